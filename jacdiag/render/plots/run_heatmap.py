"""A run as a table of gains, depth by time, for the screen and for the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jacdiag.records.run_log import RunLog, number


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
        finite = [v for row in self.values for v in row if math.isfinite(v) and v > 0]
        return (min(finite), max(finite)) if finite else (1.0, 1.0)

    def level(self, value: float, levels: int) -> int | None:
        """Return the level of a value on a log scale between the extremes.

        None for no value.
        """
        if not (math.isfinite(value) and value > 0):
            return None
        low, high = self.extent
        share = math.log(value / low) / math.log(high / low) if high > low else 0.0
        return min(int(share * levels), levels - 1)


def heat_of(run: RunLog, columns: int | None = None) -> Heat:
    """Return the gains of all probes, or of as many as there are columns.

    Probes are thinned evenly, and the last one is kept.

    Sub-layers stand in the order of the first probe, which is that of depth.
    """
    probes = [row for row in run.probes if row.get("figures")]
    if columns is not None and len(probes) > columns:
        step = (len(probes) - 1) / max(columns - 1, 1)
        probes = [probes[round(k * step)] for k in range(columns)]
    names = list(
        dict.fromkeys(name for row in probes for name in row["figures"].get("branch_norm", {}))
    )
    values = [[number(row["figures"]["branch_norm"].get(name)) for row in probes] for name in names]
    return Heat(names, [int(row["step"]) for row in probes], values)
