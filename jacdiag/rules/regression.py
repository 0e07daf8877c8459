"""JD110: a figure is worse than in the baseline or the earlier model, beyond both intervals."""

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
    """Return the sub-layers with a figure above what another seed of the baseline would reach.

    The figure must lie above it for every seed.
    """
    changes = []
    for name, figures in now.sublayers.items():
        earlier = before.sublayers.get(name, {})
        for figure in FIGURES:
            new, old = figures.get(figure), earlier.get(figure)
            if new is None or old is None:
                continue
            _, old_middle, old_upper = old
            if new[0] > old_upper:
                changes.append(Change(name, figure, old_middle, new[1], old_upper))
    return changes


def weight_changes(now: FiguresRecord, before: FiguresRecord) -> list[Change]:
    """Return the weights that changed.

    Their sampling intervals have no std in common, or they are constants of another value.
    """
    changes = []
    for name, new in now.weights.items():
        old = before.weights.get(name)
        if old is None or None in (new.get("std"), old.get("std")):
            continue
        change = _weight_change(name, new, old)
        if change is not None:
            changes.append(change)
    return changes


def _weight_change(name: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> Change | None:
    """Return the change of one weight; None if it did not change."""
    if not _constant(new) and not _constant(old):
        is_disjoint = new["lower"] > old["upper"] or new["upper"] < old["lower"]
        if not is_disjoint:
            return None
        return Change(name, "std", old["std"], new["std"], old["upper"])
    is_same = new["family"] == old["family"] and new.get("value") == old.get("value")
    if is_same:
        return None
    figure = "value" if _constant(new) and _constant(old) else "std"
    return Change(name, figure, _shown(old), _shown(new), _shown(old))


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

    # 1. Weights first: the cause before its effects.
    findings = []
    for role, group in _by_role(now, weight_changes(now, before)).items():
        findings.append(_finding(context, rule, group, f"weights ({role})" if role else "weights"))

    # 2. Sub-layers.
    worse = sublayer_changes(now, before)
    for figure in FIGURES:
        group = [change for change in worse if change.figure == figure]
        if group:
            findings.append(_finding(context, rule, group, "sub-layers"))

    # 3. What could not be compared.
    names_now = {*now.sublayers, *now.weights}
    names_before = {*before.sublayers, *before.weights}
    gone = [name for name in (*before.sublayers, *before.weights) if name not in names_now]
    added = [name for name in (*now.sublayers, *now.weights) if name not in names_before]
    note = ""
    if (gone and now.sublayers) or added:
        note = f"{len(added)} names are not in the baseline, {len(gone)} of it are gone"
    count = len(now.sublayers.keys() & before.sublayers.keys())
    count += len(now.weights.keys() & before.weights.keys())
    return Outcome(count, findings, note=note)


def _nothing_to_compare_with(context: Context) -> Outcome:
    if context.report.state != "trained":
        return NOT_APPLICABLE
    return Outcome(0, note="a trained model, and nothing to compare it with (--against EARLIER)")


# -- two checkpoints, of which at least one is trained ---------------------------------------------
def _growth_in_training(context: Context, rule: Rule, against: AgainstRecord) -> Outcome:
    """Judge the growth of branch norms beyond both intervals.

    Training lets them grow, up to what healthy runs show.
    """
    figure = "growth_from_init" if against.state == "init" else "checkpoint_growth"
    rows = [row for row in context.report.sublayers if row.name in against.branch_norms]
    limits = {row.name: context.thresholds.limits(figure, row.placement or "") for row in rows}

    # 1. Sort what grew by its level.
    groups: dict[Level, list[ChangeRecord]] = {}
    for change in against.changes:
        is_growth = change.figure == "branch_norm" and change.grew
        if is_growth and change.where in limits:
            level = _level_of_growth(change, limits[change.where])
            groups.setdefault(level, []).append(change)

    # 2. One finding per level, the highest first.
    findings = []
    for level in reversed(LEVELS):
        if level in groups:
            group = groups[level]
            worst = max(group, key=lambda change: change.amplification)
            limit = limits[worst.where]
            findings.append(_growth_finding(context, rule, group, worst, level, limit))

    # 3. Where healthy growth is not known, a comparison shows what changed and cannot pass.
    judged = {name for name, limit in limits.items() if limit.info is not None}
    unjudged = {_norm_words(row.placement) for row in rows if row.name not in judged}
    note = ""
    if unjudged:
        names = " and ".join(sorted(unjudged))
        note = f"how much healthy training grows is not known for {names}"
    return Outcome(len(judged), findings, list(against.missing), note)


def _norm_words(placement: str | None) -> str:
    return "no norm" if placement in ("none", None) else f"{placement}-norm"


def _level_of_growth(change: ChangeRecord, limits: Limits) -> Level:
    """Return "error" beyond `warning`, as for every regression.

    Between what healthy and wrecked runs show the level is "warning".
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
    """Return the finding about the branches that grew to one level."""
    against = context.report.against
    assert against is not None
    # 1. The sentence.
    limit = limits.warning if level == "error" else limits.info
    what = f"{worst.where}: branch ‖J‖ {plain(worst.earlier[1])} -> {plain(worst.now[1])}"
    what += f"; 1 + ‖J‖ is at least {plain(worst.amplification)} times that of {against.source}"
    if limit is not None:
        what += f" ({'warning' if level == 'info' else level} above {plain(limit)})"
    if len(group) > 1:
        what += f"; {len(group)} of {against.compared} branches grew so"

    # 2. The evidence.
    evidence = {
        "field": "branch_norm",
        "sublayer": worst.where,
        "value": worst.now[1],
        "lower": worst.now[0],
        "earlier": worst.earlier[1],
        "growth": worst.amplification,
        "threshold": limit,
        "changes": [
            {
                "where": change.where,
                "field": change.figure,
                "old": change.earlier[1],
                "new": change.now[1],
            }
            for change in group
        ],
    }
    fix = "go back to the earlier checkpoint; `jacdiag diff A B --all` lists every figure"
    if level == "info":
        fix = ""
    where = [change.where for change in group]
    return Finding(rule.code, context.level(rule, level), where, what, evidence, rule.summary, fix)


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
