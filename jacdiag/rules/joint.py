"""When JD501 speaks: two signals of a step together, of some steps on end, or an update that has leapt with one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from jacdiag.report.thresholds import Thresholds
from jacdiag.rules.lift import Lift
from jacdiag.rules.numbers import plain

IN_A_ROW = 3  # survey of public runs
_LEAST, _MOST = 8, 32  # samples of one sub-layer's update


class Leap:
    """Update norm / weight norm over the alarm of the field and over ten times the sub-layer's own, turn after turn.

    Unlike JD506 it is not divided by the learning rate, which may be what has gone wrong. A warm-up from zero never
    leaps: a line through zero stands at twice the median of its past.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.alarm, self.times = _cut(thresholds, "update_ratio"), _cut(thresholds, "update_leap")
        self.samples: dict[str, deque[float]] = {}
        self.in_a_row = 0
        self.last = 0.0

    def add(self, name: str, ratio: float) -> None:
        if not math.isfinite(ratio):
            return
        seen = self.samples.setdefault(name, deque(maxlen=_MOST))
        usual = median(seen) if len(seen) >= _LEAST else math.inf
        leaps = ratio > self.alarm and ratio > self.times * usual
        self.in_a_row = self.in_a_row + 1 if leaps else 0
        self.last = ratio / usual if leaps else 0.0
        seen.append(ratio)


class Joint:
    """The joint detector of one run.

    Attributes:
        hit: the step stands out; its values are left out of what the next ones are measured by.
        lifted: the same, of the means of 4 and 16 steps.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.limits = thresholds
        self.loss, self.gradient = Lift(), Lift()
        self.leap = Leap(thresholds)
        self.in_a_row = 0
        self.hit = self.lifted = False

    def look(
        self, loss: float | None, gradient: float, zl: float | None, zg: float | None, ema: float | None,
        update: tuple[str, float] | None,
    ) -> tuple[str, dict[str, Any]] | None:  # fmt: skip
        """Looks at a step, then takes it in; what there is to say, and its evidence.

        Args:
            zl, zg: z-scores of this one step, loss and gradient norm, over the last 1,000.
            ema: z-score of the gradient norm over its exponential average.
            update: (sub-layer, update norm / weight norm).
        """
        if update is not None:
            self.leap.add(*update)
        means = self.loss.z(loss) if loss is not None else {}, self.gradient.z(gradient)
        said = self._step(zl, zg)
        said = self._mean(*means) or said  # both are looked at, for what they remember
        said = said or self._leapt(ema, *means)
        if loss is not None:
            self.loss.add(loss, self.lifted)
        self.gradient.add(gradient, self.lifted)
        return said

    def _step(self, zl: float | None, zg: float | None) -> tuple[str, dict[str, Any]] | None:
        """Both over 6 deviations or one over 8, for three steps in a row: as published."""
        both, one = _cut(self.limits, "joint_both"), _cut(self.limits, "joint_one")
        zl, zg = zl if zl is not None else 0.0, zg if zg is not None else 0.0
        self.hit = (zl > both and zg > both) or max(zl, zg) > one
        self.in_a_row = self.in_a_row + 1 if self.hit else 0
        if self.in_a_row < IN_A_ROW:
            return None
        what = f"loss {plain(zl)} and gradient norm {plain(zg)} standard deviations above their last 1,000 steps, "
        return f"{what}{self.in_a_row} steps in a row", {"loss_z": zl, "gradient_z": zg}

    def _mean(self, loss: Mapping[int, float], gradient: Mapping[int, float]) -> tuple[str, dict[str, Any]] | None:
        """The same of means over some steps: both over 5, or one over 8 with a vote of the other."""
        both, one = _cut(self.limits, "lift_both"), _cut(self.limits, "joint_one")
        vote = self._vote()
        pairs = [(loss[span], gradient[span], span) for span in loss if span in gradient]
        spans = [s for a, b, s in pairs if min(a, b) > both or (max(a, b) > one and min(a, b) >= vote)]
        self.lifted = bool(spans)
        if not spans:
            return None
        span = spans[0]
        what = f"loss {plain(loss[span])} and gradient norm {plain(gradient[span])} standard deviations of such means "
        what += f"above what they were, over the last {span} steps"
        return what, {"loss_z": loss[span], "gradient_z": gradient[span], "steps": span}

    def _leapt(
        self, ema: float | None, loss: Mapping[int, float], gradient: Mapping[int, float]
    ) -> tuple[str, dict[str, Any]] | None:
        """Updates of sub-layers that leap one after the other, and a vote of the loss or of the gradient norm."""
        if self.leap.in_a_row < IN_A_ROW:
            return None
        known = max([*loss.values(), *gradient.values(), ema if ema is not None else 0.0], default=0.0)
        if known <= self._vote():
            return None
        what = f"the updates of {self.leap.in_a_row} sub-layers in a row are {plain(self.leap.last)} times their usual "
        what += f"share of the weights, and loss or gradient norm stand {plain(known)} standard deviations out"
        return what, {"update_times": self.leap.last, "z": known}

    def _vote(self) -> float:
        value = self.limits.limits("gradient_z").info
        return math.inf if value is None else float(value)

    def resumed(self) -> None:
        self.in_a_row = self.leap.in_a_row = 0
        self.leap.samples.clear()

    def state(self) -> dict[str, Any]:
        samples = {name: list(seen) for name, seen in self.leap.samples.items()}
        return {"loss": self.loss.state(), "gradient": self.gradient.state(), "in_a_row": self.in_a_row,
                "leap": {"samples": samples, "in_a_row": self.leap.in_a_row}}  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self.loss, self.gradient = Lift(), Lift()
        self.loss.load(state["loss"])
        self.gradient.load(state["gradient"])
        self.in_a_row, self.leap.in_a_row = state["in_a_row"], state["leap"]["in_a_row"]
        self.leap.samples = {name: deque(seen, maxlen=_MOST) for name, seen in state["leap"]["samples"].items()}


def _cut(thresholds: Thresholds, figure: str) -> float:
    value = thresholds.limits(figure).warning
    return math.inf if value is None else float(value)
