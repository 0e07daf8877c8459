"""Find the sub-layer whose gradient rose first: since when, how far, and from which value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.detectors.group_counts import count_groups
from jacdiag.detectors.running_statistics import ExponentialMoments
from jacdiag.rules.finding_numbers import plain

MOST_LISTED = 20
"""Sub-layers that an alert lists. Its sentence counts all of them."""


@dataclass(frozen=True)
class HighGradient:
    """A sub-layer whose gradient norm is high now.

    Attributes:
        where: its name.
        since: the step since which it has been high without a break.
        value: its gradient norm now.
        usual: the exponential mean of its gradient norm before `since`.
        z: deviations that `value` lies above `usual`.
    """

    where: str
    since: int
    value: float
    usual: float
    z: float

    def evidence(self) -> dict[str, Any]:
        """Return the fields, for the log."""
        return {
            "where": self.where,
            "since": self.since,
            "value": self.value,
            "usual": self.usual,
            "z": self.z,
        }


class GradientRises:
    """The gradient norm of every sub-layer, and since when each has been high.

    Args:
        names: of the sub-layers, in the order of the values that `look` takes.
        limit: deviations over which a gradient norm is high. A vote (2.5) is too low: of 50
            sub-layers one is over it by chance at every third step, and would be called the first
            to move.
    """

    def __init__(self, names: Sequence[str], limit: float) -> None:
        """Begin without a history; see the class for the arguments."""
        self.names = list(names)
        self.limit = limit
        self._statistics = [ExponentialMoments() for _ in self.names]
        self._high_since = [-1] * len(self.names)  # step; -1 for one that is not high
        self._usual = [0.0] * len(self.names)  # gradient norm before that step
        self._high: list[HighGradient] = []  # at the last step
        self._is_comparable = False  # the last step had sub-layers, and enough steps before it

    def look(self, step: int, values: Sequence[float]) -> None:
        """Take the gradient norms of one step.

        Args:
            step: its number.
            values: one per sub-layer; empty if they were not measured.
        """
        self._high = []
        self._is_comparable = False
        for place, (statistics, value) in enumerate(zip(self._statistics, values, strict=False)):
            # 1. Score the norm. The mean before it may become what was usual.
            mean_before = statistics.mean
            z = statistics.look(value)
            if z is not None:
                self._is_comparable = True
            if z is None or not z > self.limit:
                self._high_since[place] = -1
                continue
            # 2. Remember when the rise began.
            if self._high_since[place] < 0:
                self._high_since[place] = step
                self._usual[place] = mean_before
            rise = HighGradient(
                where=self.names[place],
                since=self._high_since[place],
                value=value,
                usual=self._usual[place],
                z=z,
            )
            self._high.append(rise)

    def order(self) -> list[HighGradient]:
        """Return all sub-layers that are high, the one that has been so longest first.

        Of those that have been high since the same step, the highest comes first.
        """
        return sorted(self._high, key=lambda rise: (rise.since, -rise.z))

    def sentence(self) -> str:
        """Return which sub-layer rose first, or that none did; "" if sub-layers are not known."""
        # 1. Nothing can be said.
        if not self._is_comparable:
            return ""

        # 2. Nothing has risen.
        order = self.order()
        if not order:
            return (
                f"; no sub-layer's gradient norm stands out by {self.limit:g} standard deviations"
            )

        # 3. One sub-layer was first.
        first = order[0]
        figures = f"gradient norm {plain(first.value)}, usually {plain(first.usual)}"
        together = [rise.where for rise in order if rise.since == first.since]
        if len(together) == 1:
            return f"; {first.where} moved first ({figures}, since step {first.since})"

        # 4. Several rose at the same step.
        return (
            f"; none moved first: {count_groups(together, self.names)} have stood out since step "
            f"{first.since}, {first.where} furthest ({figures})"
        )

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        return {
            "each": [statistics.state() for statistics in self._statistics],
            "risen": list(self._high_since),
            "usual": list(self._usual),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same sub-layers. One of an older version has no usual norms."""
        for statistics, saved in zip(self._statistics, state["each"], strict=True):
            statistics.load(saved)
        self._high_since = list(state["risen"])
        means = [statistics.mean for statistics in self._statistics]
        self._usual = list(state.get("usual", means))
