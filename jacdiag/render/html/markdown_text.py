"""Markdown of the project itself as HTML: pages of rules, and remedies."""

from __future__ import annotations

from functools import cache

from markdown_it import MarkdownIt
from markupsafe import Markup


def to_html(text: str) -> Markup:
    """Return Markdown as HTML. HTML inside it is shown as text, links lose all but http and https.

    Args:
        text: Markdown with tables. It may quote names out of a file that somebody else made.

    Example:
        >>> to_html("**bold** and <script>")
        Markup('<p><strong>bold</strong> and &lt;script&gt;</p>\\n')
    """
    return Markup(_parser().render(text))


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
