"""Formulas of literature that were computed wrongly in the entire model.

Where all matrices are wrong alike, nothing in the model is right to compare them with. Two mistakes
can still be seen: every matrix has exactly the std that a published formula gives with fan_in and
fan_out exchanged, or exactly its square, the variance. One value proves nothing, since any std may
be meant. Several that differ as the wrong formula says are no accident.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.init.formula import Formula
from jacdiag.rules.init.scheme_fit import Yardstick, holds, judged_by_schemes, variables
from jacdiag.rules.init.schemes import MATRICES, Scheme, catalogue
from jacdiag.rules.init.weight_facts import is_constant

# Schemes with one formula of the sizes of a matrix for all of them.
_FORMULAS = ("lecun", "kaiming", "pytorch", "xavier")
_APART = 1.1  # values closer than this are one
_FEWEST = 2  # values that must differ

Wrong = Callable[[Formula, Mapping[str, float]], float | None]


def find_mistaken(contract: ContractRecord) -> Yardstick | None:
    """Return the scheme of a model that follows one with a known mistake; None if there is none."""
    weights = list(filter(_is_drawn_map, judged_by_schemes(contract)))
    for looks, mistake in _MISTAKES.items():
        for scheme in _schemes_with_one_formula():
            if _follows(contract, weights, scheme, mistake):
                # Nothing but matrices was compared with the formula.
                only = replace(scheme, formulas={"matrix": scheme.formulas["matrix"]})
                return Yardstick(contract, only, judges_tables=False, looks=looks)

    return None


def _schemes_with_one_formula() -> list[Scheme]:
    """Return the schemes that have one formula for every matrix."""
    schemes, _ = catalogue()
    by_name = {scheme.name: scheme for scheme in schemes}

    # In the order in which they are tried.
    return list(map(by_name.__getitem__, _FORMULAS))


def _is_drawn_map(weight: WeightRecord) -> bool:
    """Return whether a weight is a drawn linear map.

    Kaiming by fan_out is published for convolutions.
    """
    is_convolution = len(weight.shape) > 3
    if is_convolution or is_constant(weight):
        return False
    return weight.role in MATRICES


def _follows(
    contract: ContractRecord, weights: list[WeightRecord], scheme: Scheme, wrong: Wrong
) -> bool:
    """Return whether every matrix has the value of a mistaken formula, and several prove it."""
    # 1. Every matrix has the value of the mistaken formula.
    telling: list[float] = []
    (formula,) = scheme.formulas["matrix"]
    for weight in weights:
        known = variables(contract, weight)
        value = wrong(formula, known)
        right = formula.value(known)

        # A formula has no value if the model lacks one of its variables.
        if value is None or right is None:
            return False

        # One matrix that has another value shows that this is not the mistake.
        if not holds(weight, value):
            return False

        # Those that the right formula does not explain prove the mistake.
        if not holds(weight, right):
            telling.append(value)

    # 2. Several different values are no accident.
    return _count_distinct(telling) >= _FEWEST


def _count_distinct(values: Iterable[float]) -> int:
    """Return how many values there are, those that lie close together counted as one."""
    count = 0
    last = -math.inf
    for value in sorted(values):
        if value > last * _APART:
            count += 1
            last = value

    return count


def exchanged(formula: Formula, known: Mapping[str, float]) -> float | None:
    """Return the value with fan_in and fan_out exchanged."""
    fan_in = known.get("fan_in")
    fan_out = known.get("fan_out")
    if fan_in is None or fan_out is None:
        return None
    return formula.value({**known, "fan_in": fan_out, "fan_out": fan_in})


def _squared(formula: Formula, known: Mapping[str, float]) -> float | None:
    """Return the variance."""
    value = formula.value(known)
    if value is None:
        return None
    return value * value


_MISTAKES: dict[str, Wrong] = {
    "fan_in and fan_out confused": exchanged,
    "std and variance confused": _squared,
}
