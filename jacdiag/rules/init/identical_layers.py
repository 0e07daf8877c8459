"""JD210: weights whose random numbers are those of another one.

These are layers, experts, shards, or matrices of one layer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.init.contract_judgement import Judgement
from jacdiag.rules.init.layer_groups import DRAWN
from jacdiag.rules.init.odd_parameter import names_of
from jacdiag.rules.init.schemes import MATRICES
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# Tables that are computed, such as the decay rates of a state space model, are alike in all layers
# on purpose and may
# look like a draw. These roles are never computed.
_ROLES = (*MATRICES, "router", "adapter")
# searched for shards too; two of them may be one on purpose
_OUTSIDE = ("embedding", "head", "projection")


@dataclass(frozen=True)
class Copy:
    """A weight, the one that it repeats, and where their names differ.

    Attributes:
        weight, original: the two.
        stack: the name before the first number that differs, "" if the names differ in more than
        numbers. number, original_number: that number in either name, -1 if the names differ in more
        than numbers.
    """

    weight: WeightRecord
    original: WeightRecord
    stack: str = ""
    number: int = -1
    original_number: int = -1

    @property
    def is_of_a_layer(self) -> bool:
        """Whether the names differ in numbers only, so that one layer or expert repeats another."""
        return self.number >= 0


def copies(contract: ContractRecord) -> tuple[int, list[Copy]]:
    """Return how many drawn weights were compared, and those that repeat another one.

    Only weights of one stack are compared.

    Args:
        contract: of a model at its init.
    """
    drawn = [weight for weight in contract.weights if _is_drawn(weight)]
    groups: dict[tuple[str, str], list[WeightRecord]] = {}
    for weight in drawn:
        groups.setdefault((_origin_of(weight), _stack_of(weight)), []).append(weight)
    repeating = []
    for members in groups.values():
        for position, weight in enumerate(members[1:], start=1):
            repeating.append(_copy_of(weight, members[:position]))
    return len(drawn), repeating


def constant_matrices(judgement: Judgement) -> list[WeightRecord]:
    """Return the matrices of sub-layers that hold one number other than zero throughout.

    Args:
        judgement: of a model at its init. What another rule of the contract names is left out.
    """
    constant = []
    for weight in judgement.contract.weights:
        if weight.role not in MATRICES or weight.family != "constant":
            continue

        # A matrix with one row or column is a vector, whose numbers may be one on purpose.
        is_matrix = len(weight.shape) >= 2 and min(weight.shape[-2:]) >= 2
        if is_matrix and weight.parameter not in judgement.deviating_names:
            constant.append(weight)
    return constant


def _is_drawn(weight: WeightRecord) -> bool:
    return weight.role in _ROLES and len(weight.shape) >= 2 and weight.family in DRAWN


def _origin_of(weight: WeightRecord) -> str:
    """Return the name of the first weight of a model that holds these random numbers."""
    if weight.stream_of:
        return weight.stream_of
    # Of a weight that repeats a part of itself, `same_as` is its own name.
    return weight.same_as or weight.parameter


def _content_of(weight: WeightRecord) -> str:
    """Return the name of the first weight that is bit-identical."""
    return weight.same_as or weight.parameter


def _stack_of(weight: WeightRecord) -> str:
    """Return the name before the first number, which is that of the stack of layers.

    A name without a number has the path of its module.
    """
    match = _NUMBER.search(weight.parameter)
    if match is None:
        return weight.parameter.rpartition(".")[0].rpartition(".")[0]
    return weight.parameter[: match.start()]


def _copy_of(weight: WeightRecord, earlier: Sequence[WeightRecord]) -> Copy:
    """Return which of the earlier weights one repeats.

    It is that of its own name in another layer, else the first.
    """
    for original in earlier:
        is_exact = _content_of(weight) == _content_of(original)
        copy = _compare_names(weight, original) if is_exact else None
        if copy is not None:
            return copy
    return Copy(weight, earlier[0])


def _compare_names(weight: WeightRecord, original: WeightRecord) -> Copy | None:
    """Return the copy if two names differ in numbers only.

    `stack` is the name before the first number that differs.
    """
    if _NUMBER.sub("*", weight.parameter) != _NUMBER.sub("*", original.parameter):
        return None
    pairs = zip(
        _NUMBER.finditer(weight.parameter), _NUMBER.finditer(original.parameter), strict=True
    )
    for own, other in pairs:
        if own[0] != other[0]:
            stack = weight.parameter[: own.start()].removesuffix(".")
            return Copy(weight, original, stack, int(own[0]), int(other[0]))
    return None


# -- the rule --------------------------------------------------------------------------------------
def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement
    if judgement is None or context.report.state not in rule.states:
        return NOT_APPLICABLE
    contract = judgement.contract
    count, repeating = copies(contract)
    stacks: dict[tuple[str, int], list[Copy]] = {}
    others: dict[str, list[Copy]] = {}
    for copy in repeating:
        if copy.is_of_a_layer:
            stacks.setdefault((_NUMBER.sub("*", copy.stack), copy.original_number), []).append(copy)
        else:
            others.setdefault(copy.original.parameter, []).append(copy)
    findings = [
        _finding(context, rule, contract, stack, group) for (stack, _), group in stacks.items()
    ]
    findings += [_finding_of_others(context, rule, group) for group in others.values()]
    findings += _findings_alone(context, rule, judgement)
    return CheckOutcome(count, findings)


def _findings_alone(context: RuleContext, rule: Rule, judgement: Judgement) -> Iterator[Finding]:
    """Yield what is said of weights that repeat a part of themselves."""
    # 1. Random numbers that repeat.
    repeating = []
    for weight in judgement.contract.weights:
        is_outside = weight.role in _OUTSIDE and weight.family in DRAWN
        if weight.same_as != weight.parameter:
            continue
        if is_outside or _is_drawn(weight):
            repeating.append(weight)
    if repeating:
        yield _finding_of_parts(context, rule, repeating)

    # 2. One number throughout.
    by_value: dict[str, list[WeightRecord]] = {}
    for weight in constant_matrices(judgement):
        by_value.setdefault(plain(weight.mean), []).append(weight)
    for value, weights in by_value.items():
        yield _finding_of_constants(context, rule, value, weights)


def _finding_of_others(context: RuleContext, rule: Rule, group: list[Copy]) -> Finding:
    weights = [copy.weight for copy in group]
    original = group[0].original
    verb = "repeats" if len(weights) == 1 else "repeat"
    what = (
        f"{names_of(weights)} {verb} the random numbers of {original.parameter}, up to a factor "
        "and over the shorter: "
        "they were copied, or drawn from one seed"
    )
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in weights))
    evidence = {
        "parameters": [weight.parameter for weight in weights],
        "same_as": [original.parameter] * len(weights),
    }
    fix = (
        f"draw {names_of(weights)} again, without setting the generator back to a seed before each"
    )
    return Finding(
        rule.code, context.level(rule, rule.level), where, what, evidence, rule.summary, fix
    )


def _finding_of_constants(
    context: RuleContext, rule: Rule, value: str, weights: list[WeightRecord]
) -> Finding:
    verb = "holds" if len(weights) == 1 else "hold"
    what = (
        f"{names_of(weights)} {verb} {value} throughout: all rows of such a matrix are the same, "
        "and so are all its "
        "outputs, but for a bias"
    )
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in weights))
    evidence = {"parameters": [weight.parameter for weight in weights], "value": weights[0].mean}
    fix = f"draw {names_of(weights)} at random"
    return Finding(
        rule.code, context.level(rule, rule.level), where, what, evidence, rule.summary, fix
    )


def _finding_of_parts(context: RuleContext, rule: Rule, repeating: list[WeightRecord]) -> Finding:
    names = [weight.parameter for weight in repeating]
    what = (
        f"{names_of(repeating)}: a matrix of the stack, or a block of the matrix, is "
        "bit-identical to another one"
    )
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in repeating))
    evidence = {"parameters": names, "same_as": names}
    fix = (
        f"draw {names_of(repeating)} again, each matrix of the stack and each shard with numbers "
        "of its own"
    )
    return Finding(
        rule.code, context.level(rule, rule.level), where, what, evidence, rule.summary, fix
    )


def _count_drawn_weights(
    contract: ContractRecord, stacks: Iterable[str], numbers: Iterable[int]
) -> int:
    """Return how many weights of some layers of some stacks were drawn."""
    prefixes = tuple(f"{stack}.{number}." for stack, number in itertools.product(stacks, numbers))
    drawn = [weight for weight in contract.weights if _is_drawn(weight)]
    return sum(weight.parameter.startswith(prefixes) for weight in drawn)


def _finding(
    context: RuleContext, rule: Rule, contract: ContractRecord, stack: str, group: list[Copy]
) -> Finding:
    """Return the finding about the layers or experts of a stack that repeat one of them."""
    # 1. The layers that repeat, and how many drawn weights they have.
    weights = [copy.weight for copy in group]
    numbers = sorted({copy.number for copy in group})
    stacks = {copy.stack for copy in group}
    drawn = _count_drawn_weights(contract, stacks, numbers)

    # 2. The sentence.
    original = group[0].original_number
    shown = ", ".join(map(str, numbers[:8]))
    if len(numbers) > 8:
        shown += " ..."
    what = (
        f"{stack or 'the model'}: {shown} bit-identical to {original}, in "
        f"{len(group)} of their "
        f"{drawn} drawn weights"
    )

    # 3. The finding.
    evidence = {
        "parameters": [weight.parameter for weight in weights],
        "same_as": [copy.original.parameter for copy in group],
        "copies": numbers,
        "original": original,
        "of": drawn,
    }
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in weights))
    fix = f"draw {names_of(weights)} again: build each layer by itself, not as a copy"
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, where, what, evidence, rule.summary, fix)


RULE = Rule("JD210", "identical-layers", "warning", check=_check, states=("init",))
