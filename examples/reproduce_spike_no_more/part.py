"""A part of the reproduction, and how it is written down: data as JSON, tables and sentences as
Markdown, a picture.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from jacdiag.records.output_file import write_output

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

Data = dict[str, Any]
Item = TypeVar("Item")
Made = TypeVar("Made")
_STYLE = {
    "font.size": 10.0,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a part is asked to do.

    Attributes:
        runs: folder of training runs; one that is whole is not run again.
        jobs: processes at once, one thread each.
        quick: tiny sizes, to see that it works; its numbers say nothing.
    """

    runs: Path
    jobs: int = 1
    quick: bool = False


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [
            "| " + " | ".join(self.head) + " |",
            "|" + "|".join([":---"] + ["---:"] * (len(self.head) - 1)) + "|",
        ]
        return "\n".join(
            [
                f"**{self.caption}**",
                "",
                *lines,
                *("| " + " | ".join(row) + " |" for row in self.rows),
                "",
            ]
        )


@dataclass(frozen=True)
class Part:
    """One experiment.

    Attributes:
        estimate: seconds of one core, from a short trial on this machine.
        measure: does the work; plain data, the same for the same options on the same machine. None
        where `parts` do. setup, tell, tables, draw: of that data alone, so that a picture can be
        made again without the work.
        size: of the picture in inches.
        parts: what this one is put together from, by the keys of its data; then nothing is measured
            beside them.
    """

    name: str
    title: str
    estimate: Callable[[Options], float]
    measure: Callable[[Options], Data] | None
    setup: Callable[[Data], list[str]]
    tell: Callable[[Data], list[str]]
    tables: Callable[[Data], list[Table]]
    draw: Callable[[Data, FigureBase], None]
    size: tuple[float, float] = (11.0, 4.4)
    parts: Mapping[str, Part] = field(default_factory=dict)


def write(part: Part, data: Data, folder: Path) -> None:
    """Writes `<part>.json`, `.md` and `.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_output(folder / f"{part.name}.json", (json.dumps(data, indent=1) + "\n").encode())
    write_output(folder / f"{part.name}.md", markdown(part, data).encode())
    write_output(folder / f"{part.name}.png", picture(part, data))


def markdown(part: Part, data: Data) -> str:
    lines = [f"# {part.title}", "", *part.setup(data), "", "## What was found", ""]
    lines += [f"- {sentence}" for sentence in part.tell(data)]
    lines += ["", f"![{part.title}]({part.name}.png)", "", "## Numbers", ""]
    lines += [table.markdown() for table in part.tables(data)]
    return "\n".join(lines)


def picture(part: Part, data: Data) -> bytes:
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=part.size, layout="constrained", facecolor="white")
        part.draw(data, figure)
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


# -- work ------------------------------------------------------------------------------------------
def in_parallel(
    function: Callable[[Item], Made], items: Sequence[Item], jobs: int
) -> Iterator[Made]:
    """The function's results in the order of the items; processes of one thread each where `jobs`
    is over 1.
    """
    if jobs <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=single_thread) as pool:
        yield from pool.map(function, items)


def single_thread() -> None:
    """One thread and deterministic kernels: the same numbers whatever runs beside."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


# -- words -----------------------------------------------------------------------------------------
def rounded(value: Any) -> Any:
    """Six significant digits in all numbers of plain data; what is not finite becomes text, as JSON
    has no word.
    """
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def three(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{max(0, digits)}f}"


def span(values: Iterable[float]) -> str:
    """ "1.20 to 3.40" """
    known = list(values)
    low, high = three(min(known)), three(max(known))
    return low if low == high else f"{low} to {high}"


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 spread for one value."""
    mean = math.fsum(values) / len(values)
    spread = (
        math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        if len(values) > 1
        else 0.0
    )
    return mean, spread
