"""Links from the first use of a term on a page to the glossary, and of a rule's code to its page.

The links are set in the HTML of a page when the site is built. So an author writes plain text, and
a term that joins the glossary is linked everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from jacdiag.rules import EVERY
from scripts.docs.repository_files import ROOT

GLOSSARY = "docs/glossary.md"

_ENTRY = re.compile(r"^## (.+)\n+(?:\*Also: (.+)\.\*\n)?", re.MULTILINE)
_GAP = r"[\s-]+"  # between the parts of a term
_TAG = re.compile(r"""(<!--.*?-->|<(?:[^>"']|"[^"]*"|'[^']*')*>)""", re.DOTALL)
_NAME = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
# A term inside these elements is no text of the page, or has a link already.
_SKIPPED = {
    "a", "code", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "script", "style", "svg", "button",
    "summary", "label", "kbd", "title",
}  # fmt: skip
_VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


@dataclass(frozen=True)
class Term:
    """What is linked at its first use.

    Attributes:
        words: the ways in which it is written.
        target: the page on the site, with its anchor.
    """

    words: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class Matcher:
    """One regular expression for all words of some terms.

    Attributes:
        pattern: has a group for each word. At a place the longest word wins: in "branch norm" it is
            not "branch".
        terms: the term of each group.
    """

    pattern: re.Pattern[str]
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, terms: list[Term]) -> Matcher:
        """Return the matcher of some terms."""
        words = [(word, term) for term in terms for word in term.words]
        words.sort(key=lambda pair: len(pair[0]), reverse=True)
        groups = []
        for word, _ in words:
            parts = [re.escape(part) for part in re.split(_GAP, word)]
            groups.append("(" + _GAP.join(parts) + ")")
        pattern = rf"(?<![\w-])(?:{'|'.join(groups)})(?:s|es)?(?![\w-])"
        return cls(re.compile(pattern, re.IGNORECASE), tuple(term for _, term in words))


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it.

    >>> anchor("End-to-end gain"), anchor("Webhooks: `alerts_to`")
    ('end-to-end-gain', 'webhooks-alerts_to')
    """
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def terms_of(glossary: str) -> list[Term]:
    """Return the terms of a glossary: one for each heading, with the words after "Also:".

    >>> terms_of("## Branch norm\\n\\n*Also: branch gain.*\\n\\nThe spectral norm ...")
    [Term(words=('Branch norm', 'branch gain'), target='glossary.html#branch-norm')]
    """
    terms = []
    for match in _ENTRY.finditer(glossary):
        others = match[2].split(", ") if match[2] else []
        terms.append(Term((match[1], *others), f"glossary.html#{anchor(match[1])}"))
    return terms


@cache
def all_terms() -> list[Term]:
    """Return the terms of the project's glossary, and the codes of the rules."""
    terms = terms_of((ROOT / GLOSSARY).read_text(encoding="utf-8"))
    return terms + [Term((rule.code,), f"rules/{rule.code}.html") for rule in EVERY]


def link_terms(html: str, terms: list[Term], base: str = "", here: str = "") -> str:
    """Return the HTML of a page with the first use of each term linked.

    Args:
        html: the content of the page.
        terms: that may be linked.
        base: from the page to the root of the site: "" or "../".
        here: path of the page. It is not linked to itself.

    >>> link_terms("<p>A probe, and a probe.</p>", terms_of("## Probe\\n"))
    '<p>A <a class="term" href="glossary.html#probe">probe</a>, and a probe.</p>'
    """
    on_other_pages = [term for term in terms if term.target.partition("#")[0] != here]
    if not on_other_pages:
        return html
    matcher = Matcher.of(on_other_pages)
    linked: set[Term] = set()
    pieces = []
    skipping: list[str] = []
    for piece in _TAG.split(html):
        if piece.startswith("<"):
            _follow(piece, skipping)
        elif not skipping and piece.strip():
            piece = _link_first_uses(piece, matcher, linked, base)
        pieces.append(piece)
    return "".join(pieces)


def _follow(tag: str, skipping: list[str]) -> None:
    """Note the begin or end of an element in which nothing is linked.

    Args:
        tag: one tag or comment.
        skipping: names of the open elements, from the first skipped one on. Changed in place.
    """
    match = _NAME.match(tag)
    if match is None:
        return
    name = match[2].lower()
    if match[1]:
        if skipping and skipping[-1] == name:
            skipping.pop()
        return
    is_open = name not in _VOID and not tag.endswith("/>")
    if is_open and (skipping or name in _SKIPPED):
        skipping.append(name)


def _link_first_uses(text: str, matcher: Matcher, linked: set[Term], base: str) -> str:
    """Return a piece of text with links. Terms that get one are added to `linked`."""

    def replace(match: re.Match[str]) -> str:
        term = matcher.terms[(match.lastindex or 1) - 1]
        if term in linked:
            return match[0]
        linked.add(term)
        return f'<a class="term" href="{base}{term.target}">{match[0]}</a>'

    return matcher.pattern.sub(replace, text)
