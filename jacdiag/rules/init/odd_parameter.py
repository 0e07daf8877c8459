"""A small parameter that is not what the others are, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.records import WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.weight_facts import INDEPENDENT, mean_of, parameters_of, size_of, std_of
from jacdiag.rules.wording import list_names


@dataclass(frozen=True)
class Difference:
    """A parameter that is not what the others are.

    Attributes:
        weight: the parameter.
        pattern: its name, with "*" for the layer.
        of: parameters of that pattern.
        others: what the others are, as words.
        value: the constant that it should hold, None if that is no constant.
        like: the parameter whose numbers, or whose draw, it should have; None if `value` says it.
        holds: what it holds, as words; "" to say it by its mean and std.
        part: the part of it that is wrong, such as "row 0 of "; "" for all of it.
    """

    weight: WeightRecord
    pattern: str
    of: int
    others: str
    value: float | None = None
    like: WeightRecord | None = None
    holds: str = ""
    part: str = ""


def fix_for(differences: Sequence[Difference]) -> str:
    """Return what to do about differences of one kind: which parameters to set to what."""
    first = differences[0]
    names = first.part + names_of([difference.weight for difference in differences])
    if first.value is not None:
        return f"set {names} to {first.value:.4g}"

    # Without a constant, they are to be as another parameter, if that is known.
    like = first.like
    if like is None:
        return f"initialise {names} as in the other layers"
    if like.family in INDEPENDENT:
        return f"draw {names} again {draw_in_words(like)}, as {like.parameter}"

    return f"set {names} to the numbers of {like.parameter}"


def names_of(weights: Sequence[WeightRecord]) -> str:
    """Return the names of parameters for a sentence: the first three, and how many more."""
    return list_names(parameters_of(weights), longest=None)


def draw_in_words(weight: WeightRecord) -> str:
    """Return the mean and the std of a draw, the mean only if it is not 0 within sampling."""
    mean = mean_of(weight)
    std = std_of(weight)
    if abs(mean) <= 5 * std / size_of(weight) ** 0.5:
        return f"with std {plain(std)}"

    return f"with mean {plain(mean)} and std {plain(std)}"
