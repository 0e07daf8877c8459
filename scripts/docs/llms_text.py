"""`llms.txt` for the site: the pages that programs read first, with links to what was built.

The form is that of https://llmstxt.org: a title, a summary, and sections of links.
"""

from __future__ import annotations

import re

from scripts.docs.repository_files import ROOT, on_the_site, replace_links

LLMS_TEXT = "llms.txt"
_PAGE = re.compile(r"\.md(?=#|$)")


def llms_text() -> str:
    """Return `llms.txt` with each link to a page in Markdown replaced by one to its HTML."""
    text = (ROOT / LLMS_TEXT).read_text(encoding="utf-8")
    return replace_links(on_the_site(text, LLMS_TEXT), lambda link: _PAGE.sub(".html", link))
