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
    x = np.array([point[0] for point in points], dtype=float)
    values = np.array([point[1] for point in points], dtype=float)
    finite = np.isfinite(values)
    return Series(x, np.where(finite, values, np.nan), x[~finite])


def column(run: RunLog, key: str) -> Series:
    """Return a figure of the steps; steps at which it was not measured are left out."""
    return series(
        [(row["step"], number(row[key])) for row in run.steps if row.get(key) is not None]
    )


def gradient(run: RunLog) -> Series:
    """Return the gradient norm before clipping where the loop passed it.

    The log has null for a norm that is nan, and says so by the norm after clipping.
    """
    points = []
    for row in run.steps:
        before, after = row.get("grad_norm"), row.get("grad_norm_post")
        if before is not None:
            points.append((row["step"], number(before)))
        elif after is not None and not math.isfinite(number(after)):
            points.append((row["step"], number(after)))
    passed = any(row.get("grad_norm") is not None for row in run.steps)
    return series(points if passed else [])


def clip_share(run: RunLog) -> Series:
    """Return 100 for a step that was clipped and 0 for any other.

    The mean is the share in percent.
    """
    return series(
        [
            (row["step"], 100.0 * bool(row["clipped"]))
            for row in run.steps
            if row.get("clipped") is not None
        ]
    )


def update_ratio(run: RunLog) -> Series:
    """Return update norm over weight norm, of the sub-layer whose turn it was at each step."""
    points = []
    for row in run.steps:
        update = row.get("update")
        if update and update.get("ratio") is not None:
            points.append((row["step"], number(update["ratio"])))
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
        return Band(*(part.within(first, last) for part in (self.low, self.middle, self.high)))


def band(rows: Sequence[Mapping[str, Any]], figure: str) -> Band:
    """Return a figure of the statistics or of the probes."""
    low, middle, high = [], [], []
    for row in rows:
        values = [
            number(value)
            for value in (row.get("figures") or {}).get(figure, {}).values()
            if value is not None
        ]
        finite = [value for value in values if math.isfinite(value)]
        if not values:
            continue
        step = row["step"]
        worst = max(values) if len(finite) == len(values) else math.nan
        low.append((step, min(finite, default=math.nan)))
        middle.append((step, float(np.median(finite)) if finite else math.nan))
        high.append((step, worst))
    return Band(series(low), series(middle), series(high))
