"""Isolation of faults: nothing of the watch may end a training run.

What fails is switched off, with one warning.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from jacdiag.errors import JacdiagError, clipped, one_line
from jacdiag.records.run_log import Alert

logger = logging.getLogger("jacdiag.watch")


_SHOWS_TRACE = "jacdiag.watch(..., strict=True) raises it with its traceback"
_CURES = {
    "probe": "probe=INPUTS names arguments that the model's forward takes (else those of the "
    "first batch are used); "
    f"every=None, stats_every=None leave the probe out; {_SHOWS_TRACE}",
    "updates": f"updates=False leaves them out; {_SHOWS_TRACE}",
    "batches": f"keep_batches=0 and recorder=0 leave them out; {_SHOWS_TRACE}",
    "log": "make room or name another log_dir, then go on with resume=True",
    "recorder": "make room in log_dir, or leave it out with recorder=0",
    "on_alert": "mend the function that on_alert= was given; alerts still go to the log",
}
_LESS_MEMORY = "give the probe less: probe=input_ids[:1, :128], or a larger every="
_MOST = 400  # characters of a cause


class AlertRaised(JacdiagError):
    """What `on_alert="raise"` raises from `Watch.step`.

    Attributes:
        alert: the alert.
    """

    def __init__(self, alert: Alert) -> None:
        """Take the alert's own text as the message."""
        super().__init__(str(alert), hint="on_alert='log' lets the run go on")
        self.alert = alert


class GuardedPart:
    """The context that `Guards.part` returns.

    It is entered ten times a step, and a generator would take three times as long.
    """

    __slots__ = ("guards", "loses", "name")

    def __init__(self, guards: Guards, name: str, loses: str) -> None:
        """Note the arguments, which are those of `Guards.part`."""
        self.guards = guards
        self.name = name
        self.loses = loses

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> bool:
        # KeyboardInterrupt and SystemExit are no Exception.
        if not isinstance(error, Exception):
            return False
        if self.guards.strict:
            return False
        self.guards.fail(self.name, error, self.loses)
        return True


class Guards:
    """The parts of a watch and which of them still work.

    Args:
        strict: raise a fault instead of switching its part off.
        told: called with (part, cause, what was switched off, what helps) at the first fault of a
            part.

    Attributes:
        off: part -> why it was switched off.
    """

    def __init__(self, strict: bool, told: Callable[[str, str, str, str], None]) -> None:
        """Begin with every part on; see the class for the arguments."""
        self.strict = strict
        self.told = told
        self.off: dict[str, str] = {}

    def on(self, part: str) -> bool:
        """Return whether something still works."""
        return part not in self.off

    def part(self, name: str, loses: str) -> GuardedPart:
        """Return a context that switches a part off if it fails.

        KeyboardInterrupt and SystemExit are the user's own, and pass.

        Args:
            name: of the part.
            loses: what the run's record lacks from now on, to be said.
        """
        return GuardedPart(self, name, loses)

    def fail(self, name: str, error: Exception | str, loses: str) -> None:
        """Switch a part off and warn once."""
        if name in self.off:
            return
        # 1. Switch it off first: the warning may fail as well.
        cause = error if isinstance(error, str) else describe_cause(error)
        cure = find_cure(name, error)
        self.off[name] = cause

        # 2. Warn.
        try:
            text = "jacdiag.watch: %s failed (%s); %s. What helps: %s. The training goes on."
            logger.warning(text, name, cause, loses, cure)
            self.told(name, cause, loses, cure)
        except Exception:  # a logging handler is foreign code too
            logger.debug("jacdiag.watch: a fault could not be told", exc_info=True)


def describe_cause(error: BaseException) -> str:
    """Return an error in one line: what failed, what was found, and the error that it came from."""
    if not isinstance(error, JacdiagError):
        return one_line(error)
    parts = [one_line(error)]
    # What was found is more precise than the error that it came from.
    if error.got:
        lines = [line.strip() for line in error.got.splitlines()]
        parts.extend(filter(None, lines))
    elif error.__cause__ is not None:
        parts.append(one_line(error.__cause__))
    return clipped("; ".join(parts), _MOST)


def find_cure(part: str, error: BaseException | str) -> str:
    """Return what helps against a fault: the error's own hint, else what the part allows."""
    # 1. What the error says itself.
    if isinstance(error, JacdiagError) and error.hint:
        return str(error.hint)

    # 2. A probe can be made smaller.
    is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_out_of_memory and part == "probe":
        return _LESS_MEMORY

    # 3. What the part allows. Each sink is a part of its own.
    if part.startswith("sink "):
        return "check what the sink writes to; the run log goes on without it"
    return _CURES.get(part, _SHOWS_TRACE)


def say(text: str) -> None:
    """Write one line to stderr, for the person who started the run."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the terminal has gone
        return


def quietly(call: Callable[..., Any], *args: Any) -> None:
    """Run a clean-up that must not raise."""
    try:
        call(*args)
    except Exception:
        logger.debug("jacdiag.watch: a clean-up failed", exc_info=True)
