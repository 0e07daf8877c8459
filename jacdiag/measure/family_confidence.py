"""The confidence of each interval with which all intervals of a report hold together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jacdiag.trace import Sublayer


@dataclass(frozen=True)
class Family:
    """Intervals that are to hold together.

    Attributes:
        level: probability with which all of them hold.
        intervals: how many there are, at most.

    Example:
        >>> Family(0.99, 10).each
        0.999
    """

    level: float
    intervals: int

    @property
    def each(self) -> float:
        """Return the confidence of each interval.

        By Bonferroni's inequality the chance that any of n intervals misses is at most the sum of
        their chances, however they depend on each other.
        """
        return 1.0 - (1.0 - self.level) / max(self.intervals, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a report's settings."""
        return {"method": "Bonferroni", "intervals": self.intervals, "each": self.each}


def count_intervals(groups: Iterable[list[Sublayer]], *, early: bool, state: str) -> int:
    """Return how many norms an audit measures with an interval, at most.

    A norm of a closed form has no chance to miss, and does not count.

    Args:
        groups: the sub-layers, those on one shortcut together.
        early: the audit stops each norm once the rules are decided, and leaves out what no rule
            reads.
        state: "init" or "trained"; Eq. 20 is evaluated at init only.
    """
    evaluates_eq_20 = state == "init" and not early
    count = 0
    if not early:
        count += 1  # the norm from end to end
    for sites in groups:
        count += sum(_count_own_intervals(site, evaluates_eq_20) for site in sites)
        if len(sites) > 1:
            count += 1  # the joint residual map of parallel branches

    return count


def _count_own_intervals(site: Sublayer, evaluates_eq_20: bool) -> int:
    """Return how many norms of one sub-layer are measured with an interval, at most."""
    count = 1  # the branch
    if _has_core(site):
        count += 1
    if site.value.shape == site.shortcut.shape:
        count += 1  # the residual map
    # Eq. 20 rests on the norm of the heads.
    if evaluates_eq_20 and site.heads is not None:
        count += 1
    return count


def _has_core(site: Sublayer) -> bool:
    """Return whether the core is another map than the branch."""
    if site.has_input_norm:
        return True

    # The branch ends in a norm of its own.
    return site.placement == "reordered" and site.before_output_norm is not None
