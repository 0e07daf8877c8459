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

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

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
        # the values that are expected next, as they are compared, each with the line behind it
        self._foreseen: deque[tuple[float, TrendLine]] = deque()

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
            self._line = fit_line(self.values, floor=self._floor)
        return self._line

    def add(self, value: float) -> None:
        """Take a value in. One that is not finite is left out."""
        scaled = self._scaled(value)
        if scaled is None:
            return
        self.values.append(scaled)
        self.count += 1
        self._line = None

        # A value that was not expected makes the lines behind it wrong.
        if self._foreseen:
            expected, line = self._foreseen.popleft()
            if expected == scaled:
                self._line = line
            else:
                self._foreseen.clear()

    def foresee(self, values: Sequence[float]) -> None:
        """Fit the lines that come next in one go; they are those that are fitted one by one.

        Args:
            values: that are going to be added, in order. Those that are not are no fault.
        """
        self._foreseen.clear()
        coming = [scaled for scaled in map(self._scaled, values) if scaled is not None]
        is_worth_it = len(coming) > 1 and self.count + 1 >= LEAST
        if not is_worth_it:
            return
        series = np.array([*self.values, *coming])
        windows = np.lib.stride_tricks.sliding_window_view(series, WINDOW)
        lines = fit_lines(windows[-len(coming) :], floor=self._floor)
        self._foreseen.extend(zip(coming, lines, strict=True))

    @property
    def _floor(self) -> float:
        """The least deviation, as a share of the expected value."""
        # A distance of logarithms is relative already.
        return 0.0 if self.logarithm else _FLOOR

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
        self._foreseen.clear()


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


def fit_lines(windows: Floats, floor: float) -> list[TrendLine]:
    """Fit the lines of several series at once, each to the last bit as `fit_line` does.

    Args:
        windows: one series a row, (series, values).
        floor: least deviation, as a share of the expected value.
    """
    count = windows.shape[1]
    third = count // 3
    # 1. Take the slopes through the medians of the outer thirds.
    last = _medians(windows[:, -third:])
    slopes = (last - _medians(windows[:, :third])) / (count - third)
    # 2. Take the heights, and the spreads around the lines.
    middle = (count - 1) / 2
    levelled = windows - slopes[:, None] * (np.arange(count) - middle)
    heights = _medians(levelled)
    spreads = _TO_SIGMA * _medians(np.abs(levelled - heights[:, None]))
    # 3. Carry the lines forward to the next step.
    expected = heights + slopes * (count - middle)
    lines: list[TrendLine] = []
    for level, value, spread in zip(
        last.tolist(), expected.tolist(), spreads.tolist(), strict=True
    ):
        least = floor * abs(value) if floor else _FLOOR
        lines.append(TrendLine(level, value, max(spread, least, 1e-300)))
    return lines


def _medians(rows: Floats) -> Floats:
    """Return the median of each row."""
    ordered = np.sort(rows, axis=1)
    count = ordered.shape[1]
    if count % 2:
        return ordered[:, count // 2]
    # As `statistics.median` has it, to the last bit.
    return (ordered[:, count // 2 - 1] + ordered[:, count // 2]) / 2
