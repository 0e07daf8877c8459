"""Risk curves made by hand."""

from __future__ import annotations

from dataclasses import replace

from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.rules.thresholds import Thresholds, load_thresholds

NONE = [[0.0] * 3] * 3
WIDE = [[4.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
RANGES = {"figure": [0.01, 100.0], "lr": [1e-4, 1.0], "width": [16.0, 128.0], "layers": [1.0, 12.0]}


def limits(
    intercept: float, covariance: list[list[float]] = NONE, placement: str = "pre"
) -> Thresholds:
    """A chance of logistic(intercept + ln lr) whatever the figure; at lr 1 just
    logistic(intercept).
    """
    curve = RiskCurve(
        placement, "worst branch norm", [intercept, 0.0, 1.0], covariance, RANGES, 100, 40, "a lab"
    )
    return replace(load_thresholds(), risk=RiskTable({placement: curve}))


def by_warmup() -> Thresholds:
    """A chance of logistic(2 + ln lr - ln warmup) at warm-ups of 10 to 1,000 steps."""
    made = limits(2.0)
    curve = replace(
        made.risk.curves["pre"],
        coefficients=[2.0, 0.0, 1.0, -1.0],
        covariance=[[0.0] * 4] * 4,
        ranges={**RANGES, "warmup": [10.0, 1000.0]},
    )
    return replace(made, risk=RiskTable({"pre": curve}))
