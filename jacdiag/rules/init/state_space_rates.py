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
    contract = context.contract_for(rule)
    if contract is None or not contract.rates:
        return NOT_APPLICABLE

    # 1. Time steps of which none is usual, and logarithms that are not finite.
    unusual = list(filter(_has_no_usual_step, contract.rates))
    broken = [rate for rate in contract.rates if rate.not_finite]

    # 2. One finding for each kind.
    findings: list[Finding] = []
    if unusual:
        findings.append(_steps_finding(context, rule, unusual, contract.family))
    if broken:
        findings.append(_broken_finding(context, rule, broken))
    return CheckOutcome(len(contract.rates), findings)


def _has_no_usual_step(rate: RateRecord) -> bool:
    """Return whether no time step lies where published inits draw them."""
    return rate.meaning == "time step" and rate.usual == 0


def _steps_finding(
    context: RuleContext, rule: Rule, rates: Sequence[RateRecord], family: str
) -> Finding:
    """Return the finding about time steps of which none is usual."""
    # 1. The sentence.
    least = min(rate.least for rate in rates if rate.least is not None)
    most = max(rate.most for rate in rates if rate.most is not None)
    names = [rate.parameter for rate in rates]
    what = (
        f"{list_names(names, longest=None)}: time steps of {_span(least, most)} at a zero input, "
        "where Mamba's code draws 0.001 to 0.1"
    )

    # 2. What to do. In some families the published code writes such steps.
    level: Level = "warning"
    fix = (
        "draw the steps log-uniform in [0.001, 0.1], and set the bias to their inverse "
        "softplus, after other inits"
    )

    # Steps that the authors' own code writes are no mistake of the user.
    if family in PUBLISHED_CONSTANT:
        what += f"; the code of {family} in transformers writes these values"
        level = "info"
        fix = ""

    # 3. The finding.
    evidence = {"parameters": names, "least": least, "most": most}
    level = context.level(rule, level)
    return Finding(rule.code, level, names, what, evidence, rule.summary, fix)


def _span(least: float, most: float) -> str:
    """Return a range in words; one number if it has no width."""
    if least == most:
        return plain(least)

    return f"{plain(least)} to {plain(most)}"


def _broken_finding(context: RuleContext, rule: Rule, rates: Sequence[RateRecord]) -> Finding:
    """Return the finding about logarithms and biases with NaN or Inf."""
    # 1. The sentence.
    names = [rate.parameter for rate in rates]
    counts = [rate.not_finite for rate in rates]
    listed = list_names(names, longest=None)
    what = f"{listed}: NaN or Inf in {sum(counts)} elements of a logarithm or a bias"

    # 2. The finding.
    evidence = {"parameters": names, "not_finite": counts}
    fix = "draw the rates in float32, and bound them away from zero before the logarithm"
    level = context.level(rule, "warning")
    return Finding(rule.code, level, names, what, evidence, rule.summary, fix)


RULE = Rule("JD213", "state-space-rates", "warning", check=_check, states=("init",))
