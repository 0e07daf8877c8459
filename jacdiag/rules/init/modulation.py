"""JD216: modulations of a diffusion transformer of which some start at zero and others do not."""

from __future__ import annotations

import re

from jacdiag.records import ContractRecord, Finding, WeightRecord
from jacdiag.rules.init.layer_groups import DRAWN
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
    # 1. Modulations by the end of their names, then by their place in the layer.
    kinds: dict[str, dict[str, list[WeightRecord]]] = {}
    for weight in contract.weights:
        match = _MODULATION.search(weight.parameter)
        if match is None or len(weight.shape) != 2:
            continue
        tail = weight.parameter[match.start() :].lstrip("._")
        place = _NUMBER.sub("*", weight.parameter)
        kinds.setdefault(tail, {}).setdefault(place, []).append(weight)

    # 2. Kinds of which some places are zero in all layers, and others drawn.
    pairs = []
    for places in kinds.values():
        zero: list[WeightRecord] = []
        drawn: list[WeightRecord] = []
        for group in places.values():
            if all(weight.family == "zero" for weight in group):
                zero += group
            elif all(weight.family in DRAWN for weight in group):
                drawn += group
        if zero and drawn:
            pairs.append((drawn, zero))
    return pairs


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states:
        return NOT_APPLICABLE
    count = sum(bool(_MODULATION.search(weight.parameter)) for weight in contract.weights)
    findings = []
    for drawn, zero in drawn_beside_zero(contract):
        names = [weight.parameter for weight in drawn]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = (
            f"{', '.join(names[:3])}{more} were drawn, and {zero[0].parameter} of the same "
            "name is zero"
        )
        evidence = {"parameters": names, "zero": [weight.parameter for weight in zero]}
        fix = f"set {names[0]} and the others to zero too, or leave this rule out if it is meant"
        findings.append(
            Finding(
                rule.code, context.level(rule, "warning"), names, what, evidence, rule.summary, fix
            )
        )
    return CheckOutcome(count, findings)


RULE = Rule("JD216", "modulation-at-zero", "warning", check=_check, states=("init",))
