"""JD209: routers that were not drawn as the matrices that read the same stream."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, Finding, Level, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.contract_judgement import Judgement, pinned_scheme
from jacdiag.rules.init.odd_parameter import names_of
from jacdiag.rules.init.schemes import INNER
from jacdiag.rules.init.small_parameters import differences
from jacdiag.rules.init.weight_facts import (
    StdInterval,
    has_spread,
    is_drawn,
    is_zero,
    largest_of,
    module_of,
    parameters_of,
    pattern_of,
    places_of,
    sampling_interval,
    size_of,
    std_of,
    with_role,
)
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext

_Z = 4.9  # errors of a std at a chance of 1e-6
_RARE = math.log(1e-7)
# Std of a normal after its numbers beyond two std were cut. For a small router nobody can see
# whether that was done.
_TRUNCATED = 0.8796


@dataclass(frozen=True)
class Routers:
    """The routers of one name, pooled over the layers.

    Attributes:
        members: the routers.
        std: over all their numbers; `lower` and `upper` bound that of the distribution.
        looks: whose init it is: "nn.Linear", "torch.randn", "zero", or "" for none of these.
        usual_std: the middle std of the matrices that read the same stream.
        excuse: why a look of theirs may be meant, as words; "" if nothing in the model says so.
    """

    members: tuple[WeightRecord, ...]
    std: float
    lower: float
    upper: float
    looks: str
    usual_std: float
    excuse: str = ""


def unlike_routers(judgement: Judgement) -> tuple[int, list[Routers]]:
    """Return how many routers were compared, and those that were not drawn as the rest.

    Args:
        judgement: of a model at its init.
    """
    contract = judgement.contract
    compared = 0
    unlike: list[Routers] = []
    for members in group_by(_routers_of(judgement), pattern_of).values():
        # 1. The matrices that read the same stream.
        readers = _readers_of_the_same(contract, members[0])
        if not readers:
            continue

        # 2. The routers of one name compared with them.
        compared += len(members)
        routers = _pool(members, readers)
        if not _drawn_as(routers, readers):
            unlike.append(replace(routers, excuse=_excuse_of(contract, routers)))

    return compared, unlike


def _routers_of(judgement: Judgement) -> list[WeightRecord]:
    """Return the measured routers of a model, without those that another rule judges."""
    routers = with_role(judgement.contract.weights, "router")
    left_out = _judged_elsewhere(judgement, routers)
    others = [router for router in routers if router.parameter not in left_out]
    return list(filter(_is_measured, others))


def _is_measured(router: WeightRecord) -> bool:
    """Return whether the draw of a router is known, and the width that it reads."""
    has_width = bool(router.fan_in)
    if not has_width:
        return False
    return is_drawn(router) or is_zero(router)


def _judged_elsewhere(judgement: Judgement, routers: Iterable[WeightRecord]) -> set[str]:
    """Return the routers that another rule judges, among the names of other parameters.

    The user pinned them, a scheme covers them, or they differ from those of other layers.
    """
    # 1. Those that differ from a scheme, or from other layers.
    names = set(judgement.deviating_names)
    _, differing = differences(judgement)
    names.update(difference.weight.parameter for difference in differing)

    # 2. Those that the user pinned.
    pinned = pinned_scheme(judgement.contract)
    names.update(parameters_of(filter(pinned.of, routers)))

    # 3. Those that the scheme of the model covers.
    scheme = judgement.result.scheme
    if scheme is not None:
        names.update(parameters_of(filter(scheme.of, routers)))
    return names


def _readers_of_the_same(contract: ContractRecord, router: WeightRecord) -> list[WeightRecord]:
    """Return the drawn matrices inside sub-layers that are as wide as a router."""
    readers = []
    for weight in contract.weights:
        reads_the_same = weight.role in INNER and weight.fan_in == router.fan_in
        if reads_the_same and has_spread(weight):
            readers.append(weight)

    return readers


# -- one group of routers --------------------------------------------------------------------------
def _pool(members: list[WeightRecord], readers: list[WeightRecord]) -> Routers:
    """Return the routers of one name, pooled."""
    usual_std = sorted(map(std_of, readers))[len(readers) // 2]
    if all(map(is_zero, members)):
        return Routers(tuple(members), 0.0, 0.0, 0.0, "zero", usual_std)

    # 1. Their std, with the interval of a uniform or normal sample.
    count = sum(map(size_of, members))
    std = _pooled_std(members)
    is_uniform = _is_uniform(members, std, count)
    kurtosis = 1.8 if is_uniform else 3.0
    error = _Z * math.sqrt((kurtosis - 1) / (4 * count))
    interval = StdInterval(std / (1 + error), std / max(1 - error, 1e-3))

    # 2. Whether it is the default of a class or function.
    looks = _default_of(members[0], interval, is_uniform=is_uniform)
    return Routers(tuple(members), std, interval.lower, interval.upper, looks, usual_std)


def _default_of(router: WeightRecord, interval: StdInterval, *, is_uniform: bool) -> str:
    """Return the class or function whose default a std is; "" if it is none.

    Args:
        router: one of the routers.
        interval: of the std of all of them.
        is_uniform: whether they were drawn from a uniform distribution.
    """
    # 1. nn.Linear draws between -1/√fan_in and 1/√fan_in, torch.randn with std 1.
    looks = "torch.randn"
    default = 1.0
    if is_uniform:
        fan_in = router.fan_in or 1
        looks = "nn.Linear"
        default = 1 / math.sqrt(3 * fan_in)

    # 2. Whether that is the std.
    if interval.holds(default):
        return looks
    return ""


def _pooled_std(weights: list[WeightRecord]) -> float:
    """Return the std over all numbers of several weights."""
    sizes = list(map(size_of, weights))
    squares = [size_of(weight) * std_of(weight) ** 2 for weight in weights]
    return math.sqrt(sum(squares) / sum(sizes))


def _is_uniform(members: list[WeightRecord], std: float, count: int) -> bool:
    """Return whether numbers are bounded as those of a uniform distribution are.

    The largest of so many normal numbers would lie further out.

    A router of few experts is too small to tell alone, all layers together are not.
    """
    reach = max(map(largest_of, members)) / std
    log_chance = count * math.log(max(math.erf(reach / math.sqrt(2)), 1e-300))
    end_of_uniform = math.sqrt(3) * (1 + 6 / math.sqrt(count))
    return log_chance < _RARE and reach < end_of_uniform


def _drawn_as(routers: Routers, readers: list[WeightRecord]) -> bool:
    """Return whether some reader of the stream has the routers' std.

    It may have the std as it is, as Xavier scales it to the routers' fan_out, or truncated.
    """
    interval = StdInterval(routers.lower, routers.upper)
    for weight in readers:
        factors = (1.0, _xavier_ratio(weight, routers.members[0]), _TRUNCATED, 1 / _TRUNCATED)

        for factor in factors:
            if _scaled_interval(weight, factor).meets(interval):
                return True

    return False


def _scaled_interval(weight: WeightRecord, factor: float) -> StdInterval:
    """Return the interval of a weight's std, times a factor; all stds if it was not measured."""
    interval = sampling_interval(weight)
    if interval is None:
        return StdInterval(0.0, math.inf)

    # Both ends scale alike.
    lower = interval.lower * factor
    upper = interval.upper * factor
    return StdInterval(lower, upper)


def _xavier_ratio(weight: WeightRecord, router: WeightRecord) -> float:
    """Return the std of a router over that of a matrix, as Xavier's formula gives them."""
    fans = _sum_of_fans(weight)
    fans_of_router = _sum_of_fans(router)

    # Without both sizes there is no formula.
    if fans is None or fans_of_router is None:
        return 1.0

    # Xavier's variance is 2 / (fan_in + fan_out).
    return math.sqrt(fans / fans_of_router)


def _sum_of_fans(weight: WeightRecord) -> int | None:
    """Return fan_in + fan_out; None if either is not known."""
    fan_in = weight.fan_in
    fan_out = weight.fan_out
    if not fan_in or not fan_out:
        return None
    return fan_in + fan_out


def _excuse_of(contract: ContractRecord, routers: Routers) -> str:
    """Return what in the model says that its routers are meant to look so, "" if nothing does."""
    if routers.looks == "torch.randn":
        return _table_with_unit_std(contract)

    # The default of nn.Linear is meant by nobody.
    if routers.looks != "zero":
        return ""

    # A bias may balance the experts, so that the router can start at zero.
    bias = _balancing_bias(contract, routers.members[0])
    if bias is None:
        return ""

    return f"{bias.parameter} has one number for each expert"


def _table_with_unit_std(contract: ContractRecord) -> str:
    """Return that the embedding or the head has std 1 as well; "" if neither has."""
    for weight in filter(is_drawn, contract.weights):
        is_outside = weight.role in ("embedding", "head")
        if is_outside and _may_have_unit_std(weight):
            return f"{weight.parameter} has that std too"

    return ""


def _may_have_unit_std(weight: WeightRecord) -> bool:
    interval = sampling_interval(weight)
    return interval is not None and interval.holds(1.0)


def _balancing_bias(contract: ContractRecord, router: WeightRecord) -> WeightRecord | None:
    """Return a vector of one number per expert in the router's sub-layer.

    The bias of the router's own linear map is none.
    """
    if not router.sublayer:
        return None

    own_bias = f"{module_of(router)}.bias"

    for weight in contract.weights:
        is_per_expert = weight.shape == [router.fan_out]
        is_in_sublayer = weight.sublayer == router.sublayer
        if is_per_expert and is_in_sublayer and weight.parameter != own_bias:
            return weight

    return None


# -- the rule --------------------------------------------------------------------------------------
def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement_for(rule)
    if judgement is None:
        return NOT_APPLICABLE

    # One finding for each name of routers.
    count, unlike = unlike_routers(judgement)
    return CheckOutcome(count, [_finding(context, rule, routers) for routers in unlike])


def _finding(context: RuleContext, rule: Rule, routers: Routers) -> Finding:
    # 1. The evidence.
    first = routers.members[0]
    evidence = {
        "parameters": parameters_of(routers.members),
        "role": "router",
        "pattern": first.pattern,
        "value": routers.std,
        "lower": routers.lower,
        "upper": routers.upper,
        "expected": routers.usual_std,
        "looks": routers.looks,
    }

    # 2. The sentence and what to do.
    name = first.pattern.removesuffix(".weight")
    count = f"{len(routers.members)} routers"
    if len(routers.members) == 1:
        count = "1 router"
    what = f"{name} ({count}): {_sentence(routers)}"
    fix = (
        f"draw {names_of(routers.members)} with std {plain(routers.usual_std)}, as the matrices "
        "that read the same stream, or pin a contract with the std that you want"
    )

    # 3. The finding.
    level = context.level(rule, _level_of(routers))
    where = places_of(routers.members)
    return Finding(rule.code, level, where, what, evidence, rule.summary, fix)


def _level_of(routers: Routers) -> Level:
    """Return "warning" for a default that was left, unless the model has a reason for it."""
    if not routers.looks:
        return "info"

    # The model has a reason for it.
    if routers.excuse:
        return "info"

    return "warning"


def _sentence(routers: Routers) -> str:
    excuse = ""
    if routers.excuse:
        excuse = f"; {routers.excuse}"
    if routers.looks == "zero":
        return f"all zero, so that every token gives an expert the same score{excuse}"

    # 1. How far the std is from that of the others.
    ratio = routers.std / routers.usual_std
    times = f"{plain(ratio)} times"
    if ratio < 1:
        times = f"1/{plain(1 / ratio)} of"

    # 2. The sentence, with where the std may come from.
    return (
        f"std {plain(routers.std)}{_origin_of(routers)}, {times} that of the matrices that read "
        f"the same stream ({plain(routers.usual_std)}){excuse}"
    )


def _origin_of(routers: Routers) -> str:
    """Return what left the routers with their std, in words; "" if that is not known."""
    if routers.looks == "nn.Linear":
        return ", uniform as nn.Linear leaves it"

    if routers.looks:
        return f", as {routers.looks} leaves it"

    # No default has such a std.
    return ""


RULE = Rule("JD209", "router-scale", "warning", check=_check, states=("init",))
