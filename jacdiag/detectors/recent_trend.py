"""How far a value lies above the line through the last steps: a yardstick that a young run has,
too.

The mean and the standard deviation of the last 1,000 steps hold the whole first fall of a loss. A
corrupted batch at step 200 then lies within two deviations of them. Here the last 48 steps are
compared with a line of their own, and both the line and the spread around it are made of medians,
so that a few steps that stand out change neither.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW = 48
"""Steps that the line goes through: half of the 80 steps from which on a run is guarded, and a
multiple of three.
"""

LEAST = 60
"""Steps before the first score, as the joint detector has it (survey of public runs)."""

# How often a Gaussian value lies above 6, 7 and 8 such deviations, of 4 million draws with a window
# of 48: 53, 5 and 2.
_TO_SIGMA = 1.4826  # median absolute deviation of a Gaussian to its standard deviation
_FLOOR = 1e-3  # of the level: below it a deviation is rounding


@dataclass(frozen=True)
class Line:
    """A line through the last values, carried forward by one step.

    Attributes:
        level: the median of the last third: what is usual now.
        expected: the line's value at the next step.
        deviation: standard deviation around the line.
    """

    level: float
    expected: float
    deviation: float


class Recent:
    """The last 48 values of a figure, and how far a new one lies above their line.

    The line is Tukey's resistant line: its slope goes through the medians of the outer thirds. The
    deviation is the median absolute deviation from the line, scaled to that of a Gaussian.

    Args:
        logarithm: compare logarithms. Gradient norms scatter by a factor, not by a distance.

    Example:
        >>> recent = Recent()
        >>> for step in range(60):
        ...     recent.add(5.0 - 0.05 * step + 0.1 * (step % 3))
        >>> round(recent.z(2.1)), round(recent.z(4.0)) > 8
        (0, True)
    """

    def __init__(self, *, logarithm: bool = False) -> None:
        self.logarithm = logarithm
        self.values: deque[float] = deque(maxlen=WINDOW)
        self.count = 0
        self._line: Line | None = None

    @property
    def ready(self) -> bool:
        """Whether there are values enough for a score."""
        return self.count >= LEAST

    def z(self, value: float) -> float | None:
        """Return the deviations that a value lies above the line; None without a line or for a
        value without one.
        """
        scaled = self._scaled(value)
        line = self.line()
        if scaled is None or line is None:
            return None
        return (scaled - line.expected) / line.deviation

    def usual(self) -> float | None:
        """Return what is usual now, in the unit of the figure; None while there are too few
        values.
        """
        line = self.line()
        if line is None:
            return None
        return math.exp(line.level) if self.logarithm else line.level

    def line(self) -> Line | None:
        """Return the line through the last values; None while there are too few."""
        if not self.ready:
            return None
        if self._line is None:
            self._line = fit_line(self.values, floor=0.0 if self.logarithm else _FLOOR)
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
        if not math.isfinite(value):
            return None
        if not self.logarithm:
            return value
        return math.log(value) if value > 0 else None

    def state(self) -> dict[str, object]:
        """Return what `load` goes on from."""
        return {"values": list(self.values), "count": self.count}

    def load(self, state: dict[str, object]) -> None:
        """Go on from a state."""
        values: Sequence[float] = state["values"]  # type: ignore[assignment]
        self.values = deque(values, maxlen=WINDOW)
        self.count = int(state["count"])  # type: ignore[call-overload]
        self._line = None


def fit_line(values: Sequence[float] | deque[float], floor: float) -> Line:
    """Fit Tukey's resistant line.

    Args:
        values: at equal distances, six or more.
        floor: least deviation, as a share of the expected value.

    Returns:
        The line, carried forward to the step after the last value.
    """
    points = list(values)
    count = len(points)
    third = count // 3
    # 1. The slope, through the medians of the outer thirds.
    last = median(points[-third:])
    slope = (last - median(points[:third])) / (count - third)
    # 2. The height, and the spread around the line.
    middle = (count - 1) / 2
    level = [value - slope * (place - middle) for place, value in enumerate(points)]
    height = median(level)
    spread = _TO_SIGMA * median([abs(value - height) for value in level])
    # 3. The next step.
    expected = height + slope * (count - middle)
    least = floor * abs(expected) if floor else _FLOOR
    return Line(last, expected, max(spread, least, 1e-300))
