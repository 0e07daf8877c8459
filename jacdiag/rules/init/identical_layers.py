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
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.contract_judgement import Judgement
from jacdiag.rules.init.odd_parameter import names_of
from jacdiag.rules.init.schemes import MATRICES
from jacdiag.rules.init.weight_facts import (
    content_of,
    is_drawn,
    is_vector,
    parameters_of,
    places_of,
)
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# Tables that are computed, such as the decay rates of a state space model, are alike in all layers
# on purpose and may
# look like a draw. These roles are never computed.
_ROLES = (*MATRICES, "router", "adapter")
# searched for shards too; two of them may be one on purpose
_OUTSIDE = ("embedding", "head", "projection")


_MOST_NUMBERS = 8  # of layers in a sentence


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
    # 1. Weights of one stack with the same random numbers.
    drawn = list(filter(_is_drawn, contract.weights))
    groups = group_by(drawn, lambda weight: (_origin_of(weight), _stack_of(weight)))

    # 2. All but the first repeat one that stands before them.
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
    constant: list[WeightRecord] = []
    for weight in filter(_is_constant_matrix, judgement.contract.weights):
        is_named = weight.parameter in judgement.deviating_names
        if not is_named:
            constant.append(weight)

    return constant


def _is_constant_matrix(weight: WeightRecord) -> bool:
    if weight.role not in MATRICES or weight.family != "constant":
        return False
    if is_vector(weight):
        return False

    # A matrix with one row or column is a vector, whose numbers may be one on purpose.
    return min(weight.shape[-2:]) >= 2


def _is_drawn(weight: WeightRecord) -> bool:
    """Return whether a weight is a drawn matrix of a role that is never computed."""
    # Few numbers of a vector may repeat by chance.
    is_matrix = not is_vector(weight)
    is_never_computed = weight.role in _ROLES
    return is_matrix and is_never_computed and is_drawn(weight)


def _origin_of(weight: WeightRecord) -> str:
    """Return the name of the first weight of a model that holds these random numbers."""
    # Of a weight that repeats a part of itself, `same_as` is its own name.
    return weight.stream_of or content_of(weight)


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
    exact = [original for original in earlier if content_of(original) == content_of(weight)]
    for original in exact:
        copy = _compare_names(weight, original)
        if copy is not None:
            return copy

    return Copy(weight, earlier[0])


def _compare_names(weight: WeightRecord, original: WeightRecord) -> Copy | None:
    """Return the copy if two names differ in numbers only.

    `stack` is the name before the first number that differs.
    """
    name = weight.parameter
    other_name = original.parameter
    if _without_numbers(name) != _without_numbers(other_name):
        return None

    # The first number that differs names the layer or the expert.
    pairs = zip(_NUMBER.finditer(name), _NUMBER.finditer(other_name), strict=True)
    for own, other in pairs:
        if own[0] != other[0]:
            stack = name[: own.start()].removesuffix(".")
            return Copy(weight, original, stack, int(own[0]), int(other[0]))

    return None


def _without_numbers(name: str) -> str:
    return _NUMBER.sub("*", name)


# -- the rule --------------------------------------------------------------------------------------
def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement_for(rule)
    if judgement is None:
        return NOT_APPLICABLE

    # 1. Layers that repeat another layer.
    count, repeating = copies(judgement.contract)
    of_layers = [copy for copy in repeating if copy.is_of_a_layer]
    findings = []
    for (stack, _), group in group_by(of_layers, _layer_repeated).items():
        findings.append(_finding(context, rule, judgement.contract, stack, group))

    # 2. Other weights that repeat another one.
    others = [copy for copy in repeating if not copy.is_of_a_layer]
    for group in group_by(others, lambda copy: copy.original.parameter).values():
        findings.append(_finding_of_others(context, rule, group))

    # 3. Weights that repeat a part of themselves.
    findings += _findings_alone(context, rule, judgement)
    return CheckOutcome(count, findings)


def _layer_repeated(copy: Copy) -> tuple[str, int]:
    """Return the stack that a copy is of, and the number of the layer that it repeats."""
    return _without_numbers(copy.stack), copy.original_number


def _findings_alone(context: RuleContext, rule: Rule, judgement: Judgement) -> Iterator[Finding]:
    """Yield what is said of weights that repeat a part of themselves."""
    # 1. Random numbers that repeat.
    repeating = list(filter(_repeats_a_part, judgement.contract.weights))
    if repeating:
        yield _finding_of_parts(context, rule, repeating)

    # 2. One number throughout.
    by_value = group_by(constant_matrices(judgement), lambda weight: plain(weight.mean))
    for value, weights in by_value.items():
        yield _finding_of_constants(context, rule, value, weights)


def _repeats_a_part(weight: WeightRecord) -> bool:
    """Return whether a draw holds the same numbers twice."""
    # Then it is listed as a copy of itself.
    is_copy_of_itself = weight.same_as == weight.parameter
    if not is_copy_of_itself:
        return False

    # Tables outside of the sub-layers count here as well.
    is_drawn_outside = weight.role in _OUTSIDE and is_drawn(weight)
    return is_drawn_outside or _is_drawn(weight)


def _finding_of_others(context: RuleContext, rule: Rule, group: list[Copy]) -> Finding:
    # 1. The sentence.
    weights = [copy.weight for copy in group]
    original = group[0].original
    verb = "repeats" if len(weights) == 1 else "repeat"
    what = (
        f"{names_of(weights)} {verb} the random numbers of {original.parameter}, up to a factor "
        "and over the shorter: "
        "they were copied, or drawn from one seed"
    )

    # 2. The finding.
    evidence = {
        "parameters": parameters_of(weights),
        "same_as": [original.parameter] * len(weights),
    }
    fix = (
        f"draw {names_of(weights)} again, without setting the generator back to a seed before each"
    )
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, places_of(weights), what, evidence, rule.summary, fix)


def _finding_of_constants(
    context: RuleContext, rule: Rule, value: str, weights: list[WeightRecord]
) -> Finding:
    verb = "holds" if len(weights) == 1 else "hold"
    what = (
        f"{names_of(weights)} {verb} {value} throughout: all rows of such a matrix are the same, "
        "and so are all its "
        "outputs, but for a bias"
    )
    evidence = {"parameters": parameters_of(weights), "value": weights[0].mean}
    fix = f"draw {names_of(weights)} at random"
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, places_of(weights), what, evidence, rule.summary, fix)


def _finding_of_parts(context: RuleContext, rule: Rule, repeating: list[WeightRecord]) -> Finding:
    names = parameters_of(repeating)
    what = (
        f"{names_of(repeating)}: a matrix of the stack, or a block of the matrix, is "
        "bit-identical to another one"
    )
    evidence = {"parameters": names, "same_as": names}
    fix = (
        f"draw {names_of(repeating)} again, each matrix of the stack and each shard with numbers "
        "of its own"
    )
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, places_of(repeating), what, evidence, rule.summary, fix)


def _count_drawn_weights(
    contract: ContractRecord, stacks: Iterable[str], numbers: Iterable[int]
) -> int:
    """Return how many weights of some layers of some stacks were drawn."""
    # 1. How the names of those layers begin.
    layers = itertools.product(stacks, numbers)
    prefixes = tuple(f"{stack}.{number}." for stack, number in layers)

    # 2. The drawn weights with such a name.
    names = parameters_of(filter(_is_drawn, contract.weights))
    return sum(name.startswith(prefixes) for name in names)


def _finding(
    context: RuleContext, rule: Rule, contract: ContractRecord, stack: str, group: list[Copy]
) -> Finding:
    """Return the finding about the layers or experts of a stack that repeat one of them."""
    # 1. The layers that repeat, and how many drawn weights they have.
    weights = [copy.weight for copy in group]
    originals = [copy.original for copy in group]
    numbers = sorted({copy.number for copy in group})
    stacks = {copy.stack for copy in group}
    drawn = _count_drawn_weights(contract, stacks, numbers)

    # 2. The sentence.
    original = group[0].original_number
    what = (
        f"{stack or 'the model'}: {_first_numbers(numbers)} bit-identical to {original}, in "
        f"{len(group)} of their "
        f"{drawn} drawn weights"
    )

    # 3. The finding.
    evidence = {
        "parameters": parameters_of(weights),
        "same_as": parameters_of(originals),
        "copies": numbers,
        "original": original,
        "of": drawn,
    }
    fix = f"draw {names_of(weights)} again: build each layer by itself, not as a copy"
    level = context.level(rule, rule.level)
    return Finding(rule.code, level, places_of(weights), what, evidence, rule.summary, fix)


def _first_numbers(numbers: Sequence[int]) -> str:
    """Return the first numbers for a sentence."""
    shown = ", ".join(map(str, numbers[:_MOST_NUMBERS]))
    if len(numbers) > _MOST_NUMBERS:
        shown += " ..."
    return shown


RULE = Rule("JD210", "identical-layers", "warning", check=_check, states=("init",))
