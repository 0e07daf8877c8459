"""How often a measurement runs, and the share of the training time that it may take."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from jacdiag.errors import UsageError

_RETRY = 200  # steps until a run with a budget is tried again that had not the memory
# "1%" or "200, 1%"
_SHARE = re.compile(r"\s*(?:(?P<steps>\d+)\s*,)?\s*(?P<percent>\d+(?:\.\d+)?)\s*%\s*")


@dataclass
class Cadence:
    """How often to run: every so many steps, within a share of the training time, or both.

    Attributes:
        steps: between two runs; None if a budget alone decides. With a budget, a run that it
            does not allow is left out, and the next one is that many steps later.
        budget: share of the training time, such as 0.01.
        last: the step of the last run; -1 before the first.
        looked: the last step that `due` was called with; a multiple of `steps` may lie between two
            steps.
        is_multiple: whether one lay there in the last call of `due`.

    Example:
        >>> Cadence.of(200, "every").due(400), Cadence.of("1%", "every").budget
        (True, 0.01)
        >>> Cadence.of("200, 1%", "every")
        Cadence(steps=200, budget=0.01, last=-1)
    """

    steps: int | None
    budget: float | None = None
    last: int = -1
    looked: int | None = field(default=None, repr=False)
    is_multiple: bool = field(default=False, repr=False)

    @classmethod
    def of(cls, given: int | str | None, name: str) -> Cadence:
        """Return the cadence that a user passed.

        Args:
            given: steps, "N%", "STEPS, N%", or None (or 0) for never.
            name: of the option, for messages.

        Raises:
            UsageError: anything else.
        """
        # 1. Never. A bool is a number in Python, and none here.
        is_bool = isinstance(given, bool)
        is_zero = given == 0 and not is_bool
        if given is None or is_zero:
            return cls(None)

        # 2. A number of steps.
        if isinstance(given, int) and not is_bool and given > 0:
            return cls(given)

        # 3. A text.
        if isinstance(given, str):
            cadence = cls._parse(given)
            if cadence is not None:
                return cadence
        hint = (
            f'{name}=200 (steps), {name}="1%" (of the time), {name}="200, 1%" (both), None (never)'
        )
        raise UsageError(f"{name} cannot be {given!r}", hint=hint)

    @classmethod
    def _parse(cls, text: str) -> Cadence | None:
        """Return the cadence of a text such as "1%" or "200, 1%"; None if it is no such text."""
        match = _SHARE.fullmatch(text)
        if match is None:
            return None
        percent = float(match["percent"])
        if not 0 < percent < 100:
            return None
        budget = percent / 100
        if match["steps"] is None:
            return cls(None, budget)
        if match["steps"] == "0":
            return None
        return cls(int(match["steps"]), budget)

    @property
    def never(self) -> bool:
        """Whether nothing is ever due."""
        return self.steps is None and self.budget is None

    def due(
        self,
        step: int,
        price: float | None = None,
        step_seconds: float | Callable[[], float | None] | None = None,
    ) -> bool:
        """Return whether to run at this step; call once per step, since it remembers the last one.

        Args:
            step: number of steps that are done.
            price: seconds that one run takes; None before it is known.
            step_seconds: seconds of one training step, or what returns them and is only called if
                they decide. None before they are known: then only the first run is due.
        """
        # 1. By the number of steps.
        previous = self.looked
        self.looked = step

        if self.steps is not None:
            self.is_multiple = self._reaches_multiple(previous, step, self.steps)
            if not self.is_multiple:
                return False

        # 2. By the share of the time.
        if self.budget is None:
            return self.steps is not None
        if callable(step_seconds):
            step_seconds = step_seconds()
        return self._is_within_budget(step, price, step_seconds, self.budget)

    def _reaches_multiple(self, previous: int | None, step: int, interval: int) -> bool:
        """Return whether a multiple of the interval lies between the previous step and this one."""
        if step == self.last:  # it has run at this step already
            return False

        # 1. This step is one.
        if step % interval == 0:
            return True

        # 2. The loop leaves numbers out, one of which was one. It may also have gone back.
        if previous is None or previous >= step:
            return False
        return step // interval > previous // interval

    def _is_within_budget(
        self, step: int, price: float | None, step_seconds: float | None, budget: float
    ) -> bool:
        """Return whether a run at this step keeps to the share of the time."""
        # 1. The first run waits for nothing.
        if self.last < 0:
            return True

        # 2. If it could not be run, another try is as rare as by default.
        steps_since_last = step - self.last
        if price is None:
            return steps_since_last >= _RETRY

        # 3. Compare what the steps since then have taken.
        if not step_seconds:
            return False
        return steps_since_last * step_seconds * budget >= price

    def may_be_due(self, step: int, capacity: int) -> bool:
        """Return whether ranks should agree on a run at this step; call after `due`.

        They measure different times, so that one may find a run due and another not.

        Args:
            step: number of steps that are done.
            capacity: steps between two agreements if a budget alone decides.
        """
        # 1. The number of steps is the same on all ranks.
        if self.steps is not None:
            return self.is_multiple

        # 2. The times are not.
        if self.budget is None:
            return False

        # Not at every step, since an agreement is a message between ranks.
        return step % capacity == 0

    def interval(self, price: float, step_seconds: float) -> float:
        """Predict the steps between two runs; inf for never.

        Args:
            price: seconds of one run.
            step_seconds: seconds of one training step.
        """
        # 1. By the steps alone, or never.
        if self.budget is None:
            return math.inf if self.steps is None else float(self.steps)

        # 2. By the share of the time.
        if not step_seconds:
            return math.inf
        by_budget = price / (self.budget * step_seconds)
        if self.steps is None or not math.isfinite(by_budget):
            return by_budget

        # 3. By both: the next multiple of the steps that the share allows.
        return self.steps * max(1.0, math.ceil(by_budget / self.steps))


@dataclass
class Clock:
    """Seconds of a training step without the watch's own work, and seconds of each measurement.

    Attributes:
        steps: seconds of the last steps.
        spent: measurement -> seconds so far.
        last: when the last step ended; None before the first one.
        own: seconds of the watch's own work since then.
        waited: seconds in which the host waited for the training's own work on an accelerator.
    """

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    spent: dict[str, float] = field(default_factory=dict)
    last: float | None = None
    own: float = 0.0
    waited: float = 0.0

    def step_ended(self, now: float) -> float | None:
        """Return the seconds since the last step's end, without the watch's own work."""
        if self.last is None:
            return None
        step_seconds = max(now - self.last - self.own, 0.0)
        self.steps.append(step_seconds)
        return step_seconds

    def begin(self, now: float) -> None:
        """Begin the next step."""
        self.last = now
        self.own = 0.0

    def charge(self, measurement: str, seconds: float) -> None:
        """Add seconds of the watch's own work."""
        self.spent[measurement] = self.spent.get(measurement, 0.0) + seconds
        self.own += seconds

    def share_wait(self, seconds: float, count: int) -> None:
        """Share a wait for the training's own work among the last steps.

        An accelerator runs later than the host. What it still has to do when the watch reads its
        figures is the work of these steps, and not of the watch.

        Args:
            seconds: that the host waited.
            count: of the steps, without one whose seconds are not known.
        """
        # 1. The step at hand, in which the host waited, is not longer for it.
        self.waited += seconds
        self.own += seconds

        # 2. Those that it waited for are. Only the last ones are still here.
        first = max(len(self.steps) - count, 0)
        for place in range(first, len(self.steps)):
            self.steps[place] += seconds / count

    @property
    def step_seconds(self) -> float | None:
        """The median over the last steps; None before the second one."""
        if not self.steps:
            return None
        return median(self.steps)

    def usual_seconds(self) -> float | None:
        """Return the median over the last steps."""
        return self.step_seconds
