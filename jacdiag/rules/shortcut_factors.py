"""JD407, JD408, JD410: a shortcut times zero, without the alpha of DeepNorm, or missing."""

from __future__ import annotations

from collections.abc import Iterable

from jacdiag.records import Finding, SublayerRecord
from jacdiag.records.structure import ZeroShortcut
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.wording import list_names

_NEAR = 0.05  # relative; alpha of DeepNorm is at least 1.19, for one layer


def _zero(context: RuleContext, rule: Rule) -> CheckOutcome:
    rows = _rows_with_gain(context, rule)
    contract = context.report.contract
    if contract is None or not rows:
        return NOT_APPLICABLE
    if not contract.zero_shortcuts:
        return CheckOutcome(len(rows))

    # 1. The sentence, and what to do about the parameters on the way.
    cut = contract.zero_shortcuts
    where = [shortcut.sublayer for shortcut in cut]
    parameters = _zero_parameters(cut)
    what = f"the shortcut is multiplied by zero at {list_names(where)}"
    fix = ""
    if parameters:
        what += f"; on its way: {list_names(parameters)}, zero in every element"
        fix = f"multiply the branch by {list_names(parameters)}, not the shortcut"

    # 2. The shortcuts without such a parameter.
    is_any_unexplained = any(not shortcut.parameters for shortcut in cut)
    if is_any_unexplained:
        elsewhere = "elsewhere " if parameters else ""
        what += f"; {elsewhere}no parameter on the way is zero"

    # 3. The finding.
    evidence = {"parameters": parameters, "count": len(cut)}
    level = context.level(rule, "warning")
    finding = Finding(rule.code, level, where, what, evidence, rule.summary, fix)
    return CheckOutcome(len(rows), [finding])


def _rows_with_gain(context: RuleContext, rule: Rule) -> list[SublayerRecord]:
    """Return the sub-layers whose factor on the shortcut is known."""
    return [row for row in context.rows(rule) if row.shortcut_gain is not None]


def _zero_parameters(shortcuts: Iterable[ZeroShortcut]) -> list[str]:
    """Return the parameters on the shortcuts that are zero, each once."""
    names: dict[str, None] = {}
    for shortcut in shortcuts:
        names |= dict.fromkeys(shortcut.parameters)
    return list(names)


def _alpha(context: RuleContext, rule: Rule) -> CheckOutcome:
    rows = _rows_with_gain(context, rule)
    if not rows or not _is_drawn_as_deepnorm(context):
        return NOT_APPLICABLE

    # 1. One factor shows that the code has it.
    if any(map(_has_factor, rows)):
        return CheckOutcome(len(rows))

    # 2. The sentence.
    where = [row.name for row in rows]
    alpha = (2 * max(context.report.model.layers, 1)) ** 0.25
    what = (
        "the matrices are those of DeepNorm, and the factor on the shortcut is 1 at "
        f"{list_names(where)}, "
        f"where DeepNorm has (2N)^(1/4) = {plain(alpha)}"
    )

    # 3. The finding.
    fix = f"norm({plain(alpha)} * x + f(x)): the factor belongs on the shortcut and on nothing else"
    evidence = {"expected": alpha, "value": 1.0, "count": len(rows)}
    level = context.level(rule, "warning")
    finding = Finding(rule.code, level, where, what, evidence, rule.summary, fix)
    return CheckOutcome(len(rows), [finding])


def _is_drawn_as_deepnorm(context: RuleContext) -> bool:
    """Return whether the matrices follow the scheme of DeepNorm."""
    if context.judgement is None:
        return False

    # A model may follow no scheme.
    scheme = context.judgement.result.scheme
    return scheme is not None and scheme.name == "deepnorm"


def _has_factor(row: SublayerRecord) -> bool:
    return row.shortcut_gain is not None and abs(row.shortcut_gain - 1) > _NEAR


def _missing(context: RuleContext, rule: Rule) -> CheckOutcome:
    report = context.report
    missing = report.model.missing_shortcuts
    matched = len(report.sublayers) + len(missing)
    if not missing:
        return CheckOutcome(matched)

    # 1. The sentence: one layer that has it stands for all.
    parts = [shortcut.part for shortcut in missing]
    likes = list(dict.fromkeys(shortcut.like for shortcut in missing))
    what = f"no shortcut leads around {list_names(parts)}, as one does around {list_names(likes)}"
    fix = f"add the stream to the result of {list_names(parts)}, as is done at {list_names(likes)}"

    # 2. The finding.
    parameters = [name for shortcut in missing for name in shortcut.parameters]
    evidence = {"parts": parts, "like": likes, "parameters": parameters}
    level = context.level(rule, "warning")
    finding = Finding(rule.code, level, parts, what, evidence, rule.summary, fix)
    return CheckOutcome(matched, [finding])


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
    Rule("JD410", "missing-shortcut", "warning", check=_missing),
)
