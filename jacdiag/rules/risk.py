"""JD105: the chance that a run at the planned learning rate goes wrong, where recorded runs can tell it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from jacdiag.report import LEVELS, Finding, Level, Report, Risk
from jacdiag.report.figures import EXACT, INIT
from jacdiag.report.risk import RiskTable
from jacdiag.rules import texts
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule


def assess(report: Report, table: RiskTable) -> Risk | None:
    """The chance for a report's model and planned learning rate; None where no rate was given.

    Returns:
        A risk whose `chance` is None, with the reason, where the audit lies outside of what the runs spanned.
    """
    lr = report.plan.lr
    if lr is None or report.tier != "measured":
        return None
    if report.state != "init":
        return Risk(reason="the curves are of untrained models")
    placements = {row.placement for row in report.sublayers if not row.nested}
    if len(placements) != 1 or (placement := str(next(iter(placements)))) not in table.curves:
        told = ", ".join(sorted(map(str, placements))) or "none"
        return Risk(reason=f"no curve for this placement ({told}-norm)")
    curve = table.curves[placement]
    value = INIT[curve.figure](report)
    ranged = f"{curve.runs} runs, {_ranges(curve.ranges)}"
    outside = _outside(curve.ranges, {"figure": value, "lr": lr, "width": report.model.width,
                                      "layers": report.model.layers})  # fmt: skip
    found = Risk(
        figure=curve.figure, value=None if math.isnan(value) else value, lr=lr, range=ranged, source=curve.source
    )
    if report.settings.get("decide") and curve.figure not in EXACT:
        return replace(found, reason=f"{curve.figure} is measured to its width without --decide only")
    if outside:
        return replace(found, reason=f"outside the calibrated range: {'; '.join(outside)}")
    chance, lower, upper = curve.chance(value, lr)
    return replace(found, chance=chance, lower=lower, upper=upper)


_WORDS = {"figure": "the figure", "lr": "lr", "width": "d", "layers": "layers"}


def _ranges(ranges: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{_WORDS[name]} {low:.3g} to {high:.3g}" for name, (low, high) in ranges.items())


def _outside(ranges: Mapping[str, list[float]], values: Mapping[str, float | None]) -> list[str]:
    found = []
    for name, (low, high) in ranges.items():
        value = values.get(name)
        if value is None or not low <= value <= high:
            told = "not known" if value is None or math.isnan(value) else f"{value:.3g}"
            found.append(f"{_WORDS[name]} {told}, {low:.3g} to {high:.3g} were run")
    return found


def _risk(context: Context, rule: Rule) -> Outcome:
    risk = context.report.risk
    if risk is None:
        return NOT_APPLICABLE
    if risk.chance is None or risk.lower is None or risk.upper is None:
        return Outcome(0, note=risk.reason)
    limits = context.thresholds.limits("risk")
    beyond: list[Level] = [cut for cut in LEVELS if (limit := getattr(limits, cut)) is not None and risk.lower > limit]
    if not beyond:
        across = [limit for limit in limits.cuts if limit < risk.upper]
        note = f"the chance is {risk}: {across[0]:.0%} lies inside" if across else ""
        return Outcome(1, undecided=["risk"] if across else [], note=note)
    cut = beyond[-1]
    limit = getattr(limits, cut)
    told = f"a chance of {risk} to go wrong at lr {risk.lr:g}, as recorded runs tell it"
    what = f"{told} ({cut} above {limit:.0%})"
    evidence = {"field": "risk", "value": risk.chance, "lower": risk.lower, "upper": risk.upper, "threshold": limit,
                "figure": risk.figure, "figure_value": risk.value, "lr": risk.lr, "range": risk.range}  # fmt: skip
    found = Finding(rule.code, context.level(rule, cut), [], what, evidence, why=rule.summary, fix=texts.RISK["remedy"])
    return Outcome(1, [found])


RISK = Rule("JD105", "risk", "error", **texts.RISK, check=_risk, states=("init",))
RULES = (RISK,)
