"""JD105: the chance that a run at the planned learning rate goes wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jacdiag.records import Finding, Level, Report, Risk
from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.rules.risk_features import EXACT, INIT
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext
from jacdiag.rules.thresholds import Thresholds


def assess(report: Report, table: RiskTable) -> Risk | None:
    """Return the chance for a report's model and planned rate.

    Args:
        report: of the model before its first step.
        table: the curves, by placement of the norm.

    Returns:
        A risk whose `chance` is None, with the reason, where the audit lies outside of what the
        runs spanned. None without a learning rate, or without measured norms.
    """
    # 1. Nothing to assess.
    lr = report.plan.lr
    if lr is None or report.tier != "measured":
        return None
    if report.state != "init":
        return Risk(reason="the curves are of untrained models")

    # 2. The curve of this placement.
    placement = placement_of(report)
    if placement not in table.curves:
        return Risk(reason=f"no curve for this placement ({placement or 'none'}-norm)")
    curve = table.curves[placement]

    # 3. The model's figure that the curve is drawn over.
    value = INIT[curve.figure](report)
    risk = Risk(
        figure=curve.figure,
        value=None if math.isnan(value) else value,
        lr=lr,
        range=ranged(curve),
        source=curve.source,
    )

    # 4. The chance, unless something argues against it.
    reason = _why_no_chance(report, curve, value)
    if reason:
        return replace(risk, reason=reason)
    chance, lower, upper = curve.chance(value, lr, report.plan.warmup)
    return replace(risk, chance=chance, lower=lower, upper=upper)


def _why_no_chance(report: Report, curve: RiskCurve, value: float) -> str:
    """Return why a curve gives no chance for a model and its plan; "" if it gives one.

    Args:
        report: of the model.
        curve: of its placement.
        value: the model's value of the curve's figure.
    """
    # 1. The figure must be known exactly enough.
    if report.settings.get("decide") and curve.figure not in EXACT:
        return f"{curve.figure} is measured to its width without --decide only"

    # 2. So must the warm-up, if the chance hangs on it.
    warmup = report.plan.warmup
    if curve.by_warmup and warmup is None:
        return "the chance depends on the warm-up, which is not known (--warmup)"

    # 3. The runs must have covered such a model and plan.
    values = {"lr": report.plan.lr, "warmup": warmup, **_measures(report, value)}
    values |= _optional_settings(report)
    outside = _outside(_ranges_for(curve, values), values, curve.figure)
    if not outside:
        return ""
    return f"outside the calibrated range: {'; '.join(outside)}"


def _optional_settings(report: Report) -> dict[str, float | None]:
    """Return the settings that a plan may leave out."""
    return {name: getattr(report.plan, name) for name in _OPTIONAL}


def _ranges_for(curve: RiskCurve, values: Mapping[str, float | None]) -> dict[str, list[float]]:
    """Return the ranges of a curve that a model and its plan are compared with.

    Args:
        curve: of the model's placement.
        values: of the model and its plan.
    """
    ranges = dict(curve.ranges)
    if not curve.by_warmup:
        ranges.pop("warmup", None)

    # A plan may leave out how the gradient is clipped and Adam's beta2. Those that it gives must be
    # the runs' own.
    for name in _OPTIONAL:
        if values[name] is None:
            ranges.pop(name, None)

    return ranges


def placement_of(report: Report) -> str:
    """Return the placement of all sub-layers; several are named one after the other."""
    return ", ".join(sorted({str(row.placement) for row in report.sublayers if not row.nested}))


def ranged(curve: RiskCurve) -> str:
    """Return what the runs of a curve spanned, in words."""
    return f"{curve.runs} runs, {_ranges(curve.ranges)}"


def within(curve: RiskCurve, report: Report, value: float) -> bool:
    """Return whether a model lies inside of what the runs spanned.

    The settings of its optimizer do not count.
    """
    # The figure, the width and the depth are left.
    ranges = {name: span for name, span in curve.ranges.items() if name not in _OF_THE_OPTIMIZER}
    return not _outside(ranges, _measures(report, value))


def beyond(risk: Risk, thresholds: Thresholds) -> tuple[Level, float] | None:
    """Return the highest level whose limit lies below the interval of a chance, and it.

    Args:
        risk: the chance, with its interval.
        thresholds: of the profile in use.

    Returns:
        The level and its limit; None if there is no such level.
    """
    limits = thresholds.limits("risk")
    lower = risk.lower or 0.0

    # The highest limit that even the lower end is above.
    level = limits.beyond(lower)
    if level is None:
        return None

    return level, limits.named_cuts[level]


def evidence(risk: Risk, limit: float) -> dict[str, Any]:
    """Return what a finding or an alert carries about a risk.

    That is the chance, the limit that it is beyond, and what it rests on.
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
_OF_THE_OPTIMIZER = ("lr", "warmup", *_OPTIONAL)
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
    if low == high:
        return _short(low)
    return f"{_short(low)} to {_short(high)}"


def _outside(
    ranges: Mapping[str, list[float]], values: Mapping[str, float | None], figure: str = ""
) -> list[str]:
    """Return in what a model lies outside of the runs, in words.

    Args:
        ranges: what the runs spanned, by name.
        values: of the model and its plan.
        figure: name of the curve's figure; "" for "the figure".
    """
    words = dict(_WORDS)
    if figure:
        words["figure"] = figure

    reasons: list[str] = []
    for name, (low, high) in ranges.items():
        # 1. A value inside is no reason. One that is not known is never inside.
        value = values.get(name)
        if value is not None and low <= value <= high:
            continue

        # 2. The value compared with what was run.
        verb = "was" if low == high else "were"
        reasons.append(f"{words[name]} {_shown(value)}, {_span(low, high)} {verb} run")

    return reasons


def _shown(value: float | None) -> str:
    """Return a value for a sentence, or that it is not known."""
    if value is None or math.isnan(value):
        return "not known"
    return _short(value)


def _short(value: float) -> str:
    """Return at most three digits without needless zeros, as in 0.0001, 2, 3,210."""
    return f"{float(f'{value:.3g}'):,g}"


def _risk(context: RuleContext, rule: Rule) -> CheckOutcome:
    risk = context.report.risk
    if risk is None:
        return NOT_APPLICABLE
    if risk.chance is None or risk.lower is None or risk.upper is None:
        return CheckOutcome(0, note=risk.reason)

    # 1. No limit lies below the interval: clean, or undecided if one lies inside.
    highest = beyond(risk, context.thresholds)
    if highest is None:
        inside = [limit for limit in context.thresholds.limits("risk").cuts if limit < risk.upper]
        if not inside:
            return CheckOutcome(1)

        note = f"the chance is {risk}: {inside[0]:.0%} lies inside"
        return CheckOutcome(1, undecided=["risk"], note=note)

    # 2. The finding.
    level, limit = highest
    what = (
        f"a chance of {risk} to go wrong at lr {risk.lr:g}, as recorded runs tell it "
        f"({level} above {limit:.0%})"
    )
    finding = Finding(
        rule.code,
        context.level(rule, level),
        [],
        what,
        evidence(risk, limit),
        why=rule.summary,
        fix=rule.page.remedy,
    )
    return CheckOutcome(1, [finding])


RISK = Rule("JD105", "risk", "error", check=_risk, states=("init",))
RULES = (RISK,)
