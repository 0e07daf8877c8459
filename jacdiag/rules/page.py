"""The documentation page of a rule: a Markdown file in `pages/`, named by the rule's code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PAGES = Path(__file__).parent / "pages"

_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_FENCE = re.compile(r"^```.*$\n?", re.MULTILINE)


@dataclass(frozen=True)
class RulePage:
    """The sections of a page, as Markdown without their headings.

    Attributes:
        summary: one line.
        what: what the rule measures and compares.
        why: why that matters, with the equation or the paper.
        example: code that fires the rule and code that does not; may be empty.
        remedy: what to do.
    """

    summary: str
    what: str
    why: str
    example: str
    remedy: str


@cache
def read_page(code: str) -> RulePage:
    """Read the page of a rule.

    Args:
        code: such as "JD101".

    Raises:
        FileNotFoundError: no rule has this code.
        KeyError: the page lacks one of its sections.

    Example:
        >>> read_page("JD302").summary
        'Massive activations: a few values of the stream are far above all others'
    """
    text = (PAGES / f"{code}.md").read_text(encoding="utf-8")

    # 1. Cut the page at its headings, so that titles and bodies alternate.
    head, *parts = _SECTION.split(text)
    sections = dict(zip(parts[0::2], (body.strip("\n") for body in parts[1::2]), strict=True))

    # 2. The text before the first section is the title and the summary.
    _title, _, summary = head.partition("\n")
    return RulePage(
        summary=" ".join(summary.split()),
        what=sections["What it measures"],
        why=sections["Why it matters"],
        example=_FENCE.sub("", sections.get("Example", "")).strip("\n"),
        remedy=sections["What to do"],
    )
