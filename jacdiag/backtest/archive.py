"""Pack many runs into one file.

A line holds what a backtest needs of one run. The file is compressed by gzip if its name ends so.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jacdiag.backtest.recorded_run import Floats, Run
from jacdiag.errors import SourceError

ENDINGS = (".runs", ".runs.gz")
_KIND = "packed run"


def is_packed(path: Path) -> bool:
    """Return whether a file is named like a pack of runs.

    Args:
        path: of the file, which need not exist.
    """
    return path.name.endswith(ENDINGS)


def pack(runs: Iterable[Run]) -> str:
    """Return runs as lines of JSON, losses and norms to four digits; `unpack` reads them.

    Example:
        >>> steps, loss, norm = np.array([1.0]), np.array([2.5]), np.array([math.nan])
        >>> run = Run("a", {"lr": 0.1}, steps, loss, norm, {"gain": 3.0})
        >>> next(unpack(pack([run]))).loss
        array([2.5])
    """
    return "".join(_line_of(run) for run in runs)


def _line_of(run: Run) -> str:
    """Return a run as one line of JSON."""
    row = {
        "type": _KIND,
        "name": run.name,
        "factors": dict(run.factors),
        "steps": _numbers(run.steps),
        "loss": _numbers(run.loss),
        "grad_norm": _numbers(run.grad_norm),
        "figures": _known_figures(run),
        "alerts": [list(alert) for alert in run.alerts],
    }
    return json.dumps(row, allow_nan=False) + "\n"


def _known_figures(run: Run) -> dict[str, float]:
    """Return the finite figures of a run, to twelve digits."""
    figures = {}
    for name, value in run.figures.items():
        if math.isfinite(value):
            figures[name] = float(f"{value:.12g}")
    return figures


def _numbers(values: Floats) -> list[float | str]:
    """Return numbers to four digits; those that are not finite as "nan", "inf" or "-inf"."""
    numbers: list[float | str] = []
    for value in values.tolist():
        # JSON has no name for a number that is not finite.
        if math.isfinite(value):
            numbers.append(float(f"{value:.4g}"))
        else:
            numbers.append(str(value))
    return numbers


def unpack(text: str) -> Iterator[Run]:
    """Yield the runs that `pack` wrote.

    Args:
        text: with a run a line.

    Raises:
        ValueError, KeyError: a line is of another kind.
    """
    for line in text.splitlines():
        row = json.loads(line)
        if row["type"] != _KIND:
            raise ValueError(f"a line of type {row['type']!r}")
        yield _run_of(row)


def _run_of(row: Mapping[str, Any]) -> Run:
    """Return the run that a line holds."""
    return Run(
        name=str(row["name"]),
        factors=dict(row["factors"]),
        steps=_array(row["steps"]),
        loss=_array(row["loss"]),
        grad_norm=_array(row["grad_norm"]),
        figures=dict(row["figures"]),
        alerts=[(int(step), str(code)) for step, code in row["alerts"]],
    )


def _array(values: Sequence[float | str]) -> Floats:
    """Return what `_numbers` wrote as an array."""
    return np.array([float(v) for v in values], dtype=np.float64)


def encoded(runs: Iterable[Run], path: Path) -> bytes:
    """Return the contents of a file of this name; the same runs give the same bytes.

    Args:
        runs: to pack.
        path: its ending says whether the file is compressed.
    """
    data = pack(runs).encode(errors="backslashreplace")
    if not path.name.endswith(".gz"):
        return data

    # Without the time of writing, which gzip puts into its header.
    return gzip.compress(data, mtime=0)


def read_packed(path: Path) -> list[Run]:
    """Read a file of `encoded`.

    Raises:
        SourceError: it cannot be read, or is something else.
    """
    try:
        data = path.read_bytes()
        if path.name.endswith(".gz"):
            data = gzip.decompress(data)
        return list(unpack(data.decode()))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"cannot read the runs in '{path}'",
            got=str(error),
            hint="jacdiag backtest RUN... --pack FILE.runs.gz writes such a file",
        ) from error
