"""Describe JD508: weights that were written outside the optimizer between two of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.records.run_log import number
from jacdiag.rules.finding_numbers import plain

_SHOWN = 3  # weights in a sentence
_SAME = 0.01  # relative difference of two factors that are equal


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
class OutsideWrites:
    """The weights that were written before one step.

    Attributes:
        after: the last step of the optimizer before it.
        count: how many weights were written.
        of: how many were compared.
        weights: the first of them, the one that changed most first.
    """

    after: int
    count: int
    of: int
    weights: Sequence[WrittenWeight]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> OutsideWrites | None:
        """Return what a line of the run log says; None if nothing was written."""
        written = row.get("written")
        if not written or not written["weights"]:
            return None
        # JSON has no infinity: null stands for it.
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


def describe_written(writes: OutsideWrites, step: int) -> str:
    """Return which weights were written, when and how far, and nothing about who did it.

    Args:
        writes: before a step.
        step: that step.
    """
    # 1. How many, and when.
    subject = "1 weight was"
    if writes.count != 1:
        subject = f"{writes.count} of {writes.of} weight matrices were"
    when = f"after its step {writes.after} and before step {step}"
    start = f"{subject} written outside the optimizer, {when}, as samples of their elements show: "
    shown = writes.weights[:_SHOWN]

    # 2. How far: once for all if they have the same factor.
    if _have_one_factor(writes):
        names = ", ".join(weight.name for weight in shown)
        each = ""
        if writes.count != 1:
            each = "each "
        factor = plain(writes.weights[0].times)
        return f"{start}{names}{_and_more(writes)}, {each}multiplied by {factor}"
    return start + "; ".join(map(_describe_weight, shown)) + _and_more(writes)


def _describe_weight(weight: WrittenWeight) -> str:
    if weight.times == 0:
        return f"{weight.name} set to zero"
    if weight.scaled:
        return f"{weight.name} multiplied by {plain(weight.times)}"
    if weight.change == math.inf:
        return f"{weight.name}, zero before"
    change, factor = plain(weight.change), plain(weight.times)
    return (
        f"{weight.name} changed by {change} times the smaller of its norms before and after "
        f"(norm times {factor})"
    )


def _have_one_factor(writes: OutsideWrites) -> bool:
    """Return whether every weight is known to be multiplied by the same factor."""
    # 1. All of them are listed, and each is a multiple of what it was.
    are_all_listed = writes.count <= len(writes.weights)
    if not are_all_listed:
        return False
    if not all(weight.scaled for weight in writes.weights):
        return False

    # 2. Their factors are equal.
    factors = [weight.times for weight in writes.weights]
    smallest, largest = min(factors), max(factors)
    are_equal = largest - smallest <= _SAME * smallest
    return smallest > 0 and are_equal


def _and_more(writes: OutsideWrites) -> str:
    more = writes.count - _SHOWN
    return f" and {more} more" if more > 0 else ""


def _or_infinite(value: Any) -> float:
    return math.inf if value is None else number(value)
