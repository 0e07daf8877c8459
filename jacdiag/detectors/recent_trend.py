"""Score a value by the line through the last steps, which a young run has too.

The mean and the standard deviation of the last 1,000 steps hold the entire first fall of a loss. A
corrupted batch at step 200 then lies within two deviations of them. Here a value is compared with
the line through the last 48 steps. Both the line and the spread around it are made of medians, so
that a few steps that stand out change neither.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW = 48
"""Steps that the line goes through.

They are a multiple of three, and half of the 80 steps after which a run is guarded.
"""

LEAST = 60
"""Steps before the first score, as the joint detector has it (survey of public runs)."""

# How often a Gaussian value lies above 6, 7 and 8 such deviations, of 4 million draws with a window
# of 48: 53, 5 and 2.
_TO_SIGMA = 1.4826  # median absolute deviation of a Gaussian to its standard deviation
_FLOOR = 1e-3  # of the level: below it a deviation is rounding


@dataclass(frozen=True)
class TrendLine:
    """A line through the last values, carried forward by one step.

    Attributes:
        level: the median of the last third: what is usual now.
        expected: the line's value at the next step.
        deviation: standard deviation around the line.
    """

    level: float
    expected: float
    deviation: float


class RecentTrend:
    """The last 48 values of a figure, and how far a new one lies above their line.

    The line is Tukey's resistant line: its slope goes through the medians of the outer thirds. The
    deviation is the median absolute deviation from the line, scaled to that of a Gaussian.

    Args:
        logarithm: compare logarithms. Gradient norms scatter by a factor, not by a distance.

    Example:
        >>> recent = RecentTrend()
        >>> for step in range(60):
        ...     recent.add(5.0 - 0.05 * step + 0.1 * (step % 3))
        >>> round(recent.z(2.1)), round(recent.z(4.0)) > 8
        (0, True)
    """

    def __init__(self, *, logarithm: bool = False) -> None:
        """Begin without values; see the class for the arguments."""
        self.logarithm = logarithm
        self.values: deque[float] = deque(maxlen=WINDOW)
        self.count = 0
        self._line: TrendLine | None = None

    @property
    def ready(self) -> bool:
        """Whether there are enough values for a score."""
        return self.count >= LEAST

    def z(self, value: float) -> float | None:
        """Return how many deviations a value lies above the line.

        Args:
            value: the next one of the figure. It is not taken in.

        Returns:
            The score; None while there are too few values, and for a value that is not finite or
            has no logarithm.
        """
        scaled = self._scaled(value)
        line = self.line()
        if scaled is None or line is None:
            return None
        return (scaled - line.expected) / line.deviation

    def usual(self) -> float | None:
        """Return the usual value in the figure's unit; None while there are too few values."""
        line = self.line()
        if line is None:
            return None
        if self.logarithm:
            return math.exp(line.level)
        return line.level

    def line(self) -> TrendLine | None:
        """Return the line through the last values; None while there are too few."""
        if not self.ready:
            return None
        if self._line is None:
            # A distance of logarithms is relative already.
            floor = 0.0 if self.logarithm else _FLOOR
            self._line = fit_line(self.values, floor=floor)
        return self._line

    def add(self, value: float) -> None:
        """Take a value in. One that is not finite is left out."""
        scaled = self._scaled(value)
        if scaled is None:
            return
        self.values.append(scaled)
        self.count += 1
        self._line = None

    def _scaled(self, value: float) -> float | None:
        """Return a value as it is compared; None if it cannot be."""
        if not math.isfinite(value):
            return None
        if not self.logarithm:
            return value
        if value <= 0:
            return None
        return math.log(value)

    def state(self) -> dict[str, object]:
        """Return what `load` goes on from."""
        return {"values": list(self.values), "count": self.count}

    def load(self, state: dict[str, object]) -> None:
        """Go on from a state."""
        values: Sequence[float] = state["values"]  # type: ignore[assignment]
        self.values = deque(values, maxlen=WINDOW)
        self.count = int(state["count"])  # type: ignore[call-overload]
        self._line = None


def fit_line(values: Sequence[float] | deque[float], floor: float) -> TrendLine:
    """Fit Tukey's resistant line (Exploratory Data Analysis, 1977).

    Args:
        values: at equal distances, six or more.
        floor: least deviation, as a share of the expected value.

    Returns:
        The line, carried forward to the step after the last value.
    """
    points = list(values)
    count = len(points)
    third = count // 3
    # 1. Take the slope through the medians of the outer thirds.
    last = median(points[-third:])
    slope = (last - median(points[:third])) / (count - third)
    # 2. Take the height, and the spread around the line.
    middle = (count - 1) / 2
    levelled = [value - slope * (place - middle) for place, value in enumerate(points)]
    height = median(levelled)
    spread = _TO_SIGMA * median([abs(value - height) for value in levelled])
    # 3. Carry the line forward to the next step.
    expected = height + slope * (count - middle)
    least = floor * abs(expected) if floor else _FLOOR
    return TrendLine(last, expected, max(spread, least, 1e-300))
