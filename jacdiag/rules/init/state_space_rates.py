"""JD213: time steps and decay rates of state-space layers that no published init has."""

from __future__ import annotations

from collections.abc import Sequence

from jacdiag.records import Finding, Level
from jacdiag.records.structure import RateRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names

# Model types whose own code in transformers 5 writes constant biases: ones, and zeros for jamba.
# Found by building each
# family. What their authors trained with is not known from that, so it is an observation there.
PUBLISHED_CONSTANT = ("bamba", "falcon_h1", "granitemoehybrid", "jamba")


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.report.contract
    if contract is None or context.report.state not in rule.states:
        return NOT_APPLICABLE
    if not contract.rates:
        return NOT_APPLICABLE

    # 1. Sort the rates: time steps of which none is usual, and logarithms that are not finite.
    unusual: list[RateRecord] = []
    broken: list[RateRecord] = []
    for rate in contract.rates:
        if rate.meaning == "time step" and rate.usual == 0:
            unusual.append(rate)
        if rate.not_finite:
            broken.append(rate)

    # 2. One finding for each kind.
    findings = []
    if unusual:
        findings.append(_steps_finding(context, rule, unusual, contract.family))
    if broken:
        findings.append(_broken_finding(context, rule, broken))
    return CheckOutcome(len(contract.rates), findings)


def _steps_finding(
    context: RuleContext, rule: Rule, rates: Sequence[RateRecord], family: str
) -> Finding:
    known = family in PUBLISHED_CONSTANT
    level: Level = "info" if known else "warning"
    least = min(rate.least for rate in rates if rate.least is not None)
    most = max(rate.most for rate in rates if rate.most is not None)
    span = plain(least) if least == most else f"{plain(least)} to {plain(most)}"
    names = [rate.parameter for rate in rates]
    what = (
        f"{list_names(names, longest=None)}: time steps of {span} at a zero input, where Mamba's "
        "code draws 0.001 to 0.1"
    )
    if known:
        what += f"; the code of {family} in transformers writes them so"
    evidence = {"parameters": names, "least": least, "most": most}
    fix = (
        "draw the steps log-uniform in [0.001, 0.1], and set the bias to their inverse "
        "softplus, after other inits"
    )
    return Finding(
        rule.code,
        context.level(rule, level),
        names,
        what,
        evidence,
        rule.summary,
        "" if known else fix,
    )


def _broken_finding(context: RuleContext, rule: Rule, rates: Sequence[RateRecord]) -> Finding:
    count = sum(rate.not_finite for rate in rates)
    names = [rate.parameter for rate in rates]
    listed = list_names(names, longest=None)
    what = f"{listed}: NaN or Inf in {count} elements of a logarithm or a bias"
    evidence = {"parameters": names, "not_finite": [rate.not_finite for rate in rates]}
    fix = "draw the rates in float32, and bound them away from zero before the logarithm"
    return Finding(
        rule.code, context.level(rule, "warning"), names, what, evidence, rule.summary, fix
    )


RULE = Rule("JD213", "state-space-rates", "warning", check=_check, states=("init",))
