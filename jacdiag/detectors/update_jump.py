"""JD506: a sub-layer whose updates double against its own median."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from jacdiag.rules.thresholds import Thresholds

LEAST, MOST = 8, 32  # samples of one sub-layer before it speaks, and that its median looks back on
_SAME = 1e-6


class UpdateJump:
    """Update norm / weight norm, divided by the learning rate, per sub-layer.

    Silent while the learning rate moves (warm-up, decay: Adam's update follows it late) and for
    `LEAST` samples of a sub-layer after a resume, when the optimiser's averages may be fresh.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.limits = thresholds
        self.samples: dict[str, deque[float]] = {}
        self.lr = math.nan

    def add(self, name: str, ratio: float, lr: float) -> bool:
        """Takes one sample; returns whether it is a jump."""
        if not (math.isfinite(ratio) and lr > 0):
            return False
        if not abs(lr - self.lr) <= _SAME * abs(lr):
            self.lr = lr
            self.samples.clear()
            return False
        seen = self.samples.setdefault(name, deque(maxlen=MOST))
        limit = self.limits.limits("update_jump").info
        value = ratio / lr
        jump = limit is not None and len(seen) >= LEAST and value > limit * median(seen)
        if not jump:
            seen.append(value)
        return jump

    def mute(self) -> None:
        self.samples.clear()

    def state(self) -> dict[str, Any]:
        return {"lr": self.lr, "samples": {name: list(seen) for name, seen in self.samples.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        self.lr = state["lr"]
        self.samples = {name: deque(seen, maxlen=MOST) for name, seen in state["samples"].items()}
