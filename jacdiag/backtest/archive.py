"""Pack many runs into one file.

A line holds what a backtest needs of one run. The file is compressed by gzip if its name ends so.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jacdiag.backtest.recorded_run import Floats, Run
from jacdiag.errors import SourceError

ENDINGS = (".runs", ".runs.gz")
_KIND = "packed run"


def is_packed(path: Path) -> bool:
    """Return whether a file is named like a pack of runs."""
    return path.name.endswith(ENDINGS)


def pack(runs: Iterable[Run]) -> str:
    """Return runs as lines of JSON, losses and norms to four digits; `unpack` reads them.

    Example:
        >>> steps, loss, norm = np.array([1.0]), np.array([2.5]), np.array([math.nan])
        >>> run = Run("a", {"lr": 0.1}, steps, loss, norm, {"gain": 3.0})
        >>> next(unpack(pack([run]))).loss
        array([2.5])
    """
    return "".join(
        json.dumps(
            {
                "type": _KIND,
                "name": run.name,
                "factors": dict(run.factors),
                "steps": _numbers(run.steps),
                "loss": _numbers(run.loss),
                "grad_norm": _numbers(run.grad_norm),
                "figures": dict(_known(run)),
                "alerts": [list(alert) for alert in run.alerts],
            },
            allow_nan=False,
        )
        + "\n"
        for run in runs
    )


def _known(run: Run) -> Iterator[tuple[str, float]]:
    for name, value in run.figures.items():
        if math.isfinite(value):
            yield name, float(f"{value:.12g}")


def _numbers(values: Floats) -> list[float | str]:
    return [float(f"{v:.4g}") if math.isfinite(v) else str(v) for v in values.tolist()]


def unpack(text: str) -> Iterator[Run]:
    """Raises ValueError or KeyError for what `pack` did not write."""
    for line in text.splitlines():
        row = json.loads(line)
        if row["type"] != _KIND:
            raise ValueError(f"a line of type {row['type']!r}")
        steps, loss, norm = (_array(row[name]) for name in ("steps", "loss", "grad_norm"))
        alerts = [(int(step), str(code)) for step, code in row["alerts"]]
        yield Run(
            str(row["name"]), dict(row["factors"]), steps, loss, norm, dict(row["figures"]), alerts
        )


def _array(values: Sequence[float | str]) -> Floats:
    return np.array([float(v) for v in values], dtype=np.float64)


def encoded(runs: Iterable[Run], path: Path) -> bytes:
    """Return the contents of a file of this name; the same runs give the same bytes."""
    data = pack(runs).encode()
    return gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data


def read_packed(path: Path) -> list[Run]:
    """Read a file of `encoded`.

    Raises:
        SourceError: it cannot be read, or is something else.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode()
        return list(unpack(text))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"cannot read the runs in '{path}'",
            got=str(error),
            hint="jacdiag backtest RUN... --pack FILE.runs.gz writes such a file",
        ) from error
