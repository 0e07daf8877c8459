"""An interval against limits: where it lies, and what that says about a condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.records import Condition, Interval, Level, SublayerRecord
from jacdiag.rules.thresholds import CUTS, Limits


@dataclass(frozen=True)
class Placed:
    """A sub-layer's figure against its limits.

    Attributes:
        value: None where it was not measured.
        beyond: the loudest cut that the whole interval lies above; None for none.
        across: a cut lies inside the interval, above `beyond`.
    """

    row: SublayerRecord
    value: Interval | None
    beyond: Level | None
    across: bool

    @property
    def condition(self) -> Condition:
        """Met below `info`, partly between, not met above `warning`, else unknown."""
        if self.beyond in ("warning", "error"):
            return "not met"
        if self.value is None or self.across:
            return "unknown"
        return "partly" if self.beyond == "info" else "met"


def placed(row: SublayerRecord, value: Interval | None, limits: Limits) -> Placed:
    """Return where a figure lies between its cuts.

    A value across `error` but above `warning` is beyond `warning`, and undecided.
    """
    if value is None or math.isnan(value.lower):  # not measured
        return Placed(row, None, None, False)
    beyond: Level | None = None
    across = False
    for cut in CUTS:
        limit = getattr(limits, cut)
        if limit is None:
            continue
        side = value.side_of(limit)
        if side == "above":
            beyond = cut  # type: ignore[assignment]
        across = across or side == "across"
    return Placed(row, value, beyond, across)


def overall(conditions: Sequence[Condition]) -> Condition:
    """Return the condition of a model, which is that of its worst sub-layer.

    An unknown one is never a pass.
    """
    if not conditions:
        return "not applicable"
    order: tuple[Condition, ...] = ("not met", "unknown", "partly", "met")
    return next(c for c in order if c in conditions)
