"""What the picture of a report draws: curves over depth as plain lists, marks and thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jacdiag.records import Interval, Report, SublayerRecord
from jacdiag.render.content.sentences import worst_branch
from jacdiag.render.content.severity import drawn_threshold

INK, PALE = "#222222", "#777777"
_NOTHING = Interval.exact(math.nan)


@dataclass(frozen=True)
class Look:
    """How a kind of sub-layer is drawn. The tones differ in lightness, for a print in grey."""

    label: str
    kinds: tuple[str, ...]
    colour: str
    marker: str


LOOKS = (
    Look("attention", ("attention",), "#17406d", "o"),
    Look("FFN", ("mlp", "moe"), "#e08a2e", "s"),
    Look("other", ("mixer", "conv", "other"), "#6aa67a", "^"),
)
_ALL_KINDS = tuple(kind for look in LOOKS for kind in look.kinds)


@dataclass(frozen=True)
class DepthCurve:
    """Values over depth.

    Attributes:
        label: its name at the right end.
        x: places on the depth axis.
        y: positive values; nan where there is none.
        colour, marker, dashed: how it is drawn.
        low, high: the band, if there is one. A `high` that is inf stands for an interval without
            an upper end.
    """

    label: str
    x: list[float]
    y: list[float]
    colour: str
    marker: str = ""
    dashed: bool = False
    low: list[float] | None = None
    high: list[float] | None = None

    @property
    def finite(self) -> list[float]:
        """The values that are finite."""
        return [value for value in self.y if math.isfinite(value)]

    @property
    def lonely(self) -> list[int]:
        """Points without a neighbour: a line alone would not show them."""
        known = [False, *(math.isfinite(value) for value in self.y), False]
        lonely = []
        for k in range(len(self.y)):
            has_neighbour = known[k] or known[k + 2]
            if known[k + 1] and not has_neighbour:
                lonely.append(k)
        return lonely


@dataclass(frozen=True)
class Threshold:
    """A threshold on the figure of a panel, at which a rule fires with its level."""

    level: str
    value: float


@dataclass(frozen=True)
class WorstBranch:
    """The sub-layer with the largest branch norm, and its place on the depth axis."""

    name: str
    place: float
    norm: Interval


@dataclass(frozen=True)
class DepthView:
    """The panels of a report's picture.

    Attributes:
        measured: norms were measured; else the upper panel shows the paper's bound.
        gains: the upper panel: branch norms and bounds, per kind of sub-layer.
        factors: the lower panel: the two factors, or the residual map.
        is_split: the lower panel shows the two factors.
        missing: places of sub-layers that should have a branch norm and have none.
        zeros: places of branches that add nothing.
        last: the largest place on the depth axis.
        worst: the largest branch norm; None if none is finite.
        gain_limits, norm_gain_limits: thresholds on the two panels.
        stratum: the placement that the limits on gains are for, if the model has several; else "".
    """

    measured: bool
    gains: list[DepthCurve]
    factors: list[DepthCurve]
    is_split: bool
    missing: list[float]
    zeros: list[float]
    last: float
    worst: WorstBranch | None
    gain_limits: list[Threshold]
    norm_gain_limits: list[Threshold]
    stratum: str


def build_depth_view(report: Report) -> DepthView:
    """Build what a picture draws of a report.

    Args:
        report: of either tier and state.
    """
    at = places(report)
    return DepthView(
        measured=report.tier == "measured",
        gains=_gains(report),
        factors=_factors(report),
        is_split=_is_split(report),
        missing=_missing(report),
        zeros=_zeros(report),
        last=max(at.values(), default=1.0),
        worst=_worst(report, at),
        gain_limits=_limits(report, "branch_norm"),
        norm_gain_limits=_limits(report, "norm_gain"),
        stratum=_stratum(report),
    )


def places(report: Report) -> dict[str, float]:
    """Return where each sub-layer stands on the depth axis: evenly spread within its depth."""
    by_depth: dict[int, list[str]] = {}
    for row in report.sublayers:
        by_depth.setdefault(row.depth, []).append(row.name)
    at: dict[str, float] = {}
    for depth, names in by_depth.items():
        for k, name in enumerate(names):
            at[name] = depth + k / len(names)
    return at


# -- curves ----------------------------------------------------------------------------------------
def _gains(report: Report) -> list[DepthCurve]:
    """Return branch norms per kind with their bands; bounds and earlier norms are dashed."""
    curves = [_intervals(report, look, "branch_norm", look.label) for look in LOOKS]
    curves += [_bound(report, look) for look in LOOKS]
    curves += [_earlier(report, look) for look in LOOKS]
    return [curve for curve in curves if curve.finite]


def _is_split(report: Report) -> bool:
    """Return whether branch norms come with their two factors.

    Only a norm at the branch's beginning gives them.
    """
    return any(row.norm_gain and row.core_norm for row in report.sublayers)


def _factors(report: Report) -> list[DepthCurve]:
    """Return core ‖J‖ per kind and 1/σ_x; without an input norm, the residual map instead."""
    if report.tier == "weights":
        return []
    if _is_split(report):
        curves = [_intervals(report, look, "core_norm", f"core, {look.label}") for look in LOOKS]
        curves.append(_single(report, "norm_gain", "1/σ gain"))
    else:
        curves = [
            _single(report, "residual_norm", "‖aI + J‖"),
            _single(report, "out_norm_gain", "out-norm gain"),
        ]
    return [curve for curve in curves if curve.finite]


def _is_drawable(value: float | None) -> bool:
    """Return whether a log scale has a place for a value."""
    return value is not None and math.isfinite(value) and value > 0


def _pick(report: Report, kinds: tuple[str, ...], key: str) -> list[tuple[float, Interval]]:
    """Return place and interval of a figure; an interval of nan where nothing can be drawn."""
    at = places(report)
    points = []
    for row in report.sublayers:
        if row.kind not in kinds:
            continue
        interval: Interval | None = getattr(row, key)
        if interval is None or not _is_drawable(interval.estimate):
            interval = _NOTHING
        points.append((at[row.name], interval))
    return points


def _intervals(report: Report, look: Look, key: str, label: str) -> DepthCurve:
    points = _pick(report, look.kinds, key)
    return DepthCurve(
        label,
        [x for x, _ in points],
        [interval.estimate for _, interval in points],
        look.colour,
        look.marker,
        # 0 has no place on a log scale
        low=[max(interval.lower, 1e-3 * interval.estimate) for _, interval in points],
        high=[interval.upper for _, interval in points],
    )


def _single(report: Report, key: str, label: str) -> DepthCurve:
    """Return a figure of all kinds of sub-layers as one curve without a band."""
    points = _pick(report, _ALL_KINDS, key)
    x = [place for place, _ in points]
    y = [interval.estimate for _, interval in points]
    if key == "out_norm_gain":
        return DepthCurve(label, x, y, PALE, dashed=True)
    return DepthCurve(label, x, y, INK)


def _earlier(report: Report, look: Look) -> DepthCurve:
    """Return the branch norms of the earlier model, dashed; empty without a comparison."""
    at = places(report)
    norms = report.against.branch_norms if report.against is not None else {}
    rows = [row for row in report.sublayers if row.kind in look.kinds and row.name in norms]
    values = [norms[row.name][1] for row in rows]
    y = [value if _is_drawable(value) else math.nan for value in values]
    return DepthCurve("earlier", [at[row.name] for row in rows], y, look.colour, dashed=True)


def _bound(report: Report, look: Look) -> DepthCurve:
    """Return the paper's bound, less 1; of weights alone it is the figure that is shown."""
    at = places(report)
    rows = [row for row in report.sublayers if row.kind in look.kinds and _is_drawable(row.bound)]
    x = [at[row.name] for row in rows]
    y = [_excess(row) for row in rows]
    if report.tier == "weights":
        return DepthCurve(look.label, x, y, look.colour, look.marker, dashed=True)
    return DepthCurve("paper's bound − 1", x, y, look.colour, dashed=True)


def _excess(row: SublayerRecord) -> float:
    """Return what the bound, which is on |I + J|, leaves for the branch: its excess over 1."""
    assert row.bound is not None
    return row.bound - 1 if row.bound > 1 else math.nan


def extent(curves: list[DepthCurve]) -> tuple[float, float]:
    """Return the smallest and largest value of a panel, bands included.

    The two are at least a factor of 3 apart.

    Args:
        curves: with at least one finite value.
    """
    finite = []
    for curve in curves:
        for values in (curve.y, curve.low or [], curve.high or []):
            finite += [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    widen = max(1.0, math.sqrt(3 * low / high))
    return low / widen, high * widen


# -- marks and thresholds --------------------------------------------------------------------------
def _missing(report: Report) -> list[float]:
    """Return places of sub-layers whose branch norm is absent or not finite."""
    if report.tier == "weights":
        return []
    at = places(report)
    missing = []
    for row in report.sublayers:
        norm = row.branch_norm.estimate if row.branch_norm else None
        if norm != 0 and not _is_drawable(norm):
            missing.append(at[row.name])
    return missing


def _zeros(report: Report) -> list[float]:
    """Return places of branches that add nothing: a log scale has no place for 0."""
    at = places(report)
    return [
        at[row.name]
        for row in report.sublayers
        if row.branch_norm and row.branch_norm.estimate == 0
    ]


def _worst(report: Report, at: dict[str, float]) -> WorstBranch | None:
    worst = worst_branch(report)
    if worst is None:
        return None
    row, norm = worst
    return WorstBranch(row.name, at[row.name], norm)


def _limits(report: Report, field: str) -> list[Threshold]:
    limits = []
    for level in ("warning", "error"):
        value = drawn_threshold(report, field, level)
        if value is not None:
            limits.append(Threshold(level, value))
    return limits


def _stratum(report: Report) -> str:
    kinds = {row.placement for row in report.sublayers if row.placement is not None}
    if len(kinds) < 2:
        return ""
    usual = report.settings.get("stratum")
    return f"{usual}-norm" if usual else "the most frequent placement"
