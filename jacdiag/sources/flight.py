"""Read what a flight recorder left: steps before an alert, batches, and the log around it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from jacdiag.errors import SourceError, one_line
from jacdiag.records.run_log import RUN_FILE, RunLog, parsed, read_run
from jacdiag.sources.formats.json_files import read_json

_ABOUT, _STEPS, _LATEST = "about.json", "steps.jsonl", "batch.pt"
_RUNNING = re.compile(r"running-batch-(\d+)-at-(\d+)\.pt")
_EARLIER = re.compile(r"batch-(\d+)-before-at-(\d+)\.pt")


@dataclass(frozen=True)
class FlightBatch:
    """A batch of a flight, not yet read.

    Attributes:
        file: where it is.
        step: the optimizer step that it belongs to; None if the flight does not say it.
        running: its step had not ended when the loop was left.
    """

    file: Path
    step: int | None
    running: bool = False

    def load(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the keyword arguments that the model was called with.

        Raises:
            SourceError: the file cannot be read.
        """
        # 1. The file.
        try:
            arguments = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SourceError(f"cannot read '{self.file}'", got=one_line(error)) from error

        # 2. Positional arguments are stored under their numbers: "0", "1", ...
        by_place: dict[int, Any] = {}
        by_name: dict[str, Any] = {}
        for key, value in arguments.items():
            if key.isdigit():
                by_place[int(key)] = value
            else:
                by_name[key] = value

        # the tenth comes after the second
        return tuple(by_place[place] for place in sorted(by_place)), by_name


@dataclass(frozen=True)
class Flight:
    """A folder `flight-STEP`.

    Attributes:
        folder: where it is.
        step: the step that it is about.
        why: why it was written.
        batches: the latest first, those of a step that was running before the others.
        rows: the steps that the run logged, in order: those of its log up to the flight, else the
            flight's own.
        header: the first line of the run's log.
        probe: the last probe of the run up to the step, as its log has it; None if there is none.
        ended: how the loop was left, if a step was running: "crash", "interrupt" or "signal"; else
            empty.
        complete: the rows begin with the first step of the run.
    """

    folder: Path
    step: int | None
    why: str
    batches: list[FlightBatch] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    header: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] | None = None
    ended: str = ""

    @property
    def probed(self) -> FlightBatch | None:
        """The batch that an audit probes with: the latest of a step that has ended.

        A batch that crashed may not run.
        """
        for batch in self.batches:
            if not batch.running:
                return batch

        # After a crash in the first step there is no other one.
        return next(iter(self.batches), None)

    @property
    def complete(self) -> bool:
        """Whether the rows begin with the first step of the run."""
        return bool(self.rows) and self.rows[0]["step"] <= 1


def read_flight(folder: str | os.PathLike[str]) -> Flight:
    """Read what a flight recorder left. Batches are listed and not loaded.

    Args:
        folder: `flight-STEP` of a run. The log of the run, in the folder above, is read if it is
            there.

    Returns:
        The steps before the flight, its batches, and what the log says.

    Raises:
        SourceError: it is no folder of a flight recorder.

    Example:
        >>> read_flight("runs/a/flight-150").step                       # doctest: +SKIP
        150
    """
    # 1. What the flight itself holds.
    path = Path(folder)
    about = _about(path)
    step = _integer(about.get("step"))
    rows = _rows(path / _STEPS)
    batches = _batches(path, about)

    # 2. What the log of the run adds.
    header: dict[str, Any] = {}
    probe = None
    log = _log_around(path)
    if log is not None:
        header = log.header
        rows = _with_steps_of_log(rows, log, step)
        probes = _up_to(step, log.probes)
        probe = probes[-1] if probes else None

    why = str(about.get("why", ""))
    ended = str(about.get("ended", ""))
    return Flight(path, step, why, batches, rows, header, probe, ended)


def _integer(value: Any) -> int | None:
    """Return a value that is an integer; None for any other one."""
    if isinstance(value, int):
        return value
    # The file was written by another process, perhaps of another version.
    return None


def _with_steps_of_log(
    own: list[dict[str, Any]], log: RunLog, step: int | None
) -> list[dict[str, Any]]:
    """Return the steps of a flight after the earlier steps of the log.

    Args:
        own: the steps that the flight holds.
        log: of the run.
        step: that the flight is about, if it is known.
    """
    if not own:
        return _up_to(step, log.steps)

    # Of the flight's own steps, the log is not read: a resumed run may have done them again.
    first = own[0]["step"]
    earlier = [row for row in log.steps if row["step"] < first]
    return [*earlier, *own]


def _up_to(step: int | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows up to a step, or all of them if it is not known."""
    if step is None:
        return list(rows)

    # A run that goes on has logged later ones.
    return [row for row in rows if row["step"] <= step]


def latest_batch(folder: str | os.PathLike[str]) -> dict[str, Any] | tuple[Any, ...]:
    """Return the latest batch of a flight.

    Args:
        folder: `flight-STEP` of a run.

    Returns:
        Keyword arguments of the model's forward, or a tuple of its arguments.

    Raises:
        SourceError: it is no folder of a flight recorder, or it holds no batch.
    """
    flight = read_flight(folder)
    if flight.probed is None:
        hint = "jacdiag.watch(..., keep_batches=10) keeps those of the last 10 forwards"
        raise SourceError(f"'{folder}' holds no batch", hint=hint)
    args, kwargs = flight.probed.load()
    return args or kwargs


def _about(path: Path) -> dict[str, Any]:
    """Return what a flight recorder wrote about its flight.

    Raises:
        SourceError: there is no such file, or it cannot be read.
    """
    try:
        about = read_json(path / _ABOUT)
    except SourceError as error:
        hint = "it is flight-STEP in the log_dir"
        raise SourceError(
            f"'{path}' is no folder of a flight recorder", got=error.got or error.what, hint=hint
        ) from error
    if not isinstance(about, dict):
        return {}
    return about


def _batches(path: Path, about: Mapping[str, Any]) -> list[FlightBatch]:
    """Return the batches of a flight, the latest first."""
    # After a crash in the first step, there is no batch of a step that has ended.
    step = about.get("batch_step")
    is_running_alone = step is not None and step == about.get("running_step")
    aged = [] if is_running_alone else _ended_batches(path, _integer(step))
    aged += _running_batches(path)
    aged.sort(key=lambda entry: entry.age)
    return [entry.batch for entry in aged]


class _AgedBatch(NamedTuple):
    """A batch, and how many batches before the latest one of a step that has ended it came."""

    age: int
    batch: FlightBatch


def _running_batches(path: Path) -> list[_AgedBatch]:
    """Return the batches of the step that had not ended. Their age is below 0."""
    batches = []
    for file in path.glob("running-batch-*.pt"):
        # batch-AGE-at-STEP
        match = _RUNNING.fullmatch(file.name)
        if match is not None:
            batch = FlightBatch(file, int(match[2]), running=True)
            batches.append(_AgedBatch(-int(match[1]), batch))
    return batches


def _ended_batches(path: Path, latest_step: int | None) -> list[_AgedBatch]:
    """Return the latest batch of a step that has ended, and the ones before it.

    Args:
        path: the folder of the flight.
        latest_step: of the latest batch, if it is known.
    """
    # 1. The latest one.
    batches = []
    if (path / _LATEST).is_file():
        batches.append(_AgedBatch(0, FlightBatch(path / _LATEST, latest_step)))

    # 2. Those before it.
    for file in path.glob("batch-*.pt"):
        match = _EARLIER.fullmatch(file.name)
        if match is not None:
            batches.append(_AgedBatch(int(match[1]), FlightBatch(file, int(match[2]))))
    return batches


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the steps in a file; none if it cannot be read."""
    try:
        with file.open("rb") as lines:
            rows = list(parsed(lines))
    except OSError:
        return []

    # A line without a step is of another version.
    return [row for row in rows if isinstance(row.get("step"), int)]


def _log_around(path: Path) -> RunLog | None:
    """Return the log of the run in the folder above; None if there is none that can be read."""
    folder = path.resolve().parent
    if not (folder / RUN_FILE).is_file():
        return None
    try:
        return read_run(folder)
    # A flight can be read without it.
    except SourceError:
        return None
