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
class KeptBatch:
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
    batches: list[KeptBatch] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    header: Mapping[str, Any] = field(default_factory=dict)
    probe: Mapping[str, Any] | None = None
    ended: str = ""

    @property
    def probed(self) -> KeptBatch | None:
        """The batch that an audit probes with: the latest of a step that has ended.

        A batch that crashed may not run.
        """
        return next(
            (batch for batch in self.batches if not batch.running), next(iter(self.batches), None)
        )

    @property
    def complete(self) -> bool:
        return bool(self.rows) and self.rows[0]["step"] <= 1


def read_flight(folder: str | os.PathLike[str]) -> Flight:
    """Read what a flight recorder left behind. Batches are listed and not loaded.

    Args:
        folder: `flight-STEP` of a run. The log of the run, in the folder above, is read if it is
            there.

    Raises:
        SourceError: it is no folder of a flight recorder.

    Example:
        >>> read_flight("runs/a/flight-150").step                       # doctest: +SKIP
        150
    """
    path = Path(folder)
    about = _about(path)
    step = about["step"] if isinstance(about.get("step"), int) else None
    own = _rows(path / _STEPS)
    log = _log_around(path)

    # The log of the whole run has more steps. What a resumed run did again is not what the flight
    # saw.
    rows, header, probe = own, {}, None
    if log is not None:
        header = log.header
        before = [row for row in log.steps if own and row["step"] < own[0]["step"]]
        rows = (
            [*before, *own]
            if own
            else [row for row in log.steps if step is None or row["step"] <= step]
        )
        probes = [row for row in log.probes if step is None or row["step"] <= step]
        probe = next(reversed(probes), None)
    why, ended = str(about.get("why", "")), str(about.get("ended", ""))
    return Flight(path, step, why, _batches(path, about), rows, header, probe, ended)


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
    try:
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "it is flight-STEP in the log_dir"
        raise SourceError(
            f"'{path}' is no folder of a flight recorder", got=one_line(error), hint=hint
        ) from error
    return about if isinstance(about, dict) else {}


def _batches(path: Path, about: Mapping[str, Any]) -> list[KeptBatch]:
    found: list[tuple[int, KeptBatch]] = []
    step = about.get("batch_step")
    # of a crash in the first step
    is_running_alone = step is not None and step == about.get("running_step")
    if (path / _LATEST).is_file() and not is_running_alone:
        found.append((0, KeptBatch(path / _LATEST, step if isinstance(step, int) else None)))
    matches = [(file, _EARLIER.fullmatch(file.name)) for file in path.glob("batch-*.pt")]
    if not is_running_alone:
        found += [
            (int(match[1]), KeptBatch(file, int(match[2]))) for file, match in matches if match
        ]
    begun = [(file, _RUNNING.fullmatch(file.name)) for file in path.glob("running-batch-*.pt")]
    found += [
        (-int(match[1]), KeptBatch(file, int(match[2]), running=True))
        for file, match in begun
        if match
    ]
    return [batch for _, batch in sorted(found, key=lambda pair: pair[0])]


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open("rb") as lines:
            return [row for row in parsed(lines) if isinstance(row.get("step"), int)]
    except OSError:
        return []


def _log_around(path: Path) -> RunLog | None:
    if not (path.resolve().parent / RUN_FILE).is_file():
        return None
    try:
        return read_run(path.resolve().parent)
    except SourceError:
        return None
