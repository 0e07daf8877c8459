"""JD209: routers of a mixture of experts that were not drawn as the matrices that read the same stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jacdiag.report import ContractRecord, Finding, Level, WeightRecord
from jacdiag.rules.init_contract import departures_of, judged
from jacdiag.rules.layer_groups import DRAWN
from jacdiag.rules.numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.schemes import INNER, Scheme, formulas_of
from jacdiag.rules.texts import Text
from jacdiag.rules.vectors import differences

_Z = 4.9  # errors of a std at a chance of 1e-6
_RARE = math.log(1e-7)
# Std of a normal after its numbers beyond two std were cut: of a small router nobody can tell whether that was done.
_TRUNCATED = 0.8796

TEXT = Text(
    summary="routers were left at a framework's default, or drawn wider or narrower than the rest",
    what="""\
The routers of one name are pooled over the layers, and their std is compared with that of the matrices that read the
same stream (W_Q, W_1 and others of the same fan_in), directly and as Xavier would scale it to a router's fan_out. A
warning is given where the routers hold a framework's own init and the rest does not: uniform with std 1/√(3 fan_in), as
nn.Linear leaves it, or std 1, as torch.randn does; and where they are all zero. Any other difference is an info, since
routers of their own std are published practice: 1 in Switch Transformers, zero in AFMoE, Megatron-LM forks with a
Kaiming option. Families with a known practice are not named. DeepSeek's own code leaves its gate at the default of
nn.Linear; under model types that begin with "deepseek" that is not named.""",
    why="""\
A gate written as a bare nn.Parameter is skipped by an init that goes by the type of modules, and keeps the draw of its
constructor. The std of a router sets how sharply tokens choose experts from the first step on.""",
    example="""\
    every matrix N(0, 0.02), the gates nn.Linear(64, 8) as built: uniform of std 0.072""",
    remedy="""\
Initialise the router as the rest, or pin a contract that says what is meant (router = "1/sqrt(3*fan_in)").""",
)


@dataclass(frozen=True)
class Practice:
    """A published init of routers that is not that of the other matrices.

    Attributes:
        families: beginnings of model types.
        std: the published std, None for nn.Linear's own.
        source: where it was published.
    """

    families: tuple[str, ...]
    std: float | None
    source: str


PRACTICES = (
    Practice(("switch_transformers",), 1.0, "transformers, models/switch_transformers: initializer_factor"),
    Practice(("afmoe",), 0.0, "transformers, models/afmoe"),
    Practice(("deepseek", "kimi_k2"), None, "modeling_deepseek.py of DeepSeek-V2: MoEGate.reset_parameters"),
)


@dataclass(frozen=True)
class Routers:
    """The routers of one name, pooled over the layers.

    Attributes:
        members: the routers.
        std: over all their numbers; `lower` and `upper` bound that of the distribution.
        looks: whose init it is: "nn.Linear", "torch.randn", "zero", or "" for none of these.
        rest: std of the matrices that read the same stream, and of how many numbers it was taken.
    """

    members: tuple[WeightRecord, ...]
    std: float
    lower: float
    upper: float
    looks: str
    rest: float


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
        routers = _zero_routers(members, rest) if len(zero) == len(members) else _pool(members, rest)
        if not _drawn_as(routers, rest) and not _is_published(contract.family, routers):
            found.append(routers)
    return compared, found


def _judged_elsewhere(contract: ContractRecord) -> set[str]:
    """Return the routers that the user pinned, that a scheme speaks of, or that differ from those of other layers."""
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
        if weight.role in INNER and weight.fan_in == router.fan_in and weight.family in DRAWN and weight.std
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
    return math.sqrt(sum(math.prod(weight.shape) * (weight.std or 0.0) ** 2 for weight in weights) / count)


def _is_uniform(members: list[WeightRecord], std: float, count: int) -> bool:
    """Whether numbers are bounded as a uniform distribution's: a normal's largest of so many would lie further out.

    A router of few experts is too small to tell alone, all layers together are not.
    """
    largest = max(weight.largest or 0.0 for weight in members)
    reach = largest / std
    bounded = count * math.log(max(math.erf(reach / math.sqrt(2)), 1e-300)) < _RARE
    return bounded and reach < math.sqrt(3) * (1 + 6 / math.sqrt(count))


def _drawn_as(routers: Routers, rest: list[WeightRecord]) -> bool:
    """Whether some matrix of the rest has the routers' std, as it is or as Xavier scales it to their fan_out."""
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


def _is_published(family: str, routers: Routers) -> bool:
    return any(_agrees(practice, routers) for practice in _practices_of(family))


def _practices_of(family: str) -> Iterator[Practice]:
    return (practice for practice in PRACTICES if family.lower().startswith(practice.families))


def _agrees(practice: Practice, routers: Routers) -> bool:
    if practice.std is None:
        return routers.looks == "nn.Linear"
    return routers.lower <= practice.std <= routers.upper


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
    level: Level = "warning" if routers.looks else "info"
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
    fix = "initialise the routers as the rest, or pin a contract that says what is meant"
    return Finding(rule.code, context.level(rule, level), where, what, evidence, rule.summary, fix)


def _sentence(routers: Routers) -> str:
    if routers.looks == "zero":
        return "all zero, so that a token gets one score from all experts, but for a bias"
    ratio = routers.std / routers.rest
    times = f"{plain(ratio)} times" if ratio >= 1 else f"1/{plain(1 / ratio)} of"
    origin = f", as {routers.looks} leaves it" if routers.looks else ""
    if routers.looks == "nn.Linear":
        origin = ", uniform as nn.Linear leaves it"
    return (
        f"std {plain(routers.std)}{origin}, {times} that of the matrices that read the same stream "
        f"({plain(routers.rest)})"
    )


RULE = Rule("JD209", "router-scale", "warning", **TEXT, check=_check, states=("init",))
