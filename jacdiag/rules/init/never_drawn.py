"""Weights that no init draws, whichever scheme the model follows.

Four signs are known. A matrix or table of one value that is not zero: all its units stay equal for
ever. A few numbers far outside a draw. A matrix that is larger than N(0, 1), the largest that any
published init draws. And a head of unit spread, where the logits show that nothing scales it down.
"""

from __future__ import annotations

from dataclasses import dataclass

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.first_loss import UNKNOWN
from jacdiag.rules.init.scheme_fit import is_of_unit_spread, is_projection
from jacdiag.rules.init.schemes import MATRICES
from jacdiag.rules.init.weight_facts import CONSTANT, DRAWN, mean_of, std_of, without

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


def find_no_draws(
    contract: ContractRecord, logits_limit: float | None = None, first_loss: str = UNKNOWN
) -> list[NoDraw]:
    """Return the weights that no init draws.

    Args:
        contract: Of a model at its init.
        logits_limit: Std of the logits beyond which a head of unit spread is named; None to leave
            heads out.
        first_loss: The loss before the first step, as the part of a sentence.
    """
    no_draws: list[NoDraw] = []
    for weight in contract.weights:
        no_draw = _no_draw_by_numbers(weight, contract)

        # A head may be wrong for its logits alone.
        if no_draw is None and logits_limit is not None:
            no_draw = _large_head(weight, contract, logits_limit, first_loss)
        if no_draw is not None:
            no_draws.append(no_draw)

    return no_draws


def _no_draw_by_numbers(weight: WeightRecord, contract: ContractRecord) -> NoDraw | None:
    """Return what is wrong with the numbers of a weight, the most specific first."""
    return _constant(weight, contract) or _outliers(weight) or _larger_than_one(weight, contract)


def without_no_draws(contract: ContractRecord) -> ContractRecord:
    """Return the contract of the other weights: what these hold says nothing of a scheme.

    Args:
        contract: of a model at its init.
    """
    names = {no_draw.weight.parameter for no_draw in find_no_draws(contract)}
    return without(contract, names)


def _is_inside(weight: WeightRecord, contract: ContractRecord) -> bool:
    """Return whether a weight is the matrix of an attention or FFN."""
    width = int(contract.sizes.get("d", 0))
    return weight.role in MATRICES and is_projection(weight, width)


def _constant(weight: WeightRecord, contract: ContractRecord) -> NoDraw | None:
    """Return what is wrong with a matrix of one value; None if it is none."""
    if weight.family != "constant":
        return None

    # 1. A matrix has two sizes above 1.
    sizes = [size for size in weight.shape if size > 1]
    if len(sizes) < 2:
        return None

    # 2. Others than these may be constant on purpose.
    is_table = weight.role in _TABLES
    if not is_table and not _is_inside(weight, contract):
        return None

    # 3. What that does to the units.
    sign = f"every number is {plain(mean_of(weight))}, so that its units stay equal for ever"
    return NoDraw(weight, sign, "draw it from a distribution")


def _outliers(weight: WeightRecord) -> NoDraw | None:
    """Return what is wrong with a draw that has a few numbers far outside; None if it has none."""
    if not weight.outliers or not weight.core_std or weight.largest is None:
        return None

    # Sections of other stds have numbers outside each other's draw, and none outside of their own.
    families = {section.family for section in weight.sections}
    if families and families.issubset((*DRAWN, *CONSTANT)):
        return None

    # How far, in standard deviations of the rest.
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
    lower = weight.lower or 0.0
    if lower <= 1.0:
        return None

    # 2. It is a drawn matrix of a sub-layer.
    if weight.family == "other" or not _is_inside(weight, contract):
        return None

    # 3. It has enough inputs for that to be no formula's value.
    fan_in = weight.fan_in or 0
    if fan_in < _FEW_INPUTS:
        return None

    sign = (
        f"std {plain(std_of(weight))}, larger than any published init draws a matrix of "
        f"{fan_in} inputs"
    )
    return NoDraw(weight, sign, "look for a missing root or bracket in the formula of its std")


def _large_head(
    weight: WeightRecord, contract: ContractRecord, limit: float, first_loss: str
) -> NoDraw | None:
    """Return what is wrong with a head of unit spread; None if its logits are not too large."""
    # 1. The embedding may have unit spread: JD206 judges a head that is tied to it.
    if weight.role != "head" or weight.parameter in contract.tied:
        return None
    if not is_of_unit_spread(weight):
        return None

    # 2. Something in the forward may scale the logits down.
    logits = contract.logits_std
    if logits is None:
        return None
    is_large = logits > limit
    if not is_large:
        return None

    # 3. What that does to the first loss.
    sign = (
        f"std {plain(std_of(weight))}, the spread of an embedding: logits of std "
        f"{plain(logits)} at init; {first_loss}"
    )
    return NoDraw(weight, sign, "initialise the head with std 1/sqrt(d)")
