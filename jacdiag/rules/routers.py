"""JD209: routers of a mixture of experts that were not drawn as the matrices that read the same
stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, Finding, Level, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init_contract import departures_of, judged
from jacdiag.rules.layer_groups import DRAWN
from jacdiag.rules.odd_parameter import names_of
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.schemes import INNER, Scheme, formulas_of
from jacdiag.rules.small_parameters import differences

_Z = 4.9  # errors of a std at a chance of 1e-6
_RARE = math.log(1e-7)
# Std of a normal after its numbers beyond two std were cut: of a small router nobody can tell
# whether that was done.
_TRUNCATED = 0.8796


@dataclass(frozen=True)
class Routers:
    """The routers of one name, pooled over the layers.

    Attributes:
        members: the routers.
        std: over all their numbers; `lower` and `upper` bound that of the distribution.
        looks: whose init it is: "nn.Linear", "torch.randn", "zero", or "" for none of these.
        rest: the middle std of the matrices that read the same stream.
        excuse: why a look of theirs may be meant, as words; "" if nothing in the model says so.
    """

    members: tuple[WeightRecord, ...]
    std: float
    lower: float
    upper: float
    looks: str
    rest: float
    excuse: str = ""


def unlike_routers(contract: ContractRecord) -> tuple[int, list[Routers]]:
    """Return how many routers were compared, and those that were not drawn as the rest.

    Args:
        contract: of a model at its init.
    """
    groups: dict[str, list[WeightRecord]] = {}
    for weight in contract.weights:
        if weight.role == "router" and weight.family in (*DRAWN, "zero") and weight.fan_in:
            groups.setdefault(weight.pattern, []).append(weight)
    left_out = _judged_elsewhere(contract)
    compared, found = 0, []
    for group in groups.values():
        members = [weight for weight in group if weight.parameter not in left_out]
        rest = _readers_of_the_same(contract, members[0]) if members else []
        if not rest:
            continue
        compared += len(members)
        zero = [weight for weight in members if weight.family == "zero"]
        routers = (
            _zero_routers(members, rest) if len(zero) == len(members) else _pool(members, rest)
        )
        if not _drawn_as(routers, rest):
            found.append(replace(routers, excuse=_excuse_of(contract, routers)))
    return compared, found


def _judged_elsewhere(contract: ContractRecord) -> set[str]:
    """Return the routers that the user pinned, that a scheme speaks of, or that differ from those
    of other layers.
    """
    pinned = Scheme("pinned", "", "", formulas_of(contract.pinned))
    scheme = judged(contract).scheme
    named = {one.weight.parameter for one in departures_of(contract)}
    routers = [weight for weight in contract.weights if weight.role == "router"]
    stated = {w.parameter for w in routers if pinned.of(w) or (scheme is not None and scheme.of(w))}
    unlike = {one.weight.parameter for one in differences(contract)[1]}
    return named | stated | unlike


def _readers_of_the_same(contract: ContractRecord, router: WeightRecord) -> list[WeightRecord]:
    return [
        weight
        for weight in contract.weights
        if weight.role in INNER
        and weight.fan_in == router.fan_in
        and weight.family in DRAWN
        and weight.std
    ]


# -- one group of routers --------------------------------------------------------------------------
def _pool(members: list[WeightRecord], rest: list[WeightRecord]) -> Routers:
    count = sum(math.prod(weight.shape) for weight in members)
    std = _pooled_std(members)
    uniform = _is_uniform(members, std, count)
    kurtosis = 1.8 if uniform else 3.0
    error = _Z * math.sqrt((kurtosis - 1) / (4 * count))
    lower, upper = std / (1 + error), std / max(1 - error, 1e-3)
    default = 1 / math.sqrt(3 * (members[0].fan_in or 1))
    looks = ""
    if uniform and lower <= default <= upper:
        looks = "nn.Linear"
    elif not uniform and lower <= 1.0 <= upper:
        looks = "torch.randn"
    return Routers(tuple(members), std, lower, upper, looks, _middle(rest))


def _zero_routers(members: list[WeightRecord], rest: list[WeightRecord]) -> Routers:
    return Routers(tuple(members), 0.0, 0.0, 0.0, "zero", _middle(rest))


def _middle(rest: list[WeightRecord]) -> float:
    return sorted(weight.std or 0.0 for weight in rest)[len(rest) // 2]


def _pooled_std(weights: list[WeightRecord]) -> float:
    count = sum(math.prod(weight.shape) for weight in weights)
    return math.sqrt(
        sum(math.prod(weight.shape) * (weight.std or 0.0) ** 2 for weight in weights) / count
    )


def _is_uniform(members: list[WeightRecord], std: float, count: int) -> bool:
    """Whether numbers are bounded as a uniform distribution's: a normal's largest of so many would
    lie further out.

    A router of few experts is too small to tell alone, all layers together are not.
    """
    largest = max(weight.largest or 0.0 for weight in members)
    reach = largest / std
    bounded = count * math.log(max(math.erf(reach / math.sqrt(2)), 1e-300)) < _RARE
    return bounded and reach < math.sqrt(3) * (1 + 6 / math.sqrt(count))


def _drawn_as(routers: Routers, rest: list[WeightRecord]) -> bool:
    """Whether some matrix of the rest has the routers' std, as it is or as Xavier scales it to
    their fan_out.
    """
    router = routers.members[0]
    for weight in rest:
        ratio = 1.0
        if weight.fan_in and weight.fan_out and router.fan_in and router.fan_out:
            ratio = math.sqrt((weight.fan_in + weight.fan_out) / (router.fan_in + router.fan_out))
        for factor in (1.0, ratio, _TRUNCATED, 1 / _TRUNCATED):
            lower, upper = (weight.lower or 0.0) * factor, (weight.upper or math.inf) * factor
            if lower <= routers.upper and routers.lower <= upper:
                return True
    return False


def _excuse_of(contract: ContractRecord, routers: Routers) -> str:
    """Return what in the model says that its routers are meant to look so, "" if nothing does."""
    if routers.looks == "torch.randn":
        for weight in contract.weights:
            bounds = (weight.lower, weight.upper)
            is_outside = weight.role in ("embedding", "head") and weight.family in DRAWN
            if (
                is_outside
                and bounds[0] is not None
                and bounds[1] is not None
                and bounds[0] <= 1.0 <= bounds[1]
            ):
                return f"{weight.parameter} has that std too"
    if routers.looks == "zero":
        bias = _balancing_bias(contract, routers.members[0])
        if bias is not None:
            return f"{bias.parameter} has one number for each expert"
    return ""


def _balancing_bias(contract: ContractRecord, router: WeightRecord) -> WeightRecord | None:
    """Return a vector of one number per expert in the router's sub-layer that is no bias of its
    linear map.
    """
    own = f"{router.parameter.rpartition('.')[0]}.bias"
    for weight in contract.weights:
        is_vector = weight.shape == [router.fan_out] and weight.parameter != own
        if is_vector and router.sublayer and weight.sublayer == router.sublayer:
            return weight
    return None


# -- the rule --------------------------------------------------------------------------------------
def _check(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states:
        return NOT_APPLICABLE
    count, found = unlike_routers(contract)
    return Outcome(count, [_finding(context, rule, routers) for routers in found])


def _finding(context: Context, rule: Rule, routers: Routers) -> Finding:
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
        "expected": routers.rest,
        "looks": routers.looks,
    }
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in routers.members))
    fix = (
        f"draw {names_of(routers.members)} with std {plain(routers.rest)}, as the matrices that "
        "read the same stream, "
        "or pin a contract that says what is meant"
    )
    return Finding(rule.code, context.level(rule, level), where, what, evidence, rule.summary, fix)


def _sentence(routers: Routers) -> str:
    if routers.looks == "zero":
        excuse = f"; {routers.excuse}" if routers.excuse else ""
        return f"all zero, so that every token gives an expert the same score{excuse}"
    ratio = routers.std / routers.rest
    times = f"{plain(ratio)} times" if ratio >= 1 else f"1/{plain(1 / ratio)} of"
    origin = f", as {routers.looks} leaves it" if routers.looks else ""
    if routers.looks == "nn.Linear":
        origin = ", uniform as nn.Linear leaves it"
    excuse = f"; {routers.excuse}" if routers.excuse else ""
    return (
        f"std {plain(routers.std)}{origin}, {times} that of the matrices that read the same stream "
        f"({plain(routers.rest)}){excuse}"
    )


RULE = Rule("JD209", "router-scale", "warning", check=_check, states=("init",))
