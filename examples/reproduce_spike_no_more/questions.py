"""The questions that reviewers asked, as one part: (a) embedding.py, (b) blocks.py, (c)
depth.py.
"""

from __future__ import annotations

from typing import Any

from . import blocks, depth, embedding
from .part import Data, Options, Part, Table

PARTS = {"a": embedding.PART, "b": blocks.PART, "c": depth.PART}


def estimate(options: Options) -> float:
    return sum(part.estimate(options) for part in PARTS.values())


def setup(data: Data) -> list[str]:
    lines = []
    for key, part in PARTS.items():
        lines += [f"**({key}) {part.title}.** " + " ".join(part.setup(data[key])), ""]
    return lines


def tell(data: Data) -> list[str]:
    return [
        f"({key}) {sentence}" for key, part in PARTS.items() for sentence in part.tell(data[key])
    ]


def tables(data: Data) -> list[Table]:
    return [
        Table(f"({key}) {table.caption}", table.head, table.rows)
        for key, part in PARTS.items()
        for table in part.tables(data[key])
    ]


def draw(data: Data, figure: Any) -> None:
    rows = figure.subfigures(3, 1)
    for row, (key, part) in zip(rows, PARTS.items(), strict=True):
        part.draw(data[key], row)


PART = Part(
    "questions",
    "Questions that the paper leaves open",
    estimate,
    None,
    setup,
    tell,
    tables,
    draw,
    (11.0, 12.0),
    PARTS,
)
