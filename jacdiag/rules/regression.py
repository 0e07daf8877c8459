"""JD110: a figure is worse than the recorded baseline, beyond both intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jacdiag.report import FiguresRecord, Finding
from jacdiag.rules.numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.texts import Text

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
        return f"{self.where}: {FIGURES.get(self.figure, self.figure)} {plain(self.old)} -> {plain(self.new)}"


def sublayer_changes(now: FiguresRecord, before: FiguresRecord) -> list[Change]:
    """Sub-layers whose figure lies, for every seed, above what another seed of the baseline would reach."""
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
                found.append(Change(name, "value" if _constant(new) and _constant(old) else "std",
                                    _shown(old), _shown(new), _shown(old)))  # fmt: skip
        elif new["lower"] > old["upper"] or new["upper"] < old["lower"]:
            found.append(Change(name, "std", old["std"], new["std"], old["upper"]))
    return found


def _constant(entry: Mapping[str, Any]) -> bool:
    return entry["family"] in ("zero", "constant")


def _shown(entry: Mapping[str, Any]) -> float:
    return float(entry["value"] or 0.0) if _constant(entry) else float(entry["std"])


def _check(context: Context, rule: Rule) -> Outcome:
    now, before = context.report.figures, context.report.baseline
    if now is None or before is None:
        return NOT_APPLICABLE
    count = len(now.sublayers.keys() & before.sublayers.keys()) + len(now.weights.keys() & before.weights.keys())
    findings = []
    for role, group in _by_role(now, weight_changes(now, before)).items():  # the cause before its effects
        findings.append(_finding(context, rule, group, f"weights ({role})" if role else "weights"))
    worse = sublayer_changes(now, before)
    for figure in FIGURES:
        group = [c for c in worse if c.figure == figure]
        if group:
            findings.append(_finding(context, rule, group, "sub-layers"))
    gone = [n for n in (*before.sublayers, *before.weights) if n not in now.sublayers and n not in now.weights]
    added = [n for n in (*now.sublayers, *now.weights) if n not in before.sublayers and n not in before.weights]
    note = ""
    if (gone and now.sublayers) or added:
        note = f"{len(added)} names are not in the baseline, {len(gone)} of it are gone"
    return Outcome(count, findings, note=note)


def _by_role(now: FiguresRecord, changes: Iterable[Change]) -> dict[str, list[Change]]:
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(str(now.weights[change.where].get("role", "")), []).append(change)
    return groups


def _finding(context: Context, rule: Rule, group: list[Change], what: str) -> Finding:
    worst = max(group, key=lambda c: c.new / c.old if c.old > 0 else c.new)
    text = f"{worst.words} (baseline up to {plain(worst.bound)})"
    if len(group) > 1:
        text += f"; {len(group)} {what} in all"
    evidence = {
        "field": worst.figure, "value": worst.new, "baseline": worst.old, "threshold": worst.bound,
        "parameters": [c.where for c in group if c.figure not in FIGURES],
        "changes": [{"where": c.where, "field": c.figure, "old": c.old, "new": c.new} for c in group],
    }  # fmt: skip
    fix = "undo the change, or accept it: the same command with --write-baseline"
    return Finding(rule.code, context.level(rule, "error"), [c.where for c in group], text, evidence, rule.summary, fix)


TEXT = Text(
    summary="worse than the recorded baseline, beyond both intervals",
    what="""\
A baseline holds, for every sub-layer and weight, the interval in which another seed's figure lies. Sub-layers must not
lie above theirs (branch_norm, core_norm, norm_gain); the std of a weight must share a value with its own. Norms depend
on the probe: figures of another batch, seq, tokens or dtype are refused.""",
    why="""\
A change that leaves every test green may still change what a model is at step 0. A different seed passes, a different
std does not.""",
    example="""\
    jacdiag gate build.py:model --baseline init.json --write-baseline        # once, committed
    jacdiag gate build.py:model --baseline init.json                         # in CI""",
    remedy="""\
Undo the change. Where it is meant: the same command with --write-baseline, and commit the file. With --remedies
first the weights are drawn as they were in the baseline, or the paper's recipes tried, and what helps is shown.""",
)
REGRESSION = Rule("JD110", "regression", "error", **TEXT, check=_check)
RULES = (REGRESSION,)
