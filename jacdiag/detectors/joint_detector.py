"""Judge JD501: two signals that stand out together for several steps, or updates that leap.

A single signal of a single step is only a vote. The joint detector fires if loss and gradient norm
stand out together for several steps, or if the updates of several sub-layers leap while one of the
two stands out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from jacdiag.detectors.recent_trend import WINDOW
from jacdiag.detectors.sustained_rise import SustainedRise
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.thresholds import Thresholds

IN_A_ROW = 3
"""Steps in a row before the detector fires (survey of public runs)."""

EARLIER_STEPS = "the mean of the steps before (at most 1,000)"
"""What a step is compared with, in the words of alerts. A young run has fewer steps."""

_LEAST = 8  # samples of a sub-layer's update before its usual value is known
_MOST = 32  # samples that the usual value is taken over


class UpdateLeaps:
    """Updates that leap, one after the other: update norm / weight norm, sub-layer by sub-layer.

    An update leaps if it is over the field's usual limit and over ten times the sub-layer's own
    median. Unlike in JD506 it is not divided by the learning rate, which may be what has gone
    wrong. A warm-up from zero never leaps: a line through zero stands at twice the median of its
    past.

    Attributes:
        times: an update over so many times its usual value leaps.
        samples: the last values of each sub-layer.
        in_a_row: how many of the last updates leapt without a gap.
        since: the step of the first of them.
        last: the last update over its usual value; 0 if it did not leap.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        """Begin without samples.

        Args:
            thresholds: with the limits of "update_ratio" and "update_leap".
        """
        self._alarm = _warning_limit(thresholds, "update_ratio")
        self.times = _warning_limit(thresholds, "update_leap")
        self.samples: dict[str, deque[float]] = {}
        self.in_a_row = 0
        self.since = 0
        self.last = 0.0

    def add(self, step: int, name: str, ratio: float) -> None:
        """Take the update of one sub-layer.

        Args:
            step: that made it. Steps without an update norm may lie between two of them.
            name: of the sub-layer.
            ratio: update norm / weight norm.
        """
        if not math.isfinite(ratio):
            return
        # 1. The usual value. Nothing leaps before it is known.
        earlier = self.samples.setdefault(name, deque(maxlen=_MOST))
        usual = math.inf
        if len(earlier) >= _LEAST:
            usual = median(earlier)

        # 2. Compare with it, and take the update in.
        if ratio > self._alarm and ratio > self.times * usual:
            if not self.in_a_row:
                self.since = step
            self.in_a_row += 1
            self.last = ratio / usual
        else:
            self.in_a_row = 0
            self.last = 0.0
        earlier.append(ratio)


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """How far one step stands out, in standard deviations; None while there are too few steps.

    Attributes:
        loss, gradient: above the mean of the last steps, at most 1,000.
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
        scores = {}
        for name in SCORES:
            score = getattr(self, name)
            if score is not None:
                scores[name] = score
        return scores


SCORES = tuple(field.name for field in fields(StepScores))


@dataclass(frozen=True)
class JointAlarm:
    """What the joint detector fires with.

    Attributes:
        what: the sentence.
        since: the first of the steps that stand out.
        evidence: the figures.
    """

    what: str
    since: int
    evidence: dict[str, Any]


class JointDetector:
    """The joint detector of one run.

    Args:
        thresholds: with the limits of "joint_both", "joint_one", "gradient_leap", "lift_both" and
            "gradient_z".

    Attributes:
        hit: the step stands out; its values are left out of what the next ones are compared with.
        lifted: the means of the last 4 or 16 steps stand out, with the same consequence.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        """Begin without a history; see the class for the arguments."""
        self._both = _warning_limit(thresholds, "joint_both")
        self._one = _warning_limit(thresholds, "joint_one")
        self._gradient_times = _warning_limit(thresholds, "gradient_leap")
        self._both_means = _warning_limit(thresholds, "lift_both")
        vote = thresholds.limits("gradient_z").info
        self._vote = math.inf if vote is None else float(vote)
        self._loss = SustainedRise()
        self._gradient = SustainedRise()
        self._leaps = UpdateLeaps(thresholds)
        self._in_a_row = 0  # by the last 1,000 steps
        self._recent_in_a_row = 0  # by the last 48 steps
        self.hit = False
        self.lifted = False

    def look(
        self,
        step: int,
        loss: float | None,
        gradient: float,
        scores: StepScores,
        update: tuple[str, float] | None,
        usual_gradient: float | None = None,
    ) -> JointAlarm | None:
        """Judge a step, then add it to the means.

        Args:
            step: its number.
            loss: its loss; None if the loop does not pass it.
            gradient: its gradient norm, of all parameters.
            scores: of this one step.
            update: (sub-layer, update norm / weight norm).
            usual_gradient: the gradient norm of the last steps; None while there are too few.

        Returns:
            The alarm, or None if nothing stands out.
        """
        if update is not None:
            self._leaps.add(step, *update)
        loss_means: Mapping[int, float] = {}
        if loss is not None:
            loss_means = self._loss.z(loss)
        gradient_means = self._gradient.z(gradient)

        # 1. Run all three tests, because each of them counts its steps in a row.
        times = None
        if usual_gradient:
            times = gradient / usual_gradient
        by_step = self._judge_step(step, scores, times)
        by_recent = self._judge_recent(step, scores)
        by_mean = self._judge_means(step, loss_means, gradient_means)
        alarm = by_mean or by_step or by_recent
        if alarm is None and self._leaps.in_a_row >= IN_A_ROW:
            alarm = self._judge_leaps(scores.gradient_ema, loss_means, gradient_means)

        # 2. Add the step.
        if loss is not None:
            self._loss.add(loss, self.lifted)
        self._gradient.add(gradient, self.lifted)
        return alarm

    def _judge_step(
        self, step: int, scores: StepScores, gradient_times: float | None
    ) -> JointAlarm | None:
        """Fire if both are over 6 deviations, or one over 8, for three steps in a row.

        That is the published test. The deviations are those of the last 1,000 steps. The gradient
        norm of a young run may scatter so little that a rise by a half is over 8 deviations. So a
        gradient norm alone also has to double.

        Args:
            step: its number.
            scores: of the step.
            gradient_times: its gradient norm over the usual one; None if that is not known.
        """
        # 1. Compare the scores with the limits.
        loss_z = scores.loss or 0.0
        gradient_z = scores.gradient or 0.0
        has_doubled = gradient_times is None or gradient_times > self._gradient_times
        are_both_high = loss_z > self._both and gradient_z > self._both
        is_gradient_very_high = gradient_z > self._one and has_doubled
        self.hit = are_both_high or is_gradient_very_high or loss_z > self._one

        # 2. Wait until they have been high for some steps in a row.
        if not self.hit:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row < IN_A_ROW:
            return None
        first = step - self._in_a_row + 1
        what = (
            f"{_describe_scores(scores, are_both_high=are_both_high)}; {self._in_a_row} steps in "
            f"a row stand out, since step {first}"
        )
        evidence = {"loss_z": loss_z, "gradient_z": gradient_z, "gradient_times": gradient_times}
        return JointAlarm(what, first, evidence)

    def _judge_recent(self, step: int, scores: StepScores) -> JointAlarm | None:
        """Run the same test against the line through the last 48 steps.

        One signal alone needs a vote of the other. Without the vote the test is true at 8 of the
        lab's 375,000 healthy steps, with it at none.
        """
        # 1. Compare the scores with the limits.
        loss_z = scores.loss_recent or 0.0
        gradient_z = scores.gradient_recent or 0.0
        lower, higher = min(loss_z, gradient_z), max(loss_z, gradient_z)
        is_one_confirmed = higher > self._one and lower > self._vote
        is_hit = lower > self._both or is_one_confirmed

        # 2. Wait until they have been high for some steps in a row.
        if not is_hit:
            self._recent_in_a_row = 0
            return None
        self._recent_in_a_row += 1
        if self._recent_in_a_row < IN_A_ROW:
            return None
        what = (
            f"loss {plain(loss_z)} and gradient norm {plain(gradient_z)} standard deviations above "
            f"the line of the last {WINDOW} steps, {_in_a_row(self._recent_in_a_row, step)}"
        )
        evidence = {"loss_recent_z": loss_z, "gradient_recent_z": gradient_z}
        return JointAlarm(what, step - self._recent_in_a_row + 1, evidence)

    def _judge_means(
        self, step: int, loss: Mapping[int, float], gradient: Mapping[int, float]
    ) -> JointAlarm | None:
        """Fire if the means over some steps stand out: both over 5, or one over 8 with a vote.

        Args:
            step: the last one of the means.
            loss: steps of the mean -> standard deviations of the loss.
            gradient: the same of the gradient norm.
        """
        for span, loss_z in loss.items():
            if span not in gradient:
                continue
            # 1. Compare the scores of this span with the limits.
            gradient_z = gradient[span]
            lower, higher = min(loss_z, gradient_z), max(loss_z, gradient_z)
            is_one_confirmed = higher > self._one and lower >= self._vote
            is_hit = lower > self._both_means or is_one_confirmed
            if not is_hit:
                continue

            # 2. The shortest span that stands out fires.
            self.lifted = True
            what = (
                f"loss {plain(loss_z)} and gradient norm {plain(gradient_z)} standard "
                f"deviations of such means above what they were, over the last {span} steps"
            )
            evidence = {"loss_z": loss_z, "gradient_z": gradient_z, "steps": span}
            return JointAlarm(what, step - span + 1, evidence)
        self.lifted = False
        return None

    def _judge_leaps(
        self,
        gradient_ema: float | None,
        loss: Mapping[int, float],
        gradient: Mapping[int, float],
    ) -> JointAlarm | None:
        """Fire if the loss or the gradient norm votes while updates of sub-layers leap."""
        leaps = self._leaps
        # 1. One of the two has to vote, by its means or by the single step.
        scores = {
            "loss": max(loss.values(), default=0.0),
            "gradient norm": max([*gradient.values(), gradient_ema or 0.0]),
        }
        signal = max(scores, key=lambda name: scores[name])
        highest = scores[signal]
        if highest <= self._vote:
            return None

        # 2. Say what leapt. The updates of different sub-layers leap by different factors.
        what = (
            f"the last {leaps.in_a_row} updates that were measured are over {leaps.times:g} times "
            f"their usual share of the weights, the last one {plain(leaps.last)} times, and the "
            f"{signal} stands {plain(highest)} standard deviations out"
        )
        evidence = {"update_times": leaps.last, "z": highest}
        return JointAlarm(what, leaps.since, evidence)

    @property
    def updates_leap(self) -> bool:
        """Whether the last update that was measured leapt."""
        return self._leaps.in_a_row > 0

    def resumed(self) -> None:
        """Drop what a fresh optimizer disturbs for a while."""
        self._in_a_row = 0
        self._recent_in_a_row = 0
        self._leaps.in_a_row = 0
        self._leaps.samples.clear()

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        samples = {name: list(values) for name, values in self._leaps.samples.items()}
        return {
            "loss": self._loss.state(),
            "gradient": self._gradient.state(),
            "in_a_row": self._in_a_row,
            "recent_in_a_row": self._recent_in_a_row,
            "leap": {
                "samples": samples,
                "in_a_row": self._leaps.in_a_row,
                "since": self._leaps.since,
            },
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. One of an older version has no count of recent steps."""
        self._loss = SustainedRise()
        self._loss.load(state["loss"])
        self._gradient = SustainedRise()
        self._gradient.load(state["gradient"])
        self._in_a_row = state["in_a_row"]
        self._recent_in_a_row = int(state.get("recent_in_a_row", 0))
        leap = state["leap"]
        if "since" in leap:  # older versions did not keep it: the count begins again
            self._leaps.in_a_row = leap["in_a_row"]
            self._leaps.since = leap["since"]
        self._leaps.samples = {
            name: deque(values, maxlen=_MOST) for name, values in leap["samples"].items()
        }


def _describe_scores(scores: StepScores, *, are_both_high: bool) -> str:
    """Return how far loss and gradient norm lie from their means of the steps before.

    Args:
        scores: of the step.
        are_both_high: both stand out. Else only the higher of them does.
    """
    # 1. Both.
    loss, gradient = scores.loss, scores.gradient
    if are_both_high:
        return (
            f"loss {plain(loss)} and gradient norm {plain(gradient)} standard deviations "
            f"above {EARLIER_STEPS}"
        )

    # 2. One of them, and where the other is.
    if (gradient or 0.0) >= (loss or 0.0):
        high, high_z, other, other_z = "gradient norm", gradient, "loss", loss
    else:
        high, high_z, other, other_z = "loss", loss, "gradient norm", gradient
    alone = f"{high} {plain(high_z)} standard deviations above {EARLIER_STEPS}"
    if other_z is None:
        return alone
    side = "below" if other_z < 0 else "above"
    return f"{alone}, the {other} {plain(abs(other_z))} {side} its own"


def _in_a_row(count: int, step: int) -> str:
    return f"{count} steps in a row since step {step - count + 1}"


def _warning_limit(thresholds: Thresholds, figure: str) -> float:
    value = thresholds.limits(figure).warning
    return math.inf if value is None else float(value)
