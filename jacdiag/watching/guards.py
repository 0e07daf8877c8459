"""Nothing of the watch may end a training run: every part is guarded; one that fails is switched off, once, aloud."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jacdiag.errors import JacdiagError, one_line
from jacdiag.report.runlog import Alert

logger = logging.getLogger("jacdiag.watch")


class AlertRaised(JacdiagError):
    """What `on_alert="raise"` raises from `Watch.step`.

    Attributes:
        alert: the alert.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(str(alert), hint="on_alert='log' lets the run go on")
        self.alert = alert


class Guards:
    """The parts of a watch and which of them still work.

    Args:
        strict: raise a fault instead of switching its part off.
        told: called with (part, error in one line, what was switched off) at the first fault of a part.
    """

    def __init__(self, strict: bool, told: Callable[[str, str, str], None]) -> None:
        self.strict, self.told = strict, told
        self.off: dict[str, str] = {}

    def on(self, part: str) -> bool:
        return part not in self.off

    @contextmanager
    def part(self, name: str, loses: str) -> Iterator[None]:
        """Runs a part; where it fails, it is off from now on. KeyboardInterrupt and SystemExit are the user's own.

        Args:
            name: of the part.
            loses: what the run's record lacks from now on, to be said.
        """
        try:
            yield
        except Exception as error:
            if self.strict:
                raise
            self.fail(name, error, loses)

    def fail(self, name: str, error: Exception | str, loses: str) -> None:
        """Switches a part off and says so, once."""
        if name in self.off:
            return
        text = error if isinstance(error, str) else one_line(error)
        self.off[name] = text
        try:
            logger.warning("jacdiag.watch: %s failed (%s); %s. The training goes on.", name, text, loses)
            self.told(name, text, loses)
        except Exception:  # a logging handler is foreign code too
            logger.debug("jacdiag.watch: a fault could not be told", exc_info=True)


def say(text: str) -> None:
    """One line to stderr, for the person who started the run."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the terminal has gone
        return


def quietly(call: Callable[..., Any], *args: Any) -> None:
    """Runs a clean-up that must not raise."""
    try:
        call(*args)
    except Exception:
        logger.debug("jacdiag.watch: a clean-up failed", exc_info=True)
