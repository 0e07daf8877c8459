"""JD407 and JD408: a factor of zero on the shortcut, or one where DeepNorm has alpha."""

from __future__ import annotations

from jacdiag.records import Finding, SublayerRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names

_NEAR = 0.05  # relative; alpha of DeepNorm is at least 1.19, for one layer


def _zero(context: RuleContext, rule: Rule) -> CheckOutcome:
    contract = context.report.contract
    rows = [row for row in context.rows(rule) if row.shortcut_gain is not None]
    if contract is None or not rows:
        return NOT_APPLICABLE

    cut = contract.zero_shortcuts
    if not cut:
        return CheckOutcome(len(rows))

    # 1. The parameters that are zero on the way, and the shortcuts without one.
    names: list[str] = []
    is_any_unexplained = False
    for shortcut in cut:
        names.extend(shortcut.parameters)
        if not shortcut.parameters:
            is_any_unexplained = True

    parameters = list(dict.fromkeys(names))

    # 2. The sentence.
    where = [shortcut.sublayer for shortcut in cut]
    what = f"the shortcut is multiplied by zero at {list_names(where)}"
    fix = ""
    if parameters:
        what += f"; on its way: {list_names(parameters)}, zero in every element"
        fix = f"multiply the branch by {list_names(parameters)}, not the shortcut"
    if is_any_unexplained:
        elsewhere = "elsewhere " if parameters else ""
        what += f"; {elsewhere}no parameter on the way is zero"

    # 3. The finding.
    evidence = {"parameters": parameters, "count": len(cut)}
    level = context.level(rule, "warning")
    return CheckOutcome(
        len(rows), [Finding(rule.code, level, where, what, evidence, rule.summary, fix)]
    )


def _alpha(context: RuleContext, rule: Rule) -> CheckOutcome:
    judgement = context.judgement
    rows = [row for row in context.rows(rule) if row.shortcut_gain is not None]
    if judgement is None or not rows:
        return NOT_APPLICABLE

    scheme = judgement.result.scheme
    if scheme is None or scheme.name != "deepnorm":
        return NOT_APPLICABLE

    alpha = (2 * max(context.report.model.layers, 1)) ** 0.25
    if any(_has_factor(row) for row in rows):
        return CheckOutcome(len(rows))

    where = [row.name for row in rows]
    what = (
        "the matrices are those of DeepNorm, and the factor on the shortcut is 1 at "
        f"{list_names(where)}, "
        f"where DeepNorm has (2N)^(1/4) = {plain(alpha)}"
    )
    fix = f"norm({plain(alpha)} * x + f(x)): the factor belongs on the shortcut and on nothing else"
    evidence = {"expected": alpha, "value": 1.0, "count": len(rows)}
    level = context.level(rule, "warning")
    return CheckOutcome(
        len(rows), [Finding(rule.code, level, where, what, evidence, rule.summary, fix)]
    )


def _has_factor(row: SublayerRecord) -> bool:
    return row.shortcut_gain is not None and abs(row.shortcut_gain - 1) > _NEAR


RULES = (
    Rule("JD407", "zero-shortcut", "warning", check=_zero),
    Rule(
        "JD408",
        "deepnorm-shortcut",
        "warning",
        check=_alpha,
        states=("init",),
        placements=("post",),
    ),
)
