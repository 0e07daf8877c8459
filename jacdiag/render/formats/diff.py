"""Two models side by side, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from jacdiag.records.number_format import between, three
from jacdiag.render.content.columns import DIFF_COLUMNS, figure_words
from jacdiag.render.content.sentences import legible
from jacdiag.render.formats.markdown import escaped, table_row

HEAD = tuple(column.title for column in DIFF_COLUMNS)


class PairLike(Protocol):
    """What is shown of a pair (`jacdiag.comparison.Pair`)."""

    depth: int | None
    part: str
    figure: str
    a: str
    b: str
    old: tuple[float, float, float] | None
    new: tuple[float, float, float] | None
    parts: bool

    @property
    def ratio(self) -> float | None:
        """The figure of B over that of A; None if one is missing, or A's is 0."""


def rows(pairs: Sequence[PairLike]) -> list[tuple[str, ...]]:
    """Return one row of cells per pair, under `HEAD`."""
    return [_row(pair) for pair in pairs]


def _row(pair: PairLike) -> tuple[str, ...]:
    """Return the cells of one figure of both models."""
    # 1. What may be missing.
    depth, ratio = "-", ""
    if pair.depth is not None:
        depth = str(pair.depth)
    if pair.ratio is not None:
        ratio = three(pair.ratio)

    # 2. A mark where the two differ.
    mark = ""
    if pair.parts:
        mark = "◀"
    first, second = _cell(pair, pair.old, pair.a), _cell(pair, pair.new, pair.b)
    return depth, pair.part, figure_words(pair.figure), first, second, ratio, mark


def _cell(pair: PairLike, ends: tuple[float, float, float] | None, name: str) -> str:
    """Return one figure of one model.

    A norm is written as its interval, a median with the range around it if that is wide.
    """
    # 1. No figure, of a part that the model has or has not.
    if ends is None:
        if name:
            return "not measured"
        return "missing"

    # 2. A figure with its ends.
    lower, middle, upper = ends
    if pair.figure.endswith("_norm"):
        return between(lower, upper)
    is_wide = lower <= 0 or upper > lower * 1.1
    if is_wide:
        return f"{three(middle)} ({between(lower, upper)})"
    return three(middle)


def verdict(pairs: Sequence[PairLike]) -> str:
    """Return one sentence: which figure differs first, and how many do."""
    if not pairs:
        return "nothing in one model has a counterpart in the other"

    # 1. The figures that differ.
    different = [pair for pair in pairs if pair.parts]
    if not different:
        return f"none of {len(pairs)} figures differs beyond its interval"

    # 2. The first of them, without control characters in its name.
    counts = f"{len(different)} of {len(pairs)} figures differ"
    sentence: str = legible(f"{_first_difference(different[0])}; {counts}")
    return sentence


def _first_difference(pair: PairLike) -> str:
    """Return where two models differ first, with both values and the names in both."""
    # 1. Where.
    where = "outside the layers"
    if pair.depth is not None:
        where = f"in layer {pair.depth}"
    text = f"they differ first {where}: {pair.part} {figure_words(pair.figure)}"

    # 2. The values, unless neither has one.
    if pair.old or pair.new:
        text += f" {_cell(pair, pair.old, pair.a)} and {_cell(pair, pair.new, pair.b)}"
    return f"{text} ({_both_names(pair)})"


def _both_names(pair: PairLike) -> str:
    """Return what both models call a part: one name if they agree."""
    if pair.a == pair.b:
        return pair.a
    first, second = pair.a or "nothing", pair.b or "nothing"
    return f"{first} and {second}"


def markdown(pairs: Sequence[PairLike], said: str, notes: Sequence[str] = ()) -> str:
    """Return a comparison in Markdown.

    Args:
        pairs: rows of the table; no table if there are none.
        said: the verdict.
        notes: what limits the comparison.
    """
    # 1. The verdict, and what limits it.
    sections = [f"**{escaped(said)}**"]
    for note in notes:
        sections.append(f"Note: {escaped(str(legible(note)))}.")

    # 2. The table.
    if pairs:
        lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += map(table_row, rows(pairs))
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def as_json(pairs: Sequence[PairLike], notes: Sequence[str] = ()) -> str:
    """Return every pair, the first that differs, and the notes, as JSON."""
    listed = [_plain(pair) for pair in pairs]
    different = (pair for pair in listed if pair["parts"])
    data = {
        "schema_version": 1,
        "first": next(different, None),
        "pairs": listed,
        "notes": list(notes),
    }
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _plain(pair: PairLike) -> dict[str, Any]:
    """Return a pair as JSON holds it."""
    return {
        "depth": pair.depth,
        "part": pair.part,
        "figure": pair.figure,
        "a": pair.a,
        "b": pair.b,
        "old": pair.old,
        "new": pair.new,
        "ratio": pair.ratio,
        "parts": pair.parts,
    }
