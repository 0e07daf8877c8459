"""Series that grow by one value a step: rolling mean and deviation, rolling median, exponential
z-score, a trend.

Each looks at a new value with what it has seen *before*, then takes it in. All are plain Python,
with a cost that does not depend on how long the run is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Any

_FLOOR = 1e-3  # of the mean: below it a deviation is rounding, and a z-score has no meaning


class Rolling:
    """Mean and standard deviation of the last `window` values.

    A value that the caller calls an outlier is not taken in, or a spike would hide the next one;
    after `patience` of them in a row the level has changed and they are.
    """

    def __init__(self, window: int = 1000, least: int = 60, patience: int = 200) -> None:
        self.window, self.least, self.patience = window, least, patience
        self.values: deque[float] = deque()
        self.total = self.squares = 0.0
        self.outside = self.turns = 0

    def z(self, value: float) -> float | None:
        """Standard deviations above the mean; None while there are too few values."""
        n = len(self.values)
        if n < self.least or not math.isfinite(value):
            return None
        mean = self.total / n
        deviation = math.sqrt(max(self.squares / n - mean * mean, 0.0))
        return (value - mean) / max(deviation, _FLOOR * abs(mean), 1e-300)

    def add(self, value: float, outlier: bool = False) -> None:
        if not math.isfinite(value):
            return
        self.outside = self.outside + 1 if outlier else 0
        if outlier and self.outside <= self.patience:
            return
        self.values.append(value)
        self.total += value
        self.squares += value * value
        if len(self.values) > self.window:
            old = self.values.popleft()
            self.total -= old
            self.squares -= old * old
        self.turns += 1
        if self.turns >= self.window:  # differences of large sums lose digits
            self.turns, self.total = 0, math.fsum(self.values)
            self.squares = math.fsum(v * v for v in self.values)

    def state(self) -> dict[str, Any]:
        sums = {"total": self.total, "squares": self.squares, "turns": self.turns}
        return {"values": list(self.values), "outside": self.outside, **sums}

    def load(self, state: dict[str, Any]) -> None:
        self.values.clear()
        self.values.extend(state["values"])
        self.total, self.squares = state["total"], state["squares"]
        self.outside, self.turns = state["outside"], state["turns"]


class RollingMedian:
    """Median of the last `window` values."""

    def __init__(self, window: int = 201, least: int = 60) -> None:
        self.window, self.least = window, least
        self.values: deque[float] = deque()
        self.sorted: list[float] = []

    def median(self) -> float | None:
        n = len(self.sorted)
        if n < self.least:
            return None
        return (self.sorted[(n - 1) // 2] + self.sorted[n // 2]) / 2

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self.values.append(value)
        insort(self.sorted, value)
        if len(self.values) > self.window:
            del self.sorted[bisect_left(self.sorted, self.values.popleft())]

    def state(self) -> list[float]:
        return list(self.values)

    def load(self, state: Sequence[float]) -> None:
        self.values = deque(state)
        self.sorted = sorted(state)


class Exponential:
    """Exponential mean and variance; what is over `clip` deviations enters clipped (ZClip, arXiv
    2504.02507).
    """

    def __init__(self, alpha: float = 0.97, warmup: int = 25, clip: float = 2.5) -> None:
        self.alpha, self.warmup, self.clip = alpha, warmup, clip
        self.count, self.mean, self.variance = 0, 0.0, 0.0
        self.first: list[float] = []

    def z(self, value: float) -> float | None:
        if self.count < self.warmup or not math.isfinite(value):
            return None
        return (value - self.mean) / max(math.sqrt(self.variance), _FLOOR * abs(self.mean), 1e-300)

    def look(self, value: float) -> float | None:
        """Return the score of a value, and take the value in."""
        z = self.z(value)
        self._take(value, z)
        return z

    def add(self, value: float) -> None:
        """Take a value in."""
        self._take(value, self.z(value))

    def _take(self, value: float, z: float | None) -> None:
        if not math.isfinite(value):
            return
        self.count += 1
        if self.count <= self.warmup:
            self.first.append(value)
            self.mean = math.fsum(self.first) / self.count
            self.variance = math.fsum((v - self.mean) ** 2 for v in self.first) / self.count
            return
        if z is not None and z > self.clip:
            value = self.mean + self.clip * math.sqrt(self.variance)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * value
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (value - self.mean) ** 2

    def state(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "mean": self.mean,
            "variance": self.variance,
            "first": list(self.first),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]
        self.first = list(state["first"])


class Trend:
    """A positive figure at growing steps, and what its own straight line through the last points
    foretells.

    The line is least squares on the logarithm: a slow monotone drift is what it foretells, not a
    departure from it.
    """

    def __init__(self, points: int = 8, least: int = 6) -> None:
        self.points, self.least = points, least
        self.steps: deque[float] = deque(maxlen=points)
        self.logs: deque[float] = deque(maxlen=points)

    def departure(
        self, step: float, value: float, least_scatter: float = 0.0
    ) -> tuple[float, float] | None:
        """Return ln(value / predicted) and the standard error of the prediction; None for too few
        points.

        The error is that of a prediction: the scatter of the points around their line, and how
        badly a line through so few of them is known where it is drawn out to the next step.

        Args:
            step: of the value.
            value: to compare with the prediction.
            least_scatter: the scatter is taken to be at least this, since that of few points is
                known badly.
        """
        n = len(self.logs)
        if n < self.least or not (math.isfinite(value) and value > 0):
            return None
        mx, my, sxx, slope = self._line()
        scatter = max(math.sqrt(self.residual_square() / max(n - 2, 1)), least_scatter)
        distance = (step - mx) ** 2 / sxx if sxx else 0.0
        error = scatter * math.sqrt(1 + 1 / n + distance)
        return math.log(value) - my - slope * (step - mx), error

    def residual_square(self) -> float:
        """Return the sum of squares of the points' distances from their line."""
        mx, my, _, slope = self._line()
        rest = [y - my - slope * (x - mx) for x, y in zip(self.steps, self.logs, strict=True)]
        return math.fsum(r * r for r in rest)

    def _line(self) -> tuple[float, float, float, float]:
        """Mean step, mean logarithm, spread of the steps, and slope of the least-squares line."""
        n = len(self.logs)
        mx, my = math.fsum(self.steps) / n, math.fsum(self.logs) / n
        sxx = math.fsum((x - mx) ** 2 for x in self.steps)
        covariance = math.fsum(
            (x - mx) * (y - my) for x, y in zip(self.steps, self.logs, strict=True)
        )
        slope = covariance / sxx if sxx else 0.0
        return mx, my, sxx, slope

    def add(self, step: float, value: float) -> None:
        if math.isfinite(value) and value > 0:
            self.steps.append(step)
            self.logs.append(math.log(value))

    def state(self) -> list[list[float]]:
        return [list(self.steps), list(self.logs)]

    def load(self, state: Sequence[Sequence[float]]) -> None:
        self.steps = deque(state[0], maxlen=self.points)
        self.logs = deque(state[1], maxlen=self.points)
