"""JD210: layers or experts whose weights are bit for bit those of another one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jacdiag.report import ContractRecord, Finding, WeightRecord
from jacdiag.rules.layer_groups import DRAWN
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.schemes import MATRICES
from jacdiag.rules.texts import Text

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# Tables that are computed, such as the decay rates of a state space model, are alike in all layers on purpose and may
# look like a draw. These roles are never computed.
_ROLES = (*MATRICES, "router")

TEXT = Text(
    summary="layers or experts start with bit-identical weights: one was copied from the other",
    what="""\
Matrices of sub-layers that were drawn at random are compared number by number with those whose name differs in numbers
only. A layer whose weights are those of another is named, with how many of its matrices are. A stack of matrices that
holds one twice, and a matrix of two, three, four or eight equal blocks (shards drawn from one seed), are named too.
Weights that are constant, tables that are computed, and layers that share one parameter (ALBERT) are no copies.""",
    why="""\
copy.deepcopy of one layer, or a seed that is set before each, draws once for all layers. Layers of one content start as
one function, and experts of one content get one gradient each time that they are chosen together. PyTorch's own
nn.TransformerEncoder copies its layer so, and its documentation asks for a new draw.""",
    example="""\
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(n))                         # fires
    layers = nn.ModuleList(Layer(config) for _ in range(n))                                # clean""",
    remedy="""\
Build each layer anew, or initialise the whole model once more after it was built.""",
)


@dataclass(frozen=True)
class Copy:
    """A weight, the one that it repeats, and where their names differ."""

    weight: WeightRecord
    original: WeightRecord
    stack: str
    number: int
    original_number: int


def copies(contract: ContractRecord) -> tuple[int, list[Copy]]:
    """Return how many weights were drawn and may be compared, and those that are copies of another layer's.

    Args:
        contract: of a model at its init.
    """
    by_name = {weight.parameter: weight for weight in contract.weights}
    drawn = [weight for weight in contract.weights if _is_drawn(weight)]
    found = []
    for weight in drawn:
        original = by_name.get(weight.same_as)
        copy = _compare_names(weight, original) if original is not None else None
        if copy is not None:
            found.append(copy)
    return len(drawn), found


def _is_drawn(weight: WeightRecord) -> bool:
    return weight.role in _ROLES and len(weight.shape) >= 2 and weight.family in DRAWN


def _compare_names(weight: WeightRecord, original: WeightRecord) -> Copy | None:
    """Return the copy if two names differ in numbers only; `stack` is the name before the first that differs."""
    if _NUMBER.sub("*", weight.parameter) != _NUMBER.sub("*", original.parameter):
        return None
    pairs = zip(_NUMBER.finditer(weight.parameter), _NUMBER.finditer(original.parameter), strict=True)
    for own, other in pairs:
        if own[0] != other[0]:
            stack = weight.parameter[: own.start()].removesuffix(".")
            return Copy(weight, original, stack, int(own[0]), int(other[0]))
    return None


def _check(context: Context, rule: Rule) -> Outcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states:
        return NOT_APPLICABLE
    count, found = copies(contract)
    repeating = [weight for weight in contract.weights if _is_drawn(weight) and weight.same_as == weight.parameter]
    stacks: dict[tuple[str, int], list[Copy]] = {}
    for copy in found:
        stacks.setdefault((_NUMBER.sub("*", copy.stack), copy.original_number), []).append(copy)
    findings = [_finding(context, rule, contract, stack, group) for (stack, _), group in stacks.items()]
    if repeating:
        findings.append(_finding_of_parts(context, rule, repeating))
    return Outcome(count, findings)


def _finding_of_parts(context: Context, rule: Rule, repeating: list[WeightRecord]) -> Finding:
    names = [weight.parameter for weight in repeating]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    what = f"{', '.join(names[:3])}{more}: one matrix of the stack, or block of the matrix, is bit-identical to another"
    where = list(dict.fromkeys(weight.sublayer or weight.parameter for weight in repeating))
    evidence = {"parameters": names, "same_as": names}
    fix = "draw each matrix of a stack, and each shard of a matrix, with numbers of its own"
    return Finding(rule.code, context.level(rule, rule.level), where, what, evidence, rule.summary, fix)


def _finding(context: Context, rule: Rule, contract: ContractRecord, stack: str, group: list[Copy]) -> Finding:
    numbers = sorted({copy.number for copy in group})
    prefixes = tuple(f"{prefix}.{number}." for prefix in {copy.stack for copy in group} for number in numbers)
    drawn = [w for w in contract.weights if _is_drawn(w) and w.parameter.startswith(prefixes)]
    shown = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
    what = (
        f"{stack or 'the model'}: {shown} bit-identical to {group[0].original_number}, in {len(group)} of their "
        f"{len(drawn)} drawn weights"
    )
    evidence = {
        "parameters": [copy.weight.parameter for copy in group],
        "same_as": [copy.original.parameter for copy in group],
        "copies": numbers,
        "original": group[0].original_number,
        "of": len(drawn),
    }
    where = list(dict.fromkeys(copy.weight.sublayer or copy.weight.parameter for copy in group))
    fix = "build each layer anew, or initialise the whole model once more"
    return Finding(rule.code, context.level(rule, rule.level), where, what, evidence, rule.summary, fix)


RULE = Rule("JD210", "identical-layers", "warning", **TEXT, check=_check, states=("init",))
