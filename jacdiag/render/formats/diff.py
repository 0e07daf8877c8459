"""Two models side by side, as text, Markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from jacdiag.records.number_format import between, three
from jacdiag.render.content.sentences import legible
from jacdiag.render.formats.markdown import escaped

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
    def ratio(self) -> float | None: ...


def rows(pairs: Sequence[PairLike]) -> list[tuple[str, ...]]:
    """One row of cells per pair, under `HEAD`."""
    return [
        (
            "-" if p.depth is None else str(p.depth),
            p.part,
            p.figure,
            _cell(p, p.old, p.a),
            _cell(p, p.new, p.b),
            three(p.ratio) if p.ratio is not None else "",
            "◀" if p.parts else "",
        )
        for p in pairs
    ]


def _cell(pair: PairLike, ends: tuple[float, float, float] | None, name: str) -> str:
    """Return one figure of one model.

    A norm is written as its interval, a median with the range around it if that is wide.
    """
    if ends is None:
        return "missing" if not name else "not measured"
    lower, middle, upper = ends
    if pair.figure.endswith("_norm"):
        return between(lower, upper)
    if lower <= 0 or upper > lower * 1.1:
        return f"{three(middle)} ({between(lower, upper)})"
    return three(middle)


def verdict(pairs: Sequence[PairLike]) -> str:
    """One sentence: where they part first."""
    first = next((p for p in pairs if p.parts), None)
    count = sum(p.parts for p in pairs)
    if not pairs:
        return "nothing in one has a counterpart in the other"
    if first is None:
        return f"no figure of {len(pairs)} parts beyond its interval"
    where = "outside the layers" if first.depth is None else f"at depth {first.depth}"
    names = (
        first.a if first.a == first.b else f"{first.a or 'nothing'} beside {first.b or 'nothing'}"
    )
    figures = ""
    if first.old or first.new:
        figures = f" {_cell(first, first.old, first.a)} beside {_cell(first, first.new, first.b)}"
    what = f"they part first {where}: {first.part} {first.figure}{figures} ({names})"
    return str(legible(f"{what}; {count} of {len(pairs)} figures part"))


def markdown(pairs: Sequence[PairLike], said: str, notes: Sequence[str] = ()) -> str:
    """The verdict `said`, the notes, and a table of the pairs if there are any, in Markdown."""
    parts = [f"**{escaped(said)}**", *(f"Note: {escaped(str(legible(note)))}." for note in notes)]
    if pairs:
        lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows(pairs)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_json(pairs: Sequence[PairLike], notes: Sequence[str] = ()) -> str:
    """Every pair, the first that parts, and the notes."""
    listed: list[dict[str, Any]] = [
        {
            "depth": p.depth,
            "part": p.part,
            "figure": p.figure,
            "a": p.a,
            "b": p.b,
            "old": p.old,
            "new": p.new,
            "ratio": p.ratio,
            "parts": p.parts,
        }
        for p in pairs
    ]
    first = next((p for p in listed if p["parts"]), None)
    whole = {"schema_version": 1, "first": first, "pairs": listed, "notes": list(notes)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
