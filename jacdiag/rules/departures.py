"""Weights that were not drawn as a scheme says: which, by how much, and what mistake it looks like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.report import ContractRecord, WeightRecord
from jacdiag.rules.numbers import plain
from jacdiag.rules.schemes import INNER, RESIDUAL, Scheme, expected, holds, variables

Spread = tuple[float, float]


@dataclass(frozen=True)
class Departure:
    """One weight that is not what it should be.

    Attributes:
        value: what was expected, `formula` in words.
        kind: "depth" (scaling with depth missing, twice, or on the wrong matrix), "layers" (some layers only), "plain".
        looks: the mistake that it looks like, "" for none.
        of: how many weights have the same name pattern.
    """

    weight: WeightRecord
    value: float
    formula: str
    kind: str
    looks: str = ""
    of: int = 1


def departures(
    contract: ContractRecord, scheme: Scheme, s: float | None, spread: Spread = (1.0, 1.0)
) -> tuple[int, list[Departure]]:
    """Returns how many weights the scheme speaks of, and those that depart from it."""
    stated = [(w, values) for w in contract.weights if (values := expected(contract, w, scheme, s))]
    sizes: dict[str, list[bool]] = {}
    for w, values in stated:
        sizes.setdefault(w.pattern, []).append(any(holds(w, v, spread) for v in values))
    found = []
    for w, values in stated:
        if any(holds(w, v, spread) for v in values):
            continue
        value = min(values, key=lambda v: abs(math.log(max(w.std or 0, 1e-30) / v)) if v > 0 else math.inf)
        formula = next((f for f in scheme.of(w) if f.value(variables(contract, w, s)) == value), scheme.of(w)[0])
        looks = _looks(contract, w, value, spread)
        some = any(sizes[w.pattern]) and len(sizes[w.pattern]) > 1
        kind = "depth" if "depth" in looks else "layers" if some else "plain"
        found.append(Departure(w, value, _shown(formula.text, s), kind, looks, len(sizes[w.pattern])))
    return len(stated), found


def _shown(formula: str, s: float | None) -> str:
    return formula if s is None else f"{formula} with s = {plain(s)}"


def _looks(contract: ContractRecord, w: WeightRecord, value: float, spread: Spread) -> str:
    """The mistake that turns `value` into what was measured."""
    if w.family == "zero":
        return "all of it is zero"
    if w.family == "constant" or value <= 0:
        return ""
    layers, layer = contract.sizes.get("N", 0.0), w.layer
    factors = {math.sqrt(2 * layers), *((math.sqrt(2 * (layer + 1)),) if layer is not None else ())}
    for factor in sorted(f for f in factors if f > 1):
        if holds(w, value * factor, spread) and w.role in RESIDUAL:
            return "the scaling with depth is missing"
        if holds(w, value / factor, spread):
            if w.role in RESIDUAL:
                return "scaled with depth once too often"
            if w.role in INNER:
                return "scaled with depth, and writes to no shortcut"
    if holds(w, value * value, spread) or holds(w, math.sqrt(value), spread):
        return "std and variance confused"
    if w.fan_in and w.fan_out and w.fan_in != w.fan_out:
        ratio = math.sqrt(w.fan_in / w.fan_out)
        if holds(w, value * ratio, spread) or holds(w, value / ratio, spread):
            return "fan_in and fan_out confused"
    return ""


def told(group: Sequence[Departure], by: str) -> tuple[str, dict[str, Any]]:
    """The sentence and the evidence of one finding: weights of one name pattern, layers folded."""
    first, weights = group[0], [d.weight for d in group]
    name = first.weight.pattern.removesuffix(".weight")
    count = f" ({len(group)} of {first.of}{_layers(weights, first.of)})" if first.of > 1 else ""
    vector = len(first.weight.shape) < 2
    figures = [w.mean if vector else w.std for w in weights]
    measured = _range(figures)
    wanted = sorted({d.value for d in group})
    aim = plain(wanted[0]) if len(wanted) == 1 else f"{plain(wanted[0])} to {plain(wanted[-1])}"
    stated = "" if _is_number(first.formula) else f"{first.formula} = "
    figure = "value" if vector else "std"
    if vector and first.weight.family not in ("zero", "constant"):
        measured = f"not constant, about {measured}"
    looks = next((d.looks for d in group if d.looks), "")
    what = f"{name}{count}: {figure} {measured}, {by} {stated}{aim}" + (f"; {looks}" if looks else "")
    evidence = {
        "parameters": [w.parameter for w in weights], "role": first.weight.role, "pattern": first.weight.pattern,
        "layers": [w.layer for w in weights], "of": first.of, "family": first.weight.family,
        "value": figures[0], "lower": first.weight.lower, "upper": first.weight.upper,
        "expected": first.value, "formula": first.formula, "kind": first.kind, "looks": looks,
    }  # fmt: skip
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


# -- no scheme: the layers beside each other ---------------------------------------------------------------------------
def layers_that_differ(contract: ContractRecord) -> tuple[int, list[Departure]]:
    """Layers of one name pattern whose std leaves a smooth course over depth (constant, or a power of l + 1).

    Nothing is said where no such course passes through two thirds of the layers.
    """
    groups: dict[str, list[WeightRecord]] = {}
    for w in contract.weights:
        if w.layer is not None and w.lower and w.upper and w.std and len(w.shape) >= 2:
            groups.setdefault(w.pattern, []).append(w)
    found = []
    several = [group for group in groups.values() if len(group) >= 3]
    for group in several:
        course = max(_courses(group), key=lambda c: sum(_on(w, c) for w in group))
        off = [w for w in group if not _on(w, course)]
        if off and len(off) * 3 <= len(group):
            text = f"the others' course over depth, (l + 1)^{course[1]:.2g}" if course[1] else "the std of the others"
            found += [Departure(w, _at(w, course), text, "layers", "", len(group)) for w in off]
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
    return weight.std * (weight.lower / weight.std) ** 2 <= value <= weight.std * (weight.upper / weight.std) ** 2
