"""JD215: low-rank additions that change the model at once, or that can never change it."""

from __future__ import annotations

from collections.abc import Sequence

from jacdiag.records import Finding
from jacdiag.records.structure import AdapterRecord
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.contract_for(rule)
    if contract is None or not contract.adapters:
        return NOT_APPLICABLE

    # 1. Exactly one of the two factors should be zero.
    several_zero = [pair for pair in contract.adapters if len(pair.zero_factors) > 1]
    both_drawn = list(filter(_is_drawn_at_random, contract.adapters))

    # 2. One finding for each kind.
    findings: list[Finding] = []
    if several_zero:
        findings.append(_finding_of_zeros(context, rule, several_zero))
    if both_drawn:
        findings.append(_finding_of_draws(context, rule, both_drawn))
    return CheckOutcome(len(contract.adapters), findings)


def _is_drawn_at_random(pair: AdapterRecord) -> bool:
    """Return whether no factor of an adapter is zero, and nothing shows that this is meant."""
    # Factors that are a singular value decomposition of the weight are both drawn on purpose.
    if pair.decomposed:
        return False
    return not pair.zero_factors


def _finding_of_zeros(context: RuleContext, rule: Rule, pairs: Sequence[AdapterRecord]) -> Finding:
    """Return the finding about adapters that no step can change."""
    # 1. The factors that are zero, the first of each adapter apart.
    firsts: list[str] = []
    others: list[str] = []
    for pair in pairs:
        firsts.append(pair.zero_factors[0])
        others.extend(pair.zero_factors[1:])

    # 2. The finding.
    listed = list_names(firsts, longest=None)
    what = (
        f"{listed} and another factor of each are zero in every element: no "
        "gradient can reach either"
    )
    evidence = {"parameters": [*firsts, *others], "count": len(pairs)}
    fix = f"draw {listed}, after all other inits"
    return _finding(context, rule, evidence, what, fix)


def _finding_of_draws(context: RuleContext, rule: Rule, pairs: Sequence[AdapterRecord]) -> Finding:
    """Return the finding about adapters that change the model before the first step."""
    firsts = [pair.first for pair in pairs]
    seconds = [pair.second for pair in pairs]
    state = "the adapted model is not its base at the start"
    listed = list_names(seconds, longest=None)
    what = f"{listed} and the other factor of each are not zero: {state}"
    evidence = {"parameters": seconds, "others": firsts, "count": len(pairs)}
    return _finding(context, rule, evidence, what, f"set {listed} to zero")


def _finding(
    context: RuleContext, rule: Rule, evidence: dict[str, object], what: str, fix: str
) -> Finding:
    names = evidence["parameters"]
    assert isinstance(names, list)
    return Finding(
        rule.code, context.level(rule, "warning"), names, what, evidence, rule.summary, fix
    )


RULE = Rule("JD215", "adapter-factors", "warning", check=_check, states=("init",))
