"""The chance that a run goes wrong at a learning rate, and the curves that give it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from jacdiag.records.base import Record

Z = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class Risk(Record):
    """The chance that a run at the planned learning rate goes wrong, estimated from recorded runs.

    Attributes:
        chance: None where the audit lies outside of what was recorded; `reason` says in what.
        lower, upper: 95%, over resampled inits.
        figure, value: the figure of the untrained model that it rests on.
        lr: the planned peak.
        range: what was recorded.
        source: the experiment.
    """

    chance: float | None = None
    lower: float | None = None
    upper: float | None = None

    # What it rests on.
    figure: str = ""
    value: float | None = None
    lr: float | None = None
    range: str = ""
    source: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """Return the chance as in "31% [18%, 47%]", or why there is none."""
        if self.chance is None:
            return self.reason

        # A chance is never said without its interval.
        if self.lower is None or self.upper is None:
            return self.reason
        return f"{self.chance:.0%} [{self.lower:.0%}, {self.upper:.0%}]"


@dataclass(frozen=True)
class RiskCurve(Record):
    """The chance for one placement, from a figure of the untrained model, the rate and the warm-up.

    Attributes:
        figure: its name in `jacdiag.rules.risk_features`.
        coefficients: of 1, ln figure, ln lr and, where the runs differed in it, ln of the steps of
            warm-up.
        covariance: of these, over resampled inits.
        ranges: "figure", "lr", "warmup", "width", "layers", "clip", "beta2" -> [least, most] of the
            runs. A factor without an entry is not checked.
        runs, bad: how many there were, and how many went wrong.
        source: the experiment.
    """

    placement: str
    figure: str
    coefficients: list[float]
    covariance: list[list[float]]
    ranges: dict[str, list[float]]
    runs: int
    bad: int
    source: str = ""

    @property
    def by_warmup(self) -> bool:
        """Whether the chance depends on the warm-up."""
        return len(self.coefficients) > 3

    def chance(
        self, figure: float, lr: float, warmup: float | None = None
    ) -> tuple[float, float, float]:
        """Return the chance and the ends of its 95% interval.

        Args:
            figure: of the untrained model, above 0.
            lr: the peak learning rate, above 0.
            warmup: in steps; needed only if the chance depends on it.
        """
        # 1. The point at which the logistic curve is evaluated.
        point = [1.0, math.log(figure), math.log(lr)]
        if self.by_warmup and warmup is not None:
            point.append(math.log(max(warmup, 1.0)))

        # 2. The linear predictor there, and its variance x^T C x.
        middle = sum(c * x for c, x in zip(self.coefficients, point, strict=True))
        variance = self._variance_at(point)

        # 3. Interval of the predictor, through the curve.
        half = Z * math.sqrt(max(variance, 0.0))
        return logistic(middle), logistic(middle - half), logistic(middle + half)

    def _variance_at(self, point: list[float]) -> float:
        """Return the variance of the linear predictor at a point."""
        variance = 0.0
        for row, x in zip(self.covariance, point, strict=True):
            for covariance, y in zip(row, point, strict=True):
                variance += x * y * covariance
        return variance


@dataclass(frozen=True)
class RiskTable(Record):
    """All curves, by placement; `about` says where they come from and how far they were tested."""

    curves: dict[str, RiskCurve] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def logistic(x: float) -> float:
    """Return 1 / (1 + exp(-x)), without overflow."""
    from scipy.special import expit  # slow to import, and few audits predict a risk

    return float(expit(x))
