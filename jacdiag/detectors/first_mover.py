"""Which sub-layer's gradient moved first: since when, how far, and against which usual value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.detectors.running_statistics import Exponential
from jacdiag.rules.finding_numbers import plain

_MOST = 20  # sub-layers that an alert lists


@dataclass(frozen=True)
class Moved:
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


class Movers:
    """The gradient norm of every sub-layer, and since when each has been high.

    Args:
        names: of the sub-layers, in the order of the values that `look` takes.
        limit: deviations over which a gradient norm is high. A vote (2.5) is too low: of 50
            sub-layers one is over it by chance at every third step, and would be called the first
            to move.
    """

    def __init__(self, names: Sequence[str], limit: float) -> None:
        self.names, self.limit = list(names), limit
        self.each = [Exponential() for _ in self.names]
        self.risen = [-1] * len(self.names)  # step since which a gradient norm has been high
        self.usual = [0.0] * len(self.names)  # gradient norm before that step
        self.high: list[Moved] = []
        self.seen = False  # the last step had figures of sub-layers, and enough steps before it

    def look(self, step: int, values: Sequence[float]) -> None:
        """Take the gradient norms of one step."""
        self.high = []
        self.seen = False
        for place, (series, value) in enumerate(zip(self.each, values, strict=False)):
            mean = series.mean
            z = series.look(value)
            self.seen |= z is not None
            if z is not None and z > self.limit:
                if self.risen[place] < 0:
                    self.risen[place], self.usual[place] = step, mean
                self.high.append(
                    Moved(self.names[place], self.risen[place], value, self.usual[place], z)
                )
            else:
                self.risen[place] = -1

    def order(self) -> list[Moved]:
        """Return what is high now: the longest first, and of those since the same step the highest
        first.
        """
        return sorted(self.high, key=lambda moved: (moved.since, -moved.z))[:_MOST]

    def sentence(self) -> str:
        """Return which sub-layer moved first, or that none did; "" if sub-layers are not known."""
        if not self.seen:
            return ""
        order = self.order()
        if not order:
            return (
                f"; no sub-layer's gradient norm stands out by {self.limit:g} standard deviations"
            )
        first = order[0]
        together = [moved for moved in order if moved.since == first.since]
        figures = f"gradient norm {plain(first.value)}, usually {plain(first.usual)}"
        if len(together) == 1:
            return f"; {first.where} moved first ({figures}, since step {first.since})"
        some = "all" if len(together) == len(self.names) else str(len(together))
        return (
            f"; none moved first: {some} sub-layers that stand out have since step {first.since}, "
            f"{first.where} furthest ({figures})"
        )

    def state(self) -> dict[str, Any]:
        """Return what `load` goes on from."""
        each = [series.state() for series in self.each]
        return {"each": each, "risen": list(self.risen), "usual": list(self.usual)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same sub-layers."""
        for series, saved in zip(self.each, state["each"], strict=True):
            series.load(saved)
        self.risen = list(state["risen"])
        self.usual = list(state.get("usual", [series.mean for series in self.each]))
