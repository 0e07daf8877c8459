"""What the picture of a report shows over depth: curves, conditions, marks and thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jacdiag.records import Interval, Report
from jacdiag.render.content.condition_panels import ConditionPanel, build_condition_panels
from jacdiag.render.content.depth_curves import (
    DepthCurve,
    Threshold,
    branch_curves,
    is_drawable,
    places,
    residual_curves,
    write_threshold,
)
from jacdiag.render.content.sentences import worst_branch
from jacdiag.render.content.severity import drawn_threshold
from jacdiag.render.content.shared_names import shown_names


@dataclass(frozen=True)
class WorstBranch:
    """The sub-layer with the largest branch norm, and its place on the depth axis.

    `shown` is its name with its depth if its module is applied at several depths.
    """

    name: str
    shown: str
    place: float
    norm: Interval


@dataclass(frozen=True)
class DepthView:
    """The panels of a report's picture.

    Attributes:
        measured: norms were measured; else the upper panel shows the paper's bound.
        gains: the upper panel: branch norms and bounds, per kind of sub-layer.
        residuals: the lower panel of a model whose branches do not begin with a norm.
        conditions: the two lower panels of a model whose branches do. A picture has these or
            `residuals`.
        missing: places of sub-layers that should have a branch norm and have none.
        missing_words: what these have in place of it.
        zeros: places of branches that add nothing.
        last: the largest place on the depth axis.
        worst: the largest branch norm; None if none is finite.
        gain_limits: thresholds on branch norms.
        names: place on the depth axis -> name of the sub-layer.
        order: what the layers are counted by; "" if that is not known.
    """

    measured: bool
    gains: list[DepthCurve]
    residuals: list[DepthCurve]
    conditions: list[ConditionPanel]
    missing: list[float]
    missing_words: str
    zeros: list[float]
    last: float
    worst: WorstBranch | None
    gain_limits: list[Threshold]
    names: dict[float, str]
    order: str


def build_depth_view(report: Report) -> DepthView:
    """Build what a picture draws of a report.

    Args:
        report: of either tier and state.
    """
    at = places(report)
    shown = shown_names({row.name: row.depth for row in report.sublayers})
    return DepthView(
        measured=report.tier == "measured",
        gains=branch_curves(report),
        residuals=residual_curves(report),
        conditions=build_condition_panels(report),
        missing=_missing(report),
        missing_words=_missing_in_words(report),
        zeros=_zeros(report),
        last=max(at.values(), default=1.0),
        worst=_worst(report, at, shown),
        gain_limits=_gain_limits(report),
        names={place: shown[name] for name, place in at.items()},
        order=_order_of_layers(report),
    )


def _order_of_layers(report: Report) -> str:
    """Return what the layers are counted by.

    Those of an encoder and a decoder lie on two streams. They follow each other in the forward.
    """
    network = report.network
    if network is None or network.stream is None:
        return ""
    if network.stream.is_partial:
        return "in the order of the forward, on more than one stream"
    return "counted from the embedding"


# -- marks and thresholds --------------------------------------------------------------------------
def _missing(report: Report) -> list[float]:
    """Return places of sub-layers whose branch norm is absent or not finite."""
    if report.tier == "weights":
        return []
    at = places(report)
    missing = []
    for row in report.sublayers:
        norm = None
        if row.branch_norm:
            norm = row.branch_norm.estimate
        # A norm of 0 has a sign of its own.
        is_missing = norm != 0 and not is_drawable(norm)
        if is_missing:
            missing.append(at[row.name])
    return missing


def _missing_in_words(report: Report) -> str:
    """Return what the sub-layers without a drawable branch norm have in place of it."""
    # 1. Whether NaN or Inf is the reason, or there is no norm at all.
    words: dict[str, None] = {}
    for row in report.sublayers:
        norm = row.branch_norm
        reason = row.notes.get("branch_norm", "")
        is_lost = "not finite" in reason or "NaN" in reason
        if norm is not None and not math.isfinite(norm.estimate):
            is_lost = True
        if is_lost:
            words["no finite value"] = None
        elif norm is None:
            words["not measured"] = None

    # 2. Both may be there.
    return " or ".join(words)


def _zeros(report: Report) -> list[float]:
    """Return places of branches that add nothing: a log scale has no place for 0."""
    at = places(report)
    zeros = []
    for row in report.sublayers:
        norm = row.branch_norm
        if norm and norm.estimate == 0:
            zeros.append(at[row.name])
    return zeros


def _worst(report: Report, at: dict[str, float], shown: dict[str, str]) -> WorstBranch | None:
    """Return the largest branch norm with its place on the depth axis."""
    worst = worst_branch(report)
    if worst is None:
        return None
    row, norm = worst
    return WorstBranch(row.name, shown[row.name], at[row.name], norm)


def _gain_limits(report: Report) -> list[Threshold]:
    """Return the thresholds on branch norms at which a rule fires, with their labels."""
    # 1. Which placement they are for, if there are several.
    prefix = ""
    stratum = _stratum(report)
    if stratum:
        prefix = f"{stratum}, "

    # 2. The thresholds.
    limits = []
    for level in ("warning", "error"):
        value = drawn_threshold(report, "branch_norm", level)
        if value is not None:
            limits.append(
                Threshold(level, value, f"{prefix}{level} above {write_threshold(value)}")
            )
    return limits


def _stratum(report: Report) -> str:
    """Return the placement that thresholds on gains are for; "" if the model has one alone."""
    placements = {row.placement for row in report.sublayers}
    if len(placements - {None}) < 2:
        return ""

    # An older report does not say which.
    usual = report.settings.get("stratum")
    if not usual:
        return "the most frequent placement"
    return f"{usual}-norm"
