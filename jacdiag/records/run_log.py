"""The log of a watched run: one JSON object per line, and how it is read.

Lines are only ever appended. A run that continues from a checkpoint, or a loop that goes back to
one, writes a line `resume` with the step it continues from. Later steps were done again, so
`read_run` leaves out what was logged of them before. The last line of a run that was killed may be
incomplete; it is left out too.
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

from jacdiag.errors import SourceError, UsageError
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

# Which list of a `RunLog` holds the lines of a kind.
_LIST_OF_KIND = {
    "step": "steps",
    "stats": "stats",
    "probe": "probes",
    "alert": "alerts",
    "fault": "faults",
    "note": "notes",
    "price": "prices",
    "finding": "findings",
    "ready": "ready",
}

# Kinds of lines that measure weights, which a checkpoint has again.
_MEASURED = ("stats", "probe")

# Kinds of lines that a run writes again when it goes back to an earlier step.
_STEPPED = ("step", "stats", "probe", "alert", "finding", "ready")


@dataclass(frozen=True)
class Alert(Record):
    """A live rule that fired.

    Attributes:
        step: the optimizer step of the figures.
        code: of the rule.
        level: how severe it is.
        what: the finding in one sentence.
        where: sub-layers, or the weights or gradients that were not finite, in the order in which
            they changed.
        evidence: figure -> value.
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
        """Return the alert in one line."""
        return f"step {self.step}: {self.code} {self.level}: {self.what}"


@dataclass
class RunLog:
    """A run as its log describes it.

    Attributes:
        header: the first line: model, groups (names of the sub-layers that per-step arrays follow),
            settings.
        steps: per-step figures, ascending, each step once.
        stats, probes, alerts, faults, notes: the other lines, in order.
        prices: what the measurements of the watch cost.
        findings: rules on the model's init that fired at a probe. They are no alerts.
        ready: live rules that have become ready, and at which step.
        resumes: the steps that the run continued from.
        ended: how the run ended; None if the log does not say it.
    """

    header: dict[str, Any] = field(default_factory=dict)

    # Lines of the run, in order.
    steps: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    prices: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    ready: list[dict[str, Any]] = field(default_factory=list)

    # Where it went back to an earlier step, and how it ended.
    resumes: list[int] = field(default_factory=list)
    ended: dict[str, Any] | None = None

    @property
    def groups(self) -> list[str]:
        """Names of the entries in the arrays `grad` of the steps."""
        return list(self.header.get("groups", []))

    @property
    def waits(self) -> dict[str, str]:
        """Live rules that are not ready, and what each waits for.

        Empty for a log that does not say.
        """
        # 1. What every rule waited for at the start.
        at_start: dict[str, Any] = self.header.get("waits") or {}
        waits = {str(code): str(what) for code, what in at_start.items()}

        # 2. Less the rules that have become ready.
        for row in self.ready:
            waits.pop(str(row.get("code")), None)
        return waits

    def column(self, key: str) -> list[float]:
        """Return one figure of all steps, nan where it was not measured.

        Args:
            key: of the figure in a line `step`.
        """
        return [number(row.get(key)) for row in self.steps]

    def add(self, line: Mapping[str, Any]) -> None:
        """Add one line of the log. A `resume` drops the lines of later steps.

        Args:
            line: decoded. Lines of an unknown type are ignored.
        """
        row = dict(line)
        kind = line.get("type")
        if kind == "run":
            self._add_header(row)
        elif kind == "resume":
            self._resume_from(int(row["step"]))
        elif kind == "end":
            self.ended = row
        elif kind in KINDS:
            self._add_row(kind, row)

    def _add_header(self, row: dict[str, Any]) -> None:
        """Add the first line of a process. The first header of the run stays."""
        if not self.header:
            self.header = row

        # A later process may have other groups, and its rules wait again.
        waits = row.get("waits", {})
        self.header = {**self.header, "groups": row.get("groups", []), "waits": waits}
        self.ready = [line for line in self.ready if line.get("code") not in waits]
        self.ended = None

    def _resume_from(self, step: int) -> None:
        """Add that the run continues from a step. Later steps are done again."""
        self._forget_after(step)
        self.resumes.append(step)
        self.ended = None

    def _add_row(self, kind: str, row: dict[str, Any]) -> None:
        """Add a line to the list of its kind."""
        rows: list[dict[str, Any]] = getattr(self, _LIST_OF_KIND[kind])

        # A run that continues measures the weights of its checkpoint again.
        if kind in _MEASURED and rows:
            is_same_step = rows[-1].get("step") == row.get("step")
            if is_same_step:
                rows.pop()
        rows.append(row)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of later steps."""
        for kind in _STEPPED:
            rows: list[dict[str, Any]] = getattr(self, _LIST_OF_KIND[kind])
            earlier = [row for row in rows if row.get("step", 0) <= step]
            # In place, since the record holds the list itself.
            rows[:] = earlier


# Figures of a step that plots and screens show.
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
    """Return a line with only what plots and screens show.

    Gradients of sub-layers and reports of later probes are left out. Each decoded line has its own
    strings as keys; here all lines share them. 100,000 steps take 90 MB of memory, not 600.

    Args:
        row: a decoded line.
        run: the lines before it.
    """
    kind = row.get("type")
    if kind == "step":
        return _light_step(row)

    # The report of the first probe stays: its findings are about the init.
    is_later_probe = kind == "probe" and run.probes
    if not is_later_probe:
        return row

    light = dict(row)
    light.pop("report", None)
    return light


def _light_step(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line `step` with only what plots and screens show."""
    light: dict[str, Any] = {"type": "step"}
    light.update((key, row.get(key)) for key in _SHOWN)

    # The name of a sub-layer is one string, shared by all lines.
    update = row.get("update")
    if update:
        where = sys.intern(str(update.get("where")))
        light["update"] = {"where": where, "ratio": update.get("ratio")}
    return light


def read_run(path: str | bytes | os.PathLike[str], *, light: bool = False) -> RunLog:
    """Read a run log, or the one in a folder.

    Args:
        path: of the log or of its folder.
        light: whether to leave out what no plot shows, see `lightened`.

    Raises:
        SourceError: there is none, or it was written by a newer version.
        UsageError: it is no path.

    Example:
        >>> read_run("runs/a/run.jsonl").column("loss")              # doctest: +SKIP
        [4.1, 4.0]
    """
    if not isinstance(path, str | bytes | os.PathLike):
        got = f"type {type(path).__name__}"
        raise UsageError("a run is read from a path", got=got, hint="text or a pathlib.Path")
    file = Path(os.fsdecode(path))
    if file.is_dir():
        file = file / RUN_FILE

    # 1. Add its lines one by one; a log may be larger than memory.
    run = RunLog()
    try:
        with file.open("rb") as lines:
            for row in parsed(lines):
                if light:
                    row = lightened(row, run)
                run.add(row)
    except OSError as error:
        raise SourceError(
            f"cannot read the run log '{file}'", got=error.strerror, hint=WHERE_LOGS_ARE
        ) from error

    # 2. A log has a header.
    if not run.header:
        raise SourceError(
            f"'{file}' is no run log",
            got="no line of type 'run' in it",
            hint="jacdiag.watch(..., log_dir=...) writes one",
        )
    return run


def parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the decoded lines of a log, without incomplete and foreign ones.

    Args:
        lines: of the file, each with its end.

    Raises:
        SourceError: a line of a newer schema.
    """
    for line in lines:
        if not line.endswith(b"\n"):
            return  # the process ended while it wrote
        row = _decode_line(line)
        if row is not None:
            _check_version(row.get("v"))
            yield row


def _decode_line(line: bytes) -> dict[str, Any] | None:
    """Return a line of a log; None if it is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None

    # Another JSON value is no line of a log.
    if not isinstance(row, dict):
        return None
    return row


def _check_version(version: object) -> None:
    """Raise if a line is of a newer schema than this version reads."""
    is_newer = isinstance(version, int) and version > RUN_SCHEMA_VERSION
    if not is_newer:
        return
    raise SourceError(
        "the run log was written by a newer jacdiag",
        got=f"schema {version}",
        hint=f"this one reads {RUN_SCHEMA_VERSION}; update it",
    )


def to_line(kind: str, row: Mapping[str, Any]) -> bytes:
    """Return one line of a log: strict JSON (no bare NaN), schema version and type first.

    Args:
        kind: one of `KINDS`.
        row: its values.
    """
    data: dict[str, Any] = {"v": RUN_SCHEMA_VERSION, "type": kind}
    for key, value in row.items():
        # Most values are floats, or plain JSON already.
        if type(value) is float:
            data[key] = _plain_float(value)
        elif type(value) in _PLAIN_TYPES:
            data[key] = value
        else:
            data[key] = plain(value)
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace") + b"\n"


def plain(value: Any) -> Any:
    """Return a value as plain JSON: floats with eight digits, non-finite ones as strings.

    Args:
        value: plain values in lists, tuples and mappings, or a record.

    Raises:
        TypeError: it is of another type.
    """
    # 1. The usual types, by one look-up.
    convert = _CONVERTERS.get(type(value))
    if convert is not None:
        return convert(value)

    # 2. A subclass, such as an enum of strings.
    for kind, convert in _CONVERTERS.items():
        if isinstance(value, kind):
            return convert(value)

    # 3. A record, or a mapping that is no dictionary.
    if isinstance(value, Record):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return _plain_dict(value)
    raise TypeError(f"a run log cannot hold a {type(value).__name__}")


def _unchanged(value: Any) -> Any:
    """Return a value that is plain JSON already."""
    return value


def _plain_float(value: float) -> float | str:
    """Return eight digits of a number; "nan", "inf" or "-inf" for one that is not finite."""
    if math.isfinite(value):
        return float(f"{value:.8g}")
    return str(float(value))


def _plain_dict(value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a mapping with plain values."""
    return {str(key): plain(item) for key, item in value.items()}


def _plain_list(value: Iterable[Any]) -> list[Any]:
    """Return a list with plain values."""
    items = list(value)
    if set(map(type, items)) == {float}:
        return list(map(_plain_float, items))
    return [plain(item) for item in items]


_PLAIN_TYPES = frozenset({int, str, bool, type(None)})
_CONVERTERS: dict[type, Callable[[Any], Any]] = {
    float: _plain_float,
    int: _unchanged,
    str: _unchanged,
    bool: _unchanged,
    type(None): _unchanged,
    list: _plain_list,
    tuple: _plain_list,
    dict: _plain_dict,
}


def number(value: Any) -> float:
    """Return a figure of a decoded line: "inf" and "nan" as numbers, null as nan.

    Args:
        value: as it stands in the line.
    """
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
