"""JD211: parameters that hold what was in the memory before, since no init wrote them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.odd_parameter import draw_in_words, names_of
from jacdiag.rules.init.weight_facts import (
    INDEPENDENT,
    is_constant,
    is_vector,
    is_zero,
    largest_of,
    mean_of,
    parameters_of,
    places_of,
    without,
)
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
    if _are_all_matrices_zero(contract):
        zero = filter(is_zero, contract.weights)
        return [Leftover(weight, _ALL_ZERO) for weight in zero]

    # 2. Signs of used memory in single parameters.
    result = []
    for weight in contract.weights:
        sign = _sign_of(weight)
        if sign:
            result.append(Leftover(weight, sign))

    return result


def _are_all_matrices_zero(contract: ContractRecord) -> bool:
    """Return whether a model has matrices, and each of them is zero."""
    matrices = list(itertools.filterfalse(is_vector, contract.weights))

    # Without a matrix nothing was left out.
    has_matrices = len(matrices) > 0
    return has_matrices and all(map(is_zero, matrices))


def without_leftovers(contract: ContractRecord) -> ContractRecord:
    """Return the contract of the parameters that an init wrote.

    What the others hold says nothing of a scheme.

    Args:
        contract: of a model at its init.
    """
    names = {leftover.weight.parameter for leftover in leftovers(contract)}
    return without(contract, names)


def _sign_of(weight: WeightRecord) -> str:
    """Return the sign that nobody wrote a parameter; "" if there is none."""
    if weight.tiny:
        return "numbers that are not zero and closer to it than 1e-30"

    # Random bits, read as float32, are often huge.
    if _holds_huge_numbers(weight):
        return f"numbers beyond {plain(LARGEST)}"

    # Memory of another parameter was handed out again.
    if weight.piece_of:
        return f"the numbers of a piece of {weight.piece_of}"

    return ""


def _holds_huge_numbers(weight: WeightRecord) -> bool:
    """Return whether a parameter holds numbers that are too large for any init."""
    # Memory hardly ever holds one number throughout. A mask of -1e9 does.
    is_one_number = weight.family == "constant"
    if is_one_number:
        return False
    return largest_of(weight) > LARGEST


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.contract_for(rule)
    if contract is None:
        return NOT_APPLICABLE

    # One finding for all parameters with the same sign.
    findings = []
    for sign, group in group_by(leftovers(contract), lambda leftover: leftover.sign).items():
        weights = [leftover.weight for leftover in group]
        findings.append(_finding(context, rule, sign, weights))

    return CheckOutcome(_count_measured(contract), findings)


def _count_measured(contract: ContractRecord) -> int:
    """Return of how many parameters the numbers were looked at; older reports have none."""
    return sum(weight.largest is not None for weight in contract.weights)


def _fix_for(context: RuleContext, left: list[WeightRecord]) -> str:
    """Return what to set or draw each parameter to.

    Its role or its like in another layer says so, if anything does.
    """
    # 1. The parameters that an init wrote.
    written: list[WeightRecord] = []
    contract = context.report.contract
    if contract is not None:
        written = without_leftovers(contract).weights

    # 2. One step for all parameters with which the same is to be done.
    steps = group_by(left, lambda weight: _step_for(weight, written))
    return "; ".join(step.format(names_of(weights)) for step, weights in steps.items())


def _step_for(weight: WeightRecord, others: list[WeightRecord]) -> str:
    """Return what to do about one parameter, with "{}" for its name."""
    # 1. As its like in another layer.
    for other in others:
        is_alike = other.pattern == weight.pattern and other.role == weight.role
        if is_alike:
            step = _step_to_be_like(other)
            if step:
                return step

    # 2. As its role is usually set.
    return _step_by_role(weight)


def _step_to_be_like(other: WeightRecord) -> str:
    """Return how to make a parameter like another one; "" if that one does not say how."""
    if is_constant(other):
        return f"set {{}} to {mean_of(other):.4g}"

    if other.family in INDEPENDENT:
        return f"draw {{}} {draw_in_words(other)}, as {other.parameter}"

    return ""


def _step_by_role(weight: WeightRecord) -> str:
    """Return how parameters of one role are usually set."""
    # The gain of a norm that divides by a length is not 1.
    is_plain_gain = weight.role == "norm_gain" and weight.norm_length is None
    if is_plain_gain:
        return f"set {{}} to {1.0 - weight.offset:.4g}"
    if weight.role == "bias":
        return "set {} to 0"

    return "initialise {} as the model's paper or config says"


def _finding(context: RuleContext, rule: Rule, sign: str, weights: list[WeightRecord]) -> Finding:
    # 1. The finding.
    evidence = {
        "parameters": parameters_of(weights),
        "role": weights[0].role,
        "tiny": [weight.tiny for weight in weights],
        "largest": [weight.largest for weight in weights],
        "piece_of": weights[0].piece_of,
    }
    what = _sentence(sign, weights)
    fix = f"{_fix_for(context, weights)}; after to_empty(), run the init of the whole model"

    # 2. Its level and where it is.
    level = context.level(rule, rule.level)
    where = places_of(weights)
    return Finding(rule.code, level, where, what, evidence, rule.summary, fix)


def _sentence(sign: str, weights: list[WeightRecord]) -> str:
    verb = "holds" if len(weights) == 1 else "hold"
    claim = "no init wrote this"
    if sign == _ALL_ZERO:
        claim = "no init drew them"
    return f"{names_of(weights)} {verb} {sign}: {claim}"


RULE = Rule("JD211", "leftover-memory", "warning", check=_check, states=("init",))
