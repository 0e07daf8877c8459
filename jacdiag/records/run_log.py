"""The log of a watched run: one JSON object a line, and what a reader makes of it.

Lines are only ever appended. A run that goes on from a checkpoint, or a loop that goes back to one,
writes a line `resume` with the step it goes on from. Whatever was logged beyond that step was done
again, and `read_run` leaves it out. The last line of a run that was killed may be torn; it is left
out too.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jacdiag.errors import SourceError
from jacdiag.records.base import Record
from jacdiag.records.report import Level

RUN_SCHEMA_VERSION = 1
RUN_FILE = "run.jsonl"
KINDS = (
    "run",
    "resume",
    "price",
    "step",
    "stats",
    "probe",
    "alert",
    "fault",
    "note",
    "end",
    "finding",
    "ready",
)
WHERE_LOGS_ARE = "a run is the log_dir that jacdiag.watch was given, or the run.jsonl in it"
_MEASURED = ("stats", "probe")
_STEPPED = ("step", "stats", "probe", "alert", "finding", "ready")


@dataclass(frozen=True)
class Alert(Record):
    """A live rule that spoke.

    Attributes:
        step: the optimiser step at which the figures were seen.
        where: sub-layers, or the weights or gradients that were not finite; what moved first stands
            first.
        suppressed: alerts of the same rule since the last one that was shown.
    """

    step: int
    code: str
    level: Level
    what: str
    where: list[str] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    suppressed: int = 0

    def __str__(self) -> str:
        return f"step {self.step}: {self.code} {self.level}: {self.what}"


@dataclass
class RunLog:
    """A run as its log tells it.

    Attributes:
        header: the first line: model, groups (names of the sub-layers that per-step arrays follow),
            settings.
        steps: per-step figures, ascending and without doubles.
        stats, probes, alerts, faults, notes: the other lines, in order.
        findings: what the probes said of the model's init: a report, no alerts.
        ready: live rules that have become ready, and at which step.
        ended: how the run ended, if it said so.
    """

    header: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    prices: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    ready: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)
    ended: dict[str, Any] | None = None

    @property
    def groups(self) -> list[str]:
        """Names that the arrays `grad` of the steps follow."""
        return list(self.header.get("groups", []))

    @property
    def waits(self) -> dict[str, str]:
        """Live rules that are not ready, and what each waits for.

        Empty for a log that does not say.
        """
        ready = {str(row.get("code")) for row in self.ready}
        waits = self.header.get("waits") or {}
        return {str(code): str(what) for code, what in waits.items() if code not in ready}

    def column(self, key: str) -> list[float]:
        """One figure of all steps, nan where it was not measured."""
        return [number(row.get(key)) for row in self.steps]

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes one line; a `resume` drops what lies beyond its step."""
        row, kind = dict(line), line.get("type")
        if kind == "run":
            self.header = self.header or row
            latest = {"groups": row.get("groups", []), "waits": row.get("waits", {})}
            self.header = {**self.header, **latest}
            self.ready = [row for row in self.ready if row.get("code") not in self.header["waits"]]
            self.ended = None
        elif kind == "resume":
            self._forget_after(int(row["step"]))
            self.resumes.append(int(row["step"]))
            self.ended = None
        elif kind == "end":
            self.ended = row
        elif kind in KINDS:
            places = {
                "step": self.steps,
                "stats": self.stats,
                "probe": self.probes,
                "alert": self.alerts,
                "fault": self.faults,
                "note": self.notes,
                "price": self.prices,
                "finding": self.findings,
                "ready": self.ready,
            }
            rows = places[kind]
            if kind in _MEASURED and rows and rows[-1].get("step") == row.get("step"):
                rows.pop()  # a run that goes on measures the weights of its checkpoint again
            rows.append(row)

    def _forget_after(self, step: int) -> None:
        for rows in (self.steps, self.stats, self.probes, self.alerts, self.findings, self.ready):
            rows[:] = [row for row in rows if row.get("step", 0) <= step]


_SHOWN = (
    "step",
    "loss",
    "lr",
    "tokens",
    "step_seconds",
    "grad_norm",
    "grad_norm_post",
    "clipped",
    "skipped",
)


def lightened(row: dict[str, Any], run: RunLog) -> dict[str, Any]:
    """Return a line with what pictures and screens show.

    Gradients of sub-layers and reports of later probes are left out.

    A decoded line has strings of its own for its keys; here all lines share them. 100,000 steps
    take 90 MB of memory, not 600.
    """
    kind = row.get("type")
    if kind == "step":
        light: dict[str, Any] = {key: row.get(key) for key in _SHOWN}
        update = row.get("update")
        if update:
            light["update"] = {
                "where": sys.intern(str(update.get("where"))),
                "ratio": update.get("ratio"),
            }
        return {"type": "step", **light}
    if kind == "probe" and run.probes:
        return {key: value for key, value in row.items() if key != "report"}
    return row


def read_run(path: str | os.PathLike[str], *, light: bool = False) -> RunLog:
    """Reads a run log, or the one in a folder.

    Args:
        path: of the log or of its folder.
        light: leave out what no picture shows, see `lightened`.

    Raises:
        SourceError: there is none, or it was written by a newer version.

    Example:
        >>> read_run("runs/a/run.jsonl").column("loss")              # doctest: +SKIP
        [4.1, 4.0]
    """
    file = Path(path)
    file = file / RUN_FILE if file.is_dir() else file
    run = RunLog()
    try:
        with file.open("rb") as lines:
            for row in parsed(lines):
                run.add(lightened(row, run) if light else row)
    except OSError as error:
        raise SourceError(
            f"cannot read the run log '{file}'", got=error.strerror, hint=WHERE_LOGS_ARE
        ) from error
    if not run.header:
        raise SourceError(
            f"'{file}' is no run log",
            got="no line of type 'run' in it",
            hint="jacdiag.watch(..., log_dir=...) writes one",
        )
    return run


def parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a log; a torn or foreign line is left out.

    Raises:
        SourceError: a line of a newer schema.
    """
    for line in lines:
        if not line.endswith(b"\n"):
            return
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict):
            continue
        version = row.get("v")
        if isinstance(version, int) and version > RUN_SCHEMA_VERSION:
            raise SourceError(
                "the run log was written by a newer jacdiag",
                got=f"schema {version}",
                hint=f"this one reads {RUN_SCHEMA_VERSION}; update it",
            )
        yield row


def to_line(kind: str, row: Mapping[str, Any]) -> bytes:
    """One line of a log: strict JSON (no bare NaN), its type and schema version first."""
    data = {
        "v": RUN_SCHEMA_VERSION,
        "type": kind,
        **{key: plain(value) for key, value in row.items()},
    }
    return (
        json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
        + b"\n"
    )


def plain(value: Any) -> Any:
    """A value as JSON takes it: floats to eight digits, non-finite ones as strings."""
    convert = _CONVERTERS.get(type(value))
    if convert is not None:
        return convert(value)
    for kind, convert in _CONVERTERS.items():  # a subclass, such as an enum of strings
        if isinstance(value, kind):
            return convert(value)
    if isinstance(value, Record):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return _plain_dict(value)
    raise TypeError(f"a run log cannot hold a {type(value).__name__}")


def _as_it_is(value: Any) -> Any:
    return value


def _plain_float(value: float) -> float | str:
    if math.isfinite(value):
        return float(f"{value:.8g}")
    if math.isnan(value):
        return "nan"
    return "inf" if value > 0 else "-inf"


def _plain_dict(value: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): plain(item) for key, item in value.items()}


def _plain_list(value: Iterable[Any]) -> list[Any]:
    return [plain(item) for item in value]


_CONVERTERS: dict[type, Callable[[Any], Any]] = {
    float: _plain_float,
    int: _as_it_is,
    str: _as_it_is,
    bool: _as_it_is,
    type(None): _as_it_is,
    list: _plain_list,
    tuple: _plain_list,
    dict: _plain_dict,
}


def number(value: Any) -> float:
    """A figure read back: "inf" and "nan" are numbers again, null is nan."""
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
