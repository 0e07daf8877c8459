"""JD208: small parameters that differ between layers, such as gains, biases and gates."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.biases import wrong_biases
from jacdiag.rules.init.contract_judgement import Judgement, pinned_scheme
from jacdiag.rules.init.layer_groups import (
    MAJORITY,
    Group,
    layer_groups,
    same_value,
    usual_value,
)
from jacdiag.rules.init.leftover_memory import leftovers
from jacdiag.rules.init.norm_gains import error_of_mean, gains_unlike_the_model, wrong_gains
from jacdiag.rules.init.odd_parameter import Difference, draw_in_words, fix_for
from jacdiag.rules.init.schemes import MATRICES
from jacdiag.rules.init.weight_facts import (
    is_constant,
    is_drawn,
    is_zero,
    mean_of,
    module_of,
    parameters_of,
    pattern_of,
    places_of,
    sampling_interval,
    std_of,
    with_role,
)
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
    weights = list(filter(_is_small, contract.weights))
    gains = with_role(weights, "norm_gain")
    tables = [weight for weight in weights if weight.padding_size]

    # 1. Layers compared with each other.
    groups = list(layer_groups(weights, _LEAST))
    compared = set(parameters_of(tables))
    candidates: list[Difference] = []
    for group in groups:
        compared.update(parameters_of(group.members))
        candidates += _differences_in(group)

    # 2. Norm gains and biases that are wrong in whichever layer they stand, and padding rows.
    gains_off = list(wrong_gains(gains))
    candidates += gains_off
    candidates += _biases_of_wrong_gains(gains_off, weights)
    candidates += wrong_biases(contract.weights)
    candidates += _padding(tables)

    # 3. Norm gains that no other layer has, compared with all gains.
    lonely = _lonely_gains(contract, gains, compared)
    compared.update(parameters_of(lonely))
    candidates += gains_unlike_the_model(lonely, gains)

    # 4. What no other rule names.
    return len(compared), _reported(judgement, candidates)


def _reported(judgement: Judgement, candidates: Iterable[Difference]) -> list[Difference]:
    """Return the first difference of each parameter, unless another rule names the parameter."""
    first_of: dict[str, Difference] = {}
    for difference in candidates:
        first_of.setdefault(difference.weight.parameter, difference)

    # The other rule comes first, unless a part of the parameter is meant here.
    named = _named_elsewhere(judgement)
    reported = []
    for name, difference in first_of.items():
        if difference.part or name not in named:
            reported.append(difference)

    return reported


def _is_small(weight: WeightRecord) -> bool:
    """Return whether a parameter was measured and is no matrix of a sub-layer."""
    return weight.role not in MATRICES and weight.mean is not None


def _lonely_gains(
    contract: ContractRecord, gains: list[WeightRecord], compared: Collection[str]
) -> list[WeightRecord]:
    """Return the gains of the model's width that were not compared over the layers."""
    width = contract.sizes.get("d")
    lonely: list[WeightRecord] = []
    for gain in gains:
        is_new = gain.parameter not in compared
        if is_new and gain.shape == [width]:
            lonely.append(gain)

    return lonely


def _named_elsewhere(judgement: Judgement) -> set[str]:
    """Return the parameters that other rules of the contract name, or that the user pinned."""
    # 1. Those that differ from a scheme.
    names = set(judgement.deviating_names)

    # 2. Those that no init wrote.
    contract = judgement.contract
    for leftover in leftovers(contract):
        names.add(leftover.weight.parameter)

    # 3. Those that the user pinned.
    pinned = pinned_scheme(contract)
    covered = filter(pinned.of, contract.weights)
    return names.union(parameters_of(covered))


# -- layers compared with each other ---------------------------------------------------------------
def _differences_in(group: Group) -> Iterator[Difference]:
    """Yield the members of a group that differ from most of the others."""
    # 1. Without a usual value they were drawn, or follow the depth on purpose.
    usual = usual_value(group.members)
    if usual is None:
        yield from _differences_of_draws(group)
    elif not _follows_layer_scale(group):
        yield from _differences_from(usual, group)


def _differences_from(usual: WeightRecord, group: Group) -> Iterator[Difference]:
    """Yield the members of a group whose value is not the usual one."""
    value: float | None = None
    if is_constant(usual):
        value = usual.mean
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

    # Each that differs, with how many there are.
    count = len(group.members)
    for weight in _not_drawn_alike(group):
        yield Difference(weight, group.pattern, count, others, None, middle)


def _follows_layer_scale(group: Group) -> bool:
    """Return whether scales fall with depth through the published steps of LayerScale."""
    # 1. Constant scales, each at one of the steps.
    if not all(map(_is_step_of_layer_scale, group.members)):
        return False

    # 2. None is larger than the one before it.
    values = list(map(mean_of, group.members))
    return all(later <= earlier for earlier, later in itertools.pairwise(values))


def _is_step_of_layer_scale(weight: WeightRecord) -> bool:
    """Return whether a weight is a constant scale with a published value of LayerScale."""
    is_constant_scale = weight.role == "scale" and weight.family == "constant"
    if not is_constant_scale:
        return False

    # Low precisions move a constant by a little.
    for step in _LAYER_SCALE_STEPS:
        if math.isclose(mean_of(weight), step, rel_tol=1e-2):
            return True

    return False


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
    other_mean = _with_other_mean(drawn)
    other_std = _with_other_std(drawn)

    # 2. Most must agree.
    most_exceptions = max(len(other_mean), len(other_std))
    if len(drawn) - most_exceptions < enough:
        return []

    # 3. Constants, then other means, then other stds, each member once.
    unlike = list(filter(is_constant, group.members))
    unlike += other_mean
    return unlike + [weight for weight in other_std if weight not in unlike]


def _with_other_mean(drawn: list[WeightRecord]) -> list[WeightRecord]:
    """Return the draws whose mean is not that of the middle one."""
    by_mean = sorted(drawn, key=mean_of)
    middle = by_mean[len(drawn) // 2]

    def agrees(weight: WeightRecord) -> bool:
        return _means_agree(weight, middle)

    return list(itertools.filterfalse(agrees, drawn))


def _with_other_std(drawn: list[WeightRecord]) -> list[WeightRecord]:
    """Return the draws whose std is not that of the middle one."""
    by_std = sorted(drawn, key=std_of)
    middle = by_std[len(drawn) // 2]

    def agrees(weight: WeightRecord) -> bool:
        return _stds_agree(weight, middle)

    return list(itertools.filterfalse(agrees, drawn))


def _drawn_members(group: Group) -> list[WeightRecord]:
    return list(filter(is_drawn, group.members))


def _middle_draw(group: Group) -> WeightRecord | None:
    """Return the member of a group of draws whose std is the middle one."""
    by_std = sorted(_drawn_members(group), key=std_of)
    if not by_std:
        return None

    return by_std[len(by_std) // 2]


def _means_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    error = math.hypot(error_of_mean(weight), error_of_mean(other))
    return abs(mean_of(weight) - mean_of(other)) <= error


def _stds_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    """Return whether the sampling intervals of two draws meet."""
    interval = sampling_interval(weight)
    other_interval = sampling_interval(other)

    # One that was not measured says nothing against it.
    if interval is None or other_interval is None:
        return True

    return interval.meets(other_interval)


# -- alone -----------------------------------------------------------------------------------------
def _biases_of_wrong_gains(
    gains_off: list[Difference], weights: list[WeightRecord]
) -> Iterator[Difference]:
    """Yield biases that are not zero in the norms whose gain is wrong.

    Both went through the same code.
    """
    # 1. The biases of those norms.
    norms = {module_of(difference.weight) for difference in gains_off}
    of_norms = [bias for bias in with_role(weights, "bias") if module_of(bias) in norms]
    biases = list(itertools.filterfalse(is_zero, of_norms))

    # 2. Each with how many there are of its name.
    count_of = Counter(map(pattern_of, biases))
    others = "the gain of the same norm is wrong too; a norm's bias is 0"
    for bias in biases:
        yield Difference(bias, bias.pattern, count_of[bias.pattern], others, 0.0)


def _padding(tables: list[WeightRecord]) -> Iterator[Difference]:
    """Yield tables that were drawn, their padding row included.

    nn.Embedding sets that row to zero.
    """
    others = "that is its padding_idx, a row that nn.Embedding sets to 0 and passes no gradient to"
    for table in filter(is_drawn, tables):
        holds = f"numbers up to {plain(table.padding_size)} in row {table.padding_row}"
        part = f"row {table.padding_row} of "
        yield Difference(table, table.pattern, 1, others, 0.0, holds=holds, part=part)


# -- the rule --------------------------------------------------------------------------------------
def _content(weight: WeightRecord) -> str:
    if is_constant(weight):
        return plain(weight.mean)

    # A draw, or numbers that were computed.
    return f"numbers of mean {plain(weight.mean)} and std {plain(weight.std)}"


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement_for(rule)
    if judgement is None:
        return NOT_APPLICABLE

    # One finding for the parameters of one name that differ from the same others.
    count, differing = differences(judgement)
    groups = group_by(differing, lambda difference: (difference.pattern, difference.others))
    return CheckOutcome(count, [_finding(context, rule, group) for group in groups.values()])


def _finding(context: RuleContext, rule: Rule, group: list[Difference]) -> Finding:
    """Return the finding about the parameters of one name that differ from the same others."""
    # 1. What they hold.
    first = group[0]
    weights = [difference.weight for difference in group]
    evidence = {
        "parameters": parameters_of(weights),
        "role": first.weight.role,
        "pattern": first.pattern,
        "layers": [weight.layer for weight in weights],
        "of": first.of,
        "value": first.weight.mean,
        "std": first.weight.std,
        "expected": first.value,
        "offset": first.weight.offset,
    }

    # 2. The finding.
    what = f"{_subject(group)} holds {_contents_in_words(group)}; {first.others}"
    level = context.level(rule, rule.level)
    where = places_of(weights)
    return Finding(rule.code, level, where, what, evidence, rule.summary, fix_for(group))


def _contents_in_words(group: list[Difference]) -> str:
    """Return what the first parameter of a group holds, and whether others hold something else."""
    contents = list(map(_content_of, group))

    # The same words mean the same content.
    are_all_the_same = len(set(contents)) == 1
    if are_all_the_same:
        return contents[0]
    return f"{contents[0]} and others"


def _content_of(difference: Difference) -> str:
    """Return what a parameter holds, in words."""
    return difference.holds or _content(difference.weight)


def _subject(group: list[Difference]) -> str:
    """Return what a finding is about: "h.*.ln_1.bias (2 of 12, layer 3, 4)"."""
    first = group[0]
    name = first.pattern.removesuffix(".weight")
    if first.of <= 1:
        return name

    layers = layers_in_words([difference.weight for difference in group], first.of)
    return f"{name} ({len(group)} of {first.of}{layers})"


RULE = Rule("JD208", "vectors-differ", "warning", check=_check, states=("init",))
