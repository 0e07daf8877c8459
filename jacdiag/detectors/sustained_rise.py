"""Score a figure that stands above its own level for several steps, though no single step does."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import islice
from statistics import median
from typing import Any

SPANS = (4, 16)  # steps that a mean is taken over
CLIP = 4.9  # standard deviations that one step counts for at most: three of four stay under 8

# Three steps of a span have to be over this, or the span does no more than vote. It is the vote of
# ZClip (arXiv 2504.02507).
VOTE = 2.5

LEVEL = 201  # steps of the level, as of the rolling median of arXiv 2608.30320
MEMORY = 1000  # steps that the deviation looks back on, as in the joint detector
LEAST = 60  # steps before the first score, as in the joint detector

_LONGEST = max(SPANS)
_FLOOR = 1e-3  # share of the level below which a deviation is rounding
_TINY = 1e-300  # no division by zero, for a series of zeros
_LEAST_POSITIVE = 20  # squares above the level before their mean is used
_LEVEL_EVERY = 8  # steps between two computations of the level
_MEDIAN_ERROR = 1.25  # standard error of a median over that of a mean, of a normal distribution


class RollingMeanSquare:
    """The mean of the last squares that are positive.

    Squares of zero count for the length that is looked back on, and not for the mean.

    Attributes:
        squares: the last ones.
        positive: how many of them are positive.
    """

    def __init__(self) -> None:
        """Begin without squares."""
        self.squares: deque[float] = deque()
        self.positive = 0
        self._total = 0.0

    def mean(self) -> float:
        """Return the mean; 0 if no square is positive."""
        if not self.positive:
            return 0.0
        return max(self._total, 0.0) / self.positive

    def add(self, square: float, most: int) -> None:
        """Take a square in, and let the oldest ones go.

        Args:
            square: the next one.
            most: how many to keep.
        """
        self.squares.append(square)
        self._total += square
        if square > 0:
            self.positive += 1
        while len(self.squares) > most:
            oldest = self.squares.popleft()
            self._total -= oldest
            if oldest > 0:
                self.positive -= 1
            is_left_over_rounding = oldest > 1e6 * self._total
            if is_left_over_rounding:
                self._total = math.fsum(self.squares)


class SustainedRise:
    """z-scores of the means of the last 4 and 16 steps, compared with the level before them.

    The level is the median of the 201 values that end 16 steps ago. If it rises, it is carried
    forward with Tukey's resistant line through the medians of the outer thirds, so that a slow
    monotone drift does not count. If it falls, it is followed (the median of the last third) and
    not carried forward, since a fall may end at any step.

    The deviation is that of means of as many steps from each other. If the earlier means above
    their level have a larger one, that is taken. Neither is widened by the fall of a loss, and both
    take into account that steps depend on each other. They look back on 1,000 steps, but never on
    more than half of the run: what its beginning was like is soon forgotten.

    Attributes:
        count: finite values so far.
    """

    def __init__(self) -> None:
        """Begin without values."""
        self.count = 0
        self._recent: deque[float] = deque(maxlen=2 * _LONGEST)
        self._before: deque[float] = deque(maxlen=LEVEL)  # values that are over 16 steps old
        spans = (1, *SPANS)
        # squares of the differences of successive means, by span
        self._jumps = {span: RollingMeanSquare() for span in spans}
        # squares of means above their level, by span, and those that are still too recent to count
        self._above = {span: RollingMeanSquare() for span in spans}
        self._pending: dict[int, deque[float]] = {span: deque() for span in spans}
        # the count that the level was computed at, and the level
        self._level: tuple[int, float] = (-_LEVEL_EVERY, 0.0)

    @property
    def ready(self) -> bool:
        """Whether there are enough values for a score."""
        return self.count >= LEAST + _LONGEST

    def z(self, value: float) -> dict[int, float]:
        """Score the means that end with a value.

        Args:
            value: the next one of the series. It is not taken in.

        Returns:
            Span -> standard deviations of its mean; empty while there are too few values.
        """
        if not self.ready or not math.isfinite(value):
            return {}
        # 1. How far each of the last steps lies off the level, clipped.
        level = self.level()
        deviation = self._deviation(1)
        most = CLIP * deviation
        steps = [value, *islice(reversed(self._recent), _LONGEST - 1)]
        off = [min(max(step - level, -most), most) for step in steps]

        # 2. The mean over each span. One corrupted batch, or two, do no more than vote.
        scores = {}
        for span in SPANS:
            score = math.fsum(off[:span]) / span / self._deviation(span)
            third_largest = sorted(off[:span])[-3] / deviation
            if third_largest > VOTE:
                scores[span] = score
            else:
                scores[span] = min(score, VOTE)
        return scores

    def level(self) -> float:
        """Return the level before the last 16 steps, carried forward if it rises."""
        computed_at, level = self._level
        if self.count - computed_at >= _LEVEL_EVERY:
            level = self._compute_level()
            self._level = (self.count, level)
        return level

    def _compute_level(self) -> float:
        values = list(self._before)
        third = len(values) // 3
        last = median(values[-third:])
        middle = median(values)
        rise = last - median(values[:third])
        if rise > 0:
            steps_ahead = len(values) / 2 + _LONGEST
            return middle + rise * steps_ahead / (len(values) - third)
        # A fall counts from two standard errors of two such medians.
        error = _MEDIAN_ERROR * math.sqrt(self._jumps[1].mean() / third)
        if -rise > 2 * error:
            return last
        return middle

    def _deviation(self, span: int) -> float:
        """Return the standard deviation of a mean over some steps."""
        square = self._jumps[span].mean() / 2
        above = self._above[span]
        if above.positive >= _LEAST_POSITIVE:
            square = max(square, above.mean())
        return max(math.sqrt(square), _FLOOR * abs(self.level()), _TINY)

    def add(self, value: float, outlier: bool = False) -> None:
        """Take a value in. One that is not finite is left out.

        Args:
            value: the next one of the series.
            outlier: take it into the level, and not into the deviation.
        """
        if not math.isfinite(value):
            return
        # 1. What is over 16 steps old belongs to the level.
        if len(self._recent) >= _LONGEST:
            self._before.append(self._recent[-_LONGEST])
        self._recent.append(value)
        self.count += 1
        # 2. An outlier would widen the deviation, and hide the next one.
        if not outlier:
            self._add_to_deviations()

    def _add_to_deviations(self) -> None:
        most = max(LEAST, min(MEMORY, self.count // 2))
        values = list(self._recent)
        level = self.level() if self.ready else math.inf
        for span in (1, *SPANS):
            if len(values) < 2 * span:
                continue
            # 1. The jump from the mean before to the last mean.
            last = math.fsum(values[-span:]) / span
            earlier = math.fsum(values[-2 * span : -span]) / span
            self._jumps[span].add((last - earlier) ** 2, most)
            # 2. The distance above the level counts later, or a rise would hide itself.
            pending = self._pending[span]
            pending.append(max(last - level, 0.0) ** 2)
            if len(pending) > 2 * _LONGEST:
                self._above[span].add(pending.popleft(), most)

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        return {
            "recent": list(self._recent),
            "before": list(self._before),
            "count": self.count,
            "level": list(self._level),
            "late": {str(span): list(squares) for span, squares in self._pending.items()},
            "jumps": _squares_by_span(self._jumps),
            "above": _squares_by_span(self._above),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Call it on a new object."""
        # 1. The values and their level.
        self._recent.extend(state["recent"])
        self._before.extend(state["before"])
        self.count = state["count"]
        computed_at, level = state["level"]
        self._level = (computed_at, level)

        # 2. Values that are still too recent to count.
        for span, pending in self._pending.items():
            pending.extend(state["late"][str(span)])

        # 3. The squares of each span, whose sums are taken again.
        for span in (1, *SPANS):
            for square in state["jumps"][str(span)]:
                self._jumps[span].add(square, MEMORY)
            for square in state["above"][str(span)]:
                self._above[span].add(square, MEMORY)


def _squares_by_span(means: Mapping[int, RollingMeanSquare]) -> dict[str, list[float]]:
    return {str(span): list(mean.squares) for span, mean in means.items()}
