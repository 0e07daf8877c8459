"""JD110: a figure is worse than in the baseline or the earlier model, beyond both intervals."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.records import (
    LEVELS,
    AgainstRecord,
    ChangeRecord,
    FiguresRecord,
    Finding,
    Level,
    SublayerRecord,
)
from jacdiag.records.placement_words import placements_in_words
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.thresholds import Limits

FIGURES = {"branch_norm": "branch norm", "core_norm": "core norm", "norm_gain": "norm gain"}


@dataclass(frozen=True)
class MovedFigure:
    """One figure, before and now.

    Attributes:
        where: the sub-layer or the parameter.
        figure: its name.
        old: the value before.
        new: the value now.
        bound: what another seed of the old model would reach.
    """

    where: str
    figure: str
    old: float
    new: float
    bound: float

    @property
    def words(self) -> str:
        """The change in words, such as "h.0.mlp: core norm 0.5 -> 2.00"."""
        name = FIGURES.get(self.figure, self.figure)
        return f"{self.where}: {name} {plain(self.old)} -> {plain(self.new)}"


def sublayer_changes(now: FiguresRecord, before: FiguresRecord) -> list[MovedFigure]:
    """Return the sub-layers with a figure above what another seed of the baseline would reach.

    The figure must lie above it for every seed.

    Args:
        now: of the model that is audited.
        before: of the baseline or the earlier model.
    """
    changes: list[MovedFigure] = []
    for name, figures in now.sublayers.items():
        earlier = before.sublayers.get(name, {})
        for figure in FIGURES:
            # 1. A figure that one side lacks cannot be compared.
            new = figures.get(figure)
            old = earlier.get(figure)
            if new is None or old is None:
                continue

            # 2. The interval of now lies above that of before.
            _, old_middle, old_upper = old
            new_lower, new_middle, _ = new
            if new_lower > old_upper:
                changes.append(MovedFigure(name, figure, old_middle, new_middle, old_upper))

    return changes


def weight_changes(now: FiguresRecord, before: FiguresRecord) -> list[MovedFigure]:
    """Return the weights that changed.

    Their sampling intervals have no std in common, or they are constants of another value.
    """
    changes = []
    for name, new in now.weights.items():
        old = before.weights.get(name)
        if old is None:
            continue

        # A weight without a std was not measured.
        is_measured = new.get("std") is not None and old.get("std") is not None
        if is_measured:
            changes += _weight_change(name, new, old)

    return changes


def _weight_change(name: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> list[MovedFigure]:
    """Return the change of one weight alone; [] if it did not change."""
    # 1. A constant differs from a draw.
    if _constant(new) != _constant(old):
        return [MovedFigure(name, "std", _shown(old), _shown(new), _shown(old))]

    # 2. Two draws.
    if not _constant(new):
        return _change_of_draws(name, new, old)

    # 3. Two constants.
    if _is_same_constant(new, old):
        return []

    return [MovedFigure(name, "value", _shown(old), _shown(new), _shown(old))]


def _is_same_constant(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    is_same_family = new["family"] == old["family"]
    return is_same_family and new.get("value") == old.get("value")


def _change_of_draws(
    name: str, new: Mapping[str, Any], old: Mapping[str, Any]
) -> list[MovedFigure]:
    """Return the change between two draws; [] if some std lies in both intervals."""
    is_above = new["lower"] > old["upper"]
    is_below = new["upper"] < old["lower"]
    if not is_above and not is_below:
        return []
    return [MovedFigure(name, "std", old["std"], new["std"], old["upper"])]


def _constant(entry: Mapping[str, Any]) -> bool:
    return entry["family"] in ("zero", "constant")


def _shown(entry: Mapping[str, Any]) -> float:
    """Return the value of a constant, the std of a draw."""
    if not _constant(entry):
        return float(entry["std"])

    # A value that was not kept is zero.
    value = entry["value"] or 0.0
    return float(value)


def _check(context: RuleContext, rule: Rule) -> CheckOutcome:
    # 1. There may be nothing to compare with.
    current = context.report.figures
    before = context.report.baseline
    if current is None or before is None:
        return _nothing_to_compare_with(context)

    # 2. Two models, of which at least one is trained, are compared by their growth.
    against = context.report.against
    if against is not None and against.training:
        return _growth_in_training(context, rule, against)

    # 3. Weights first: the cause before its effects.
    findings = []
    for role, group in _by_role(current, weight_changes(current, before)).items():
        what = f"weights ({role})" if role else "weights"
        findings.append(_finding(context, rule, group, what))

    # 4. Sub-layers.
    worse = group_by(sublayer_changes(current, before), lambda change: change.figure)
    for figure in FIGURES:
        if figure in worse:
            findings.append(_finding(context, rule, worse[figure], "sub-layers"))

    # 5. How much was compared, and what could not be.
    same_sublayers = current.sublayers.keys() & before.sublayers.keys()
    same_weights = current.weights.keys() & before.weights.keys()
    count = len(same_sublayers) + len(same_weights)
    return CheckOutcome(count, findings, note=_names_of_one_alone(current, before))


def _names_of_one_alone(now: FiguresRecord, before: FiguresRecord) -> str:
    """Return how many names only one side has; "" if that says nothing."""
    # 1. A name of a sub-layer may be that of a weight of the other side.
    names_now = {*now.sublayers, *now.weights}
    names_before = {*before.sublayers, *before.weights}
    gone = _count_missing([*before.sublayers, *before.weights], names_now)
    added = _count_missing([*now.sublayers, *now.weights], names_before)

    # 2. An audit of weights alone has no sub-layers: that those are gone says nothing.
    is_loss = gone > 0 and bool(now.sublayers)
    if not added and not is_loss:
        return ""
    return f"{added} names are not in the baseline, {gone} of it are gone"


def _count_missing(names: Iterable[str], others: Container[str]) -> int:
    """Return how many names are not among others."""
    return sum(name not in others for name in names)


def _nothing_to_compare_with(context: RuleContext) -> CheckOutcome:
    # A fresh model is judged by the other rules, a trained one by comparison alone.
    if context.report.state != "trained":
        return NOT_APPLICABLE
    return CheckOutcome(
        0, note="a trained model, and nothing to compare it with (--against EARLIER)"
    )


# -- two checkpoints, of which at least one is trained ---------------------------------------------
def _growth_in_training(context: RuleContext, rule: Rule, against: AgainstRecord) -> CheckOutcome:
    """Judge the growth of branch norms beyond both intervals.

    Training lets them grow, up to what healthy runs show.
    """
    # 1. The sub-layers that were compared, with what healthy runs show.
    rows = [row for row in context.report.sublayers if row.name in against.branch_norms]
    limits = {row.name: _limits_of_growth(context, against, row) for row in rows}

    # 2. One finding per level, the highest first.
    groups = _growth_by_level(against, limits)
    findings: list[Finding] = []
    for level in reversed(LEVELS):
        if level in groups:
            findings.append(_growth_finding(context, rule, groups[level], level, limits))

    # 3. Where healthy growth is not known, a comparison shows what changed and cannot pass.
    unjudged = [row for row in rows if limits[row.name].info is None]
    judged_count = len(limits) - len({row.name for row in unjudged})
    note = _growth_unknown_for(unjudged)
    return CheckOutcome(judged_count, findings, list(against.missing), note)


def _limits_of_growth(context: RuleContext, against: AgainstRecord, row: SublayerRecord) -> Limits:
    """Return how much the branch of a sub-layer grows in healthy training."""
    figure = "checkpoint_growth"
    if against.state == "init":
        figure = "growth_from_init"

    # Growth is known by the placement of the norm.
    placement = row.placement or ""
    return context.thresholds.limits(figure, placement)


def _growth_by_level(
    against: AgainstRecord, limits: Mapping[str, Limits]
) -> dict[Level, list[ChangeRecord]]:
    """Return the branch norms that grew, by the level of their growth."""
    groups: dict[Level, list[ChangeRecord]] = {}
    for change in against.changes:
        # A sub-layer without a branch norm in one of the models has no limits.
        is_judged = change.where in limits
        if is_judged and _is_growth_of_branch(change):
            level = _level_of_growth(change, limits[change.where])
            groups.setdefault(level, []).append(change)

    return groups


def _is_growth_of_branch(change: ChangeRecord) -> bool:
    return change.figure == "branch_norm" and change.grew


def _growth_unknown_for(rows: Sequence[SublayerRecord]) -> str:
    """Return the note about sub-layers without a threshold of growth; "" without any."""
    if not rows:
        return ""

    # Each placement once.
    placements = placements_in_words(rows)
    names = " and ".join(sorted(placements))
    return f"how much healthy training grows is not known for {names}"


def _level_of_growth(change: ChangeRecord, limits: Limits) -> Level:
    """Return "error" beyond `warning`, as for every regression.

    Between what healthy and wrecked runs show the level is "warning".
    """
    # 1. Only wrecked runs grew so much.
    growth = change.amplification
    if limits.warning is not None and growth > limits.warning:
        return "error"

    # 2. No healthy run grew so much.
    if limits.info is not None and growth > limits.info:
        return "warning"

    # 3. Healthy runs did.
    return "info"


def _growth_finding(
    context: RuleContext,
    rule: Rule,
    group: list[ChangeRecord],
    level: Level,
    limits: Mapping[str, Limits],
) -> Finding:
    """Return the finding about the branches that grew to one level."""
    against = context.report.against
    assert against is not None

    # 1. The branch that grew the most, and the limit that it is compared with.
    worst = max(group, key=lambda change: change.amplification)
    limit = limits[worst.where].info
    if level == "error":
        limit = limits[worst.where].warning

    # 2. The sentence.
    what = f"{worst.where}: branch norm {plain(worst.earlier[1])} -> {plain(worst.now[1])}"
    what += (
        f"; 1 + branch norm is at least {plain(worst.amplification)} times that of {against.source}"
    )
    if limit is not None:
        level_above = "warning" if level == "info" else level
        what += f" ({level_above} above {plain(limit)})"
    if len(group) > 1:
        how_far = f"beyond the {level}"
        if level == "info":
            how_far = "without a warning"
        what += f"; {len(group)} of {against.compared} branches grew {how_far}"

    # 3. The evidence.
    changes = []
    for change in group:
        old, new = change.earlier[1], change.now[1]
        changes.append({"where": change.where, "field": change.figure, "old": old, "new": new})
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

    # 4. The finding.
    fix = "go back to the earlier checkpoint; `jacdiag diff A B --all` lists every figure"
    if level == "info":
        fix = ""
    where = [change.where for change in group]
    return Finding(rule.code, context.level(rule, level), where, what, evidence, rule.summary, fix)


# -- a baseline, or an earlier model at init -------------------------------------------------------
def _by_role(
    current: FiguresRecord, changes: Iterable[MovedFigure]
) -> dict[str, list[MovedFigure]]:
    """Return the changes of weights by the role that each weight has now."""

    def role_of(change: MovedFigure) -> str:
        return str(current.weights[change.where].get("role", ""))

    return group_by(changes, role_of)


def _finding(context: RuleContext, rule: Rule, group: list[MovedFigure], what: str) -> Finding:
    """Return the finding about the changes of one figure, or of the weights of one role.

    Args:
        context: of the evaluation.
        rule: that fires.
        group: the changes.
        what: what changed, in words.
    """
    # 1. The sentence.
    worst = max(group, key=_growth_of)
    against = context.report.against
    reference = "baseline"
    fix = "undo the change, or accept it: the same command with --write-baseline"
    if against is not None:
        reference = against.source
        fix = "undo the change; `jacdiag diff A B --all` lists every figure"
    text = f"{worst.words} ({reference} up to {plain(worst.bound)})"
    if len(group) > 1:
        text += f"; {len(group)} {what} in all"

    # 2. The evidence.
    changes = []
    for change in group:
        old, new = change.old, change.new
        changes.append({"where": change.where, "field": change.figure, "old": old, "new": new})

    evidence = {
        "field": worst.figure,
        "value": worst.new,
        "baseline": worst.old,
        "threshold": worst.bound,
        "parameters": [change.where for change in group if change.figure not in FIGURES],
        "changes": changes,
    }

    # 3. The finding.
    where = [change.where for change in group]
    level = context.level(rule, "error")
    return Finding(rule.code, level, where, text, evidence, rule.summary, fix)


def _growth_of(change: MovedFigure) -> float:
    """Return the new value over the old one; the new one if the old is not above zero."""
    if change.old > 0:
        return change.new / change.old

    # From zero every growth is infinite, and the new value orders them.
    return change.new


REGRESSION = Rule("JD110", "regression", "error", check=_check)
RULES = (REGRESSION,)
