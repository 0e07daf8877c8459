"""A run of the benchmark: its parts one after the other, within a time, on whatever card there is.

A part that the card or the machine cannot do is left out with a sentence, and the others go on. An
error that nobody expected is a row that failed, with its traceback on stderr.
"""

from __future__ import annotations

import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from jacdiag.devices import accelerators
from jacdiag.errors import one_line


class OutOfTimeError(BaseException):
    """The time of the run is over. No handler of `Exception` keeps it."""


class NotHereError(Exception):
    """What a part needs is not here; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        part: the part that measured it.
        what: the subject of the row.
        figure: the figure as text; empty if the row was left out.
        passes: whether it is as it must be; None if nothing is demanded of it.
        why: why it was left out; empty if it was not.
        numbers: the figures as numbers, by name.
    """

    part: str
    what: str
    figure: str = ""
    passes: bool | None = None
    why: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Something that a part measures.

    Attributes:
        part, what: as in `Row`.
        measure: returns the row.
        bytes_needed: of the device; the case is left out if it has fewer.
    """

    part: str
    what: str
    measure: Callable[[], Row]
    bytes_needed: int = 0


def run_cases(
    cases: list[Case],
    device: torch.device,
    seconds: float,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure every case that can be measured.

    Args:
        cases: in the order in which they run.
        device: that they run on.
        seconds: after which no case goes on.
        keep: called with the rows so far after each of them.
    """
    end = time.monotonic() + seconds
    rows: list[Row] = []
    is_lost = False
    for case in cases:
        # 1. Measure the case, unless an error before it has taken the device away.
        if is_lost:
            row = _left_out(case, "the device does not work since the error above")
        else:
            row = _run_case(case, device, end - time.monotonic())

        # 2. Show the row, and keep it: the next case may end the process.
        print(line_of(row), flush=True)
        rows.append(row)
        keep(rows)
        if is_lost:
            continue

        # 3. Give its memory back. Some errors of CUDA end everything that the process can do there.
        is_lost = "error" in row.numbers and not is_working(device)
        if is_lost:
            print(_LOST, file=sys.stderr, flush=True)
        else:
            give_memory_back(device)
    return rows


_LOST = (
    "The device does not work any more in this process after the error above, so the benchmark "
    "stops here. Run the parts that are left out in a new process: --only PART"
)


def is_working(device: torch.device) -> bool:
    """Return whether the device still computes: after some errors of CUDA every call fails."""
    try:
        torch.ones(1, device=device).add_(1)
        accelerators.wait_for(device)
    except Exception:
        return False
    return True


def _run_case(case: Case, device: torch.device, seconds: float) -> Row:
    """Measure a case, or say why it is left out."""
    # 1. What is known before.
    if seconds <= 0:
        return _left_out(case, "no time was left for it")
    free = None if device.type == "cpu" else accelerators.free_device_memory(device)
    if free is not None and free < case.bytes_needed:
        text = f"it needs about {_gib(case.bytes_needed)}, and {_gib(free)} are free on the device"
        return _left_out(case, text)

    # 2. What shows itself.
    reset_peak_memory(device)
    begun = time.monotonic()
    try:
        with _limited(seconds):
            row = case.measure()
    except OutOfTimeError:
        return _left_out(case, f"it was stopped after {time.monotonic() - begun:.0f} s, at the end")
    except NotHereError as error:
        return _left_out(case, str(error))
    except ModuleNotFoundError as error:
        return _left_out(case, f"{error.name or error} is not installed")
    except Exception as error:
        if is_out_of_memory(error):
            return _left_out(case, "the device ran out of memory")
        return _failed(case, error)
    wait_seconds = round(time.monotonic() - begun, 2)
    return Row(**{**asdict(row), "numbers": {**row.numbers, "case_seconds": wait_seconds}})


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left.

    Not every backend raises `torch.OutOfMemoryError`.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "out of memory" in str(error).lower()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError after some seconds, in the main thread."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def give_memory_back(device: torch.device) -> None:
    """Give back what a case has left."""
    gc.collect()
    empty = getattr(accelerators.module_of(device.type), "empty_cache", None)
    if empty is not None:
        empty()


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak of the device's memory begin anew, so that it is that of one case."""
    reset = getattr(accelerators.module_of(device.type), "reset_peak_memory_stats", None)
    if reset is not None:
        reset(device)


def line_of(row: Row) -> str:
    """Return a row as a line of the table."""
    verdict = {True: "ok", False: "WRONG", None: ""}[row.passes]
    text = f"left out: {row.why}" if row.why else row.figure
    return f"{row.part:12} {row.what:40} {text}  {verdict}".rstrip()


def _left_out(case: Case, why: str) -> Row:
    return Row(part=case.part, what=case.what, why=why)


def _failed(case: Case, error: Exception) -> Row:
    """Return the row of a case that ended with an error, and print the traceback."""
    traceback.print_exception(error, file=sys.stderr)
    text = one_line(error)
    return Row(
        part=case.part,
        what=case.what,
        figure=f"failed: {text}",
        passes=False,
        numbers={"error": text},
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
