"""When JD501 speaks: two signals of a step together, of some steps on end, or an update that has
leapt with one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from jacdiag.detectors.recent_trend import WINDOW
from jacdiag.detectors.sustained_rise import Lift
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.thresholds import Thresholds

IN_A_ROW = 3  # survey of public runs
_LEAST, _MOST = 8, 32  # samples of one sub-layer's update


class Leap:
    """Update norm / weight norm over the alarm of the field and over ten times the sub-layer's own,
    turn after turn.

    Unlike JD506 it is not divided by the learning rate, which may be what has gone wrong. A warm-up
    from zero never leaps: a line through zero stands at twice the median of its past.
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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How far one step stands out, in standard deviations; None while there are too few steps
    before it.

    Attributes:
        loss, gradient: above the mean of the last 1,000 steps.
        gradient_ema: above the exponential mean.
        loss_recent, gradient_recent: above the line through the last 48 steps.
    """

    loss: float | None = None
    gradient: float | None = None
    gradient_ema: float | None = None
    loss_recent: float | None = None
    gradient_recent: float | None = None

    def known(self) -> dict[str, float]:
        """Return the scores that there are, by name."""
        every = {name: getattr(self, name) for name in SCORES}
        return {name: value for name, value in every.items() if value is not None}


SCORES = tuple(field.name for field in fields(Scores))


@dataclass(frozen=True)
class Spoken:
    """What the joint detector has to say.

    Attributes:
        what: the sentence.
        since: the first of the steps that it speaks of.
        evidence: the figures.
    """

    what: str
    since: int
    evidence: dict[str, Any]


class Joint:
    """The joint detector of one run.

    Attributes:
        hit: the step stands out; its values are left out of what the next ones are measured by.
        lifted: the same, of the means of 4 and 16 steps.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.both, self.one = _cut(thresholds, "joint_both"), _cut(thresholds, "joint_one")
        self.lift_both = _cut(thresholds, "lift_both")
        vote = thresholds.limits("gradient_z").info
        self.vote = math.inf if vote is None else float(vote)
        self.loss, self.gradient = Lift(), Lift()
        self.leap = Leap(thresholds)
        self.in_a_row = self.recent_in_a_row = 0
        self.hit = self.lifted = False

    def look(
        self,
        step: int,
        loss: float | None,
        gradient: float,
        scores: Scores,
        update: tuple[str, float] | None,
    ) -> Spoken | None:
        """Look at a step, then take it in.

        Args:
            step: its number.
            loss, gradient: its figures; the gradient norm is that of all parameters.
            scores: of this one step.
            update: (sub-layer, update norm / weight norm).

        Returns:
            What there is to say, if anything.
        """
        if update is not None:
            self.leap.add(*update)
        means = self.loss.z(loss) if loss is not None else {}, self.gradient.z(gradient)
        # All three are looked at, for what they remember.
        by_step = self._step(step, scores)
        by_recent = self._recent(step, scores)
        by_mean = self._mean(step, *means)
        spoken = by_mean or by_step or by_recent or self._leapt(step, scores.gradient_ema, *means)
        if loss is not None:
            self.loss.add(loss, self.lifted)
        self.gradient.add(gradient, self.lifted)
        return spoken

    def _step(self, step: int, scores: Scores) -> Spoken | None:
        """Both over 6 deviations or one over 8, for three steps in a row: as published."""
        both, one = self.both, self.one
        zl, zg = scores.loss or 0.0, scores.gradient or 0.0
        self.hit = (zl > both and zg > both) or max(zl, zg) > one
        self.in_a_row = self.in_a_row + 1 if self.hit else 0
        if self.in_a_row < IN_A_ROW:
            return None
        what = (
            f"loss {plain(zl)} and gradient norm {plain(zg)} standard deviations above their "
            "last 1,000 steps, "
        )
        what += _in_a_row(self.in_a_row, step)
        return Spoken(what, step - self.in_a_row + 1, {"loss_z": zl, "gradient_z": zg})

    def _recent(self, step: int, scores: Scores) -> Spoken | None:
        """The same of the line through the last 48 steps; one alone needs a vote of the other.

        Without the vote 8 of the lab's 375,000 healthy steps speak, with it none.
        """
        both, one = self.both, self.one
        zl, zg = scores.loss_recent or 0.0, scores.gradient_recent or 0.0
        out = min(zl, zg) > both or (max(zl, zg) > one and min(zl, zg) > self.vote)
        self.recent_in_a_row = self.recent_in_a_row + 1 if out else 0
        if self.recent_in_a_row < IN_A_ROW:
            return None
        what = (
            f"loss {plain(zl)} and gradient norm {plain(zg)} standard deviations above the "
            "line of the last "
        )
        what += f"{WINDOW} steps, {_in_a_row(self.recent_in_a_row, step)}"
        evidence = {"loss_recent_z": zl, "gradient_recent_z": zg}
        return Spoken(what, step - self.recent_in_a_row + 1, evidence)

    def _mean(
        self, step: int, loss: Mapping[int, float], gradient: Mapping[int, float]
    ) -> Spoken | None:
        """The same of means over some steps: both over 5, or one over 8 with a vote of the
        other.
        """
        both, one, vote = self.lift_both, self.one, self.vote
        pairs = [(loss[span], gradient[span], span) for span in loss if span in gradient]
        spans = [
            s for a, b, s in pairs if min(a, b) > both or (max(a, b) > one and min(a, b) >= vote)
        ]
        self.lifted = bool(spans)
        if not spans:
            return None
        span = spans[0]
        what = (
            f"loss {plain(loss[span])} and gradient norm {plain(gradient[span])} standard "
            "deviations of such means "
        )
        what += f"above what they were, over the last {span} steps"
        evidence = {"loss_z": loss[span], "gradient_z": gradient[span], "steps": span}
        return Spoken(what, step - span + 1, evidence)

    def _leapt(
        self, step: int, ema: float | None, loss: Mapping[int, float], gradient: Mapping[int, float]
    ) -> Spoken | None:
        """Updates of sub-layers that leap one after the other, and a vote of the loss or of the
        gradient norm.
        """
        if self.leap.in_a_row < IN_A_ROW:
            return None
        known = max(
            [*loss.values(), *gradient.values(), ema if ema is not None else 0.0], default=0.0
        )
        if known <= self.vote:
            return None
        what = (
            f"the updates of {self.leap.in_a_row} sub-layers in a row are "
            f"{plain(self.leap.last)} times their usual "
        )
        what += (
            f"share of the weights, and loss or gradient norm stand {plain(known)} standard "
            "deviations out"
        )
        return Spoken(
            what, step - self.leap.in_a_row + 1, {"update_times": self.leap.last, "z": known}
        )

    def resumed(self) -> None:
        self.in_a_row = self.recent_in_a_row = self.leap.in_a_row = 0
        self.leap.samples.clear()

    def state(self) -> dict[str, Any]:
        samples = {name: list(seen) for name, seen in self.leap.samples.items()}
        return {
            "loss": self.loss.state(),
            "gradient": self.gradient.state(),
            "in_a_row": self.in_a_row,
            "recent_in_a_row": self.recent_in_a_row,
            "leap": {"samples": samples, "in_a_row": self.leap.in_a_row},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.loss, self.gradient = Lift(), Lift()
        self.loss.load(state["loss"])
        self.gradient.load(state["gradient"])
        self.in_a_row, self.leap.in_a_row = state["in_a_row"], state["leap"]["in_a_row"]
        self.recent_in_a_row = int(state.get("recent_in_a_row", 0))
        self.leap.samples = {
            name: deque(seen, maxlen=_MOST) for name, seen in state["leap"]["samples"].items()
        }


def _in_a_row(count: int, step: int) -> str:
    return f"{count} steps in a row since step {step - count + 1}"


def _cut(thresholds: Thresholds, figure: str) -> float:
    value = thresholds.limits(figure).warning
    return math.inf if value is None else float(value)
