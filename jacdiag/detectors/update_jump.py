"""Judge JD506: a sub-layer whose updates double compared with their own median."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from jacdiag.rules.thresholds import Thresholds

LEAST = 8
"""Samples of one sub-layer before it is judged."""
MOST = 32
"""Samples that the median of a sub-layer is taken over."""

_SAME = 1e-6  # relative difference of two learning rates that are equal


class UpdateJump:
    """Update norm / weight norm, divided by the learning rate, per sub-layer.

    It does not fire while the learning rate moves (warm-up, decay), because Adam's update follows
    the rate late. It does not fire for `LEAST` samples of a sub-layer after a resume either, when
    the optimizer's averages may be fresh.

    Args:
        thresholds: with the limit of "update_jump".
    """

    def __init__(self, thresholds: Thresholds) -> None:
        """Begin without samples; see the class for the arguments."""
        self.limits = thresholds
        self.samples: dict[str, deque[float]] = {}
        self.lr = math.nan

    def add(self, name: str, ratio: float, lr: float) -> bool:
        """Take one sample and return whether it is a jump.

        Args:
            name: of the sub-layer.
            ratio: update norm / weight norm.
            lr: learning rate of the step.
        """
        if not (math.isfinite(ratio) and lr > 0):
            return False
        # 1. Begin again whenever the learning rate has moved. The first one is compared with nan.
        is_same_rate = abs(lr - self.lr) <= _SAME * abs(lr)
        if not is_same_rate:
            self.lr = lr
            self.samples.clear()
            return False
        # 2. Compare with the sub-layer's own median. A jump stays out of it.
        earlier = self.samples.setdefault(name, deque(maxlen=MOST))
        value = ratio / lr
        if self._is_jump(value, earlier):
            return True
        earlier.append(value)
        return False

    def _is_jump(self, value: float, earlier: deque[float]) -> bool:
        limit = self.limits.limits("update_jump").info
        if limit is None or len(earlier) < LEAST:
            return False
        return value > limit * median(earlier)

    def most_samples(self) -> int:
        """Return how many samples the sub-layer has that has the most of them."""
        return max(map(len, self.samples.values()), default=0)

    def mute(self) -> None:
        """Drop all samples."""
        self.samples.clear()

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        samples = {name: list(values) for name, values in self.samples.items()}
        return {"lr": self.lr, "samples": samples}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.lr = state["lr"]
        self.samples = {
            name: deque(values, maxlen=MOST) for name, values in state["samples"].items()
        }
