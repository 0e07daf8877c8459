"""JD211: parameters that hold what was in the memory before, since no init wrote them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.layer_groups import CONSTANT
from jacdiag.rules.init.odd_parameter import draw_in_words, names_of
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext

# Over the fresh families of transformers the largest number of any parameter is 10
# (benchmarks/results/vectors.json).
# This is a hundred thousand times as large. Random bits read as float32 exceed it in four of ten
# numbers.
LARGEST = 1e6
_ALL_ZERO = "zeros, as every matrix of the model does"


@dataclass(frozen=True)
class Leftover:
    """A parameter with numbers that no init writes, and the sign that it is known by."""

    weight: WeightRecord
    sign: str


def leftovers(contract: ContractRecord) -> list[Leftover]:
    """Return the parameters that hold leftover memory.

    Args:
        contract: of a model at its init.
    """
    # 1. New memory is often zero throughout: then every matrix is.
    matrices = [weight for weight in contract.weights if len(weight.shape) >= 2]
    if matrices and all(weight.family == "zero" for weight in matrices):
        zero = [weight for weight in contract.weights if weight.family == "zero"]
        return [Leftover(weight, _ALL_ZERO) for weight in zero]

    # 2. Signs of used memory in single parameters.
    result = []
    for weight in contract.weights:
        sign = _sign_of(weight)
        if sign:
            result.append(Leftover(weight, sign))
    return result


def without_leftovers(contract: ContractRecord) -> ContractRecord:
    """Return the contract of the parameters that an init wrote.

    What the others hold says nothing of a scheme.

    Args:
        contract: of a model at its init.
    """
    left = {leftover.weight.parameter for leftover in leftovers(contract)}
    if not left:
        return contract

    written = [weight for weight in contract.weights if weight.parameter not in left]
    return replace(contract, weights=written)


def _sign_of(weight: WeightRecord) -> str:
    """Return the sign that nobody wrote a parameter; "" if there is none."""
    if weight.tiny:
        return "numbers that are not zero and closer to it than 1e-30"

    # Memory hardly ever holds one number throughout. A mask of -1e9 does.
    is_written = weight.family == "constant"
    is_large = weight.largest is not None and weight.largest > LARGEST
    if is_large and not is_written:
        return f"numbers beyond {plain(LARGEST)}"

    if weight.piece_of:
        return f"the numbers of a piece of {weight.piece_of}"
    return ""


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states:
        return NOT_APPLICABLE
    known = [weight for weight in contract.weights if weight.largest is not None]
    groups: dict[str, list[WeightRecord]] = {}
    for leftover in leftovers(contract):
        groups.setdefault(leftover.sign, []).append(leftover.weight)
    findings = [_finding(context, rule, sign, weights) for sign, weights in groups.items()]
    return CheckOutcome(len(known), findings)


def _fix_for(context: RuleContext, left: list[WeightRecord]) -> str:
    """Return what to set or draw each parameter to.

    Its role or its like in another layer says so, if anything does.
    """
    contract = context.report.contract
    others = [] if contract is None else without_leftovers(contract).weights
    steps: dict[str, list[WeightRecord]] = {}
    for weight in left:
        steps.setdefault(_step_for(weight, others), []).append(weight)
    return "; ".join(step.format(names_of(weights)) for step, weights in steps.items())


def _step_for(weight: WeightRecord, others: list[WeightRecord]) -> str:
    """Return what to do about one parameter, with "{}" for its name."""
    # 1. As its like in another layer.
    for other in others:
        is_alike = other.pattern == weight.pattern and other.role == weight.role
        if not is_alike:
            continue
        if other.family in CONSTANT:
            return f"set {{}} to {other.mean or 0.0:.4g}"
        if other.family in ("normal", "truncated", "uniform"):
            return f"draw {{}} {draw_in_words(other)}, as {other.parameter}"

    # 2. As its role is usually set. The gain of a norm that divides by a length is not 1.
    if weight.role == "norm_gain" and weight.norm_length is None:
        return f"set {{}} to {1.0 - weight.offset:.4g}"
    if weight.role == "bias":
        return "set {} to 0"
    return "initialise {} as the model's paper or config says"


def _finding(context: RuleContext, rule: Rule, sign: str, weights: list[WeightRecord]) -> Finding:
    # 1. The sentence.
    names = names_of(weights)
    verb = "holds" if len(weights) == 1 else "hold"
    claim = "no init wrote this"
    if sign == _ALL_ZERO:
        claim = "no init drew them"
    what = f"{names} {verb} {sign}: {claim}"

    # 2. The finding.
    evidence = {
        "parameters": [weight.parameter for weight in weights],
        "role": weights[0].role,
        "tiny": [weight.tiny for weight in weights],
        "largest": [weight.largest for weight in weights],
        "piece_of": weights[0].piece_of,
    }
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in weights))
    fix = f"{_fix_for(context, weights)}; after to_empty(), run the init of the whole model"
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, where, what, evidence, rule.summary, fix)


RULE = Rule("JD211", "leftover-memory", "warning", check=_check, states=("init",))
