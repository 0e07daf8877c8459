"""`jacdiag explain TOPIC`: a rule, or the columns of the tables."""

from __future__ import annotations

import re
import textwrap
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click

from jacdiag.errors import UsageError
from jacdiag_cli.rules import applies_to
from jacdiag_cli.streams import emit, room

if TYPE_CHECKING:
    from jacdiag.render.content.columns import Column
    from jacdiag.rules.page import RulePage

_WIDEST = 96
_COLUMNS = "columns"


@click.command(short_help="Explains a rule, or the columns of the tables.")
@click.argument("topic", nargs=-1, metavar="[TOPIC]")
def explain(topic: tuple[str, ...]) -> None:
    """Explains a rule: what it checks, why that matters (with the equation), an example, a remedy.

    TOPIC is the code or the name of a rule, the word "columns" for every column of the tables of
    `audit` and `diff`, or the title of one column. Without it, all topics are listed.

    \b
    Examples:
      jacdiag explain JD102
      jacdiag explain columns
      jacdiag explain branch norm
    """
    if not topic:
        emit(_all_topics() + "\n")
        return

    # A topic of several words needs no quotes.
    emit(_text_on(" ".join(topic)) + "\n")


def _text_on(topic: str) -> str:
    """Return what is said about a topic.

    Raises:
        UsageError: nothing has this name.
    """
    from jacdiag.render.content.columns import find_column

    # 1. Columns.
    word = topic.strip()
    if word.lower() == _COLUMNS:
        return _all_columns()
    column = find_column(word)
    if column is not None:
        return _column(column)

    # 2. A rule.
    return _rule(_code_of(word))


def _all_topics() -> str:
    """Return what can be explained, one topic a line."""
    from jacdiag.render.content.columns import COLUMNS, titles
    from jacdiag.rules import EVERY

    # 1. The tables.
    lines = [
        "jacdiag explain TOPIC",
        "",
        f"{_COLUMNS:<9}  every column of the tables of `audit` and `diff`",
        _wrapped(f"one column: {', '.join(titles(COLUMNS))}", " " * 11),
        "",
    ]

    # 2. The rules.
    lines += [f"{info.code:<9}  {info.name}" for info in EVERY]
    return "\n".join(lines)


def _code_of(word: str) -> str:
    """Return the code of a rule that is called by its code or its name.

    Raises:
        UsageError: no rule is called so.
    """
    from jacdiag.rules import EVERY, rule

    # 1. The name of a rule, as tables show it, or with spaces.
    name = word.lower().replace(" ", "-")
    for info in EVERY:
        if name == info.name:
            return info.code

    # 2. Its code. The error names the closest topics.
    try:
        return rule(word).code
    except UsageError as error:
        closest = error.hint
        near = _closest_topics(word)
        if near and not word.upper().startswith("JD"):
            closest = f"closest: {', '.join(near)}"
        hint = f"{closest}; `jacdiag explain` lists every topic, columns among them"
        raise UsageError(f"nothing to explain is called '{word}'", hint=hint) from error


def _closest_topics(word: str) -> list[str]:
    """Return the topics whose spelling is closest to a word, at most three.

    Args:
        word: as the user wrote it.
    """
    from jacdiag.render.content.columns import COLUMNS, DIFF_COLUMNS
    from jacdiag.rules import EVERY

    # 1. All topics, by the spelling that is compared.
    spellings = {_COLUMNS: _COLUMNS}
    for column in (*COLUMNS, *DIFF_COLUMNS):
        spellings[column.title.lower()] = column.title
    for info in EVERY:
        spellings[info.name] = info.name
        spellings[info.code.lower()] = info.code

    # 2. The closest. One word of a longer name counts too.
    asked = word.lower()
    near = get_close_matches(asked, spellings, n=3, cutoff=0.6)
    if not near:
        near = [spelling for spelling in spellings if _has_similar_word(spelling, asked)][:3]
    return [spellings[spelling] for spelling in near]


def _has_similar_word(spelling: str, word: str) -> bool:
    """Return whether one of the words of a topic is spelled nearly as a word."""
    return bool(get_close_matches(word, re.split(r"[ -]", spelling), n=1, cutoff=0.7))


# -- columns ---------------------------------------------------------------------------------------
def _all_columns() -> str:
    """Return every column of both tables."""
    from jacdiag.render.content.columns import COLUMNS, DIFF_COLUMNS

    sections = ["The table of `jacdiag audit`. A column is shown if it has something to show."]
    sections += map(_column, COLUMNS)
    sections.append("The table of `jacdiag diff`.")
    sections += map(_column, DIFF_COLUMNS)
    sections.append(
        "Thresholds are those that ship; [tool.jacdiag.thresholds] in pyproject.toml sets others."
    )
    return "\n\n".join(sections)


def _column(column: Column) -> str:
    """Return one column: its title, its meaning, and what is known of it."""
    from jacdiag.render.content.columns import facts_of

    lines = [column.title, _wrapped(column.meaning, "  ")]
    lines += [_wrapped(fact, "  ") for fact in facts_of(column)]
    return "\n".join(lines)


# -- rules -----------------------------------------------------------------------------------------
def _rule(code: str) -> str:
    """Return the page of a rule."""
    from jacdiag.rules import rule

    info = rule(code)
    parts = [
        f"{info.code} {info.name}  (at most {info.level}; {applies_to(info)})",
        _wrapped(info.summary, ""),
    ]
    for title, text in _sections(info.page):
        if text.strip():
            parts.append(f"{title}\n{_wrapped(text, '  ', title != 'Example')}")
    return "\n\n".join(parts)


def _sections(page: RulePage) -> list[tuple[str, str]]:
    named = (("What", "what"), ("Why", "why"), ("Example", "example"), ("Remedy", "remedy"))
    return [(title, str(getattr(page, field))) for title, field in named]


def _wrapped(text: str, indent: str, prose: bool = True) -> str:
    """Wrap paragraphs to the terminal.

    Code, and a paragraph with an indented line (an equation), stay as they are.
    """
    paragraphs = []
    for paragraph in textwrap.dedent(text).strip("\n").split("\n\n"):
        lines = paragraph.splitlines()
        is_equation = any(line.startswith(" ") for line in lines)
        if prose and not is_equation:
            paragraphs.append(_filled(paragraph, indent))
        else:
            paragraphs.append("\n".join(_indented(line, indent) for line in lines))
    return "\n\n".join(paragraphs)


def _filled(paragraph: str, indent: str) -> str:
    """Return a paragraph of prose in lines of the terminal's width."""
    width = min(room() or _WIDEST, _WIDEST)
    return textwrap.fill(
        paragraph,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _indented(line: str, indent: str) -> str:
    """Return a line with an indent; an empty one stays empty."""
    if not line:
        return ""
    return indent + line
