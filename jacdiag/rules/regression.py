"""JD110: a figure is worse than in the baseline, or in the earlier model, beyond both intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jacdiag.records import LEVELS, AgainstRecord, ChangeRecord, FiguresRecord, Finding, Level
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.thresholds import Limits

FIGURES = {"branch_norm": "branch ‖J‖", "core_norm": "core ‖J‖", "norm_gain": "1/σ gain"}


@dataclass(frozen=True)
class Change:
    """One figure, before and now."""

    where: str
    figure: str
    old: float
    new: float
    bound: float

    @property
    def words(self) -> str:
        return (
            f"{self.where}: {FIGURES.get(self.figure, self.figure)} {plain(self.old)} -> "
            f"{plain(self.new)}"
        )


def sublayer_changes(now: FiguresRecord, before: FiguresRecord) -> list[Change]:
    """Sub-layers whose figure lies, for every seed, above what another seed of the baseline would
    reach.
    """
    found = []
    for name, figures in now.sublayers.items():
        for figure in FIGURES:
            new, old = figures.get(figure), before.sublayers.get(name, {}).get(figure)
            if new is not None and old is not None and new[0] > old[2]:
                found.append(Change(name, figure, old[1], new[1], old[2]))
    return found


def weight_changes(now: FiguresRecord, before: FiguresRecord) -> list[Change]:
    """Weights whose sampling intervals have no std in common, constants that have another value."""
    found = []
    for name, new in now.weights.items():
        old = before.weights.get(name)
        if old is None or None in (new.get("std"), old.get("std")):
            continue
        if _constant(new) or _constant(old):
            if new["family"] != old["family"] or new.get("value") != old.get("value"):
                found.append(
                    Change(
                        name,
                        "value" if _constant(new) and _constant(old) else "std",
                        _shown(old),
                        _shown(new),
                        _shown(old),
                    )
                )
        elif new["lower"] > old["upper"] or new["upper"] < old["lower"]:
            found.append(Change(name, "std", old["std"], new["std"], old["upper"]))
    return found


def _constant(entry: Mapping[str, Any]) -> bool:
    return entry["family"] in ("zero", "constant")


def _shown(entry: Mapping[str, Any]) -> float:
    return float(entry["value"] or 0.0) if _constant(entry) else float(entry["std"])


def _check(context: Context, rule: Rule) -> Outcome:
    now, before, against = context.report.figures, context.report.baseline, context.report.against
    if now is None or before is None:
        return _nothing_to_compare_with(context)
    if against is not None and against.training:
        return _growth_in_training(context, rule, against)
    count = len(now.sublayers.keys() & before.sublayers.keys()) + len(
        now.weights.keys() & before.weights.keys()
    )
    findings = []
    # the cause before its effects
    for role, group in _by_role(now, weight_changes(now, before)).items():
        findings.append(_finding(context, rule, group, f"weights ({role})" if role else "weights"))
    worse = sublayer_changes(now, before)
    for figure in FIGURES:
        group = [c for c in worse if c.figure == figure]
        if group:
            findings.append(_finding(context, rule, group, "sub-layers"))
    gone = [
        n
        for n in (*before.sublayers, *before.weights)
        if n not in now.sublayers and n not in now.weights
    ]
    added = [
        n
        for n in (*now.sublayers, *now.weights)
        if n not in before.sublayers and n not in before.weights
    ]
    note = ""
    if (gone and now.sublayers) or added:
        note = f"{len(added)} names are not in the baseline, {len(gone)} of it are gone"
    return Outcome(count, findings, note=note)


def _nothing_to_compare_with(context: Context) -> Outcome:
    if context.report.state != "trained":
        return NOT_APPLICABLE
    return Outcome(0, note="a trained model, and nothing to compare it with (--against EARLIER)")


# -- two checkpoints, of which at least one is trained ---------------------------------------------
def _growth_in_training(context: Context, rule: Rule, against: AgainstRecord) -> Outcome:
    """Judge the growth of branch norms beyond both intervals; training lets them grow, up to what
    healthy runs show.
    """
    figure = "growth_from_init" if against.state == "init" else "checkpoint_growth"
    limits = {
        row.name: context.thresholds.limits(figure, row.placement or "")
        for row in context.report.sublayers
        if row.name in against.branch_norms
    }

    # 1. Sort what grew by how loud it is.
    groups: dict[Level, list[ChangeRecord]] = {}
    for change in against.changes:
        if change.figure == "branch_norm" and change.grew and change.where in limits:
            groups.setdefault(_level_of_growth(change, limits[change.where]), []).append(change)

    # 2. One finding per level.
    findings = []
    for level in LEVELS[::-1]:
        group = groups.get(level)
        if group:
            worst = max(group, key=lambda change: change.amplification)
            findings.append(
                _growth_finding(context, rule, group, worst, level, limits[worst.where])
            )

    # 3. Where healthy growth is not known, a comparison shows what changed and cannot pass.
    judged = [name for name, limit in limits.items() if limit.info is not None]
    unjudged = {
        row.placement
        for row in context.report.sublayers
        if row.name in limits and row.name not in judged
    }
    names = sorted(
        "no norm" if placement in ("none", None) else f"{placement}-norm" for placement in unjudged
    )
    note = (
        f"how much healthy training grows is not known for {' and '.join(names)}" if names else ""
    )
    return Outcome(len(judged), findings, list(against.missing), note)


def _level_of_growth(change: ChangeRecord, limits: Limits) -> Level:
    """Beyond `warning` an error, as every regression; between what healthy and wrecked runs show a
    warning.
    """
    if limits.warning is not None and change.amplification > limits.warning:
        return "error"
    if limits.info is not None and change.amplification > limits.info:
        return "warning"
    return "info"


def _growth_finding(
    context: Context,
    rule: Rule,
    group: list[ChangeRecord],
    worst: ChangeRecord,
    level: Level,
    limits: Limits,
) -> Finding:
    against = context.report.against
    assert against is not None
    limit = limits.warning if level == "error" else limits.info
    text = f"{worst.where}: branch ‖J‖ {plain(worst.earlier[1])} -> {plain(worst.now[1])}"
    text += f"; 1 + ‖J‖ is at least {plain(worst.amplification)} times that of {against.source}"
    if limit is not None:
        text += f" ({'warning' if level == 'info' else level} above {plain(limit)})"
    if len(group) > 1:
        text += f"; {len(group)} of {against.compared} branches grew so"
    changes = [
        {"where": c.where, "field": c.figure, "old": c.earlier[1], "new": c.now[1]} for c in group
    ]
    evidence = {
        "field": "branch_norm",
        "sublayer": worst.where,
        "value": worst.now[1],
        "lower": worst.now[0],
        "earlier": worst.earlier[1],
        "growth": worst.amplification,
        "threshold": limit,
        "changes": changes,
    }
    fix = (
        ""
        if level == "info"
        else "go back to the earlier checkpoint; `jacdiag diff A B --all` lists every figure"
    )
    where = [change.where for change in group]
    return Finding(rule.code, context.level(rule, level), where, text, evidence, rule.summary, fix)


# -- a baseline, or an earlier model at init -------------------------------------------------------
def _by_role(now: FiguresRecord, changes: Iterable[Change]) -> dict[str, list[Change]]:
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(str(now.weights[change.where].get("role", "")), []).append(change)
    return groups


def _finding(context: Context, rule: Rule, group: list[Change], what: str) -> Finding:
    worst = max(group, key=lambda c: c.new / c.old if c.old > 0 else c.new)
    against = context.report.against
    reference = "baseline" if against is None else against.source
    text = f"{worst.words} ({reference} up to {plain(worst.bound)})"
    if len(group) > 1:
        text += f"; {len(group)} {what} in all"
    evidence = {
        "field": worst.figure,
        "value": worst.new,
        "baseline": worst.old,
        "threshold": worst.bound,
        "parameters": [c.where for c in group if c.figure not in FIGURES],
        "changes": [
            {"where": c.where, "field": c.figure, "old": c.old, "new": c.new} for c in group
        ],
    }
    fix = "undo the change, or accept it: the same command with --write-baseline"
    if against is not None:
        fix = "undo the change; `jacdiag diff A B --all` lists every figure"
    return Finding(
        rule.code,
        context.level(rule, "error"),
        [c.where for c in group],
        text,
        evidence,
        rule.summary,
        fix,
    )


REGRESSION = Rule("JD110", "regression", "error", check=_check)
RULES = (REGRESSION,)
