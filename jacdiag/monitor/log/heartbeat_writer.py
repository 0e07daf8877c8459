"""Writes the sign of life of a run, about once a second, by the thread that writes the log."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jacdiag.records.heartbeat import (
    HEARTBEAT_FILE,
    Heartbeat,
    birth_of,
    host_name,
    place_of_process,
)

INTERVAL = 1.0  # seconds between two signs


class Pulse:
    """The sign of life of a run, written once in a while.

    Args:
        folder: of the run.
        submit: takes a function that another thread calls.

    Attributes:
        session: names this process's part of the run.
    """

    def __init__(self, folder: Path, submit: Callable[[Callable[[], None]], None]) -> None:
        """Write the first sign; see the class for the arguments."""
        self.path = folder / HEARTBEAT_FILE
        self.submit = submit
        self.session = secrets.token_hex(8)
        self._next = 0.0
        # A reader tells by process, birth and host whether this run still lives.
        pid = os.getpid()
        started = time.time()
        self._last = Heartbeat(
            session=self.session,
            pid=pid,
            born=birth_of(pid),
            host=host_name(),
            place=place_of_process(),
            started=started,
            time=started,
        )
        self._send()

    def step_ended(self, step: int, now: float, step_seconds: Callable[[], float | None]) -> None:
        """Note a step; costs one comparison unless a second has passed.

        Args:
            step: its number.
            now: of `time.perf_counter`.
            step_seconds: returns the usual duration of a step.
        """
        if now < self._next:
            return
        self._next = now + INTERVAL
        self._last = replace(self._last, step=step, time=time.time(), step_seconds=step_seconds())
        self._send()

    def _send(self) -> None:
        beat = self._last
        self.submit(lambda: _replace_file(self.path, beat))


def _replace_file(path: Path, beat: Heartbeat) -> None:
    """Write the file completely or not at all; a run without a sign of life goes on."""
    with suppress(OSError):
        passing = path.with_name(f".{path.name}.{beat.pid}")
        passing.write_bytes(beat.to_bytes())
        passing.replace(path)
