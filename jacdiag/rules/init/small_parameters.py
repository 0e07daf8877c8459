"""JD208: small parameters that differ between layers, such as gains, biases and gates."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.biases import wrong_biases
from jacdiag.rules.init.contract_judgement import Judgement
from jacdiag.rules.init.layer_groups import (
    DRAWN,
    MAJORITY,
    Group,
    is_constant,
    layer_groups,
    same_value,
    usual_value,
)
from jacdiag.rules.init.leftover_memory import leftovers
from jacdiag.rules.init.norm_gains import error_of_mean, gains_unlike_the_model, wrong_gains
from jacdiag.rules.init.odd_parameter import Difference, draw_in_words, fix_for
from jacdiag.rules.init.schemes import MATRICES, Scheme, formulas_of
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import layers_in_words

_LEAST = 3  # layers: of two that differ nobody can say which is usual
# LayerScale by depth: CaiT starts it at 0.1 in the first 18 layers, at 1e-5 up to the 24th, at 1e-6
# beyond (Touvron et al. 2021, table of section 2); written per layer, one model holds all three.
_LAYER_SCALE_STEPS = (0.1, 1e-5, 1e-6)


def differences(judgement: Judgement) -> tuple[int, list[Difference]]:
    """Return how many small parameters were compared, and those that differ.

    Args:
        judgement: of the model. What another rule of the contract names, or the user pinned, is
            left out.
    """
    contract = judgement.contract
    weights = [weight for weight in contract.weights if _is_small(weight)]
    gains = [weight for weight in weights if weight.role == "norm_gain"]
    tables = [weight for weight in weights if weight.padding_size]
    compared = {table.parameter for table in tables}
    candidates: list[Difference] = []

    # 1. Layers compared with each other.
    for group in layer_groups(weights, _LEAST):
        compared.update(weight.parameter for weight in group.members)
        candidates += _differences_in(group)

    # 2. Norm gains and biases that are wrong in whichever layer they stand, and padding rows.
    gains_off = list(wrong_gains(gains))
    candidates += gains_off
    candidates += _biases_of_wrong_gains(gains_off, weights)
    candidates += wrong_biases(contract.weights)
    candidates += _padding(tables)

    # 3. Norm gains that no other layer has, compared with all gains.
    lonely = _lonely_gains(contract, gains, compared)
    compared.update(gain.parameter for gain in lonely)
    candidates += gains_unlike_the_model(lonely, gains)

    # 4. The first difference of each parameter.
    first_of: dict[str, Difference] = {}
    for difference in candidates:
        first_of.setdefault(difference.weight.parameter, difference)

    # 5. Another rule that names the parameter comes first, unless a part of it is meant here.
    named = _named_elsewhere(judgement)
    reported = []
    for name, difference in first_of.items():
        if difference.part or name not in named:
            reported.append(difference)
    return len(compared), reported


def _is_small(weight: WeightRecord) -> bool:
    """Return whether a parameter was measured and is no matrix of a sub-layer."""
    return weight.role not in MATRICES and weight.mean is not None


def _lonely_gains(
    contract: ContractRecord, gains: list[WeightRecord], compared: Collection[str]
) -> list[WeightRecord]:
    """Return the gains of the model's width that were not compared over the layers."""
    shape = [contract.sizes.get("d")]
    lonely = []
    for gain in gains:
        was_compared = gain.parameter in compared
        if gain.shape == shape and not was_compared:
            lonely.append(gain)
    return lonely


def _named_elsewhere(judgement: Judgement) -> set[str]:
    """Return the parameters that other rules of the contract name, or that the user pinned."""
    contract = judgement.contract
    pinned = Scheme("pinned", "", "", formulas_of(contract.pinned))
    names = set(judgement.deviating_names)
    names.update(leftover.weight.parameter for leftover in leftovers(contract))
    names.update(weight.parameter for weight in contract.weights if pinned.of(weight))
    return names


# -- layers compared with each other ---------------------------------------------------------------
def _differences_in(group: Group) -> Iterator[Difference]:
    """Yield the members of a group that differ from most of the others."""
    # 1. Without a usual value they were drawn, or follow the depth on purpose.
    usual = usual_value(group.members)
    if usual is None:
        yield from _differences_of_draws(group)
        return
    if _follows_layer_scale(group):
        return

    # 2. Most members have one value.
    value = usual.mean if is_constant(usual) else None
    others = f"the others hold {_content(usual)}"
    for weight in group.members:
        if not same_value(weight, usual):
            yield Difference(weight, group.pattern, len(group.members), others, value, usual)


def _differences_of_draws(group: Group) -> Iterator[Difference]:
    """Yield the members of a group of draws that differ from the middle one."""
    middle = _middle_draw(group)
    others = ""
    if middle is not None:
        others = f"most of the others were drawn {draw_in_words(middle)}"

    count = len(group.members)
    for weight in _not_drawn_alike(group):
        yield Difference(weight, group.pattern, count, others, None, middle)


def _follows_layer_scale(group: Group) -> bool:
    """Return whether scales fall with depth through the published steps of LayerScale."""
    # 1. Constant scales, each at one of the steps.
    values: list[float] = []
    for weight in group.members:
        is_constant_scale = weight.role == "scale" and weight.family == "constant"
        value = weight.mean or 0.0
        if not is_constant_scale or not _is_step_of_layer_scale(value):
            return False
        values.append(value)

    # 2. None is larger than the one before it.
    return all(later <= earlier for earlier, later in itertools.pairwise(values))


def _is_step_of_layer_scale(value: float) -> bool:
    return any(math.isclose(value, step, rel_tol=1e-2) for step in _LAYER_SCALE_STEPS)


def _not_drawn_alike(group: Group) -> list[WeightRecord]:
    """Return members of a group of draws that are constant, or whose mean or std differs.

    Nothing is said where fewer than two thirds of the members agree with a middle one: decay rates
    and LayerScale may change from layer to layer on purpose.
    """
    drawn = _drawn_members(group)
    enough = MAJORITY * len(group.members)
    if len(drawn) < enough:
        return []

    # 1. Means and stds, each compared with the middle one.
    middle_of_means = sorted(drawn, key=_mean_of)[len(drawn) // 2]
    other_mean = [weight for weight in drawn if not _means_agree(weight, middle_of_means)]
    middle_of_stds = sorted(drawn, key=_std_of)[len(drawn) // 2]
    other_std = [weight for weight in drawn if not _stds_agree(weight, middle_of_stds)]

    # 2. Most must agree.
    most_exceptions = max(len(other_mean), len(other_std))
    if len(drawn) - most_exceptions < enough:
        return []

    # 3. Constants, then other means, then other stds, each member once.
    unlike = [weight for weight in group.members if is_constant(weight)]
    unlike += other_mean
    return unlike + [weight for weight in other_std if weight not in unlike]


def _drawn_members(group: Group) -> list[WeightRecord]:
    return [weight for weight in group.members if weight.family in DRAWN]


def _mean_of(weight: WeightRecord) -> float:
    return weight.mean or 0.0


def _std_of(weight: WeightRecord) -> float:
    return weight.std or 0.0


def _middle_draw(group: Group) -> WeightRecord | None:
    """Return the member of a group of draws whose std is the middle one."""
    drawn = _drawn_members(group)
    if not drawn:
        return None
    by_std = sorted(drawn, key=_std_of)
    return by_std[len(by_std) // 2]


def _means_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    error = math.hypot(error_of_mean(weight), error_of_mean(other))
    return abs(_mean_of(weight) - _mean_of(other)) <= error


def _stds_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    """Return whether the sampling intervals of two draws meet."""
    # One that was not measured says nothing against it.
    if weight.lower is None or weight.upper is None:
        return True
    if other.lower is None or other.upper is None:
        return True
    starts_before_its_end = weight.lower <= other.upper
    ends_after_its_start = other.lower <= weight.upper
    return starts_before_its_end and ends_after_its_start


# -- alone -----------------------------------------------------------------------------------------
def _biases_of_wrong_gains(
    gains_off: list[Difference], weights: list[WeightRecord]
) -> Iterator[Difference]:
    """Yield biases that are not zero in the norms whose gain is wrong.

    Both went through the same code.
    """
    # 1. The biases of those norms.
    norms = {_module_of(difference.weight) for difference in gains_off}
    biases = []
    for weight in weights:
        is_bias_of_norm = weight.role == "bias" and _module_of(weight) in norms
        if is_bias_of_norm and weight.family != "zero":
            biases.append(weight)

    # 2. Each with how many there are of its name.
    count_of = Counter(bias.pattern for bias in biases)
    others = "the gain of the same norm is wrong too; a norm's bias is 0"
    for bias in biases:
        yield Difference(bias, bias.pattern, count_of[bias.pattern], others, 0.0)


def _module_of(weight: WeightRecord) -> str:
    return weight.parameter.rpartition(".")[0]


def _padding(tables: list[WeightRecord]) -> Iterator[Difference]:
    """Yield tables that were drawn, their padding row included.

    nn.Embedding sets that row to zero.
    """
    for table in tables:
        if table.family not in DRAWN:
            continue
        holds = f"numbers up to {plain(table.padding_size)} in row {table.padding_row}"
        others = (
            "that is its padding_idx, a row that nn.Embedding sets to 0 and passes no gradient to"
        )
        part = f"row {table.padding_row} of "
        yield Difference(table, table.pattern, 1, others, 0.0, holds=holds, part=part)


# -- the rule --------------------------------------------------------------------------------------
def _content(weight: WeightRecord) -> str:
    if is_constant(weight):
        return plain(weight.mean)
    return f"numbers of mean {plain(weight.mean)} and std {plain(weight.std)}"


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement
    if judgement is None or context.report.state not in rule.states:
        return NOT_APPLICABLE

    # One finding for the parameters of one name that differ from the same others.
    count, differing = differences(judgement)
    groups: dict[tuple[str, str], list[Difference]] = {}
    for difference in differing:
        groups.setdefault((difference.pattern, difference.others), []).append(difference)
    return CheckOutcome(count, [_finding(context, rule, group) for group in groups.values()])


def _finding(context: RuleContext, rule: Rule, group: list[Difference]) -> Finding:
    """Return the finding about the parameters of one name that differ from the same others."""
    first = group[0]
    weights = [difference.weight for difference in group]
    # 1. What they hold.
    contents = [difference.holds or _content(difference.weight) for difference in group]
    shown = contents[0]
    if len(set(contents)) > 1:
        shown = f"{shown} and others"

    # 2. Which they are.
    name = first.pattern.removesuffix(".weight")
    if first.of > 1:
        name = f"{name} ({len(group)} of {first.of}{layers_in_words(weights, first.of)})"
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
    what = f"{name} holds {shown}; {first.others}"
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, where, what, evidence, rule.summary, fix_for(group))


RULE = Rule("JD208", "vectors-differ", "warning", check=_check, states=("init",))
