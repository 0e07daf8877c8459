"""JD105: the chance that a run at the planned learning rate goes wrong, where recorded runs can
tell it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jacdiag.records import LEVELS, Finding, Level, Report, Risk
from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.rules.risk_features import EXACT, INIT
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.thresholds import Thresholds


def assess(report: Report, table: RiskTable) -> Risk | None:
    """The chance for a report's model and planned learning rate; None where no rate was given.

    Returns:
        A risk whose `chance` is None, with the reason, where the audit lies outside of what the
        runs spanned.
    """
    lr = report.plan.lr
    if lr is None or report.tier != "measured":
        return None
    if report.state != "init":
        return Risk(reason="the curves are of untrained models")
    placement = placement_of(report)
    if placement not in table.curves:
        return Risk(reason=f"no curve for this placement ({placement or 'none'}-norm)")
    curve = table.curves[placement]
    value = INIT[curve.figure](report)
    found = Risk(
        figure=curve.figure,
        value=None if math.isnan(value) else value,
        lr=lr,
        range=ranged(curve),
        source=curve.source,
    )
    if report.settings.get("decide") and curve.figure not in EXACT:
        return replace(
            found, reason=f"{curve.figure} is measured to its width without --decide only"
        )
    warmup = report.plan.warmup
    if curve.by_warmup and warmup is None:
        return replace(
            found, reason="the chance hangs on the warm-up, which is not known (--warmup)"
        )
    ranges = (
        curve.ranges
        if curve.by_warmup
        else {name: r for name, r in curve.ranges.items() if name != "warmup"}
    )
    values = {"lr": lr, "warmup": warmup, **_measures(report, value)}

    # A plan may leave out how the gradient is clipped and Adam's beta2. Those that it gives must be
    # the runs' own.
    for name in _OPTIONAL:
        given = getattr(report.plan, name)
        if given is None:
            ranges = {key: span for key, span in ranges.items() if key != name}
        values[name] = given

    if outside := _outside(ranges, values, curve.figure):
        return replace(found, reason=f"outside the calibrated range: {'; '.join(outside)}")
    chance, lower, upper = curve.chance(value, lr, warmup)
    return replace(found, chance=chance, lower=lower, upper=upper)


def placement_of(report: Report) -> str:
    """The placement of all sub-layers; several are named one after the other."""
    return ", ".join(sorted({str(row.placement) for row in report.sublayers if not row.nested}))


def ranged(curve: RiskCurve) -> str:
    """What the runs behind a curve spanned, in words."""
    return f"{curve.runs} runs, {_ranges(curve.ranges)}"


def within(curve: RiskCurve, report: Report, value: float) -> bool:
    """Return whether a model lies inside of what the runs spanned, whatever its optimizer is set
    to.
    """
    ranges = {
        name: span
        for name, span in curve.ranges.items()
        if name not in ("lr", "warmup", *_OPTIONAL)
    }
    return not _outside(ranges, _measures(report, value))


def beyond(risk: Risk, thresholds: Thresholds) -> tuple[Level, float] | None:
    """The loudest level whose limit the whole interval of a chance lies above, and that limit; None
    if none.
    """
    limits, lower = thresholds.limits("risk"), risk.lower
    over = [
        (cut, limit)
        for cut in LEVELS
        if (limit := getattr(limits, cut)) is not None and (lower or 0.0) > limit
    ]
    return over[-1] if over else None


def evidence(risk: Risk, limit: float) -> dict[str, Any]:
    """What a finding or an alert carries: the chance, the limit that it is beyond, and what it
    rests on.
    """
    return {
        "field": "risk",
        "value": risk.chance,
        "lower": risk.lower,
        "upper": risk.upper,
        "threshold": limit,
        "figure": risk.figure,
        "figure_value": risk.value,
        "lr": risk.lr,
        "range": risk.range,
    }


def _measures(report: Report, value: float) -> dict[str, float | None]:
    return {"figure": value, "width": report.model.width, "layers": report.model.layers}


_OPTIONAL = ("clip", "beta2")  # of the plan: factors that are only judged if they are given
_WORDS = {
    "figure": "the figure",
    "lr": "lr",
    "warmup": "warm-up",
    "width": "d",
    "layers": "layers",
    "clip": "clip",
    "beta2": "beta2",
}


def _ranges(ranges: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{_WORDS[name]} {_span(low, high)}" for name, (low, high) in ranges.items())


def _span(low: float, high: float) -> str:
    """Return "20 to 400", or "1" if all runs had the same."""
    return _short(low) if low == high else f"{_short(low)} to {_short(high)}"


def _outside(
    ranges: Mapping[str, list[float]], values: Mapping[str, float | None], figure: str = ""
) -> list[str]:
    """In what a model lies outside of the runs, in words; `figure` is the name of the curve's."""
    words, found = {**_WORDS, **({"figure": figure} if figure else {})}, []
    for name, (low, high) in ranges.items():
        value = values.get(name)
        if value is None or not low <= value <= high:
            told = "not known" if value is None or math.isnan(value) else _short(value)
            verb = "was" if low == high else "were"
            found.append(f"{words[name]} {told}, {_span(low, high)} {verb} run")
    return found


def _short(value: float) -> str:
    """Three digits at most, no more zeros than need be: 0.0001, 2, 3,210."""
    return f"{float(f'{value:.3g}'):,g}"


def _risk(context: Context, rule: Rule) -> Outcome:
    risk = context.report.risk
    if risk is None:
        return NOT_APPLICABLE
    if risk.chance is None or risk.lower is None or risk.upper is None:
        return Outcome(0, note=risk.reason)
    loudest = beyond(risk, context.thresholds)
    if loudest is None:
        across = [limit for limit in context.thresholds.limits("risk").cuts if limit < risk.upper]
        note = f"the chance is {risk}: {across[0]:.0%} lies inside" if across else ""
        return Outcome(1, undecided=["risk"] if across else [], note=note)
    cut, limit = loudest
    told = f"a chance of {risk} to go wrong at lr {risk.lr:g}, as recorded runs tell it"
    what = f"{told} ({cut} above {limit:.0%})"
    found = Finding(
        rule.code,
        context.level(rule, cut),
        [],
        what,
        evidence(risk, limit),
        why=rule.summary,
        fix=rule.page.remedy,
    )
    return Outcome(1, [found])


RISK = Rule("JD105", "risk", "error", check=_risk, states=("init",))
RULES = (RISK,)
