"""An interval compared with limits: where it lies, and what that says about a condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.records import Condition, Interval, Level, SublayerRecord
from jacdiag.rules.thresholds import Limits


@dataclass(frozen=True)
class ComparedFigure:
    """A sub-layer's figure compared with its limits.

    Attributes:
        row: the sub-layer.
        value: None where it was not measured.
        beyond: the highest cut that the entire interval lies above; None for none.
        across: a cut lies inside the interval, above `beyond`.
    """

    row: SublayerRecord
    value: Interval | None
    beyond: Level | None
    across: bool

    @property
    def is_undecided(self) -> bool:
        """Whether the figure was not measured, or a cut lies inside its interval."""
        return self.value is None or self.across

    @property
    def condition(self) -> Condition:
        """Met below `info`, partly between, not met above `warning`, else unknown."""
        # Above a cut for certain, whatever lies above that.
        if self.beyond in ("warning", "error"):
            return "not met"

        # What is open is never met.
        if self.is_undecided:
            return "unknown"
        if self.beyond == "info":
            return "partly"
        return "met"


def compare_with_limits(
    row: SublayerRecord, value: Interval | None, limits: Limits
) -> ComparedFigure:
    """Return where a figure lies between its cuts.

    A value across `error` but above `warning` is beyond `warning`, and undecided.

    Args:
        row: the sub-layer.
        value: its figure; None or NaN if it was not measured.
        limits: the cuts of the figure.
    """
    # 1. Nothing to compare.
    if value is None or math.isnan(value.lower):
        return ComparedFigure(row, None, None, False)

    # 2. The cuts ascend, so the last one that the interval is above is the highest.
    beyond: Level | None = None
    across = False
    for cut, limit in limits.named_cuts.items():
        side = value.side_of(limit)
        if side == "above":
            beyond = cut
        elif side == "across":
            across = True

    return ComparedFigure(row, value, beyond, across)


def overall(conditions: Sequence[Condition]) -> Condition:
    """Return the condition of a model, which is that of its worst sub-layer.

    An unknown one is never a pass.
    """
    worst_first: tuple[Condition, ...] = ("not met", "unknown", "partly", "met")
    for condition in worst_first:
        if condition in conditions:
            return condition

    # No sub-layer has the condition.
    return "not applicable"
