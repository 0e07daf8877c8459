"""The two conditions of the paper as panels of a picture: figures over depth, with targets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from jacdiag.records import Report, SublayerRecord
from jacdiag.render.content.depth_curves import (
    ALL_KINDS,
    INK,
    LOOKS,
    DepthCurve,
    Look,
    Threshold,
    drawable_curves,
    interval_curve,
    is_drawable,
    is_split,
    places,
    points_of_kinds,
    write_threshold,
)
from jacdiag.render.content.sentences import condition, judged_sublayers
from jacdiag.render.content.severity import FIELD_OF_RULE, drawn_threshold
from jacdiag.rules.wording import name_layers

_CONDITIONS = {"JD101": "Small sub-layers", "JD102": "Large shortcut"}
_STATUS_WORDS = {
    "partly": "partly met",
    "unknown": "undecided",
    "not applicable": "does not apply",
    "not selected": "was not judged",
}
_CUT_WORDS = {"info": "met up to", "warning": "not met above", "error": "error above"}


@dataclass(frozen=True)
class ConditionPanel:
    """One of the two conditions of the paper: its figure over depth with its targets.

    Attributes:
        code: of the rule that judges it.
        title: the condition and how it came out, with the layers that miss it.
        figure: what the vertical axis shows.
        curves: per kind of sub-layer, or one for all.
        targets: where the condition ceases to be met; none if no rule decides on this model.
        missed: place and value of each sub-layer that does not meet the condition in full.
    """

    code: str
    title: str
    figure: str
    curves: list[DepthCurve]
    targets: list[Threshold]
    missed: list[tuple[float, float]] = field(default_factory=list)


def build_condition_panels(report: Report) -> list[ConditionPanel]:
    """Return a panel for each condition; none if branch norms have no two factors."""
    if report.tier == "weights" or not is_split(report):
        return []
    cores = drawable_curves([_scaled_cores(report, look) for look in LOOKS])
    gains = drawable_curves([_norm_gains(report)])
    return [
        _condition_panel(report, "JD101", "core ‖J‖·√(2N)", cores, _core_targets(report)),
        _condition_panel(report, "JD102", "norm gain 1/σ", gains, _gain_targets(report)),
    ]


def _condition_panel(
    report: Report, code: str, figure: str, curves: list[DepthCurve], targets: list[Threshold]
) -> ConditionPanel:
    """Return the panel of one condition.

    Args:
        report: what is drawn.
        code: of the rule that judges the condition.
        figure: what the vertical axis shows.
        curves: the figure over depth.
        targets: where the condition ceases to be met.
    """
    missed = _sublayers_that_miss(report, code, targets)
    title = f"{_CONDITIONS[code]}: {_outcome(report, code, missed, targets)}"

    # A rule that only observes has no target, and calls no sub-layer wrong.
    points: list[tuple[float, float]] = []
    if targets:
        points = _points_of([*missed.entirely, *missed.partly], curves, places(report))
    return ConditionPanel(code, title, figure, curves, targets, points)


@dataclass(frozen=True)
class _Missed:
    """The sub-layers that do not meet a condition, and those that meet it in part."""

    entirely: list[SublayerRecord]
    partly: list[SublayerRecord]


def _sublayers_that_miss(report: Report, code: str, targets: list[Threshold]) -> _Missed:
    """Return the sub-layers that the rule of a condition named."""
    # 1. Their names. A finding at the first cut says that the condition is met in part.
    partly_cuts = [target.value for target in targets if target.level == "info"]
    failed: set[str] = set()
    partly: set[str] = set()
    for finding in report.findings:
        if finding.code != code:
            continue
        if _is_among(finding.evidence.get("threshold"), partly_cuts):
            partly.update(finding.where)
        else:
            failed.update(finding.where)

    # 2. Their records, in the order of the model.
    return _Missed(
        entirely=[row for row in report.sublayers if row.name in failed],
        partly=[row for row in report.sublayers if row.name in partly - failed],
    )


def _points_of(
    rows: list[SublayerRecord], curves: list[DepthCurve], at: dict[str, float]
) -> list[tuple[float, float]]:
    """Return place and value of sub-layers on the curves of a panel.

    Args:
        rows: the sub-layers.
        curves: of the panel.
        at: name of a sub-layer -> its place on the depth axis.
    """
    values: dict[float, float] = {}
    for curve in curves:
        values.update(zip(curve.x, curve.y, strict=True))

    points = []
    for row in rows:
        value = values.get(at[row.name], math.nan)
        if math.isfinite(value):
            points.append((at[row.name], value))
    return points


def _is_among(value: object, cuts: Iterable[float]) -> bool:
    """Return whether a value is one of some cuts, up to rounding."""
    if not isinstance(value, float | int):
        return False
    return any(math.isclose(value, cut, rel_tol=1e-6) for cut in cuts)


def _outcome(report: Report, code: str, missed: _Missed, targets: list[Threshold]) -> str:
    """Return how a condition came out, with the layers that miss it.

    Args:
        report: what is drawn.
        code: of the rule that judges the condition.
        missed: the sub-layers that miss it.
        targets: where it ceases to be met.
    """
    # 1. A rule that only observes has no target.
    if report.state == "trained" and not targets:
        return "no target, the model is trained"

    # 2. The layers that miss it, each once.
    failed_depths = {row.depth for row in missed.entirely}
    partly_depths = {row.depth for row in missed.partly} - failed_depths
    parts = []
    if failed_depths:
        parts.append(f"not met in {name_layers(failed_depths)}")
    if partly_depths:
        parts.append(f"partly met in {name_layers(partly_depths)}")
    judged = _judged_share(report, code)
    if not parts:
        status = condition(report, code)
        return f"{_STATUS_WORDS.get(status, status)}{judged}"
    return f"{', '.join(parts)} (of {report.model.layers}){judged}"


def _judged_share(report: Report, code: str) -> str:
    """Return at how many sub-layers a condition was judged, as an end; "" if at all of them."""
    # 1. Not known.
    judged = judged_sublayers(report, code)
    if judged is None:
        return ""

    # 2. At some sub-layers alone.
    if judged.share:
        return f", {judged.share} judged"
    return ""


# -- figures and targets ---------------------------------------------------------------------------
def _scaled_cores(report: Report, look: Look) -> DepthCurve:
    """Return core ‖J‖·√(2N) of one kind of sub-layers, as the condition has it."""
    curve = interval_curve(report, look, "core_norm", look.label)
    scale = _core_scale(report)
    y, low, high = (
        [scale * value for value in values]
        for values in (curve.y, curve.low or [], curve.high or [])
    )
    return DepthCurve(look.label, curve.x, y, look.colour, look.marker, low=low, high=high)


def _core_scale(report: Report) -> float:
    """Return √(2N), with N the number of layers."""
    return math.sqrt(2 * max(report.model.layers, 1))


def _norm_gains(report: Report) -> DepthCurve:
    """Return 1/σ of all kinds: its 99th percentile over tokens, from their median to the largest.

    The condition is judged by that percentile.
    """
    x, y, low, high = [], [], [], []
    for place, interval in points_of_kinds(report, ALL_KINDS, "norm_gain"):
        least, value, most = interval.lower, interval.estimate, interval.upper
        spread = interval.per_token
        if spread is not None and is_drawable(spread.p99):
            least, value, most = spread.median, spread.p99, spread.max
        x.append(place)
        y.append(value)
        low.append(least)
        high.append(most)
    return DepthCurve("1/σ", x, y, INK, "d", over_tokens=True, low=low, high=high)


def _core_targets(report: Report) -> list[Threshold]:
    """Return where core ‖J‖·√(2N) ceases to meet its condition, for each kind that is drawn."""
    # 1. The cuts, and the looks that share each of them.
    kinds = {row.kind for row in report.sublayers}
    looks_of: dict[tuple[str, float], list[Look]] = {}
    for look in LOOKS:
        for level, value in _core_cuts(report, [kind for kind in look.kinds if kind in kinds]):
            looks = looks_of.setdefault((level, value), [])
            if look not in looks:
                looks.append(look)

    # 2. Their labels. A cut for all kinds needs none of their names.
    scale = _core_scale(report)
    drawn = [look for look in LOOKS if kinds & set(look.kinds)]
    targets = []
    for (level, value), looks in looks_of.items():
        text = f"{_CUT_WORDS[level]} {write_threshold(value * scale)}"
        colour = INK
        if len(looks) < len(drawn):
            text = f"{' and '.join(look.label for look in looks)} {text}"
            colour = looks[0].colour
        targets.append(Threshold(level, value * scale, text, colour))
    return targets


def _core_cuts(report: Report, kinds: list[str]) -> list[tuple[str, float]]:
    """Return level and value of each cut of the core norms of some kinds."""
    cuts = []
    for kind in kinds:
        for level in _CUT_WORDS:
            value = _core_cut(report, kind, level)
            if value is not None:
                cuts.append((level, value))
    return cuts


def _core_cut(report: Report, kind: str, level: str) -> float | None:
    """Return a cut of the core norm of one kind; that of all kinds in an older report."""
    field_of_kind = f"{FIELD_OF_RULE['JD101']}.{kind}"
    if field_of_kind in report.settings.get("thresholds", {}):
        return drawn_threshold(report, field_of_kind, level)
    return drawn_threshold(report, FIELD_OF_RULE["JD101"], level)


def _gain_targets(report: Report) -> list[Threshold]:
    """Return where 1/σ ceases to meet its condition."""
    targets = []
    for level, words in _CUT_WORDS.items():
        value = drawn_threshold(report, FIELD_OF_RULE["JD102"], level)
        if value is not None:
            targets.append(Threshold(level, value, f"{words} {write_threshold(value)}"))
    return targets
