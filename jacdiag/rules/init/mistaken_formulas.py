"""Formulas of literature that were computed wrongly in the entire model.

Where all matrices are wrong alike, nothing in the model is right to compare them with. Two mistakes
can still be seen: every matrix has exactly the std that a published formula gives with fan_in and
fan_out exchanged, or exactly its square, the variance. One value proves nothing, since any std may
be meant. Several that differ as the wrong formula says are no accident.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.init.formula import Formula
from jacdiag.rules.init.scheme_fit import Yardstick, holds, judged_by_schemes, variables
from jacdiag.rules.init.schemes import MATRICES, Scheme, catalogue

# Schemes with one formula of the sizes of a matrix for all of them.
_FORMULAS = ("lecun", "kaiming", "pytorch", "xavier")
_APART = 1.1  # values closer than this are one
_FEWEST = 2  # values that must differ

Wrong = Callable[[Formula, Mapping[str, float]], float | None]


def find_mistaken(contract: ContractRecord) -> Yardstick | None:
    """Return the scheme of a model that follows one with a known mistake; None if there is none."""
    weights = [weight for weight in judged_by_schemes(contract) if _is_drawn_map(weight)]
    schemes = {scheme.name: scheme for scheme in catalogue()[0]}
    for looks, mistake in _MISTAKES.items():
        for name in _FORMULAS:
            if _follows(contract, weights, schemes[name], mistake):
                scheme = schemes[name]
                only = replace(scheme, formulas={"matrix": scheme.formulas["matrix"]})
                return Yardstick(contract, only, judges_tables=False, looks=looks)
    return None


def _is_drawn_map(weight: WeightRecord) -> bool:
    """Return whether a weight is a drawn linear map.

    Kaiming by fan_out is published for convolutions.
    """
    is_drawn = weight.family not in ("zero", "constant")
    return weight.role in MATRICES and is_drawn and len(weight.shape) <= 3


def _follows(
    contract: ContractRecord, weights: list[WeightRecord], scheme: Scheme, wrong: Wrong
) -> bool:
    """Return whether every matrix has the value of a mistaken formula, and several prove it."""
    telling: list[float] = []
    (formula,) = scheme.formulas["matrix"]
    for weight in weights:
        known = variables(contract, weight)
        value, right = wrong(formula, known), formula.value(known)
        if value is None or right is None or not holds(weight, value):
            return False
        if not holds(weight, right):
            telling.append(value)
    distinct: list[float] = []
    for value in sorted(telling):
        if not distinct or value > distinct[-1] * _APART:
            distinct.append(value)
    return len(distinct) >= _FEWEST


def _exchanged(formula: Formula, known: Mapping[str, float]) -> float | None:
    """Return the value with fan_in and fan_out exchanged."""
    if "fan_in" not in known or "fan_out" not in known:
        return None
    return formula.value({**known, "fan_in": known["fan_out"], "fan_out": known["fan_in"]})


def _squared(formula: Formula, known: Mapping[str, float]) -> float | None:
    """Return the variance."""
    value = formula.value(known)
    return None if value is None else value * value


_MISTAKES: dict[str, Wrong] = {
    "fan_in and fan_out confused": _exchanged,
    "std and variance confused": _squared,
}
