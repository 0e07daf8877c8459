"""JD216: modulations of a diffusion transformer of which some start at zero and others do not."""

from __future__ import annotations

import re

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.odd_parameter import names_of
from jacdiag.rules.init.weight_facts import is_drawn, is_zero, parameters_of
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext

# What code calls the map from the condition to shifts, scales and gates: DiT and its descendants,
# PixArt, SD3, Flux.
_MODULATION = re.compile(
    r"(^|[._])(ada_?ln\w*|adaln\w*|ada_?norm\w*|\w*modulation)([._]|$)", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def drawn_beside_zero(
    contract: ContractRecord,
) -> list[tuple[list[WeightRecord], list[WeightRecord]]]:
    """Return groups of modulations that were drawn, each with its namesakes that are zero."""
    modulations = [weight for weight in contract.weights if _is_modulation_map(weight)]
    pairs = []
    for namesakes in group_by(modulations, _name_of_modulation).values():
        # Of one name, some places are zero in all layers, and others drawn.
        zero: list[WeightRecord] = []
        drawn: list[WeightRecord] = []
        for group in group_by(namesakes, _place_in_layer).values():
            if all(map(is_zero, group)):
                zero += group
            elif all(map(is_drawn, group)):
                drawn += group

        if zero and drawn:
            pairs.append((drawn, zero))

    return pairs


def _is_modulation_map(weight: WeightRecord) -> bool:
    """Return whether a weight is the matrix of a modulation."""
    return len(weight.shape) == 2 and _is_modulation(weight)


def _is_modulation(weight: WeightRecord) -> bool:
    return _MODULATION.search(weight.parameter) is not None


def _name_of_modulation(weight: WeightRecord) -> str:
    """Return the end of a name, from what the code calls the modulation."""
    match = _MODULATION.search(weight.parameter)
    assert match is not None
    return weight.parameter[match.start() :].lstrip("._")


def _place_in_layer(weight: WeightRecord) -> str:
    """Return a name with "*" for its numbers."""
    return _NUMBER.sub("*", weight.parameter)


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.contract_for(rule)
    if contract is None:
        return NOT_APPLICABLE

    # One finding for each name.
    findings = []
    for drawn, zero in drawn_beside_zero(contract):
        findings.append(_finding(context, rule, drawn, zero))
    count = sum(map(_is_modulation, contract.weights))
    return CheckOutcome(count, findings)


def _finding(
    context: RuleContext, rule: Rule, drawn: list[WeightRecord], zero: list[WeightRecord]
) -> Finding:
    """Return the finding about the modulations of one name that do not start at zero."""
    names = parameters_of(drawn)
    what = f"{names_of(drawn)} were drawn, and {zero[0].parameter} of the same name is zero"
    evidence = {"parameters": names, "zero": parameters_of(zero)}
    fix = f"set {names[0]} and the others to zero too, or ignore this rule if that is intended"
    level = context.level(rule, "warning")
    return Finding(rule.code, level, names, what, evidence, rule.summary, fix)


RULE = Rule("JD216", "modulation-at-zero", "warning", check=_check, states=("init",))
