"""JD203: the scaling of an init with depth is missing, applied twice, or on the wrong matrix.

Output matrices of residual branches are often drawn smaller in deeper models: by 1/sqrt(2N) for N
layers (GPT-2), or by 1/sqrt(2(l + 1)) in layer l. A weight that is off by just this factor is a
mistake in the scaling. `scheme_deviations.py` makes it a deviation of the kind "depth", and
`init_contract.py` lists the rule that reports those.
"""

from __future__ import annotations

import math

from jacdiag.records import WeightRecord
from jacdiag.rules.init.scheme_fit import Mismatch, Yardstick, holds
from jacdiag.rules.init.schemes import INNER, RESIDUAL
from jacdiag.rules.init.weight_facts import is_constant

_MISSING = "the scaling with depth is missing"
_TWICE = "scaled with depth once too often"
_ON_OTHERS = "scaled with depth, and writes to no shortcut"


_MISTAKES_OF_OUTPUTS = {"missing": _MISSING, "extra": _TWICE}
DEPTH_MISTAKES = frozenset({_MISSING, _TWICE, _ON_OTHERS})
"""What `depth_mistake` returns if something is wrong."""


def depth_factor(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return "missing" or "extra" if a weight is off by just the scaling with depth, else ""."""
    # 1. A constant was not scaled.
    weight = mismatch.piece.weight
    value = mismatch.value
    if is_constant(weight) or value <= 0:
        return ""

    # 2. The std times one of the factors. What the formula does not scale cannot miss it.
    factors = _factors(yardstick, weight)
    for name, factor in factors:
        is_scaled = name in mismatch.formula.names
        if is_scaled and holds(weight, value * factor, yardstick.spread):
            return "missing"

    # 3. The std over one of the factors.
    for _, factor in factors:
        if holds(weight, value / factor, yardstick.spread):
            return "extra"

    return ""


def _factors(yardstick: Yardstick, weight: WeightRecord) -> list[tuple[str, float]]:
    """Return the factors of the model and of a weight's layer, each with the variable in it.

    A factor of 1 changes nothing and is left out.
    """
    # 1. 1/sqrt(2N) in every layer.
    layers = yardstick.contract.sizes.get("N", 0.0)
    factors = [("N", math.sqrt(2 * layers))]

    # 2. 1/sqrt(2(l + 1)) in layer l.
    if weight.layer is not None:
        factors.append(("l", math.sqrt(2 * (weight.layer + 1))))

    return [(name, factor) for name, factor in factors if factor > 1]


def depth_mistake(role: str, factor: str) -> str:
    """Return what is wrong with the scaling with depth; "" if nothing is.

    Args:
        role: of the matrix.
        factor: what `depth_factor` returned for it.
    """
    # 1. Output matrices are scaled down with depth, once.
    if role in RESIDUAL:
        return _MISTAKES_OF_OUTPUTS.get(factor, "")

    # 2. The matrices before them are not.
    is_scaled = factor == "extra"
    if role in INNER and is_scaled:
        return _ON_OTHERS
    return ""
