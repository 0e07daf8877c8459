"""Judge JD105 while a run goes on: the chance to go wrong at the highest learning rate so far.

The chance is that of the model which the run began with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jacdiag.records import Report, Risk
from jacdiag.records.risk import RiskCurve
from jacdiag.records.run_log import Alert
from jacdiag.rules.risk_at_lr import beyond, evidence, placement_of, ranged, within
from jacdiag.rules.risk_features import INIT
from jacdiag.rules.thresholds import Thresholds

_ANY = [0.0, math.inf]


class RisingRate:
    """Fires once a level, if the learning rate rises past what such a model tolerates.

    The curves come from recorded runs of untrained models, at peak rates and warm-ups. So the
    figure is that of the probe before the first update, and the rate is the highest so far. The
    warm-up is the number of steps that its steepest rise would have taken to get there: the steps
    so far for a linear one, one step for a leap. It is kept inside of the warm-ups that were run: a
    longer one is no worse than the longest, a shorter one no better than the shortest.

    Nothing fires without such a probe, for a placement without a curve, and outside of the values
    that the runs spanned.

    Args:
        thresholds: with the curves of the chance.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        """Begin without a curve, which `know` chooses."""
        self._thresholds = thresholds
        self._curve: RiskCurve | None = None
        self._value = 0.0  # of the curve's figure, before the first update
        self._highest = 0.0  # learning rate inside of the curve's range
        self._steepest = 0.0  # rise of the learning rate in one step
        self._last_rate: float | None = None
        self._levels_fired: list[str] = []

    def know(self, report: Report) -> None:
        """Take the report of the probe before the first update.

        Reports of other probes, and of a model that was trained before, are left out.
        """
        # 1. The curve of models of this kind.
        is_untrained = report.source.get("step") == 0 and report.state == "init"
        is_measured = report.tier == "measured"
        curve = self._thresholds.risk.curves.get(placement_of(report))
        if curve is None or not (is_untrained and is_measured):
            return

        # 2. Where the model lies on it, if the recorded runs reach that far.
        value = INIT[curve.figure](report)
        if within(curve, report, value):
            self._curve = curve
            self._value = value

    def look(self, step: int, lr: float) -> list[Alert]:
        """Return the alert of a step whose learning rate is the first beyond a limit.

        Args:
            step: its number.
            lr: its learning rate; nan if it is not known.
        """
        # 1. Follow the rate.
        is_rate = lr >= 0.0
        if self._curve is None or not is_rate:
            return []
        if not self._is_new_highest(self._curve, lr):
            return []
        self._highest = lr

        # 2. Judge it, once a level.
        risk = self._risk_at(self._curve, lr)
        exceeded = beyond(risk, self._thresholds)
        if exceeded is None:
            return []
        level, limit = exceeded
        if level in self._levels_fired:
            return []
        self._levels_fired.append(level)
        what = (
            f"the learning rate has risen to {lr:.3g}: a chance of {risk} to go wrong, as "
            f"recorded runs tell it ({level} above {limit:.0%})"
        )
        return [Alert(step, "JD105", level, what, [], evidence(risk, limit))]

    def _is_new_highest(self, curve: RiskCurve, lr: float) -> bool:
        """Follow the rate; return whether it is the highest so far, and in the curve's range."""
        # 1. From the first step alone it is not known whether it rises.
        before = self._last_rate
        self._last_rate = lr
        if before is None:
            return False

        # 2. How steeply it rises. One that stands where it began was there in one step.
        self._steepest = max(self._steepest, lr - before)
        if not self._steepest:
            self._steepest = lr

        # 3. Whether the curve says something of it.
        lowest, highest = curve.ranges.get("lr", _ANY)
        return lr > self._highest and lowest <= lr <= highest

    def _risk_at(self, curve: RiskCurve, lr: float) -> Risk:
        """Return the chance to go wrong at a learning rate, with the warm-up that led to it."""
        # The warm-up is kept inside of those that were run.
        shortest, longest = curve.ranges.get("warmup", _ANY)
        warmup = min(max(lr / self._steepest, shortest), longest)
        chance, lower, upper = curve.chance(self._value, lr, warmup)
        return Risk(
            chance,
            lower,
            upper,
            curve.figure,
            self._value,
            lr,
            range=ranged(curve),
            source=curve.source,
        )

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        curve = {}
        if self._curve is not None:
            curve = {"placement": self._curve.placement, "figure": self._curve.figure}
        return {
            "curve": curve,
            "value": self._value,
            "highest": self._highest,
            "steepest": self._steepest,
            "last": self._last_rate,
            "said": list(self._levels_fired),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Without the curve of its figure the rule stays silent."""
        saved = state["curve"]
        curve = self._thresholds.risk.curves.get(saved.get("placement", ""))
        self._curve = None
        if curve is not None and curve.figure == saved["figure"]:
            self._curve = curve
        self._value = state["value"]
        self._highest = state["highest"]
        self._steepest = state["steepest"]
        self._last_rate = state["last"]
        self._levels_fired = list(state["said"])
