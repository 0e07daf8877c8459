"""A figure that stands above its own recent level for some steps on end, though no single step of
it stands out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import islice
from statistics import median
from typing import Any

SPANS = (4, 16)  # steps that a mean is taken over
CLIP = 4.9  # standard deviations that one step counts for at most: three of four stay under 8
# ZClip (arXiv 2504.02507): three steps of a span have to be over it, or the span does no more than
# vote
VOTE = 2.5
# steps: 201 of the rolling median of arXiv 2608.30320, 1,000 and 60 of the joint
LEVEL, MEMORY, LEAST = 201, 1000, 60
_FLOOR = 1e-3  # of the level: below it a deviation is rounding
_FEW = 20
_EVERY = 8  # steps between two looks at the level


class Trail:
    """The mean of the last squares, of how many the caller says; those of 0 are in the length and
    not in the mean.
    """

    def __init__(self) -> None:
        self.squares: deque[float] = deque()
        self.total, self.positive = 0.0, 0

    def mean(self) -> float:
        return max(self.total, 0.0) / self.positive if self.positive else 0.0

    def add(self, square: float, most: int) -> None:
        self.squares.append(square)
        self.total, self.positive = self.total + square, self.positive + (square > 0)
        while len(self.squares) > most:
            old = self.squares.popleft()
            self.total, self.positive = self.total - old, self.positive - (old > 0)
            if old > 1e6 * self.total:  # what is left is the rounding of what has gone
                self.total = math.fsum(self.squares)


class Lift:
    """z-scores of the means of the last 4 and 16 steps against the level before them.

    The level is the median of the 201 values that end 16 steps ago. A rise of it is carried forward
    (Tukey's resistant line through the medians of the outer thirds), so that a slow monotone drift
    is no departure; a fall is followed (the median of the last third) and not carried on, since it
    may end at any step. The deviation is that of means of as many steps from each other and, where
    it is larger, of earlier means above their level: neither sees the fall of a loss, both see that
    steps hang together. Looked back on are 1,000 steps, but never more than half of the run: what
    its beginning was like is soon forgotten.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=2 * max(SPANS))
        self.before: deque[float] = deque(maxlen=LEVEL)
        self.jumps = {span: Trail() for span in (1, *SPANS)}
        self.above = {span: Trail() for span in (1, *SPANS)}
        self._late: dict[int, deque[float]] = {span: deque() for span in (1, *SPANS)}
        self.count = 0
        self._level: tuple[int, float] = (-_EVERY, 0.0)

    @property
    def ready(self) -> bool:
        return self.count >= LEAST + max(SPANS)

    def z(self, value: float) -> dict[int, float]:
        """Span -> standard deviations of the mean that ends with this value; empty while there are
        too few values.
        """
        if not self.ready or not math.isfinite(value):
            return {}
        level, one = self.level(), self._deviation(1)
        steps = [value, *islice(reversed(self.recent), max(SPANS) - 1)]
        off = [min(max(v - level, -CLIP * one), CLIP * one) for v in steps]
        found = {}
        for span in SPANS:
            score = math.fsum(off[:span]) / span / self._deviation(span)
            third = sorted(off[:span])[-3] / one  # one corrupted batch, or two, are no lift
            found[span] = score if third > VOTE else min(score, VOTE)
        return found

    def level(self) -> float:
        """What the figure was before the last 16 steps, carried forward where it rises."""
        if self.count - self._level[0] >= _EVERY:
            values = list(self.before)
            third = len(values) // 3
            middle, rise = median(values), median(values[-third:]) - median(values[:third])
            if rise > 0:
                middle += rise * (len(values) / 2 + max(SPANS)) / (len(values) - third)
            # two standard errors of two such medians
            elif -rise > 2 * 1.25 * math.sqrt(self.jumps[1].mean() / third):
                middle = median(values[-third:])
            self._level = (self.count, middle)
        return self._level[1]

    def _deviation(self, span: int) -> float:
        square, above = self.jumps[span].mean() / 2, self.above[span]
        if above.positive >= _FEW:
            square = max(square, above.mean())
        return max(math.sqrt(square), _FLOOR * abs(self.level()), 1e-300)

    def add(self, value: float, outlier: bool = False) -> None:
        """Takes a value in; one that the caller calls an outlier is in the level, and not in the
        deviation.
        """
        if not math.isfinite(value):
            return
        if len(self.recent) >= max(SPANS):
            self.before.append(self.recent[-max(SPANS)])
        self.recent.append(value)
        self.count += 1
        if outlier:
            return
        most = max(LEAST, min(MEMORY, self.count // 2))
        values, level = list(self.recent), self.level() if self.ready else math.inf
        for span in (1, *SPANS):
            if len(values) >= 2 * span:
                last, earlier = (
                    math.fsum(values[-span:]) / span,
                    math.fsum(values[-2 * span : -span]) / span,
                )
                self.jumps[span].add((last - earlier) ** 2, most)
                self._late[span].append(max(last - level, 0.0) ** 2)
                if len(self._late[span]) > 2 * max(SPANS):  # a lift is not what it is measured by
                    self.above[span].add(self._late[span].popleft(), most)

    def state(self) -> dict[str, Any]:
        trails = {
            name: {str(span): [*trail.squares] for span, trail in trails.items()}
            for name, trails in (("jumps", self.jumps), ("above", self.above))
        }
        own = {
            "recent": [*self.recent],
            "before": [*self.before],
            "count": self.count,
            "level": [*self._level],
        }
        return {**own, "late": {str(span): [*late] for span, late in self._late.items()}, **trails}

    def load(self, state: Mapping[str, Any]) -> None:
        self.recent.extend(state["recent"])
        self.before.extend(state["before"])
        self.count, self._level = state["count"], (state["level"][0], state["level"][1])
        for span, late in self._late.items():
            late.extend(state["late"][str(span)])
        for name, trails in (("jumps", self.jumps), ("above", self.above)):
            for span, trail in trails.items():
                for square in state[name][str(span)]:
                    trail.add(square, MEMORY)
