"""The paper's closed-form bounds for one sub-layer (Eq. 15 and 20), and stricter ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jacdiag.measure.weight_statistics import bound_attention, bound_ffn
from jacdiag.records.report import Interval, Spread, WeightStats

# Largest slope of the activation; the product of norms bounds the FFN with this factor.
LIPSCHITZ = {
    "relu": 1.0,
    "tanh": 1.0,
    "gelu": 1.13,
    "silu": 1.1,
    "sigmoid": 0.25,
    "relu6": 1.0,
    "leaky_relu": 1.0,
}


@dataclass(frozen=True)
class Bounds:
    """The bounds of one sub-layer.

    `bound` is that of the paper. `bound_norms` has measured norms in place of the estimates. Only
    the latter is a bound in every case.
    """

    bound: float | None = None
    bound_norms: float | None = None
    notes: dict[str, str] = field(default_factory=dict)


def closed_form_bounds(
    *,
    kind: str,
    placement: str,
    state: str,
    weights: Mapping[str, WeightStats],
    activations: Sequence[str],
    shortcut_std: Spread | None,
    norm_gain: Interval | None,
    heads_norm: Interval | None,
) -> Bounds:
    """Evaluate Eq. 15 (FFN) or Eq. 20 (attention) where they apply.

    They apply to pre-norm at init, and to an FFN of two matrices.

    Args:
        kind: of the sub-layer, such as "mlp" or "attention".
        placement: of its norm; the equations are for "pre".
        state: "init" or "trained".
        weights: by role; W_1 and W_2, or W_O, are read.
        activations: names of the activation functions of an FFN.
        shortcut_std: Eq. 15 takes its median over tokens, `bound_norms` the largest gain instead.
        norm_gain: of the input norm, the largest over tokens.
        heads_norm: measured |J^Z| for attention.

    Returns:
        The bounds; those that do not apply are None, with a note that says why.
    """
    reason = _why_not_applicable(kind, placement, state, weights)
    if reason:
        return _without_bounds(reason)
    # Both equations divide by the std that the norm takes off.
    if shortcut_std is None or norm_gain is None:
        return _without_bounds("no input norm")

    if kind == "mlp":
        return _ffn(weights["W_1"], weights["W_2"], activations, shortcut_std, norm_gain)

    return _attention(weights["W_O"], shortcut_std, norm_gain, heads_norm)


def _without_bounds(reason: str) -> Bounds:
    """Return no bounds, and why there are none."""
    return Bounds(notes=dict.fromkeys(("bound", "bound_norms", "tightness"), reason))


def _why_not_applicable(
    kind: str, placement: str, state: str, weights: Mapping[str, WeightStats]
) -> str:
    """Return why the paper has no bound for a sub-layer; "" if it has one."""
    # 1. What both equations need.
    if placement != "pre":
        return f"Eq. 15 and 20 are for pre-norm; the placement is {placement}"
    if state != "init":
        return "Eq. 15 and 20 describe an initial state; this model is trained"
    if kind not in ("mlp", "attention"):
        return f"the paper has no closed form for kind {kind}"

    # 2. The weights that each reads.
    if kind == "mlp" and set(weights) != {"W_1", "W_2"}:
        return "Eq. 15 is for an FFN of two matrices"
    if kind == "attention" and "W_O" not in weights:
        return "W_O was not found"

    return ""


def _ffn(
    w1: WeightStats, w2: WeightStats, activations: Sequence[str], spread: Spread, gain: Interval
) -> Bounds:
    """Return the bounds of an FFN of two matrices."""
    # 1. The paper's bound, from the std of the weights.
    bound = None
    has_stds = w1.std is not None and w2.std is not None
    if has_stds and spread.median > 0:
        assert w1.std is not None and w2.std is not None
        bound = bound_ffn(w1.std, w2.std, spread.median, min(w1.shape), max(w1.shape))

    # 2. The bound from their norms and the activation's largest slope.
    slope = max((LIPSCHITZ.get(name, 0.0) for name in activations), default=1.0)
    notes = {}
    norms = None
    if w1.norm is None or w2.norm is None:
        notes["bound_norms"] = "the norms of the weights were not measured"
    elif slope == 0:
        notes["bound_norms"] = f"no Lipschitz factor is known for {', '.join(activations)}"
    else:
        norms = 1 + slope * w1.norm * w2.norm * gain.upper

    # 3. A slope that the norms alone do not show.
    if slope not in (0.0, 1.0):
        notes["bound_norms_factor"] = (
            f"the activation's largest slope {slope} is part of bound_norms"
        )
    return Bounds(bound, norms, notes)


def _attention(
    wo: WeightStats, spread: Spread, gain: Interval, heads_norm: Interval | None
) -> Bounds:
    """Return the bounds of an attention, which rest on the measured norm of its heads."""
    if heads_norm is None:
        return _without_bounds("|J^Z| was not measured")

    # 1. The paper's bound, from the std of W_O.
    bound = None
    if wo.std is not None and spread.median > 0:
        bound = bound_attention(wo.std, spread.median, min(wo.shape), heads_norm.estimate)

    # 2. The bound from its norm.
    norms = None
    if wo.norm is not None:
        norms = 1 + wo.norm * heads_norm.upper * gain.upper
    return Bounds(bound, norms, {})
