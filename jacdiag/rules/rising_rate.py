"""JD105 while a run goes on: the chance at the highest learning rate so far, for the model that it began with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jacdiag.report import Report, Risk
from jacdiag.report.figures import INIT
from jacdiag.report.risk import RiskCurve
from jacdiag.report.runlog import Alert
from jacdiag.report.thresholds import Thresholds
from jacdiag.rules.risk import beyond, evidence, placement_of, ranged, within

_ANY = [0.0, math.inf]


class RisingRate:
    """Speaks once a level, when the learning rate rises past what the recorded runs of such a model bore.

    The curves are of untrained models, peak rates and warm-ups: the figure is that of the probe before the first
    update, the rate the highest so far, the warm-up the steps that it took to get there. Without such a probe, for a
    placement without a curve, and outside of what the runs spanned, it is silent; a rise that takes longer than the
    longest warm-up that was run counts as that one, which no longer one is worse than.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.limits = thresholds
        self.curve: RiskCurve | None = None
        self.value = self.highest = 0.0
        self.said: list[str] = []

    def know(self, report: Report) -> None:
        """Takes the report of the probe before the first update; others are passed over, and a model trained before."""
        curve = self.limits.risk.curves.get(placement_of(report))
        if report.source.get("step") != 0 or report.state != "init" or report.tier != "measured" or curve is None:
            return
        value = INIT[curve.figure](report)
        if within(curve, report, value):
            self.curve, self.value = curve, value

    def look(self, step: int, lr: float) -> list[Alert]:
        """The alert of a step whose learning rate is the first beyond a limit."""
        if self.curve is None:
            return []
        shortest, longest = self.curve.ranges.get("warmup", _ANY) if self.curve.by_warmup else _ANY
        if not (lr > self.highest or step == math.ceil(shortest)):
            return []
        self.highest = max(self.highest, lr)
        lr, (lowest, highest) = self.highest, self.curve.ranges.get("lr", _ANY)
        if step < shortest or not lowest <= lr <= highest:
            return []
        chance, lower, upper = self.curve.chance(self.value, lr, min(step, longest))
        risk = Risk(chance, lower, upper, self.curve.figure, self.value, lr, range=ranged(self.curve),
                    source=self.curve.source)  # fmt: skip
        found = beyond(risk, self.limits)
        if found is None or found[0] in self.said:
            return []
        level, limit = found
        self.said.append(level)
        what = f"the learning rate has risen to {lr:.3g}: a chance of {risk} to go wrong, as recorded runs tell it"
        return [Alert(step, "JD105", level, f"{what} ({level} above {limit:.0%})", [], evidence(risk, limit))]

    def state(self) -> dict[str, Any]:
        placement = self.curve.placement if self.curve is not None else None
        return {"placement": placement, "value": self.value, "highest": self.highest, "said": list(self.said)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.curve = self.limits.risk.curves.get(state["placement"])
        self.value, self.highest, self.said = state["value"], state["highest"], list(state["said"])
