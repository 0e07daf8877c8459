"""Single facts about the record of a weight, which many rules of the init ask for."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, WeightRecord

DRAWN = ("normal", "truncated", "uniform", "orthogonal")
INDEPENDENT = ("normal", "truncated", "uniform")  # draws whose numbers do not depend on each other
CONSTANT = ("zero", "constant")


# -- numbers ---------------------------------------------------------------------------------------
def mean_of(weight: WeightRecord) -> float:
    """Return the mean of a weight; 0 if it was not measured."""
    return weight.mean or 0.0


def std_of(weight: WeightRecord) -> float:
    """Return the std of a weight; 0 if it was not measured."""
    return weight.std or 0.0


def largest_of(weight: WeightRecord) -> float:
    """Return the largest magnitude in a weight; 0 if it was not measured."""
    return weight.largest or 0.0


def size_of(weight: WeightRecord) -> int:
    """Return how many numbers a weight holds."""
    return math.prod(weight.shape)


@dataclass(frozen=True)
class StdInterval:
    """The std that a weight was drawn with, as far as its numbers tell."""

    lower: float
    upper: float

    def meets(self, other: StdInterval) -> bool:
        """Return whether some std lies in both intervals."""
        starts_before_its_end = self.lower <= other.upper
        ends_after_its_start = other.lower <= self.upper
        return starts_before_its_end and ends_after_its_start

    def holds(self, std: float) -> bool:
        """Return whether a std lies in the interval."""
        return self.lower <= std <= self.upper


def sampling_interval(weight: WeightRecord) -> StdInterval | None:
    """Return the interval of a weight's std; None if it was not measured."""
    lower = weight.lower
    upper = weight.upper
    if lower is None or upper is None:
        return None
    return StdInterval(lower, upper)


# -- families ------------------------------------------------------------------------------------
def is_constant(weight: WeightRecord) -> bool:
    """Return whether all numbers of a weight are one."""
    return weight.family in CONSTANT


def is_zero(weight: WeightRecord) -> bool:
    """Return whether all numbers of a weight are zero."""
    return weight.family == "zero"


def is_drawn(weight: WeightRecord) -> bool:
    """Return whether a weight is a random draw of a known family."""
    return weight.family in DRAWN


def has_spread(weight: WeightRecord) -> bool:
    """Return whether a weight is a draw of a known family whose std was measured."""
    return is_drawn(weight) and bool(weight.std)


def is_vector(weight: WeightRecord) -> bool:
    """Return whether a weight has fewer than two dimensions."""
    return len(weight.shape) < 2


# -- names -----------------------------------------------------------------------------------------
def module_of(weight: WeightRecord) -> str:
    """Return the name of the module that holds a weight."""
    return weight.parameter.rpartition(".")[0]


def content_of(weight: WeightRecord) -> str:
    """Return the name of the first weight that is bit-identical to a weight."""
    return weight.same_as or weight.parameter


def place_of(weight: WeightRecord) -> str:
    """Return the sub-layer of a weight; its own name outside of all."""
    return weight.sublayer or weight.parameter


def pattern_of(weight: WeightRecord) -> str:
    """Return the name of a weight with "*" for its layer."""
    return weight.pattern


def places_of(weights: Iterable[WeightRecord]) -> list[str]:
    """Return the places of weights, each once, as a finding lists them."""
    return list(dict.fromkeys(map(place_of, weights)))


def parameters_of(weights: Iterable[WeightRecord]) -> list[str]:
    """Return the names of weights."""
    return [weight.parameter for weight in weights]


def with_role(weights: Iterable[WeightRecord], *roles: str) -> list[WeightRecord]:
    """Return the weights of one role, or of some roles."""
    return [weight for weight in weights if weight.role in roles]


def without(contract: ContractRecord, names: Container[str]) -> ContractRecord:
    """Return a contract without some weights; the contract itself if it has none of them.

    Args:
        contract: of a model.
        names: of the weights to leave out.
    """
    others: list[WeightRecord] = []
    for weight in contract.weights:
        if weight.parameter not in names:
            others.append(weight)

    # A new record only if something is left out.
    is_any_left_out = len(others) < len(contract.weights)
    if not is_any_left_out:
        return contract

    return replace(contract, weights=others)
