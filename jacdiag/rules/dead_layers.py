"""Which layers are the odd ones where some of one name are zero and others are not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.layer_groups import MAJORITY
from jacdiag.rules.init.weight_facts import is_zero, parameters_of
from jacdiag.rules.wording import list_names

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class LayersOfZeros:
    """Zero parameters whose namesakes in other layers are not zero.

    Attributes:
        differing: The zero parameters. Those that are zero in every layer are left out.
        fix: What makes the layers alike; "" if there are none.
    """

    differing: list[str]
    fix: str

    @classmethod
    def of(cls, contract: ContractRecord | None, parameters: Iterable[str]) -> LayersOfZeros:
        """Compare zero parameters with their namesakes.

        Args:
            contract: The weights of the model; None if they were not measured.
            parameters: Names of those that are zero.
        """
        # 1. All parameters by their name without its numbers.
        namesakes: dict[str, list[WeightRecord]] = {}
        if contract is not None:
            namesakes = group_by(contract.weights, _name_without_numbers)

        # 2. The names that stand for zeros and for others.
        differing: list[str] = []
        mixed: dict[str, list[WeightRecord]] = {}
        for parameter in parameters:
            name = _NUMBER.sub("*", parameter)
            group = namesakes.get(name, [])
            if not all(map(is_zero, group)):
                differing.append(parameter)
                mixed[name] = group

        # 3. What to do about each, once.
        fixes = dict.fromkeys(map(_fix_of, mixed.values()))
        return cls(differing, "; ".join(fixes))


def _name_without_numbers(weight: WeightRecord) -> str:
    """Return the name of a weight with "*" for each of its numbers."""
    return _NUMBER.sub("*", weight.parameter)


def _fix_of(group: Iterable[WeightRecord]) -> str:
    """Return what makes parameters of one name alike: those of most layers show what is meant."""
    # 1. How many are zero.
    weights = list(group)
    zeros = list(filter(is_zero, weights))
    others = [weight for weight in weights if not is_zero(weight)]
    zero_names = list_names(parameters_of(zeros))
    other_names = list_names(parameters_of(others))

    # 2. Most show what is usual.
    if len(zeros) >= MAJORITY * len(weights):
        return f"set {other_names} to zero, as in the other layers"
    if len(others) >= MAJORITY * len(weights):
        return f"initialise {zero_names} as in the other layers"

    # 3. Nobody can say which are meant.
    return f"initialise all layers alike: {zero_names} are zero, and {other_names} are not"
