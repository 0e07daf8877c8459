"""Weights that were not drawn as a scheme says: which, by how much, and what mistake it looks
like.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jacdiag.records import WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.scheme_choice import depth_factor
from jacdiag.rules.scheme_fit import Mismatch, Yardstick, holds
from jacdiag.rules.schemes import INNER, MATRICES, OUTSIDE, RESIDUAL

_LINEAR_DEFAULT = "PyTorch's default for nn.Linear"
_PROJECTIONS = ("W_Q", "W_K", "W_V", "W_QK", "W_QV", "W_KV", "W_QKV")


@dataclass(frozen=True)
class Departure:
    """One weight that is not what it should be.

    Attributes:
        value: what was expected, `formula` in words.
        kind: "depth" (scaling with depth missing, twice, or on the wrong matrix), "layers" (some
            layers only), "plain".
        looks: the mistake that it looks like, "" for none.
        of: how many weights have the same name pattern.
        section: the role whose rows of a fused matrix are meant; "" for the entire weight. Then the
            figures of `weight` are those of these rows.
        by_layers: whether the weight was compared with the other layers alone.
    """

    weight: WeightRecord
    value: float
    formula: str
    kind: str
    looks: str = ""
    of: int = 1
    section: str = ""
    by_layers: bool = False


def departures(yardstick: Yardstick) -> tuple[int, list[Departure]]:
    """Return how many weights a scheme speaks of, and those that depart from it."""
    # 1. Compare every weight that the scheme speaks of.
    stated: list[tuple[WeightRecord, list[Mismatch]]] = []
    for weight in yardstick.contract.weights:
        mismatches = yardstick.mismatches(weight)
        if mismatches is not None:
            stated.append((weight, mismatches))

    # 2. Note which layers of each name agree: a mistake of all layers is another than that of one.
    agreeing: dict[str, list[bool]] = {}
    for weight, mismatches in stated:
        agreeing.setdefault(weight.pattern, []).append(not mismatches)

    # 3. Say what each mismatch looks like.
    found = []
    for weight, mismatches in stated:
        of = agreeing[weight.pattern]
        for mismatch in mismatches:
            looks = _looks(yardstick, mismatch)
            kind = "plain"
            if "depth" in looks:
                kind = "depth"
            elif any(of) and len(of) > 1:
                kind = "layers"
            formula = _shown(mismatch.formula.text, yardstick.s)
            piece = mismatch.piece
            departure = Departure(
                piece.weight, mismatch.value, formula, kind, looks, len(of), piece.section
            )
            found.append(departure)
    return len(stated), found


def head_left_at_default(yardstick: Yardstick) -> list[Departure]:
    """Return the head, if it alone keeps the default of nn.Linear in a model that was drawn
    otherwise.

    Patch embeddings are left at their default by published inits (timm), and so is the output of
    an attention (torchvision): they are not looked at here.

    Args:
        yardstick: A scheme that the model was found to follow.
    """
    # 1. Every matrix inside the sub-layers agrees, and nothing else keeps the default of its class.
    for weight in yardstick.contract.weights:
        if weight.role in MATRICES and yardstick.mismatches(weight):
            return []
        if weight.role != "head" and _is_default(weight):
            return []
    # 2. The head is a uniform draw with just the bounds of nn.Linear.
    heads = [w for w in yardstick.contract.weights if w.role == "head" and is_linear_default(w)]
    tied = yardstick.contract.tied
    found = []
    for head in heads:
        as_inside = replace(head, role="W_1")
        values = yardstick.values(as_inside)
        if head.parameter in tied or yardstick.agrees_by_itself(head) or not values:
            continue
        formula, value = next(iter(values.items()))
        if not formula.names <= {"s"}:
            continue  # a formula of the sub-layers' sizes says nothing of the head (T-Fixup)
        if not holds(head, value, yardstick.spread):
            text = _shown(formula.text, yardstick.s)
            found.append(Departure(head, value, text, "plain", _LINEAR_DEFAULT))
    return found


def _is_default(weight: WeightRecord) -> bool:
    """Return whether a weight keeps the default of nn.Linear or nn.Embedding."""
    if weight.role in ("embedding", "positions"):
        return weight.family == "normal" and holds(weight, 1.0)
    return weight.role in (*MATRICES, *OUTSIDE) and is_linear_default(weight)


def is_linear_default(weight: WeightRecord) -> bool:
    """Return whether a weight is a uniform draw between -1/sqrt(fan_in) and 1/sqrt(fan_in)."""
    if weight.family != "uniform" or not weight.fan_in:
        return False
    return holds(weight, 1 / math.sqrt(3 * weight.fan_in))


def _shown(formula: str, s: float | None) -> str:
    return formula if s is None else f"{formula} with s = {plain(s)}"


def _looks(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return the mistake that turns the expected value into what was measured, "" if none is
    known.
    """
    weight, value, spread = mismatch.piece.weight, mismatch.value, yardstick.spread
    if weight.family == "zero":
        return "all of it is zero"
    if weight.family == "constant" or value <= 0:
        return ""
    if yardstick.looks:
        return yardstick.looks
    if holds(weight, 1.0) and value < 1.0:
        return "the default std of torch.nn.init.normal_ is 1"
    if _is_scaled_by_head(yardstick, mismatch):
        return "scaled by the width of a head, not by that of its input"
    factor = depth_factor(yardstick, mismatch)
    if factor == "missing" and weight.role in RESIDUAL:
        return "the scaling with depth is missing"
    if factor == "extra" and weight.role in RESIDUAL:
        return "scaled with depth once too often"
    if factor == "extra" and weight.role in INNER:
        return "scaled with depth, and writes to no shortcut"
    if holds(weight, value * value, spread) or holds(weight, math.sqrt(value), spread):
        return "std and variance confused"
    if weight.fan_in and weight.fan_out and weight.fan_in != weight.fan_out:
        ratio = math.sqrt(weight.fan_in / weight.fan_out)
        if holds(weight, value * ratio, spread) or holds(weight, value / ratio, spread):
            return "fan_in and fan_out confused"
    return _LINEAR_DEFAULT if is_linear_default(weight) else ""


def _is_scaled_by_head(yardstick: Yardstick, mismatch: Mismatch) -> bool:
    """Return whether queries, keys or values have the std of an input as wide as one head."""
    weight, head = mismatch.piece.weight, yardstick.contract.sizes.get("d_head")
    if weight.role not in _PROJECTIONS or not head or not weight.fan_in or weight.fan_in == head:
        return False
    value = mismatch.value * math.sqrt(weight.fan_in / head)
    return holds(weight, value, yardstick.spread)


def told(group: Sequence[Departure], by: str) -> tuple[str, dict[str, Any]]:
    """The sentence and the evidence of one finding: weights of one name pattern, layers folded."""
    first, weights = group[0], [d.weight for d in group]
    if first.by_layers:
        by = "the other layers have"
    name = first.weight.pattern.removesuffix(".weight")
    if first.section:
        name = f"the {first.section} rows of {name}"
    count = f" ({len(group)} of {first.of}{_layers(weights, first.of)})" if first.of > 1 else ""
    vector = len(first.weight.shape) < 2
    figures = [w.mean if vector else w.std for w in weights]
    measured = _range(figures)
    wanted = sorted({d.value for d in group})
    aim = plain(wanted[0]) if len(wanted) == 1 else f"{plain(wanted[0])} to {plain(wanted[-1])}"
    stated = "" if first.by_layers or _is_number(first.formula) else f"{first.formula} = "
    figure = "value" if vector else "std"
    if vector and first.weight.family not in ("zero", "constant"):
        measured = f"not constant, about {measured}"
    looks = next((d.looks for d in group if d.looks), "")
    what = f"{name}{count}: {figure} {measured}, {by} {stated}{aim}" + (
        f"; {looks}" if looks else ""
    )
    evidence = {
        "parameters": [w.parameter for w in weights],
        "role": first.weight.role,
        "pattern": first.weight.pattern,
        "layers": [w.layer for w in weights],
        "of": first.of,
        "family": first.weight.family,
        "value": figures[0],
        "lower": first.weight.lower,
        "upper": first.weight.upper,
        "expected": first.value,
        "formula": first.formula,
        "kind": first.kind,
        "looks": looks,
    }
    if first.section:
        evidence["section"] = first.section
    return what, evidence


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _range(values: Iterable[float | None]) -> str:
    known = sorted(v for v in values if v is not None)
    if not known:
        return "?"
    low, high = plain(known[0]), plain(known[-1])
    return low if low == high or known[-1] < known[0] * 1.05 else f"{low} to {high}"


def _layers(weights: Sequence[WeightRecord], of: int) -> str:
    layers = [str(w.layer) for w in weights if w.layer is not None]
    return f", layer {', '.join(layers[:8])}" if layers and len(layers) < of else ""


# -- no scheme: the layers compared with each other ------------------------------------------------
def layers_that_differ(weights: Iterable[WeightRecord]) -> tuple[int, list[Departure]]:
    """Return the layers of one name whose std leaves a smooth course over depth (constant, or a
    power of l + 1).

    Nothing is said where no such course passes through two thirds of the layers.

    Args:
        weights: Those that no scheme speaks of.
    """
    groups: dict[str, list[WeightRecord]] = {}
    for w in weights:
        if w.layer is not None and w.lower and w.upper and w.std and len(w.shape) >= 2:
            groups.setdefault(w.pattern, []).append(w)
    found = []
    several = [group for group in groups.values() if len(group) >= 3]
    for group in several:
        course = max(_courses(group), key=lambda c: sum(_on(w, c) for w in group))
        off = [w for w in group if not _on(w, course)]
        if off and len(off) * 3 <= len(group):
            text = "the std of the other layers"
            if course[1]:
                text = f"a course over depth of (l + 1)^{course[1]:.2g}"
            for weight in off:
                value = _at(weight, course)
                found.append(
                    Departure(weight, value, text, "layers", of=len(group), by_layers=True)
                )
    return sum(map(len, several)), found


Course = tuple[float, float]  # std = a (l + 1)^b


def _courses(group: Sequence[WeightRecord]) -> Iterable[Course]:
    middle = sorted(w.std or 0.0 for w in group)[len(group) // 2]
    yield middle, 0.0
    chosen = group if len(group) <= 24 else group[:: max(1, len(group) // 24)]
    for one, other in itertools.combinations(chosen, 2):
        a, b = (one.layer or 0) + 1, (other.layer or 0) + 1
        if a != b and one.std and other.std:
            power = math.log(other.std / one.std) / math.log(b / a)
            yield one.std / a**power, power


def _at(weight: WeightRecord, course: Course) -> float:
    return course[0] * float((weight.layer or 0) + 1) ** course[1]


def _on(weight: WeightRecord, course: Course) -> bool:
    """Within twice the sampling interval: the course itself was drawn through samples."""
    assert weight.std is not None and weight.lower is not None and weight.upper is not None
    value = _at(weight, course)
    return (
        weight.std * (weight.lower / weight.std) ** 2
        <= value
        <= weight.std * (weight.upper / weight.std) ** 2
    )
