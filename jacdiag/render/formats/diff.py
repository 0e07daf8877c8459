"""Two models side by side, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from jacdiag.records.number_format import between, three
from jacdiag.render.content.sentences import legible
from jacdiag.render.formats.markdown import escaped, table_row

HEAD = ("depth", "part", "figure", "A", "B", "B / A", "")


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
    depth, ratio, mark = "-", "", ""
    if pair.depth is not None:
        depth = str(pair.depth)
    if pair.ratio is not None:
        ratio = three(pair.ratio)
    if pair.parts:
        mark = "◀"
    first, second = _cell(pair, pair.old, pair.a), _cell(pair, pair.new, pair.b)
    return depth, pair.part, pair.figure, first, second, ratio, mark


def _cell(pair: PairLike, ends: tuple[float, float, float] | None, name: str) -> str:
    """Return one figure of one model.

    A norm is written as its interval, a median with the range around it if that is wide.
    """
    if ends is None:
        return "not measured" if name else "missing"
    lower, middle, upper = ends
    if pair.figure.endswith("_norm"):
        return between(lower, upper)
    if lower <= 0 or upper > lower * 1.1:
        return f"{three(middle)} ({between(lower, upper)})"
    return three(middle)


def verdict(pairs: Sequence[PairLike]) -> str:
    """Return one sentence: which figure differs first, and how many do."""
    if not pairs:
        return "nothing in one has a counterpart in the other"
    different = [pair for pair in pairs if pair.parts]
    if not different:
        return f"no figure of {len(pairs)} differs beyond its interval"
    counts = f"{len(different)} of {len(pairs)} figures differ"
    return str(legible(f"{_first_difference(different[0])}; {counts}"))


def _first_difference(pair: PairLike) -> str:
    """Return where two models differ first, with both values and the names in both."""
    where = "outside the layers"
    if pair.depth is not None:
        where = f"at depth {pair.depth}"
    text = f"they differ first {where}: {pair.part} {pair.figure}"
    if pair.old or pair.new:
        text += f" {_cell(pair, pair.old, pair.a)} and {_cell(pair, pair.new, pair.b)}"
    names = pair.a
    if pair.a != pair.b:
        names = f"{pair.a or 'nothing'} and {pair.b or 'nothing'}"
    return f"{text} ({names})"


def markdown(pairs: Sequence[PairLike], said: str, notes: Sequence[str] = ()) -> str:
    """Return a comparison in Markdown.

    Args:
        pairs: rows of the table; no table if there are none.
        said: the verdict.
        notes: what limits the comparison.
    """
    sections = [f"**{escaped(said)}**"]
    sections += [f"Note: {escaped(str(legible(note)))}." for note in notes]
    if pairs:
        lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += [table_row(row) for row in rows(pairs)]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def as_json(pairs: Sequence[PairLike], notes: Sequence[str] = ()) -> str:
    """Return every pair, the first that differs, and the notes, as JSON."""
    listed = [_plain(pair) for pair in pairs]
    first = next((pair for pair in listed if pair["parts"]), None)
    data = {"schema_version": 1, "first": first, "pairs": listed, "notes": list(notes)}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _plain(pair: PairLike) -> dict[str, Any]:
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
