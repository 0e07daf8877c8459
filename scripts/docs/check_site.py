"""Check a site that was built: its links, what its pages load, and the links to the glossary.

mkdocs checks the links that authors write. This also checks those that the build adds.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scripts.docs.glossary import all_terms, link_terms

_LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
_TERM_LINK = re.compile(r'href="later:([^"]+)"')
_ARTICLE = re.compile(r"<article[^>]*>(.*)</article>", re.DOTALL)


@dataclass
class PageLinks(HTMLParser):
    """What a page links to.

    Attributes:
        anchors: of the page.
        links: of its `a` elements.
        loaded: files that a browser fetches to show it.
    """

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare the parser."""
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the links and the anchor of an element."""
        values = dict(attrs)
        if values.get("id"):
            self.anchors.add(str(values["id"]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        address = values.get(_LOADED.get(tag, ""))
        if address:
            self.loaded.append(address)


def problems(folder: Path) -> list[str]:
    """Return what is wrong with a site, one sentence each.

    Args:
        folder: that mkdocs wrote.
    """
    # 1. Read all pages. The page for a wrong address is shown at any address, and links from "/".
    texts = {}
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        if name != "404.html":
            texts[name] = path.read_text(encoding="utf-8")
            pages[name] = PageLinks()
            pages[name].feed(texts[name])

    # 2. Links, files that a browser fetches, and terms of the glossary.
    wrong = []
    for name, page in pages.items():
        wrong += _dead_links(folder, pages, name)
        for address in page.loaded:
            if urlsplit(address).netloc:
                wrong.append(f"{name}: {address} is on another host")
        for target in _unlinked(name, texts[name]):
            wrong.append(f"{name}: the first use of {target} is not linked")
    return wrong


def _dead_links(folder: Path, pages: dict[str, PageLinks], name: str) -> list[str]:
    """Return what is wrong with the links of a page, and with the files that it loads."""
    wrong = []
    for link in [*pages[name].links, *pages[name].loaded]:
        if urlsplit(link).scheme or link.startswith("//"):
            continue
        path, anchor = _target(link, name)
        if not (folder / path).exists():
            wrong.append(f"{name}: {link} leads nowhere")
        elif anchor and path in pages and anchor not in pages[path].anchors:
            wrong.append(f"{name}: {link} leads to a heading that is not there")
    return wrong


def _target(link: str, page: str) -> tuple[str, str]:
    """Return the file that a link of a page leads to, and the anchor in it."""
    parts = urlsplit(link)
    if not parts.path:
        return page, unquote(parts.fragment)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(parts.path)))
    return path, unquote(parts.fragment)


def _unlinked(name: str, text: str) -> list[str]:
    """Return the addresses of terms that a page uses in its text and links nowhere."""
    article = _ARTICLE.search(text)
    if article is None:
        return []
    later_uses = _TERM_LINK.findall(link_terms(article[1], all_terms(), "later:", name))
    return [target for target in later_uses if f'{target}">' not in article[1]]
