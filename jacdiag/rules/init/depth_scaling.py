"""JD203: the scaling of an init with depth is missing, applied twice, or on the wrong matrix.

Output matrices of residual branches are often drawn smaller in deeper models: by 1/sqrt(2N) for N
layers (GPT-2), or by 1/sqrt(2(l + 1)) in layer l. A weight that is off by just this factor is a
mistake in the scaling. `scheme_deviations.py` makes it a deviation of the kind "depth", and
`init_contract.py` lists the rule that reports those.
"""

from __future__ import annotations

import math

from jacdiag.rules.init.scheme_fit import Mismatch, Yardstick, holds
from jacdiag.rules.init.schemes import INNER, RESIDUAL

_MISSING = "the scaling with depth is missing"
_TWICE = "scaled with depth once too often"
_ON_OTHERS = "scaled with depth, and writes to no shortcut"
DEPTH_MISTAKES = frozenset({_MISSING, _TWICE, _ON_OTHERS})
"""What `depth_mistake` returns if something is wrong."""


def depth_factor(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return "missing" or "extra" if a weight is off by just the scaling with depth, else ""."""
    weight, value = mismatch.piece.weight, mismatch.value
    if weight.family in ("zero", "constant") or value <= 0:
        return ""
    layers = yardstick.contract.sizes.get("N", 0.0)
    factors = {math.sqrt(2 * layers)}
    if weight.layer is not None:
        factors.add(math.sqrt(2 * (weight.layer + 1)))
    for factor in sorted(factors):
        if factor <= 1:
            continue
        if holds(weight, value * factor, yardstick.spread):
            return "missing"
        if holds(weight, value / factor, yardstick.spread):
            return "extra"
    return ""


def depth_mistake(role: str, factor: str) -> str:
    """Return what is wrong with the scaling with depth; "" if nothing is.

    Args:
        role: of the matrix.
        factor: what `depth_factor` returned for it.
    """
    # 1. Output matrices are scaled down with depth, once.
    if role in RESIDUAL:
        if factor == "missing":
            return _MISSING
        if factor == "extra":
            return _TWICE

    # 2. The others are not.
    if role in INNER and factor == "extra":
        return _ON_OTHERS
    return ""
