"""How often a tier runs, and what it costs: said before it runs, kept to while it does."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from jacdiag.errors import UsageError

_RETRY = 200  # steps until a run with a budget is tried again that had not the memory


@dataclass
class Cadence:
    """Every so many steps, or so often that a share of the time is not exceeded, or both.

    Attributes:
        steps: between two runs; None where a budget alone decides. With a budget, a run that it
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
        """Reads what a user asked for: steps, "N%", "STEPS, N%", or None (or 0) for never.

        Raises:
            UsageError: anything else.
        """
        if given is None or (given == 0 and not isinstance(given, bool)):
            return cls(None)
        if isinstance(given, int) and not isinstance(given, bool) and given > 0:
            return cls(given)
        text = given if isinstance(given, str) else ""
        share = re.fullmatch(r"\s*(?:(\d+)\s*,)?\s*(\d+(?:\.\d+)?)\s*%\s*", text)
        if share is not None and 0 < float(share[2]) < 100 and share[1] != "0":
            return cls(int(share[1]) if share[1] else None, float(share[2]) / 100)
        hint = (
            f'{name}=200 (steps), {name}="1%" (of the time), {name}="200, 1%" (both), None (never)'
        )
        raise UsageError(f"{name} cannot be {given!r}", hint=hint)

    @property
    def never(self) -> bool:
        return self.steps is None and self.budget is None

    def due(self, step: int, price: float | None = None, step_seconds: float | None = None) -> bool:
        """Return whether to run at this step; call once per step, since it remembers the step
        before.

        Args:
            step: number of steps that are done.
            price: seconds that one run takes; None before it is known.
            step_seconds: of one training step; None before it is known: then only the first run is
                due.
        """
        before, self.looked = self.looked, step
        if self.steps is not None:
            is_passed = (
                before is not None and before < step and step // self.steps > before // self.steps
            )
            self.is_multiple = (step % self.steps == 0 or is_passed) and step != self.last
            if not self.is_multiple or self.budget is None:
                return self.is_multiple
        if self.budget is None:
            return False
        if self.last < 0:
            return True
        if price is None:  # it could not be run; another try is as rare as by default
            return step - self.last >= _RETRY
        if not step_seconds:
            return False
        return (step - self.last) * step_seconds * self.budget >= price

    def may_be_due(self, step: int, capacity: int) -> bool:
        """Whether ranks, which measure different times, should agree on a run at this step; ask
        after `due`.

        Args:
            step: number of steps that are done.
            capacity: steps between two agreements where a budget alone decides.
        """
        if self.steps is not None:
            return self.is_multiple
        return self.budget is not None and step % capacity == 0

    def interval(self, price: float, step_seconds: float) -> float:
        """Steps between two runs, as far as can be foretold."""
        if self.budget is None:
            return float(self.steps) if self.steps is not None else float("inf")
        by_budget = price / (self.budget * step_seconds) if step_seconds else float("inf")
        if self.steps is None:
            return by_budget
        return (
            self.steps * max(1.0, math.ceil(by_budget / self.steps))
            if math.isfinite(by_budget)
            else by_budget
        )


@dataclass
class Clock:
    """Seconds of a training step without the watch's own work, and of each tier."""

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    spent: dict[str, float] = field(default_factory=dict)
    last: float | None = None
    own: float = 0.0  # of the watch, since the last step ended

    def step_ended(self, now: float) -> float | None:
        """Returns seconds since the last step's end, the watch's own work left out."""
        passed = None if self.last is None else max(now - self.last - self.own, 0.0)
        if passed is not None:
            self.steps.append(passed)
        return passed

    def begin(self, now: float) -> None:
        """The next step begins."""
        self.last, self.own = now, 0.0

    def charge(self, tier: str, seconds: float) -> None:
        self.spent[tier] = self.spent.get(tier, 0.0) + seconds
        self.own += seconds

    @property
    def step_seconds(self) -> float | None:
        """Median of the last steps."""
        return median(self.steps) if self.steps else None

    def usual_seconds(self) -> float | None:
        """Return the median of the last steps."""
        return self.step_seconds
