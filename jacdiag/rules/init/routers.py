"""JD209: routers that were not drawn as the matrices that read the same stream."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, Finding, Level, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.contract_judgement import Judgement
from jacdiag.rules.init.layer_groups import DRAWN
from jacdiag.rules.init.odd_parameter import names_of
from jacdiag.rules.init.schemes import INNER, Scheme, formulas_of
from jacdiag.rules.init.small_parameters import differences
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
    # 1. Routers by name pattern, without those that another rule judges.
    contract = judgement.contract
    left_out = _judged_elsewhere(judgement)
    groups: dict[str, list[WeightRecord]] = {}
    for weight in contract.weights:
        is_measured = weight.family in (*DRAWN, "zero") and bool(weight.fan_in)
        if weight.role == "router" and is_measured and weight.parameter not in left_out:
            groups.setdefault(weight.pattern, []).append(weight)

    # 2. Each group compared with the matrices that read the same stream.
    compared, unlike = 0, []
    for members in groups.values():
        readers = _readers_of_the_same(contract, members[0])
        if not readers:
            continue
        compared += len(members)
        routers = _pool(members, readers)
        if not _drawn_as(routers, readers):
            unlike.append(replace(routers, excuse=_excuse_of(contract, routers)))
    return compared, unlike


def _judged_elsewhere(judgement: Judgement) -> set[str]:
    """Return the routers that another rule judges.

    The user pinned them, a scheme covers them, or they differ from those of other layers.
    """
    contract = judgement.contract
    pinned = Scheme("pinned", "", "", formulas_of(contract.pinned))
    scheme = judgement.result.scheme
    names = set(judgement.deviating_names)
    names.update(difference.weight.parameter for difference in differences(judgement)[1])
    for weight in contract.weights:
        is_covered = bool(pinned.of(weight)) or (scheme is not None and bool(scheme.of(weight)))
        if weight.role == "router" and is_covered:
            names.add(weight.parameter)
    return names


def _readers_of_the_same(contract: ContractRecord, router: WeightRecord) -> list[WeightRecord]:
    """Return the drawn matrices inside sub-layers that are as wide as a router."""
    readers = []
    for weight in contract.weights:
        is_drawn = weight.family in DRAWN and bool(weight.std)
        if weight.role in INNER and weight.fan_in == router.fan_in and is_drawn:
            readers.append(weight)
    return readers


# -- one group of routers --------------------------------------------------------------------------
def _pool(members: list[WeightRecord], readers: list[WeightRecord]) -> Routers:
    """Return the routers of one name, pooled."""
    usual_std = sorted(weight.std or 0.0 for weight in readers)[len(readers) // 2]
    if all(weight.family == "zero" for weight in members):
        return Routers(tuple(members), 0.0, 0.0, 0.0, "zero", usual_std)

    # 1. Their std, with the interval of a uniform or normal sample.
    count = sum(math.prod(weight.shape) for weight in members)
    std = _pooled_std(members)
    is_uniform = _is_uniform(members, std, count)
    kurtosis = 1.8 if is_uniform else 3.0
    error = _Z * math.sqrt((kurtosis - 1) / (4 * count))
    lower, upper = std / (1 + error), std / max(1 - error, 1e-3)

    # 2. Whether it is the default of a class or function.
    linear_default = 1 / math.sqrt(3 * (members[0].fan_in or 1))
    looks = ""
    if is_uniform and lower <= linear_default <= upper:
        looks = "nn.Linear"
    elif not is_uniform and lower <= 1.0 <= upper:
        looks = "torch.randn"
    return Routers(tuple(members), std, lower, upper, looks, usual_std)


def _pooled_std(weights: list[WeightRecord]) -> float:
    """Return the std over all numbers of several weights."""
    sizes = [math.prod(weight.shape) for weight in weights]
    squares = []
    for size, weight in zip(sizes, weights, strict=True):
        squares.append(size * (weight.std or 0.0) ** 2)
    return math.sqrt(sum(squares) / sum(sizes))


def _is_uniform(members: list[WeightRecord], std: float, count: int) -> bool:
    """Return whether numbers are bounded as those of a uniform distribution are.

    The largest of so many normal numbers would lie further out.

    A router of few experts is too small to tell alone, all layers together are not.
    """
    largest = max(weight.largest or 0.0 for weight in members)
    reach = largest / std
    bounded = count * math.log(max(math.erf(reach / math.sqrt(2)), 1e-300)) < _RARE
    return bounded and reach < math.sqrt(3) * (1 + 6 / math.sqrt(count))


def _drawn_as(routers: Routers, readers: list[WeightRecord]) -> bool:
    """Return whether some reader of the stream has the routers' std.

    It may have the std as it is, as Xavier scales it to the routers' fan_out, or truncated.
    """
    for weight in readers:
        factors = (1.0, _xavier_ratio(weight, routers.members[0]), _TRUNCATED, 1 / _TRUNCATED)
        for factor in factors:
            # The intervals of the two stds meet.
            lower = (weight.lower or 0.0) * factor
            upper = (weight.upper or math.inf) * factor
            if lower <= routers.upper and routers.lower <= upper:
                return True
    return False


def _xavier_ratio(weight: WeightRecord, router: WeightRecord) -> float:
    """Return the std of a router over that of a matrix, as Xavier's formula gives them."""
    if not weight.fan_in or not weight.fan_out:
        return 1.0
    if not router.fan_in or not router.fan_out:
        return 1.0

    # Xavier's variance is 2 / (fan_in + fan_out).
    return math.sqrt((weight.fan_in + weight.fan_out) / (router.fan_in + router.fan_out))


def _excuse_of(contract: ContractRecord, routers: Routers) -> str:
    """Return what in the model says that its routers are meant to look so, "" if nothing does."""
    if routers.looks == "torch.randn":
        for weight in contract.weights:
            is_outside = weight.role in ("embedding", "head") and weight.family in DRAWN
            if is_outside and _may_have_unit_std(weight):
                return f"{weight.parameter} has that std too"
    if routers.looks == "zero":
        bias = _balancing_bias(contract, routers.members[0])
        if bias is not None:
            return f"{bias.parameter} has one number for each expert"
    return ""


def _may_have_unit_std(weight: WeightRecord) -> bool:
    if weight.lower is None or weight.upper is None:
        return False
    return weight.lower <= 1.0 <= weight.upper


def _balancing_bias(contract: ContractRecord, router: WeightRecord) -> WeightRecord | None:
    """Return a vector of one number per expert in the router's sub-layer.

    The bias of the router's own linear map is none.
    """
    if not router.sublayer:
        return None
    own_bias = f"{router.parameter.rpartition('.')[0]}.bias"
    for weight in contract.weights:
        is_vector = weight.shape == [router.fan_out] and weight.parameter != own_bias
        if is_vector and weight.sublayer == router.sublayer:
            return weight
    return None


# -- the rule --------------------------------------------------------------------------------------
def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement
    if judgement is None or context.report.state not in rule.states:
        return NOT_APPLICABLE

    # One finding for each name of routers.
    count, unlike = unlike_routers(judgement)
    findings = [_finding(context, rule, routers) for routers in unlike]
    return CheckOutcome(count, findings)


def _finding(context: RuleContext, rule: Rule, routers: Routers) -> Finding:
    first = routers.members[0]
    name = first.pattern.removesuffix(".weight")
    level: Level = "warning" if routers.looks and not routers.excuse else "info"
    what = f"{name} ({len(routers.members)} routers): {_sentence(routers)}"
    evidence = {
        "parameters": [weight.parameter for weight in routers.members],
        "role": "router",
        "pattern": first.pattern,
        "value": routers.std,
        "lower": routers.lower,
        "upper": routers.upper,
        "expected": routers.usual_std,
        "looks": routers.looks,
    }
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in routers.members))
    fix = (
        f"draw {names_of(routers.members)} with std {plain(routers.usual_std)}, as the matrices "
        "that read the same stream, or pin a contract that says what is meant"
    )
    return Finding(rule.code, context.level(rule, level), where, what, evidence, rule.summary, fix)


def _sentence(routers: Routers) -> str:
    excuse = f"; {routers.excuse}" if routers.excuse else ""
    if routers.looks == "zero":
        return f"all zero, so that every token gives an expert the same score{excuse}"
    # 1. Where the std may come from.
    origin = ""
    if routers.looks == "nn.Linear":
        origin = ", uniform as nn.Linear leaves it"
    elif routers.looks:
        origin = f", as {routers.looks} leaves it"
    # 2. How far it is from that of the others.
    ratio = routers.std / routers.usual_std
    times = f"{plain(ratio)} times" if ratio >= 1 else f"1/{plain(1 / ratio)} of"
    return (
        f"std {plain(routers.std)}{origin}, {times} that of the matrices that read the same stream "
        f"({plain(routers.usual_std)}){excuse}"
    )


RULE = Rule("JD209", "router-scale", "warning", check=_check, states=("init",))
