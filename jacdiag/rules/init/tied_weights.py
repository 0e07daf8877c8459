"""JD214: head and embedding are not tied as the model says."""

from __future__ import annotations

from jacdiag.records import Finding
from jacdiag.records.structure import TieRecord
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.contract_for(rule)
    if contract is None or contract.tie is None:
        return NOT_APPLICABLE

    # 1. The model does as it says.
    tie = contract.tie
    if tie.said == tie.shared:
        return CheckOutcome(1)

    # 2. It does the reverse.
    names = list(dict.fromkeys((tie.head, tie.embedding)))
    evidence = {"parameters": names, "said": tie.said, "shared": tie.shared, "equal": tie.equal}
    what, fix = _words(tie)
    level = context.level(rule, "warning")
    return CheckOutcome(1, [Finding(rule.code, level, names, what, evidence, rule.summary, fix)])


def _words(tie: TieRecord) -> tuple[str, str]:
    """Return what is said of a tie, and what to do."""
    # 1. One tensor where two are meant.
    if tie.shared:
        what = f"{tie.by} is false, but the head reads {tie.embedding}"
        return what, f"set {tie.by} to true, or give the head a tensor of its own"

    # 2. Two tensors where one is meant. Their values may agree until the first step.
    values = "different values"
    if tie.equal:
        values = "the same values at this moment"
    what = f"{tie.by} is true, but {tie.head} and {tie.embedding} are two tensors with {values}"
    fix = (
        f"tie them after the last move or init ({tie.head} = {tie.embedding}), or set {tie.by} to "
        "false"
    )
    return what, fix


RULE = Rule("JD214", "tie-as-said", "warning", check=_check, states=("init",))
