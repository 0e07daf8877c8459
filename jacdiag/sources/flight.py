"""Read what a flight recorder left: steps before an alert, batches, and the log around it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, one_line
from jacdiag.records.run_log import RUN_FILE, RunLog, parsed, read_run

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
        try:
            arguments = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise SourceError(f"cannot read '{self.file}'", got=one_line(error)) from error
        places = sorted((name for name in arguments if name.isdigit()), key=int)
        named = {name: value for name, value in arguments.items() if not name.isdigit()}
        return tuple(arguments[place] for place in places), named


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
        return self.batches[0] if self.batches else None

    @property
    def complete(self) -> bool:
        """Whether the rows begin with the first step of the run."""
        return bool(self.rows) and self.rows[0]["step"] <= 1


def read_flight(folder: str | os.PathLike[str]) -> Flight:
    """Read what a flight recorder left. Batches are listed and not loaded.

    Args:
        folder: `flight-STEP` of a run. The log of the run, in the folder above, is read if it is
            there.

    Raises:
        SourceError: it is no folder of a flight recorder.

    Example:
        >>> read_flight("runs/a/flight-150").step                       # doctest: +SKIP
        150
    """
    # 1. What the flight itself holds.
    path = Path(folder)
    about = _about(path)
    step = about.get("step")
    if not isinstance(step, int):
        step = None
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


def _with_steps_of_log(
    own: list[dict[str, Any]], log: RunLog, step: int | None
) -> list[dict[str, Any]]:
    """Return the steps of a flight after the earlier steps of the log.

    Of the flight's own steps, the log is not read: a resumed run may have done them again.

    Args:
        own: the steps that the flight holds.
        log: of the run.
        step: that the flight is about, if it is known.
    """
    if not own:
        return _up_to(step, log.steps)
    first = own[0]["step"]
    earlier = [row for row in log.steps if row["step"] < first]
    return [*earlier, *own]


def _up_to(step: int | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows up to a step, or all of them if it is not known."""
    if step is None:
        return list(rows)
    return [row for row in rows if row["step"] <= step]


def latest_batch(folder: str | os.PathLike[str]) -> dict[str, Any] | tuple[Any, ...]:
    """Return the latest batch of a flight.

    It holds keyword arguments of the model's forward, or a tuple of its arguments.

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
    """Return what a flight recorder wrote about its flight."""
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "it is flight-STEP in the log_dir"
        raise SourceError(
            f"'{path}' is no folder of a flight recorder", got=one_line(error), hint=hint
        ) from error
    return about if isinstance(about, dict) else {}


def _batches(path: Path, about: Mapping[str, Any]) -> list[FlightBatch]:
    """Return the batches of a flight, the latest first."""
    # How many batches before the latest one -> the batch. Those of a running step came after it.
    aged: list[tuple[int, FlightBatch]] = []

    # 1. The latest batch of a step that has ended, and the ones before it. After a crash in the
    # first step there is none.
    step = about.get("batch_step")
    is_running_alone = step is not None and step == about.get("running_step")
    if not is_running_alone:
        if (path / _LATEST).is_file():
            step_of_latest = step if isinstance(step, int) else None
            aged.append((0, FlightBatch(path / _LATEST, step_of_latest)))
        for file in path.glob("batch-*.pt"):
            match = _EARLIER.fullmatch(file.name)
            if match is not None:
                aged.append((int(match[1]), FlightBatch(file, int(match[2]))))

    # 2. Batches of the step that had not ended.
    for file in path.glob("running-batch-*.pt"):
        match = _RUNNING.fullmatch(file.name)
        if match is not None:
            aged.append((-int(match[1]), FlightBatch(file, int(match[2]), running=True)))

    aged.sort(key=lambda pair: pair[0])
    return [batch for _, batch in aged]


def _rows(file: Path) -> list[dict[str, Any]]:
    """Return the steps in a file; none if it cannot be read."""
    try:
        with file.open("rb") as lines:
            return [row for row in parsed(lines) if isinstance(row.get("step"), int)]
    except OSError:
        return []


def _log_around(path: Path) -> RunLog | None:
    """Return the log of the run in the folder above; None if there is none that can be read."""
    folder = path.resolve().parent
    if not (folder / RUN_FILE).is_file():
        return None
    try:
        return read_run(folder)
    except SourceError:
        return None
