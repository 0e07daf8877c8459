"""Numbers of the steps: the watch's own count, or what the trainer passes to `Watch.step`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jacdiag.errors import UsageError


@dataclass(frozen=True)
class StepMove:
    """What a call of `Watch.step` does to the numbers.

    Attributes:
        number: of the step that has ended.
        base: the step that the weights were at before it, as far as the numbers tell.
        is_rewind: steps beyond `base` are done again: the loop has gone back to an earlier
            checkpoint.
    """

    number: int
    base: int
    is_rewind: bool = False


class StepNumbers:
    """The numbers of a run's steps; they grow, except if the loop goes back.

    | passed | number |
    |---|---|
    | nothing | the last number + 1 |
    | more than the last number | as passed; a loop may leave numbers out |
    | less than the last number | as passed; the loop has gone back |
    | the last number again, or the first one | the last number + 1, from then on |

    The last line is a counter that starts again in each epoch, or one that two calls share. It
    cannot number the steps of a run, and that is said once.

    The first step of a process may have any number: a run that goes on from a checkpoint.

    Args:
        count: the number of the last step so far.
        warn: called with (topic, text).

    Attributes:
        stride: between the numbers of the last two steps.

    Example:
        >>> numbers = StepNumbers(0, print)
        >>> [numbers.advance(step).number for step in (400, None, 404)]
        [400, 401, 404]
    """

    def __init__(self, count: int, warn: Callable[[str, str], None]) -> None:
        """Begin before the first step; see the class for the arguments."""
        self.count = count
        self.warn = warn
        self.stride = 1
        self._first: int | None = None  # that was passed
        self._has_started = False
        self._counts_alone = False

    @property
    def coming(self) -> int:
        """The number that the next step will have, if it goes on as it has."""
        return self.count + self.stride

    def advance(self, given: Any) -> StepMove:
        """Return the number of the step that has ended.

        Args:
            given: what the loop passed; None if it passed nothing.

        Returns:
            The number, and the step that the weights were at before.

        Raises:
            UsageError: it is no integer, or negative.
        """
        last = self.count
        is_start = not self._has_started
        self._has_started = True
        # 1. No number was passed, or none that counts.
        if given is None or self._counts_alone:
            self.count = last + 1
            self.stride = 1
            return StepMove(self.count, last)
        number = _whole(given)
        if self._first is None:
            self._first = number

        # 2. The first step of a process says where the run is.
        if is_start:
            self.count = number
            return StepMove(number, number - 1)

        # 3. It grows, as it does nearly always.
        if number > last:
            self.count = number
            self.stride = number - last
            return StepMove(number, last)

        # 4. A counter that does not number the steps of a run.
        if number in (0, 1, last, self._first):
            self._counts_alone = True
            self.count = last + 1
            self.stride = 1
            self.warn(
                "numbers",
                f"step={number} came after step={last}: these numbers do not grow over the run. "
                "The watch counts by "
                f"itself from step {self.count} on. Pass a number that grows from one optimizer "
                "step to the next",
            )
            return StepMove(self.count, last)

        # 5. The loop has gone back.
        self.count = number
        self.stride = 1
        self.warn(
            "rewind",
            f"step={number} came after step={last}: the loop has gone back. The log keeps all "
            "lines; plot, live and "
            f"backtest show the later ones from step {number} on",
        )
        return StepMove(number, number - 1, is_rewind=True)


def _whole(given: Any) -> int:
    """Return an integer that is not negative."""
    hint = "w.step(loss, step=it), with the number of the optimizer step"
    try:
        # A bool is a number in Python, and none here.
        if isinstance(given, bool):
            raise TypeError
        number = operator.index(given)
    except TypeError as error:
        raise UsageError(f"step cannot be {given!r}", hint=hint) from error

    if number < 0:
        raise UsageError(f"step cannot be {given!r}", got="a negative number", hint=hint)
    return number
