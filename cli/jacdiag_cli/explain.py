"""`jacdiag explain CODE`: what a rule looks at, why, an example, a remedy."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from jacdiag_cli.rules import applies_to
from jacdiag_cli.streams import emit, room

if TYPE_CHECKING:
    from jacdiag.rules.page import RulePage

_WIDEST = 96


@click.command(short_help="Explains a rule: what, why, an example, a remedy.")
@click.argument("code")
def explain(code: str) -> None:
    """Explains a rule: what it checks, why that matters (with the equation), an example, a remedy.

    \b
    Example:
      jacdiag explain JD102
    """
    from jacdiag.rules import rule

    info = rule(code.strip().upper())
    parts = [
        f"{info.code} {info.name}  (at most {info.level}; {applies_to(info)})",
        _wrapped(info.summary, ""),
        *(
            f"{title}\n{_wrapped(text, '  ', title != 'Example')}"
            for title, text in _sections(info.page)
            if text.strip()
        ),
    ]
    emit("\n\n".join(parts) + "\n")


def _sections(page: RulePage) -> list[tuple[str, str]]:
    named = (("What", "what"), ("Why", "why"), ("Example", "example"), ("Remedy", "remedy"))
    return [(title, str(getattr(page, field))) for title, field in named]


def _wrapped(text: str, indent: str, prose: bool = True) -> str:
    """Wrap paragraphs to the terminal.

    Code, and a paragraph with an indented line (an equation), stay as they are.
    """
    width = min(room() or _WIDEST, _WIDEST)
    paragraphs = []
    for paragraph in textwrap.dedent(text).strip("\n").split("\n\n"):
        lines = paragraph.splitlines()
        if not prose or any(line.startswith(" ") for line in lines):
            paragraphs.append("\n".join(indent + line if line else "" for line in lines))
        else:
            paragraphs.append(
                textwrap.fill(
                    paragraph,
                    width,
                    initial_indent=indent,
                    subsequent_indent=indent,
                    break_on_hyphens=False,
                    break_long_words=False,
                )
            )
    return "\n\n".join(paragraphs)
