"""JD208: gains, biases, gates and other small parameters that are not in one layer what they are in
the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.biases import wrong_biases
from jacdiag.rules.finding_numbers import plain
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
from jacdiag.rules.norm_gains import error_of_mean, gains_unlike_the_model, wrong_gains
from jacdiag.rules.odd_parameter import Difference, draw_in_words, fix_for
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.schemes import MATRICES, Scheme, formulas_of

_LEAST = 3  # layers: of two that differ nobody can say which is usual
# LayerScale by depth: CaiT starts it at 0.1 in the first 18 layers, at 1e-5 up to the 24th, at 1e-6
# beyond (Touvron et
# al. 2021, table of section 2); written per layer, one model holds all three.
_LAYER_SCALE_STEPS = (0.1, 1e-5, 1e-6)


def differences(contract: ContractRecord) -> tuple[int, list[Difference]]:
    """Return how many small parameters were compared, and those that differ.

    Args:
        contract: of the model. What another rule of the contract names, or the user pinned, is left
            out.
    """
    weights = [
        weight
        for weight in contract.weights
        if weight.role not in MATRICES and weight.mean is not None
    ]
    found: dict[str, Difference] = {}
    compared: set[str] = set()

    # 1. Layers against each other.
    for group in layer_groups(weights, _LEAST):
        compared.update(weight.parameter for weight in group.members)
        for difference in _differences_in(group):
            found.setdefault(difference.weight.parameter, difference)

    # 2. Norm gains and biases that are wrong in whichever layer they stand, and padding rows.
    gains = [weight for weight in weights if weight.role == "norm_gain"]
    wrong = list(wrong_gains(gains))
    tables = [weight for weight in weights if weight.padding_size]
    compared.update(table.parameter for table in tables)
    alone = (
        *wrong,
        *_biases_beside(wrong, weights),
        *wrong_biases(contract.weights),
        *_padding(tables),
    )

    # 3. Norm gains that no other layer has, against all gains.
    width = contract.sizes.get("d")
    lonely = [gain for gain in gains if gain.parameter not in compared and gain.shape == [width]]
    compared.update(gain.parameter for gain in lonely)
    for difference in (*alone, *gains_unlike_the_model(lonely, gains)):
        found.setdefault(difference.weight.parameter, difference)

    named = _named_elsewhere(contract)
    return len(compared), [one for name, one in found.items() if name not in named or one.part]


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
        like: WeightRecord | None = usual
        others = f"the others hold {_content(usual)}"
        unlike = [weight for weight in group.members if not same_value(weight, usual)]
    else:
        value = None
        unlike = _not_drawn_alike(group)
        like = _middle_draw(group)
        others = f"most of the others were drawn {draw_in_words(like)}" if like else ""
    for weight in unlike:
        yield Difference(weight, group.pattern, len(group.members), others, value, like)


def _follows_layer_scale(group: Group) -> bool:
    """Whether scales fall with depth through the published steps of LayerScale."""
    if not all(weight.role == "scale" and weight.family == "constant" for weight in group.members):
        return False
    values = [weight.mean or 0.0 for weight in group.members]
    falls = all(later <= earlier for earlier, later in itertools.pairwise(values))
    on_a_step = (
        any(math.isclose(value, step, rel_tol=1e-2) for step in _LAYER_SCALE_STEPS)
        for value in values
    )
    return falls and all(on_a_step)


def _not_drawn_alike(group: Group) -> list[WeightRecord]:
    """Members of a group of draws that are constant, or whose mean or std is not that of the
    others.

    Nothing is said where fewer than two thirds of the members agree with a middle one: decay rates
    and LayerScale may change from layer to layer on purpose.
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


def _middle_draw(group: Group) -> WeightRecord | None:
    """Return the member of a group of draws whose std is the middle one."""
    drawn = sorted(
        (w for w in group.members if w.family in DRAWN), key=lambda weight: weight.std or 0.0
    )
    return drawn[len(drawn) // 2] if drawn else None


def _means_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    error = math.hypot(error_of_mean(weight), error_of_mean(other))
    return abs((weight.mean or 0.0) - (other.mean or 0.0)) <= error


def _stds_agree(weight: WeightRecord, other: WeightRecord) -> bool:
    """Whether the sampling intervals of two draws meet."""
    if weight.lower is None or weight.upper is None or other.lower is None or other.upper is None:
        return True
    return weight.lower <= other.upper and other.lower <= weight.upper


# -- alone -----------------------------------------------------------------------------------------
def _biases_beside(wrong: list[Difference], weights: list[WeightRecord]) -> Iterator[Difference]:
    """Biases that are not zero in the norms whose gain is wrong: both went through the same
    code.
    """
    norms = {difference.weight.parameter.rpartition(".")[0] for difference in wrong}
    beside = [
        w
        for w in weights
        if w.role == "bias" and w.parameter.rpartition(".")[0] in norms and w.family != "zero"
    ]
    for bias in beside:
        same = [other for other in beside if other.pattern == bias.pattern]
        others = "the gain of the same norm is wrong too; a norm's bias is 0"
        yield Difference(bias, bias.pattern, len(same), others, 0.0)


def _padding(tables: list[WeightRecord]) -> Iterator[Difference]:
    """Tables that were drawn, their padding row included: nn.Embedding sets that row to zero."""
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
    contents = list(dict.fromkeys(one.holds or _content(one.weight) for one in group))
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
    what = f"{name}{count} holds {shown}; {first.others}"
    return Finding(
        rule.code,
        context.level(rule, rule.level),
        where,
        what,
        evidence,
        rule.summary,
        fix_for(group),
    )


def _layers(weights: Iterable[WeightRecord], of: int) -> str:
    layers = [str(weight.layer) for weight in weights if weight.layer is not None]
    return f", layer {', '.join(layers[:8])}" if layers and len(layers) < of else ""


RULE = Rule("JD208", "vectors-differ", "warning", check=_check, states=("init",))
