"""The flights of a run: which alert has one, and the command that runs its batches again."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jacdiag.records.run_log import RunLog

_NOTE = "flight recorder: "  # how the note begins that the watch writes with a flight
_BATCHES = ("batch.pt", "running-batch-*.pt")  # a flight may have been kept without any


@dataclass(frozen=True)
class RunFlight:
    """A folder that the flight recorder wrote.

    Attributes:
        folder: its path, as a command takes it.
        has_batch: whether it holds a batch that can be run again.
    """

    folder: str
    has_batch: bool

    @property
    def command(self) -> str:
        """The command that runs its batches again; "" if it holds none."""
        if not self.has_batch:
            return ""
        return f"jacdiag audit CHECKPOINT --replay {shlex.quote(self.folder)}"

    @property
    def lines(self) -> list[str]:
        """Where it is, and what to do with it."""
        if not self.has_batch:
            return [f"flight: {self.folder} (no batch was kept)"]
        return [f"flight: {self.folder}", f"next: {self.command}"]


def flights_of_run(run: RunLog, folder: Path) -> dict[int, RunFlight]:
    """Return the flights of a run that are there, by the step of the alert.

    Args:
        run: its log.
        folder: of the log; the flights lie next to it.
    """
    flights = {}
    for note in run.notes:
        # 1. The note that the watch writes with a flight.
        text = str(note.get("text", ""))
        step = note.get("step")
        if not text.startswith(_NOTE) or not isinstance(step, int):
            continue

        # 2. The folder. A log may name whatever it likes, and a folder may have been deleted.
        name = Path(text.removeprefix(_NOTE)).name
        path = folder / name
        if name and path.is_dir():
            flights[step] = RunFlight(str(path), _has_batch(path))
    return flights


def flight_of_alert(alert: Mapping[str, Any], flights: Mapping[int, RunFlight]) -> RunFlight | None:
    """Return the flight that an alert wrote; None if it wrote none.

    Args:
        alert: a line of the log.
        flights: of the run, by step.
    """
    step = alert.get("step")
    if not isinstance(step, int):
        return None
    return flights.get(step)


def alert_lines(alert: Mapping[str, Any], flights: Mapping[int, RunFlight]) -> list[str]:
    """Return an alert as text: its sentence in full, then lines on its flight if it has one.

    Args:
        alert: a line of the log.
        flights: of the run, by step.
    """
    step, code, level = alert.get("step"), alert.get("code"), alert.get("level")
    lines = [f"step {step}: {code} {level}: {alert.get('what', '')}"]
    flight = flight_of_alert(alert, flights)
    if flight is not None:
        lines += flight.lines
    return lines


def _has_batch(folder: Path) -> bool:
    """Return whether a flight holds a batch."""
    # The first one is enough.
    batches = itertools.chain.from_iterable(map(folder.glob, _BATCHES))
    first = next(batches, None)
    return first is not None
