"""What the picture of a run draws, as plain arrays: one series per figure, smoothed and thinned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jacdiag.records.run_log import RunLog, number

Array = NDArray[np.float64]
_NORMAL = 1.4826  # median absolute deviation to standard deviation, of a normal distribution
_PEAK = 8.0  # usual deviations that a peak stands above the mean
_LEAST_PEAK = 0.2  # share of the mean that it stands above it
_MOST_POINTS = 2000  # per line: more than a picture has columns


@dataclass(frozen=True)
class Series:
    """A figure over steps.

    Attributes:
        x: steps, ascending.
        y: values; nan where there is none, and where it is not finite.
        lost: steps at which the figure was measured and is not finite.
    """

    x: Array
    y: Array
    lost: Array

    @property
    def any(self) -> bool:
        """Whether there is something to draw."""
        return bool(np.isfinite(self.y).any()) or self.lost.size > 0

    def within(self, first: float, last: float) -> Series:
        """Return the part between two steps, both included."""
        inside = (self.x >= first) & (self.x <= last)
        lost = self.lost[(self.lost >= first) & (self.lost <= last)]
        return Series(self.x[inside], self.y[inside], lost)

    def smoothed(self, window: int) -> Series:
        """Return the mean of the last `window` values that are finite; nan if there is none."""
        if window <= 1 or not self.y.size:
            return self
        finite = np.isfinite(self.y)
        sums = np.concatenate([[0.0], np.cumsum(np.where(finite, self.y, 0.0))])
        counts = np.concatenate([[0], np.cumsum(finite)])
        ends = np.arange(1, self.y.size + 1)
        begins = np.maximum(ends - window, 0)
        number_of = counts[ends] - counts[begins]
        means = (sums[ends] - sums[begins]) / np.maximum(number_of, 1)
        return Series(self.x, np.where(finite, means, np.nan), self.lost)

    def peaks_over(self, mean: Series, *, logarithm: bool) -> Series:
        """Return the values that stand far above a mean.

        They are above it by eight times the usual deviation from it, and by a fifth of it.

        Args:
            mean: at the same steps.
            logarithm: compare logarithms, as of a norm; values that are not above 0 are left out.
        """
        # 1. How far each value is above the mean.
        known = np.isfinite(self.y) & np.isfinite(mean.y)
        if logarithm:
            known &= (np.nan_to_num(self.y) > 0) & (np.nan_to_num(mean.y) > 0)
        values, means = self.y[known], mean.y[known]
        above = values - means
        if logarithm:
            above = np.log(values) - np.log(means)
        if not above.size:
            return Series(self.x[known], values, np.array([]))

        # 2. What is far beyond the usual: the median, so that peaks do not count.
        usual = _NORMAL * float(np.median(np.abs(above)))
        is_peak = (above > _PEAK * usual) & (values - means > _LEAST_PEAK * np.abs(means))
        return Series(self.x[known][is_peak], values[is_peak], np.array([]))

    def largest(self, most: int) -> Series:
        """Return the points with the largest values, at most a given count, in their order."""
        if self.y.size <= most:
            return self
        chosen = np.sort(np.argsort(self.y)[-most:])
        return Series(self.x[chosen], self.y[chosen], self.lost)

    def thinned(self, most: int = _MOST_POINTS) -> Series:
        """Return at most a given count of points.

        Of each share of the steps the smallest and the largest value are kept.

        A spike of one step stays, however long the run is.
        """
        size = self.y.size
        if size <= most:
            return self
        shares = np.array_split(np.arange(size), most // 2)
        chosen: list[int] = []
        for share in shares:
            values = self.y[share]
            if not np.isfinite(values).any():
                chosen.append(int(share[0]))
                continue
            ends = {int(share[np.nanargmin(values)]), int(share[np.nanargmax(values)])}
            chosen += sorted(ends)
        return Series(self.x[chosen], self.y[chosen], self.lost)

    def sampled(self, most: int = _MOST_POINTS) -> Series:
        """Return at most so many points, evenly chosen: a cloud of dots keeps its density."""
        every = max(-(-self.y.size // most), 1)
        return Series(self.x[::every], self.y[::every], self.lost)


def series(points: Sequence[tuple[float, float]]) -> Series:
    """Build a series of (step, value); a value that is inf or nan is one that was lost."""
    steps, values = [], []
    for step, value in points:
        steps.append(step)
        values.append(value)
    x, y = np.array(steps, dtype=float), np.array(values, dtype=float)
    finite = np.isfinite(y)
    return Series(x, np.where(finite, y, np.nan), x[~finite])


def column(run: RunLog, key: str) -> Series:
    """Return a figure of the steps; steps at which it was not measured are left out."""
    points = []
    for row in run.steps:
        value = row.get(key)
        if value is not None:
            points.append((row["step"], number(value)))
    return series(points)


def gradient(run: RunLog) -> Series:
    """Return the gradient norm before clipping where the loop passed it.

    The log has null for a norm that is nan, and says so by the norm after clipping.
    """
    points = []
    was_passed = False
    for row in run.steps:
        before, after = row.get("grad_norm"), row.get("grad_norm_post")
        # 1. The norm that the loop passed.
        if before is not None:
            was_passed = True
            points.append((row["step"], number(before)))
            continue

        # 2. A norm that was lost.
        is_lost = after is not None and not math.isfinite(number(after))
        if is_lost:
            points.append((row["step"], number(after)))

    # 3. Without a norm before clipping, those after it belong to another curve.
    if not was_passed:
        return series([])
    return series(points)


def clip_share(run: RunLog) -> Series:
    """Return 100 for a step that was clipped and 0 for any other.

    The mean is the share in percent.
    """
    points = []
    for row in run.steps:
        was_clipped = row.get("clipped")
        if was_clipped is not None:
            points.append((row["step"], 100.0 * bool(was_clipped)))
    return series(points)


def update_ratio(run: RunLog) -> Series:
    """Return update norm over weight norm, of the sub-layer whose turn it was at each step."""
    points = []
    for row in run.steps:
        update = row.get("update") or {}
        ratio = update.get("ratio")
        # A step may have no turn, and an update no ratio to a weight of 0.
        if ratio is not None:
            points.append((row["step"], number(ratio)))
    return series(points)


@dataclass(frozen=True)
class Band:
    """A figure of all sub-layers over steps: its smallest, median and largest value."""

    low: Series
    middle: Series
    high: Series

    @property
    def any(self) -> bool:
        """Whether there is something to draw."""
        return self.middle.any

    def within(self, first: float, last: float) -> Band:
        """Return the part between two steps, both included."""
        return Band(
            self.low.within(first, last),
            self.middle.within(first, last),
            self.high.within(first, last),
        )


def band(rows: Sequence[Mapping[str, Any]], figure: str) -> Band:
    """Return a figure of the statistics or of the probes."""
    low, middle, high = [], [], []
    for row in rows:
        # 1. The values of all sub-layers.
        values = _values_of(row, figure)
        if not values:
            continue
        finite = [value for value in values if math.isfinite(value)]

        # 2. The smallest and the median of those that are finite.
        smallest, median = math.nan, math.nan
        if finite:
            smallest, median = min(finite), float(np.median(finite))

        # 3. The largest is lost with any of them.
        largest = math.nan
        if len(finite) == len(values):
            largest = max(values)

        step = row["step"]
        low.append((step, smallest))
        middle.append((step, median))
        high.append((step, largest))
    return Band(series(low), series(middle), series(high))


def _values_of(row: Mapping[str, Any], figure: str) -> list[float]:
    """Return the values of a figure that a line of the log holds, over its sub-layers."""
    by_name = (row.get("figures") or {}).get(figure, {})
    return [number(value) for value in by_name.values() if value is not None]
