"""A run as a table of gains, depth by time, for the screen and for the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jacdiag.records.run_log import RunLog, number
from jacdiag.render.content.run_sublayers import sublayer_depths


@dataclass(frozen=True)
class Heat:
    """Branch gains over depth and time.

    Attributes:
        names: sub-layers, first depth first.
        steps: of the probes, ascending.
        values: one row per sub-layer, one column per probe; nan where there is none.
    """

    names: list[str]
    steps: list[int]
    values: list[list[float]]

    @property
    def extent(self) -> tuple[float, float]:
        """Smallest and largest positive value; (1, 1) where there is none."""
        drawable: list[float] = []
        for row in self.values:
            drawable += filter(_is_positive, row)
        if not drawable:
            return 1.0, 1.0
        return min(drawable), max(drawable)

    @property
    def gaps_in_words(self) -> str:
        """What cells without a colour are, such as "not measured or 0"; "" without any."""
        kinds: dict[str, None] = {}
        for row in self.values:
            for value in filter(_has_no_colour, row):
                kinds[_why_no_colour(value)] = None
        return " or ".join(kinds)

    def level(self, value: float, levels: int) -> int | None:
        """Return the level of a value on a log scale between the extremes.

        None for no value.
        """
        if not _is_positive(value):
            return None

        # 1. The share of the way from the smallest to the largest.
        low, high = self.extent
        share = 0.0
        if high > low:
            share = math.log(value / low) / math.log(high / low)

        # 2. The largest value belongs to the last level.
        return min(int(share * levels), levels - 1)


def heat_of(run: RunLog, columns: int | None = None) -> Heat:
    """Return the gains of all probes, or of as many as there are columns.

    Probes are thinned evenly, and the last one is kept.

    Sub-layers stand in the order of the first probe, which is that of depth. One that no probe
    measured has a row too.
    """
    # 1. The probes that measured something.
    probes = [row for row in run.probes if row.get("figures")]
    if columns is not None and len(probes) > columns:
        probes = _thinned(probes, columns)

    # 2. The names, each once, where a probe has it first.
    names: dict[str, None] = dict.fromkeys(sublayer_depths(run))
    for row in probes:
        names.update(dict.fromkeys(row["figures"].get("branch_norm", {})))

    # 3. The gains.
    values = []
    for name in names:
        gains = [row["figures"]["branch_norm"].get(name) for row in probes]
        values.append([number(gain) for gain in gains])
    steps = [int(row["step"]) for row in probes]
    return Heat(list(names), steps, values)


def _thinned(probes: list[dict[str, Any]], columns: int) -> list[dict[str, Any]]:
    """Return as many probes as there are columns, evenly chosen, with the first and the last."""
    step = (len(probes) - 1) / max(columns - 1, 1)
    return [probes[round(k * step)] for k in range(columns)]


def _has_no_colour(value: float) -> bool:
    """Return whether the scale of colours has no place for a value."""
    return not _is_positive(value)


def _why_no_colour(value: float) -> str:
    """Return why the scale of colours has no place for a value."""
    if math.isnan(value):
        return "not measured"
    if value == 0:
        return "0"
    return "not finite"


def _is_positive(value: float) -> bool:
    """Return whether a log scale has a place for a value."""
    return math.isfinite(value) and value > 0
