"""Find weights that were not drawn as a scheme says, and the mistake that each looks like."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.records.init_contract import SectionRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.depth_scaling import DEPTH_MISTAKES
from jacdiag.rules.init.likely_mistakes import LINEAR_DEFAULT, find_mistakes, is_linear_default
from jacdiag.rules.init.scheme_fit import Mismatch, Yardstick, holds
from jacdiag.rules.init.schemes import MATRICES, OUTSIDE
from jacdiag.rules.init.weight_facts import (
    is_constant,
    is_vector,
    parameters_of,
    pattern_of,
    sampling_interval,
    std_of,
    with_role,
)
from jacdiag.rules.init.zero_matrices import drawn_among_zeros
from jacdiag.rules.wording import layers_in_words

# Two values of a range are shown as one if the larger is less than 5% above the smaller.
_NARROW_RANGE = 1.05
_FEWEST_LAYERS = 3  # that can show a course over depth
_MOST_LAYERS = 24  # between which courses are drawn


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
        rows: where these rows lie; None for the entire weight.
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
    rows: SectionRecord | None = None


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

    # 3. Say what each mismatch looks like, which others may have to confirm.
    every_mismatch = [mismatch for _, mismatches in compared for mismatch in mismatches]
    counts = {pattern: len(layers) for pattern, layers in agreeing.items()}
    mistakes = find_mistakes(yardstick, every_mismatch, counts)

    # 4. Put it all together.
    result = []
    for mismatch, looks in zip(every_mismatch, mistakes, strict=True):
        layers = agreeing[mismatch.piece.weight.pattern]
        result.append(_deviation(yardstick, mismatch, looks, layers))

    return len(compared), result


def _deviation(
    yardstick: Yardstick, mismatch: Mismatch, looks: str, layers: Sequence[bool]
) -> Deviation:
    """Return a mismatch with the rule that reports it, and what it looks like.

    Args:
        yardstick: what the weight is compared with.
        mismatch: the weight, or its section.
        looks: the mistake that it looks like, "" for none.
        layers: whether each of the weights with its name pattern agrees.
    """
    # 1. The kind says which rule reports it.
    kind = "plain"
    if looks in DEPTH_MISTAKES:
        kind = "depth"
    elif any(layers):
        kind = "layers"

    # 2. The deviation.
    return Deviation(
        mismatch.piece.weight,
        mismatch.value,
        formula=_shown(mismatch.formula.text, yardstick.s),
        kind=kind,
        looks=looks,
        of=len(layers),
        section=mismatch.piece.section,
        rows=mismatch.piece.rows,
    )


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
    heads = filter(is_linear_default, with_role(contract.weights, "head"))
    for head in heads:
        if head.parameter in contract.tied or yardstick.agrees_by_itself(head):
            continue

        # The scheme would draw it otherwise.
        deviation = _compare_with_matrices(yardstick, head)
        if deviation is not None:
            result.append(deviation)

    return result


def _only_the_head_may_differ(yardstick: Yardstick) -> bool:
    """Return whether all matrices agree, and nothing but the head keeps the default of a class."""
    # 1. A matrix that differs from the scheme.
    weights = yardstick.contract.weights
    if any(map(yardstick.mismatches, with_role(weights, *MATRICES))):
        return False

    # 2. Another weight that nobody initialized.
    others = [weight for weight in weights if weight.role != "head"]
    return not any(map(_is_default, others))


def _compare_with_matrices(yardstick: Yardstick, head: WeightRecord) -> Deviation | None:
    """Compare a head at its default with what the scheme says of a matrix of any size."""
    # 1. The first formula for the matrices.
    values = yardstick.values(replace(head, role="W_1"))
    if not values:
        return None
    formula, value = next(iter(values.items()))

    # 2. A formula of the sub-layers' sizes says nothing of the head (T-Fixup).
    is_of_any_size = formula.names <= {"s"}
    if not is_of_any_size or holds(head, value, yardstick.spread):
        return None

    # 3. The head was to be drawn so, too.
    text = _shown(formula.text, yardstick.s)
    return Deviation(head, value, text, "plain", LINEAR_DEFAULT)


def _is_default(weight: WeightRecord) -> bool:
    """Return whether a weight keeps the default of nn.Linear or nn.Embedding."""
    # 1. nn.Embedding draws from N(0, 1).
    if weight.role in ("embedding", "positions"):
        return weight.family == "normal" and holds(weight, 1.0)

    # 2. nn.Linear.
    has_linear_map = weight.role in (*MATRICES, *OUTSIDE)
    return has_linear_map and is_linear_default(weight)


def _shown(formula: str, s: float | None) -> str:
    """Return a formula for a sentence, with the base std if the scheme has one."""
    if s is None:
        return formula

    return f"{formula} with s = {plain(s)}"


def describe(group: Sequence[Deviation], by: str) -> tuple[str, dict[str, Any]]:
    """Return the sentence and the evidence of one finding.

    Args:
        group: Weights of one name pattern, so that the layers are folded.
        by: What expects another value, with its verb.
    """
    # 1. The sentence.
    first = group[0]
    weights = [deviation.weight for deviation in group]
    looks = _common_look(group)
    sentence = f"{_subject(group)}: {_measured(first, weights)}, {_expected(group, by)}"
    remark = looks or _times_expected(group)
    if remark:
        sentence += f"; {remark}"

    # 2. The evidence.
    evidence = {
        "parameters": parameters_of(weights),
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


def _common_look(group: Sequence[Deviation]) -> str:
    """Return the mistake that all weights of a group look like; "" for none."""
    looks = {deviation.looks for deviation in group}
    if len(looks) > 1:
        return ""

    return looks.pop()


def _times_expected(group: Sequence[Deviation]) -> str:
    """Return by which factor weights differ from what was expected; "" if that says nothing."""
    factors = []
    for deviation in group:
        # 1. The value of a vector stands in the sentence, and what is constant has no std.
        weight = deviation.weight
        if is_vector(weight) or is_constant(weight) or deviation.value <= 0:
            return ""

        # 2. A weight of the right std differs in something else.
        if holds(weight, deviation.value):
            return ""
        factors.append(std_of(weight) / deviation.value)

    return f"{_range(factors)} times that"


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
    measured = _range(map(_value_of, weights))
    if not is_vector(first.weight):
        return f"std {measured}"

    # Of a vector that is no constant, the mean.
    if is_constant(first.weight):
        return f"value {measured}"
    return f"value not constant, about {measured}"


def _expected(group: Sequence[Deviation], by: str) -> str:
    """Return what was expected: "the published init expects 0.02/sqrt(2*N) = 0.00408"."""
    # 1. The values, which may differ from layer to layer.
    values = sorted({deviation.value for deviation in group})
    shown = plain(values[0])
    if len(values) > 1:
        shown = f"{shown} to {plain(values[-1])}"

    # 2. What they come from.
    first = group[0]
    if first.by_layers:
        return f"the other layers have {shown}"

    # 3. A formula that is a number says nothing more than its value.
    if _is_number(first.formula):
        return f"{by} {shown}"
    return f"{by} {first.formula} = {shown}"


def _value_of(weight: WeightRecord) -> float | None:
    """Return the value of a vector, the std of a matrix."""
    if is_vector(weight):
        return weight.mean

    return weight.std


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _range(values: Iterable[float | None]) -> str:
    """Return "0.02", or "0.02 to 0.04" if the values differ by more than a few percent."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return "?"

    # 1. Values that are shown alike are one.
    low = plain(known[0])
    high = plain(known[-1])
    if low == high:
        return low

    # 2. So are values that differ by little.
    is_narrow = known[-1] < known[0] * _NARROW_RANGE
    if is_narrow:
        return low
    return f"{low} to {high}"


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
    count = 0
    result: list[Deviation] = []
    of_layers = filter(_is_measured_in_layer, weights)
    for group in group_by(of_layers, pattern_of).values():
        # Few layers show no course.
        if len(group) >= _FEWEST_LAYERS:
            count += len(group)
            result += _off_course(group)

    return count, result


def with_drawn_among_zeros(
    contract: ContractRecord, uneven: Iterable[Deviation]
) -> list[Deviation]:
    """Return deviations of layers, with the matrices that were drawn where most are zero.

    Args:
        contract: The weights of the model.
        uneven: The layers that leave a smooth course over depth. Those that should be zero are
            replaced: the course was that of the few that were drawn.
    """
    # 1. What should be zero.
    result: list[Deviation] = []
    for weight, count in drawn_among_zeros(contract):
        deviation = Deviation(
            weight, 0.0, "zeros, as in the other layers", "layers", of=count, by_layers=True
        )
        result.append(deviation)

    # 2. The others.
    named = {deviation.weight.parameter for deviation in result}
    for deviation in uneven:
        if deviation.weight.parameter not in named:
            result.append(deviation)

    return result


def _is_measured_in_layer(weight: WeightRecord) -> bool:
    """Return whether a weight is a matrix of a layer with a std and its interval."""
    # 1. A matrix of a layer.
    if weight.layer is None or is_vector(weight):
        return False

    # 2. An interval from 0 has no logarithm.
    interval = sampling_interval(weight)
    has_logarithm = interval is not None and interval.lower != 0
    return has_logarithm and std_of(weight) != 0


def _off_course(group: Sequence[WeightRecord]) -> list[Deviation]:
    """Return the layers off the course that passes through the most; [] if it passes few."""

    def count_met(course: _Course) -> int:
        return sum(map(course.meets, group))

    # 1. The course and the layers off it.
    course = max(_courses(group), key=count_met)
    off = list(itertools.filterfalse(course.meets, group))
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
        return float(self.scale * _depth_of(weight) ** self.power)

    def meets(self, weight: WeightRecord) -> bool:
        """Return whether a weight lies on the course, within twice its sampling interval.

        The course itself was drawn through samples.
        """
        assert weight.std is not None
        assert weight.lower is not None
        assert weight.upper is not None
        low = weight.std * (weight.lower / weight.std) ** 2
        high = weight.std * (weight.upper / weight.std) ** 2
        return low <= self.at(weight) <= high


def _courses(group: Sequence[WeightRecord]) -> Iterable[_Course]:
    """Yield the constant course through the median, and the power through each pair of layers."""
    # 1. The constant.
    stds = sorted(map(std_of, group))
    yield _Course(stds[len(stds) // 2])

    # 2. The powers. A deep model has more pairs than are needed.
    if len(group) > _MOST_LAYERS:
        group = group[:: max(1, len(group) // _MOST_LAYERS)]

    for first, second in itertools.combinations(group, 2):
        course = _course_through(first, second)
        if course is not None:
            yield course


def _course_through(first: WeightRecord, second: WeightRecord) -> _Course | None:
    """Return the power of l + 1 that two layers lie on; None without two stds at two depths."""
    if not first.std or not second.std:
        return None
    if first.layer == second.layer:
        return None

    # A straight line between the logarithms.
    depth = _depth_of(first)
    power = math.log(second.std / first.std) / math.log(_depth_of(second) / depth)
    return _Course(first.std / depth**power, power)


def _depth_of(weight: WeightRecord) -> float:
    """Return l + 1, the number of a weight's layer counted from one."""
    return float((weight.layer or 0) + 1)
