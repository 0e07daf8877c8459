"""JD508: weights that something other than the optimizer has written between two of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.records.run_log import number
from jacdiag.rules.finding_numbers import plain

_SHOWN = 3  # weights in a sentence
_SAME = 0.01  # relative difference of two factors that are one


@dataclass(frozen=True, kw_only=True)
class WrittenWeight:
    """A weight that was written.

    Attributes:
        name: of the parameter.
        change: norm of the difference over the smaller of the two norms; inf from zero or to zero.
        times: factor of the norm; inf from zero.
        scaled: the new weight is a multiple of the old one.
    """

    name: str
    change: float
    times: float
    scaled: bool


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written before one step.

    Attributes:
        after: the last step of the optimizer before it.
        count: how many weights were written.
        of: how many were looked at.
        weights: the first of them, the one that changed most first.
    """

    after: int
    count: int
    of: int
    weights: Sequence[WrittenWeight]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Written | None:
        """Return what a line of the run log says; None if nothing was written."""
        written = row.get("written")
        if not written or not written["weights"]:
            return None
        weights = [
            WrittenWeight(
                name=weight["weight"],
                change=_or_infinite(weight["change"]),
                times=_or_infinite(weight["times"]),
                scaled=bool(weight["scaled"]),
            )
            for weight in written["weights"]
        ]
        return cls(
            after=written["after"], count=written["count"], of=written["of"], weights=weights
        )


def describe_written(written: Written, step: int) -> str:
    """Return which weights were written, when and how far: what is known, and nothing about who did
    it.
    """
    some = (
        "1 weight was"
        if written.count == 1
        else f"{written.count} of {written.of} weight matrices were"
    )
    when = f"after its step {written.after} and before step {step}"
    what = f"{some} written outside the optimizer, {when}, as samples of their elements show: "
    if _is_one_factor(written):
        factor = plain(written.weights[0].times)
        names = ", ".join(weight.name for weight in written.weights[:_SHOWN])
        each = "" if written.count == 1 else "each "
        return f"{what}{names}{_more(written)}, {each}multiplied by {factor}"
    return what + "; ".join(map(_describe_one, written.weights[:_SHOWN])) + _more(written)


def _describe_one(weight: WrittenWeight) -> str:
    if weight.times == 0:
        return f"{weight.name} set to zero"
    if weight.scaled:
        return f"{weight.name} multiplied by {plain(weight.times)}"
    if weight.change == float("inf"):
        return f"{weight.name}, zero before"
    change, factor = plain(weight.change), plain(weight.times)
    return (
        f"{weight.name} changed by {change} times the smaller of its norms before and after "
        f"(norm times {factor})"
    )


def _is_one_factor(written: Written) -> bool:
    """Whether every weight is known to be multiplied by one and the same factor."""
    if written.count > len(written.weights) or not all(weight.scaled for weight in written.weights):
        return False
    factors = [weight.times for weight in written.weights]
    return min(factors) > 0 and max(factors) - min(factors) <= _SAME * min(factors)


def _more(written: Written) -> str:
    more = written.count - _SHOWN
    return f" and {more} more" if more > 0 else ""


def _or_infinite(value: Any) -> float:
    return float("inf") if value is None else number(value)
