"""Made-up series of a run's figures, and live rules that have seen them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.rules.thresholds import load_thresholds

LIMITS = load_thresholds()


def healthy(steps: int, seed: int = 0, start: int = 0) -> Iterator[StepFigures]:
    """A loss that falls as losses do, with scatter; a gradient norm with a heavy tail."""
    source = random.Random(seed)
    for step in range(start, start + steps):
        loss = 2.0 + 3.0 * (1 + step / 50) ** -0.5 + source.gauss(0, 0.05)
        gradient = 0.5 + 2.0 * (1 + step / 20) ** -0.5
        noise = [math.exp(source.gauss(0, 0.25)) for _ in range(3)]
        each = [gradient * n for n in noise]
        yield StepFigures(step, loss, math.sqrt(sum(g * g for g in each)), 1e-3, each)


def codes(
    live: LiveRules, figures: Iterator[StepFigures] | list[StepFigures]
) -> list[tuple[int, str]]:
    """Return the step and the code of each alert."""
    return [(alert.step, alert.code) for f in figures for alert in live.step(f).alerts]


def fed(steps: int = 500, **options: Any) -> LiveRules:
    """Return live rules that have seen a healthy run."""
    live = LiveRules(LIMITS, ["a", "b", "c"])
    for f in healthy(steps, **options):
        live.step(f)
    return live


def spike(step: int, loss: float, gradient: float, each: Any = (0.7, 0.7, 0.7)) -> StepFigures:
    """Return the figures of one step at the same learning rate as `healthy`."""
    return StepFigures(step, loss, gradient, 1e-3, each)
