"""Find weights that were not drawn as a scheme says, and the mistake that each looks like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jacdiag.records import WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.depth_scaling import DEPTH_MISTAKES, depth_factor, depth_mistake
from jacdiag.rules.init.scheme_fit import Mismatch, Spread, Yardstick, holds
from jacdiag.rules.init.schemes import MATRICES, OUTSIDE
from jacdiag.rules.wording import layers_in_words

_LINEAR_DEFAULT = "PyTorch's default for nn.Linear"
# Two values of a range are shown as one if the larger is less than 5% above the smaller.
_NARROW_RANGE = 1.05
_FEWEST_LAYERS = 3  # that can show a course over depth
_MOST_LAYERS = 24  # between which courses are drawn
_PROJECTIONS = ("W_Q", "W_K", "W_V", "W_QK", "W_QV", "W_KV", "W_QKV")


@dataclass(frozen=True)
class Deviation:
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


def deviations(yardstick: Yardstick) -> tuple[int, list[Deviation]]:
    """Return how many weights a scheme covers, and those that differ from it."""
    # 1. Compare every weight that the scheme covers.
    compared: list[tuple[WeightRecord, list[Mismatch]]] = []
    for weight in yardstick.contract.weights:
        mismatches = yardstick.mismatches(weight)
        if mismatches is not None:
            compared.append((weight, mismatches))

    # 2. Note which layers of each name agree: a mistake of all layers is another than that of one.
    agreeing: dict[str, list[bool]] = {}
    for weight, mismatches in compared:
        agreeing.setdefault(weight.pattern, []).append(not mismatches)

    # 3. Say what each mismatch looks like.
    result = []
    for weight, mismatches in compared:
        layers = agreeing[weight.pattern]
        is_uneven = any(layers) and len(layers) > 1
        for mismatch in mismatches:
            looks = _looks(yardstick, mismatch)
            kind = "plain"
            if looks in DEPTH_MISTAKES:
                kind = "depth"
            elif is_uneven:
                kind = "layers"
            deviation = Deviation(
                mismatch.piece.weight,
                mismatch.value,
                formula=_shown(mismatch.formula.text, yardstick.s),
                kind=kind,
                looks=looks,
                of=len(layers),
                section=mismatch.piece.section,
            )
            result.append(deviation)
    return len(compared), result


def head_left_at_default(yardstick: Yardstick) -> list[Deviation]:
    """Return the head, if it alone keeps the default of nn.Linear.

    Patch embeddings are left at their default by published inits (timm), and so is the output of
    an attention (torchvision). They are not looked at here.

    Args:
        yardstick: A scheme that the model was found to follow.
    """
    contract = yardstick.contract
    if not _only_the_head_may_differ(yardstick):
        return []

    # The head is a uniform draw with just the bounds of nn.Linear.
    result: list[Deviation] = []
    for head in contract.weights:
        if head.role != "head" or not is_linear_default(head):
            continue
        if head.parameter in contract.tied or yardstick.agrees_by_itself(head):
            continue
        deviation = _compare_with_matrices(yardstick, head)
        if deviation is not None:
            result.append(deviation)
    return result


def _only_the_head_may_differ(yardstick: Yardstick) -> bool:
    """Return whether all matrices agree, and nothing but the head keeps the default of a class."""
    for weight in yardstick.contract.weights:
        if weight.role in MATRICES and yardstick.mismatches(weight):
            return False
        if weight.role != "head" and _is_default(weight):
            return False
    return True


def _compare_with_matrices(yardstick: Yardstick, head: WeightRecord) -> Deviation | None:
    """Compare a head at its default with what the scheme says of a matrix of any size."""
    values = yardstick.values(replace(head, role="W_1"))
    if not values:
        return None
    formula, value = next(iter(values.items()))

    # A formula of the sub-layers' sizes says nothing of the head (T-Fixup).
    is_of_any_size = formula.names <= {"s"}
    if not is_of_any_size or holds(head, value, yardstick.spread):
        return None
    text = _shown(formula.text, yardstick.s)
    return Deviation(head, value, text, "plain", _LINEAR_DEFAULT)


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
    """Return the mistake that turns the expected value into what was measured.

    "" means that none is known.
    """
    weight = mismatch.piece.weight
    if weight.family == "zero":
        return "all of it is zero"
    if weight.family == "constant" or mismatch.value <= 0:
        return ""

    # 1. The mistake of the entire model.
    if yardstick.looks:
        return yardstick.looks

    # 2. Mistakes of one weight, the most specific first.
    factor = depth_factor(yardstick, mismatch)
    return (
        _wrong_number(yardstick, mismatch)
        or depth_mistake(weight.role, factor)
        or _confusion(yardstick, mismatch)
    )


def _wrong_number(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return which other number the std was taken from; "" if that is not known."""
    is_unit_std = holds(mismatch.piece.weight, 1.0)
    if is_unit_std and mismatch.value < 1.0:
        return "the default std of torch.nn.init.normal_ is 1"
    if _is_scaled_by_head(yardstick, mismatch):
        return "scaled by the width of a head, not by that of its input"
    return ""


def _confusion(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return which two numbers were taken for each other, or that no init was applied."""
    weight, value, spread = mismatch.piece.weight, mismatch.value, yardstick.spread
    if holds(weight, value * value, spread) or holds(weight, math.sqrt(value), spread):
        return "std and variance confused"

    if _has_fans_confused(weight, value, spread):
        return "fan_in and fan_out confused"

    if is_linear_default(weight):
        return _LINEAR_DEFAULT
    return ""


def _has_fans_confused(weight: WeightRecord, value: float, spread: Spread) -> bool:
    """Return whether the std is that of the transposed matrix."""
    if not weight.fan_in or not weight.fan_out:
        return False
    if weight.fan_in == weight.fan_out:
        return False

    # Formulas divide by a root of fan_in or of fan_out, so that either ratio may be right.
    ratio = math.sqrt(weight.fan_in / weight.fan_out)
    return holds(weight, value * ratio, spread) or holds(weight, value / ratio, spread)


def _is_scaled_by_head(yardstick: Yardstick, mismatch: Mismatch) -> bool:
    """Return whether queries, keys or values have the std of an input as wide as one head."""
    weight = mismatch.piece.weight
    if weight.role not in _PROJECTIONS:
        return False

    # With one head there is nothing to confuse.
    head = yardstick.contract.sizes.get("d_head")
    if not head or not weight.fan_in:
        return False
    if weight.fan_in == head:
        return False

    value = mismatch.value * math.sqrt(weight.fan_in / head)
    return holds(weight, value, yardstick.spread)


def describe(group: Sequence[Deviation], by: str) -> tuple[str, dict[str, Any]]:
    """Return the sentence and the evidence of one finding.

    Args:
        group: Weights of one name pattern, so that the layers are folded.
        by: What expects another value, with its verb.
    """
    # 1. The sentence.
    first = group[0]
    weights = [deviation.weight for deviation in group]
    looks = _first_look(group)
    sentence = f"{_subject(group)}: {_measured(first, weights)}, {_expected(group, by)}"
    if looks:
        sentence += f"; {looks}"

    # 2. The evidence.
    evidence = {
        "parameters": [weight.parameter for weight in weights],
        "role": first.weight.role,
        "pattern": first.weight.pattern,
        "layers": [weight.layer for weight in weights],
        "of": first.of,
        "family": first.weight.family,
        "value": _value_of(first.weight),
        "lower": first.weight.lower,
        "upper": first.weight.upper,
        "expected": first.value,
        "formula": first.formula,
        "kind": first.kind,
        "looks": looks,
    }
    if first.section:
        evidence["section"] = first.section
    return sentence, evidence


def _first_look(group: Sequence[Deviation]) -> str:
    """Return the mistake that the first weights of a group look like; "" for none."""
    for deviation in group:
        if deviation.looks:
            return deviation.looks
    return ""


def _subject(group: Sequence[Deviation]) -> str:
    """Return what a finding is about: "h.*.mlp.c_proj (2 of 12, layer 3, 4)"."""
    first = group[0]
    name = first.weight.pattern.removesuffix(".weight")
    if first.section:
        name = f"the {first.section} rows of {name}"
    if first.of <= 1:
        return name
    layers = layers_in_words([deviation.weight for deviation in group], first.of)
    return f"{name} ({len(group)} of {first.of}{layers})"


def _measured(first: Deviation, weights: Sequence[WeightRecord]) -> str:
    """Return what was measured: "std 0.02", or the value of a vector."""
    measured = _range(_value_of(weight) for weight in weights)
    if not _is_vector(first.weight):
        return f"std {measured}"
    if first.weight.family in ("zero", "constant"):
        return f"value {measured}"
    return f"value not constant, about {measured}"


def _expected(group: Sequence[Deviation], by: str) -> str:
    """Return what was expected: "the published init expects 0.02/sqrt(2*N) = 0.00408"."""
    first = group[0]
    values = sorted({deviation.value for deviation in group})
    shown = plain(values[0])
    if len(values) > 1:
        shown = f"{shown} to {plain(values[-1])}"
    if first.by_layers:
        return f"the other layers have {shown}"
    if _is_number(first.formula):
        return f"{by} {shown}"
    return f"{by} {first.formula} = {shown}"


def _is_vector(weight: WeightRecord) -> bool:
    return len(weight.shape) < 2


def _value_of(weight: WeightRecord) -> float | None:
    return weight.mean if _is_vector(weight) else weight.std


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _range(values: Iterable[float | None]) -> str:
    """Return "0.02", or "0.02 to 0.04" if the values differ by more than a few percent."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return "?"

    low, high = plain(known[0]), plain(known[-1])
    if low == high:
        return low
    is_narrow = known[-1] < known[0] * _NARROW_RANGE
    return low if is_narrow else f"{low} to {high}"


# -- no scheme: the layers compared with each other ------------------------------------------------
def layers_that_differ(weights: Iterable[WeightRecord]) -> tuple[int, list[Deviation]]:
    """Return the layers of one name whose std leaves a smooth course over depth.

    A course is constant, or a power of l + 1. Nothing is said where no such course passes through
    two thirds of the layers.

    Args:
        weights: Those that no scheme covers.

    Returns:
        How many weights were compared, and those off their course.
    """
    # 1. Matrices by name pattern.
    groups: dict[str, list[WeightRecord]] = {}
    for weight in weights:
        is_measured = bool(weight.lower and weight.upper and weight.std)
        if weight.layer is not None and is_measured and not _is_vector(weight):
            groups.setdefault(weight.pattern, []).append(weight)

    # 2. Those of enough layers to show a course.
    count = 0
    result: list[Deviation] = []
    for group in groups.values():
        if len(group) >= _FEWEST_LAYERS:
            count += len(group)
            result += _off_course(group)
    return count, result


def _off_course(group: Sequence[WeightRecord]) -> list[Deviation]:
    """Return the layers off the course that passes through the most; [] if it passes few."""

    def count_met(course: _Course) -> int:
        return sum(course.meets(weight) for weight in group)

    # 1. The course and the layers off it.
    course = max(_courses(group), key=count_met)
    off = [weight for weight in group if not course.meets(weight)]
    if len(off) * 3 > len(group):
        return []

    # 2. What the course says of each.
    result = []
    for weight in off:
        value = course.at(weight)
        result.append(
            Deviation(weight, value, course.words, "layers", of=len(group), by_layers=True)
        )
    return result


@dataclass(frozen=True)
class _Course:
    """A std over depth: scale (l + 1)^power."""

    scale: float
    power: float = 0.0

    @property
    def words(self) -> str:
        """The course in words."""
        is_constant = not self.power
        if is_constant:
            return "the std of the other layers"
        return f"a course over depth of (l + 1)^{self.power:.2g}"

    def at(self, weight: WeightRecord) -> float:
        """Return the std at the layer of a weight."""
        depth = float((weight.layer or 0) + 1)
        return float(self.scale * depth**self.power)

    def meets(self, weight: WeightRecord) -> bool:
        """Return whether a weight lies on the course, within twice its sampling interval.

        The course itself was drawn through samples.
        """
        assert weight.std is not None and weight.lower is not None and weight.upper is not None
        low = weight.std * (weight.lower / weight.std) ** 2
        high = weight.std * (weight.upper / weight.std) ** 2
        return low <= self.at(weight) <= high


def _courses(group: Sequence[WeightRecord]) -> Iterable[_Course]:
    """Yield the constant course through the median, and the power through each pair of layers."""
    # 1. The constant.
    stds = sorted(weight.std or 0.0 for weight in group)
    yield _Course(stds[len(stds) // 2])

    # 2. The powers. A deep model has more pairs than are needed.
    if len(group) > _MOST_LAYERS:
        group = group[:: max(1, len(group) // _MOST_LAYERS)]
    for first, second in itertools.combinations(group, 2):
        if not first.std or not second.std:
            continue
        if first.layer == second.layer:
            continue
        depth, other_depth = (first.layer or 0) + 1, (second.layer or 0) + 1
        power = math.log(second.std / first.std) / math.log(other_depth / depth)
        yield _Course(first.std / depth**power, power)
