"""JD105 while a run goes on: the chance at the highest learning rate so far, for the model that it
began with.
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
    """Speaks once a level, when the learning rate rises past what the recorded runs of such a model
    bore.

    The curves are of untrained models, peak rates and warm-ups: the figure is that of the probe
    before the first update, the rate the highest so far, the warm-up the steps that its steepest
    rise would have taken to get there: of a linear one the steps so far, of a leap one. Without
    such a probe, for a placement without a curve, and outside of what the runs spanned, it is
    silent. A rise longer than the longest warm-up that was run counts as that one, which no longer
    one is worse than; a shorter than the shortest as that one, which no shorter one is better than.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.limits = thresholds
        self.curve: RiskCurve | None = None
        self.value = self.highest = self.steepest = 0.0
        self.last: float | None = None
        self.said: list[str] = []

    def know(self, report: Report) -> None:
        """Takes the report of the probe before the first update; others are passed over, and a
        model trained before.
        """
        curve = self.limits.risk.curves.get(placement_of(report))
        if (
            report.source.get("step") != 0
            or report.state != "init"
            or report.tier != "measured"
            or curve is None
        ):
            return
        value = INIT[curve.figure](report)
        if within(curve, report, value):
            self.curve, self.value = curve, value

    def look(self, step: int, lr: float) -> list[Alert]:
        """The alert of a step whose learning rate is the first beyond a limit."""
        if self.curve is None or not lr >= 0.0:
            return []
        last, self.last = self.last, lr
        if last is None:
            return []  # the next step tells whether the rate rises
        # one that stands where it began was there in one step
        self.steepest = max(self.steepest, lr - last) or lr
        lowest, highest = self.curve.ranges.get("lr", _ANY)
        if not (lr > self.highest and lowest <= lr <= highest):
            return []
        self.highest = lr
        shortest, longest = self.curve.ranges.get("warmup", _ANY)
        warmup = min(max(lr / self.steepest, shortest), longest)
        chance, lower, upper = self.curve.chance(self.value, lr, warmup)
        risk = Risk(
            chance,
            lower,
            upper,
            self.curve.figure,
            self.value,
            lr,
            range=ranged(self.curve),
            source=self.curve.source,
        )
        found = beyond(risk, self.limits)
        if found is None or found[0] in self.said:
            return []
        level, limit = found
        self.said.append(level)
        what = (
            f"the learning rate has risen to {lr:.3g}: a chance of {risk} to go wrong, as "
            "recorded runs tell it"
        )
        return [
            Alert(
                step,
                "JD105",
                level,
                f"{what} ({level} above {limit:.0%})",
                [],
                evidence(risk, limit),
            )
        ]

    def state(self) -> dict[str, Any]:
        curve = (
            {}
            if self.curve is None
            else {"placement": self.curve.placement, "figure": self.curve.figure}
        )
        return {
            "curve": curve,
            "value": self.value,
            "highest": self.highest,
            "steepest": self.steepest,
            "last": self.last,
            "said": list(self.said),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        known = state["curve"]
        curve = self.limits.risk.curves.get(known.get("placement", ""))
        # else another value
        self.curve = curve if curve is not None and curve.figure == known["figure"] else None
        self.value, self.highest, self.steepest = (
            state["value"],
            state["highest"],
            state["steepest"],
        )
        self.last, self.said = state["last"], list(state["said"])
