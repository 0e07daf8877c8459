"""JD208: gains, biases, gates and other small parameters that are not in one layer what they are in the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jacdiag.report import ContractRecord, Finding, WeightRecord
from jacdiag.rules.init_contract import departures_of
from jacdiag.rules.layer_groups import (
    DRAWN,
    MAJORITY,
    Group,
    is_constant,
    layer_groups,
    same_value,
    usual_value,
)
from jacdiag.rules.leftover_memory import leftovers
from jacdiag.rules.numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.schemes import MATRICES, Scheme, formulas_of
from jacdiag.rules.texts import Text

# A mean of so many numbers tells a draw around 0 from old PyTorch's gains, uniform between 0 and 1.
_LEAST_SIZE = 32
_LEAST = 3  # layers: of two that differ nobody can say which is usual
# LayerScale by depth: CaiT starts it at 0.1 in the first 18 layers, at 1e-5 up to the 24th, at 1e-6 beyond (Touvron et
# al. 2021, table of section 2); written per layer, one model holds all three.
_LAYER_SCALE_STEPS = (0.1, 1e-5, 1e-6)

# Model types whose published code initialises the w of 1 + w with 1.
_DRAWN_AROUND_ZERO = ("efficientnet", "mobilevit", "mobilevitv2")  # batch norms, in transformers' _init_weights
_USED_AS_TWO = ("nemotron",)  # transformers, models/nemotron, PreTrainedModel._init_weights

TEXT = Text(
    summary="a gain, bias, gate or other small parameter of some layers differs from that of the others",
    what="""\
Parameters that are no matrix of a sub-layer (norm gains, biases, LayerScale, gates, routers, tables of positions) are
compared over the layers. Where two thirds of the layers hold one constant, or one table, the others are named. Where
two thirds were drawn alike, a layer is named if it is constant, or if its mean or std lies outside the others' sampling
interval; where mean or std change from layer to layer, nothing is said. LayerScale may fall with depth through the
steps of CaiT (0.1, 1e-5, 1e-6).
A norm gain of the model's width that no other layer has, such as that of the last norm, is compared with the gains of
the whole model: it is named if it is zero, or holds numbers around another value. For a gain that the model uses as
1 + w, the gain is 1 + w: it is named where it is 2, since w was then initialised as a gain of its own (Nemotron does so
on purpose, and is not named). A gain that was drawn around 0 is named in any case, and so are all gains if every one is
zero (transformers draws the batch norms of EfficientNet and MobileViT around 0; those are not named). Other layers that
are all alike are not named: gains of zero at the end of every branch are a published init.""",
    why="""\
A zero gain cuts its branch off: neither it nor the matrices before it get a gradient. A gain that was never initialised
holds what was in the memory. Neither changes a shape, and the other layers hide both from a loss curve.""",
    example="""\
    layers.*.ffn_norm.weight: zero in layer 2, one in the others""",
    remedy="""\
Initialise it by the same code as in the other layers. After model.to_empty(), call reset_parameters() of every module:
it is easily missed for a norm that was written by hand. If the difference is meant, pin a contract that says so.""",
)


@dataclass(frozen=True)
class Difference:
    """A parameter that is not what the others are.

    Attributes:
        weight: the parameter.
        pattern: its name, with "*" for the layer.
        of: parameters of that pattern.
        others: what the others are, as words.
        value: the constant that the others have, None if they have none.
    """

    weight: WeightRecord
    pattern: str
    of: int
    others: str
    value: float | None = None


def differences(contract: ContractRecord) -> tuple[int, list[Difference]]:
    """Return how many small parameters were compared, and those that differ.

    Args:
        contract: of the model. What another rule of the contract names, or the user pinned, is left out.
    """
    weights = [weight for weight in contract.weights if weight.role not in MATRICES and weight.mean is not None]
    found: dict[str, Difference] = {}
    compared: set[str] = set()

    # 1. Layers against each other.
    for group in layer_groups(weights, _LEAST):
        compared.update(weight.parameter for weight in group.members)
        for difference in _differences_in(group):
            found.setdefault(difference.weight.parameter, difference)

    # 2. Norm gains that no other layer has, against all gains.
    gains = [weight for weight in weights if weight.role == "norm_gain"]
    width = contract.sizes.get("d")
    lonely = [gain for gain in gains if gain.parameter not in compared and gain.shape == [width]]
    compared.update(gain.parameter for gain in lonely)
    doubled = () if contract.family in _USED_AS_TWO else _doubled(gains)
    around_zero = () if contract.family in _DRAWN_AROUND_ZERO else _around_zero(gains)
    broken = [*around_zero, *_all_zero(gains)]
    for difference in (*doubled, *broken, *_biases_beside(broken, weights), *_unlike_the_model(lonely, gains)):
        found.setdefault(difference.weight.parameter, difference)

    named = _named_elsewhere(contract)
    return len(compared), [one for name, one in found.items() if name not in named]


def _named_elsewhere(contract: ContractRecord) -> set[str]:
    pinned = Scheme("pinned", "", "", formulas_of(contract.pinned))
    return {
        *(one.weight.parameter for one in departures_of(contract)),
        *(one.weight.parameter for one in leftovers(contract)),
        *(weight.parameter for weight in contract.weights if pinned.of(weight)),
    }


# -- layers against each other ---------------------------------------------------------------------
def _differences_in(group: Group) -> Iterator[Difference]:
    usual = usual_value(group.members)
    if usual is not None:
        if _follows_layer_scale(group):
            return
        value = usual.mean if is_constant(usual) else None
        others = f"the others hold {_content(usual)}"
        unlike = [weight for weight in group.members if not same_value(weight, usual)]
    else:
        value = None
        unlike = _not_drawn_alike(group)
        others = f"the others were drawn with std {plain(_middle_std(group))}"
    for weight in unlike:
        yield Difference(weight, group.pattern, len(group.members), others, value)


def _follows_layer_scale(group: Group) -> bool:
    """Whether scales fall with depth through the published steps of LayerScale."""
    if not all(weight.role == "scale" and weight.family == "constant" for weight in group.members):
        return False
    values = [weight.mean or 0.0 for weight in group.members]
    falls = all(later <= earlier for earlier, later in itertools.pairwise(values))
    on_a_step = (any(math.isclose(value, step, rel_tol=1e-2) for step in _LAYER_SCALE_STEPS) for value in values)
    return falls and all(on_a_step)


def _not_drawn_alike(group: Group) -> list[WeightRecord]:
    """Members of a group of draws that are constant, or whose mean or std is not that of the others.

    Nothing is said where fewer than two thirds of the members agree with a middle one: decay rates and LayerScale may
    change from layer to layer on purpose.
    """
    drawn = [weight for weight in group.members if weight.family in DRAWN]
    enough = MAJORITY * len(group.members)
    if len(drawn) < enough:
        return []
    unlike = [weight for weight in group.members if is_constant(weight)]
    middle_of_means = sorted(drawn, key=lambda weight: weight.mean or 0.0)[len(drawn) // 2]
    middle_of_stds = sorted(drawn, key=lambda weight: weight.std or 0.0)[len(drawn) // 2]
    others = {
        "mean": [weight for weight in drawn if not _means_agree(weight, middle_of_means)],
        "std": [weight for weight in drawn if not _stds_agree(weight, middle_of_stds)],
    }
    if any(len(drawn) - len(exceptions) < enough for exceptions in others.values()):
        return []
    unlike += others["mean"]
    return unlike + [weight for weight in others["std"] if weight not in unlike]


def _middle_std(group: Group) -> float:
    stds = sorted(weight.std or 0.0 for weight in group.members if weight.family in DRAWN)
    return stds[len(stds) // 2] if stds else 0.0


def _means_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    error = math.hypot(_error_of_mean(weight), _error_of_mean(other))
    return abs((weight.mean or 0.0) - (other.mean or 0.0)) <= error


def _error_of_mean(weight: WeightRecord) -> float:
    """Return how far the mean of a draw may lie from that of its distribution: five errors of the widest std."""
    return 5 * (weight.upper or 0.0) / math.sqrt(math.prod(weight.shape))


def _stds_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    """Whether the sampling intervals of two draws meet."""
    if weight.lower is None or weight.upper is None or other.lower is None or other.upper is None:
        return True
    return weight.lower <= other.upper and other.lower <= weight.upper


# -- gains of the whole model ----------------------------------------------------------------------
def _doubled(gains: list[WeightRecord]) -> Iterator[Difference]:
    """Gains used as 1 + w whose w is 1."""
    for gain in gains:
        if gain.offset == 1 and gain.family == "constant" and math.isclose(gain.mean or 0.0, 1.0, rel_tol=1e-3):
            same = [other for other in gains if other.pattern == gain.pattern]
            others = "the model uses it as 1 + w, so that the gain is 2: a w of 0 is a gain of 1"
            yield Difference(gain, gain.pattern, len(same), others, 0.0)


def _around_zero(gains: list[WeightRecord]) -> Iterator[Difference]:
    """Gains that were drawn around zero, as matrices are: a gain is drawn around 1 if at all."""
    for gain in gains:
        size = math.prod(gain.shape)
        if gain.offset != 0 or gain.family not in DRAWN or size < _LEAST_SIZE:
            continue
        if abs(gain.mean or 0.0) <= 5 * (gain.std or 0.0) / math.sqrt(size):
            same = [other for other in gains if other.pattern == gain.pattern]
            others = "a gain is 1, or drawn around 1; this one was drawn around 0 as a matrix is"
            yield Difference(gain, gain.pattern, len(same), others, 1.0)


def _all_zero(gains: list[WeightRecord]) -> Iterator[Difference]:
    """The gains of a model in which no norm has any other: every norm returns its bias, or nothing."""
    if len(gains) < 2 or not all(is_constant(gain) and gain.offset + (gain.mean or 0.0) == 0 for gain in gains):
        return
    for gain in gains:
        same = [other for other in gains if other.pattern == gain.pattern]
        yield Difference(gain, gain.pattern, len(same), "every gain of the model is zero", 1.0 - gain.offset)


def _biases_beside(broken: list[Difference], weights: list[WeightRecord]) -> Iterator[Difference]:
    """Biases that are not zero in the norms whose gain is wrong: both went through the same code."""
    norms = {difference.weight.parameter.rpartition(".")[0] for difference in broken}
    beside = [w for w in weights if w.role == "bias" and w.parameter.rpartition(".")[0] in norms and w.family != "zero"]
    for bias in beside:
        same = [other for other in beside if other.pattern == bias.pattern]
        others = "the gain of the same norm is wrong too; a norm's bias is 0"
        yield Difference(bias, bias.pattern, len(same), others, 0.0)


def _unlike_the_model(lonely: list[WeightRecord], gains: list[WeightRecord]) -> Iterator[Difference]:
    """Gains without their like in other layers that are zero, or hold numbers around another value than all gains."""
    ordinary = [gain for gain in gains if is_constant(gain)]
    values = [gain.offset + (gain.mean or 0.0) for gain in ordinary]
    enough = MAJORITY * len(gains)
    usual = next((v for v in values if sum(math.isclose(v, x, rel_tol=1e-3) for x in values) >= enough), None)
    if usual is None or usual == 0 or len(gains) < _LEAST:
        return
    for gain in lonely:
        value = gain.offset + (gain.mean or 0.0)
        if value == 0 or (not is_constant(gain) and abs(value - usual) > _error_of_mean(gain)):
            others = f"the model's other gains are {plain(usual)}"
            yield Difference(gain, gain.pattern, 1, others, usual - gain.offset)


# -- the rule --------------------------------------------------------------------------------------
def _content(weight: WeightRecord) -> str:
    if is_constant(weight):
        return plain(weight.mean)
    return f"numbers of mean {plain(weight.mean)} and std {plain(weight.std)}"


def _check(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states:
        return NOT_APPLICABLE
    count, found = differences(contract)
    groups: dict[tuple[str, str], list[Difference]] = {}
    for one in found:
        groups.setdefault((one.pattern, one.others), []).append(one)
    return Outcome(count, [_finding(context, rule, group) for group in groups.values()])


def _finding(context: Context, rule: Rule, group: list[Difference]) -> Finding:
    first, weights = group[0], [one.weight for one in group]
    contents = list(dict.fromkeys(_content(weight) for weight in weights))
    shown = contents[0] if len(contents) == 1 else f"{contents[0]} and others"
    name = first.pattern.removesuffix(".weight")
    count = f" ({len(group)} of {first.of}{_layers(weights, first.of)})" if first.of > 1 else ""
    evidence = {
        "parameters": [weight.parameter for weight in weights],
        "role": weights[0].role,
        "pattern": first.pattern,
        "layers": [weight.layer for weight in weights],
        "of": first.of,
        "value": weights[0].mean,
        "std": weights[0].std,
        "expected": first.value,
        "offset": weights[0].offset,
    }
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in weights))
    fix = "initialise it as in the other layers"
    if first.value is not None:
        fix = f"initialise it with {plain(first.value)}"
    what = f"{name}{count} holds {shown}; {first.others}"
    return Finding(rule.code, context.level(rule, rule.level), where, what, evidence, rule.summary, fix)


def _layers(weights: Iterable[WeightRecord], of: int) -> str:
    layers = [str(weight.layer) for weight in weights if weight.layer is not None]
    return f", layer {', '.join(layers[:8])}" if layers and len(layers) < of else ""


RULE = Rule("JD208", "vectors-differ", "warning", **TEXT, check=_check, states=("init",))
