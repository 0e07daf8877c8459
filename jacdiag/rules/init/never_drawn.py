"""Weights that no init draws, whichever scheme the model follows.

Four signs are known. A matrix or table of one value that is not zero: all its units stay equal for
ever. A few numbers far outside a draw. A matrix that is larger than N(0, 1), the largest that any
published init draws. And a head of unit spread, where the logits show that nothing scales it down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.scheme_fit import is_of_unit_spread, is_projection
from jacdiag.rules.init.schemes import MATRICES

_TABLES = ("embedding", "head", "projection")
# Of so few inputs a layer may have std 1 by LeCun's or Xavier's formula.
_FEW_INPUTS = 16


@dataclass(frozen=True)
class NoDraw:
    """A weight that no init draws.

    Attributes:
        weight: Its record.
        sign: What is wrong with it, as the part of a sentence after its name.
        fix: What to do.
    """

    weight: WeightRecord
    sign: str
    fix: str


def find_no_draws(contract: ContractRecord, logits_limit: float | None = None) -> list[NoDraw]:
    """Return the weights that no init draws.

    Args:
        contract: Of a model at its init.
        logits_limit: Std of the logits beyond which a head of unit spread is named; None to leave
            heads out.
    """
    no_draws = []
    for weight in contract.weights:
        sign = (
            _constant(weight, contract) or _outliers(weight) or _larger_than_one(weight, contract)
        )
        if sign is not None:
            no_draws.append(sign)
        elif logits_limit is not None and _is_large_head(weight, contract, logits_limit):
            no_draws.append(_large_head(weight, contract))
    return no_draws


def without_no_draws(contract: ContractRecord) -> ContractRecord:
    """Return the contract of the other weights: what these hold says nothing of a scheme.

    Args:
        contract: of a model at its init.
    """
    left = {no_draw.weight.parameter for no_draw in find_no_draws(contract)}
    if not left:
        return contract

    # A new record only if something is left out.
    others = [weight for weight in contract.weights if weight.parameter not in left]
    return replace(contract, weights=others)


def _is_inside(weight: WeightRecord, contract: ContractRecord) -> bool:
    """Return whether a weight is the matrix of an attention or FFN."""
    return weight.role in MATRICES and is_projection(weight, int(contract.sizes.get("d", 0)))


def _constant(weight: WeightRecord, contract: ContractRecord) -> NoDraw | None:
    """Return what is wrong with a matrix of one value; None if it is none."""
    if weight.family != "constant":
        return None
    sizes = [size for size in weight.shape if size > 1]
    if len(sizes) < 2:
        return None

    is_table = weight.role in _TABLES
    if not is_table and not _is_inside(weight, contract):
        return None
    sign = f"every number is {plain(weight.mean or 0.0)}, so that its units stay equal for ever"
    return NoDraw(weight, sign, "draw it from a distribution")


def _outliers(weight: WeightRecord) -> NoDraw | None:
    if not weight.outliers or not weight.core_std or weight.largest is None:
        return None
    distance = plain(weight.largest / weight.core_std)
    verb = "number lies" if weight.outliers == 1 else "numbers lie"
    sign = (
        f"{weight.outliers} {verb} far outside the draw, up to {plain(weight.largest)} where the "
        "rest has "
        f"std {plain(weight.core_std)}: {distance} standard deviations"
    )
    return NoDraw(weight, sign, "draw it again in float32, or cut it at a few standard deviations")


def _larger_than_one(weight: WeightRecord, contract: ContractRecord) -> NoDraw | None:
    """Return what is wrong with a matrix larger than N(0, 1); None if it is not so large."""
    # 1. Even the lower bound of its std is above 1.
    if not weight.lower or weight.lower <= 1.0:
        return None
    if weight.family == "other" or not _is_inside(weight, contract):
        return None

    # 2. It has enough inputs for that to be no formula's value.
    if (weight.fan_in or 0) < _FEW_INPUTS:
        return None
    sign = (
        f"std {plain(weight.std or 0.0)}, larger than any published init draws a matrix of "
        f"{weight.fan_in} inputs"
    )
    return NoDraw(weight, sign, "look for a missing root or bracket in the formula of its std")


def _is_large_head(weight: WeightRecord, contract: ContractRecord, limit: float) -> bool:
    """Return whether a head of unit spread makes the logits too large."""
    if weight.role != "head" or not is_of_unit_spread(weight):
        return False
    # The embedding may have unit spread: JD206 judges a head that is tied to it.
    if weight.parameter in contract.tied:
        return False

    # Something in the forward may scale the logits down.
    return contract.logits_std is not None and contract.logits_std > limit


def _large_head(weight: WeightRecord, contract: ContractRecord) -> NoDraw:
    logits = contract.logits_std or 0.0
    sign = (
        f"std {plain(weight.std or 0.0)}, the spread of an embedding: logits of std "
        f"{plain(logits)} at init, "
        f"so that the first loss is about ln V + {plain(logits**2 / 2)}"
    )
    return NoDraw(weight, sign, "initialise the head with std 1/sqrt(d)")
