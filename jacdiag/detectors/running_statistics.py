"""Statistics of a series that grows by one value a step.

Each class compares a new value with the values *before* it, then takes it in. All are plain Python.
Their cost does not depend on how long the run is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# Share of the mean below which a deviation is rounding, and a z-score has no meaning.
_FLOOR = 1e-3
_TINY = 1e-300  # no division by zero, for a series of zeros


class RollingMoments:
    """Mean and standard deviation of the last values.

    An outlier is not taken in, because it would hide the next one. After `patience` outliers in a
    row the level has changed, and they are taken in.

    Args:
        window: how many values to keep.
        least: values before the first score.
        patience: outliers in a row that are left out.
    """

    def __init__(self, window: int = 1000, least: int = 60, patience: int = 200) -> None:
        """Begin without values; see the class for the arguments."""
        self.window = window
        self.least = least
        self.patience = patience
        self.values: deque[float] = deque()
        self._total = 0.0
        self._squares = 0.0
        self._outliers_in_a_row = 0
        self._values_since_sums = 0  # since the sums were last computed from the values

    def z(self, value: float) -> float | None:
        """Return the standard deviations above the mean; None while there are too few values."""
        count = len(self.values)
        if count < self.least or not math.isfinite(value):
            return None
        mean = self._total / count
        deviation = math.sqrt(max(self._squares / count - mean * mean, 0.0))
        return (value - mean) / max(deviation, _FLOOR * abs(mean), _TINY)

    def add(self, value: float, outlier: bool = False) -> None:
        """Take a value in. One that is not finite is left out.

        Args:
            value: the next one of the series.
            outlier: leave it out, unless `patience` outliers came before it.
        """
        if not math.isfinite(value):
            return
        if not outlier:
            self._outliers_in_a_row = 0
        else:
            self._outliers_in_a_row += 1
            if self._outliers_in_a_row <= self.patience:
                return
        # 1. Take the value in, and let the oldest one go.
        self.values.append(value)
        self._total += value
        self._squares += value * value
        if len(self.values) > self.window:
            oldest = self.values.popleft()
            self._total -= oldest
            self._squares -= oldest * oldest
        # 2. Sum up again from time to time: differences of large sums lose digits.
        self._values_since_sums += 1
        if self._values_since_sums >= self.window:
            self._values_since_sums = 0
            self._total = math.fsum(self.values)
            self._squares = math.fsum(v * v for v in self.values)

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        return {
            "values": list(self.values),
            "outside": self._outliers_in_a_row,
            "total": self._total,
            "squares": self._squares,
            "turns": self._values_since_sums,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.values.clear()
        self.values.extend(state["values"])
        self._total = state["total"]
        self._squares = state["squares"]
        self._outliers_in_a_row = state["outside"]
        self._values_since_sums = state["turns"]


class RollingMedian:
    """Median of the last values.

    Args:
        window: how many values to keep.
        least: values before the first median.
    """

    def __init__(self, window: int = 201, least: int = 60) -> None:
        """Begin without values; see the class for the arguments."""
        self.window = window
        self.least = least
        self.values: deque[float] = deque()
        self._sorted: list[float] = []

    def median(self) -> float | None:
        """Return the median; None while there are too few values."""
        count = len(self._sorted)
        if count < self.least:
            return None
        return (self._sorted[(count - 1) // 2] + self._sorted[count // 2]) / 2

    def add(self, value: float) -> None:
        """Take a value in. One that is not finite is left out."""
        if not math.isfinite(value):
            return
        self.values.append(value)
        insort(self._sorted, value)
        if len(self.values) > self.window:
            oldest = self.values.popleft()
            del self._sorted[bisect_left(self._sorted, oldest)]

    def state(self) -> list[float]:
        """Return what `load` goes on from."""
        return list(self.values)

    def load(self, state: Sequence[float]) -> None:
        """Go on from a state."""
        self.values = deque(state)
        self._sorted = sorted(state)


class ExponentialMoments:
    """Exponential mean and variance, as in ZClip (arXiv 2504.02507).

    A value that lies more than `clip` deviations above the mean enters clipped.

    Args:
        alpha: weight of the past at each value.
        warmup: values whose plain mean and variance come first.
        clip: deviations.

    Attributes:
        count: values so far.
        mean: their exponential mean.
    """

    def __init__(self, alpha: float = 0.97, warmup: int = 25, clip: float = 2.5) -> None:
        """Begin without values; see the class for the arguments."""
        self.alpha = alpha
        self.warmup = warmup
        self.clip = clip
        self.count = 0
        self.mean = 0.0
        self._variance = 0.0
        self._first_values: list[float] = []

    def z(self, value: float) -> float | None:
        """Return the standard deviations above the mean; None during the warm-up."""
        if self.count < self.warmup or not math.isfinite(value):
            return None
        deviation = max(math.sqrt(self._variance), _FLOOR * abs(self.mean), _TINY)
        return (value - self.mean) / deviation

    def look(self, value: float) -> float | None:
        """Return the score of a value, and take the value in."""
        z = self.z(value)
        self._take(value, z)
        return z

    def add(self, value: float) -> None:
        """Take a value in. One that is not finite is left out."""
        self._take(value, self.z(value))

    def _take(self, value: float, z: float | None) -> None:
        if not math.isfinite(value):
            return
        self.count += 1
        if self.count <= self.warmup:
            self._warm_up(value)
            return
        if z is not None and z > self.clip:
            value = self.mean + self.clip * math.sqrt(self._variance)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * value
        # The mean already holds the value, as in ZClip.
        square = (value - self.mean) ** 2
        self._variance = self.alpha * self._variance + (1 - self.alpha) * square

    def _warm_up(self, value: float) -> None:
        """Take the plain mean and variance of the first values."""
        self._first_values.append(value)
        self.mean = math.fsum(self._first_values) / self.count
        squares = math.fsum((v - self.mean) ** 2 for v in self._first_values)
        self._variance = squares / self.count

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        return {
            "count": self.count,
            "mean": self.mean,
            "variance": self._variance,
            "first": list(self._first_values),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.count = state["count"]
        self.mean = state["mean"]
        self._variance = state["variance"]
        self._first_values = list(state["first"])


class TrendDeviation(NamedTuple):
    """How far a value lies from what a trend predicted.

    Attributes:
        log_ratio: ln(value / predicted).
        error: standard error of the predicted logarithm.
    """

    log_ratio: float
    error: float


@dataclass(frozen=True)
class _LineFit:
    """A least-squares line through logarithms, and the spread of the steps around their mean."""

    mean_step: float
    mean_log: float
    slope: float
    step_squares: float

    def distance(self, step: float, logarithm: float) -> float:
        """Return how far a point lies above the line."""
        return logarithm - self.mean_log - self.slope * (step - self.mean_step)


class LogTrend:
    """A positive figure at growing steps, and the straight line through its last logarithms.

    The line is least squares on the logarithm. A slow monotone drift is what the line predicts, so
    it is no deviation from it.

    Args:
        points: that the line goes through.
        least: points before the first prediction.

    Example:
        >>> trend = LogTrend()
        >>> for step in range(8):
        ...     trend.add(step, 2.0**step)
        >>> round(math.exp(trend.departure(8, 512.0).log_ratio), 6)
        2.0
    """

    def __init__(self, points: int = 8, least: int = 6) -> None:
        """Begin without points; see the class for the arguments."""
        self.points = points
        self.least = least
        self.steps: deque[float] = deque(maxlen=points)
        self.logs: deque[float] = deque(maxlen=points)

    def departure(
        self, step: float, value: float, least_scatter: float = 0.0
    ) -> TrendDeviation | None:
        """Compare a value with the prediction.

        The error of a prediction has two parts: the scatter of the points around their line, and
        how badly a line through so few of them is known where it is extended to the next step.

        Args:
            step: of the value.
            value: to compare with the prediction.
            least_scatter: the scatter is taken to be at least this, since that of few points is
                known badly.

        Returns:
            The deviation; None for too few points, or a value without a logarithm.
        """
        count = len(self.logs)
        has_logarithm = math.isfinite(value) and value > 0
        if count < self.least or not has_logarithm:
            return None
        # 1. The scatter of the points around their line.
        line = self._fit()
        own_scatter = math.sqrt(self._residual_square(line) / max(count - 2, 1))
        scatter = max(own_scatter, least_scatter)

        # 2. The error of the line itself, which grows with the distance from the points.
        leverage = 0.0
        if line.step_squares:
            leverage = (step - line.mean_step) ** 2 / line.step_squares
        error = scatter * math.sqrt(1 + 1 / count + leverage)
        return TrendDeviation(line.distance(step, math.log(value)), error)

    def residual_square(self) -> float:
        """Return the sum of squares of the points' distances from their line."""
        return self._residual_square(self._fit())

    def _residual_square(self, line: _LineFit) -> float:
        residuals = [line.distance(x, y) for x, y in zip(self.steps, self.logs, strict=True)]
        return math.fsum(residual * residual for residual in residuals)

    def _fit(self) -> _LineFit:
        """Fit the least-squares line through the points."""
        count = len(self.logs)
        mean_step = math.fsum(self.steps) / count
        mean_log = math.fsum(self.logs) / count
        step_squares = math.fsum((x - mean_step) ** 2 for x in self.steps)
        covariance = math.fsum(
            (x - mean_step) * (y - mean_log) for x, y in zip(self.steps, self.logs, strict=True)
        )
        slope = 0.0
        if step_squares:
            slope = covariance / step_squares
        return _LineFit(mean_step, mean_log, slope, step_squares)

    def add(self, step: float, value: float) -> None:
        """Take a point in. A value without a logarithm is left out."""
        has_logarithm = math.isfinite(value) and value > 0
        if not has_logarithm:
            return
        self.steps.append(step)
        self.logs.append(math.log(value))

    def renumber(self, old: float, new: float) -> None:
        """Give the points of step `old` the number `new`."""
        for place, step in enumerate(self.steps):
            if step == old:
                self.steps[place] = new

    def state(self) -> list[list[float]]:
        """Return what `load` goes on from."""
        return [list(self.steps), list(self.logs)]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        """Go on from a state."""
        steps, logs = state
        self.steps = deque(steps, maxlen=self.points)
        self.logs = deque(logs, maxlen=self.points)
