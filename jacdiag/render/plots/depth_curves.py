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
        # One more place on each side, so that every point has two neighbours.
        is_known = [False, *map(math.isfinite, self.y), False]
        lonely = []
        for place in range(1, len(is_known) - 1):
            has_neighbour = is_known[place - 1] or is_known[place + 1]
            if is_known[place] and not has_neighbour:
                lonely.append(place - 1)
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
        names: place on the depth axis -> name of the sub-layer.
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
    names: dict[float, str]


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
        names={place: name for name, place in at.items()},
    )


def places(report: Report) -> dict[str, float]:
    """Return where each sub-layer stands on the depth axis: evenly spread within its depth."""
    # 1. The sub-layers of each depth.
    by_depth: dict[int, list[str]] = {}
    for row in report.sublayers:
        by_depth.setdefault(row.depth, []).append(row.name)

    # 2. Their places from this depth to the next.
    at: dict[str, float] = {}
    for depth, names in by_depth.items():
        for k, name in enumerate(names):
            at[name] = depth + k / len(names)
    return at


# -- curves ----------------------------------------------------------------------------------------
def _gains(report: Report) -> list[DepthCurve]:
    """Return branch norms per kind with their bands; bounds and earlier norms are dashed."""
    norms, bounds, earlier = [], [], []
    for look in LOOKS:
        norms.append(_intervals(report, look, "branch_norm", look.label))
        bounds.append(_bound(report, look))
        earlier.append(_earlier(report, look))
    return _drawable([*norms, *bounds, *earlier])


def _drawable(curves: list[DepthCurve]) -> list[DepthCurve]:
    """Return the curves that have something to show."""
    return [curve for curve in curves if curve.finite]


def _is_split(report: Report) -> bool:
    """Return whether branch norms come with their two factors.

    Only a norm at the branch's beginning gives them.
    """
    return any(row.norm_gain and row.core_norm for row in report.sublayers)


def _factors(report: Report) -> list[DepthCurve]:
    """Return core ‖J‖ per kind and 1/σ_x; without an input norm, the residual map instead."""
    if report.tier == "weights":
        return []  # nothing was run
    if _is_split(report):
        curves = [_intervals(report, look, "core_norm", f"core, {look.label}") for look in LOOKS]
        curves.append(_single(report, "norm_gain", "1/σ gain"))
    else:
        curves = [
            _single(report, "residual_norm", "‖aI + J‖"),
            _single(report, "out_norm_gain", "out-norm gain"),
        ]
    return _drawable(curves)


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

        # A gap, so that the line does not cross a sub-layer without a figure.
        interval: Interval | None = getattr(row, key)
        if interval is None or not _is_drawable(interval.estimate):
            interval = _NOTHING
        points.append((at[row.name], interval))
    return points


def _intervals(report: Report, look: Look, key: str, label: str) -> DepthCurve:
    """Return a figure of one kind of sub-layers with its intervals as a band."""
    x, y, low, high = [], [], [], []
    for place, interval in _pick(report, look.kinds, key):
        x.append(place)
        y.append(interval.estimate)
        # 0 has no place on a log scale.
        low.append(max(interval.lower, 1e-3 * interval.estimate))
        high.append(interval.upper)
    return DepthCurve(label, x, y, look.colour, look.marker, low=low, high=high)


def _single(report: Report, key: str, label: str) -> DepthCurve:
    """Return a figure of all kinds of sub-layers as one curve without a band."""
    x, y = [], []
    for place, interval in _pick(report, _ALL_KINDS, key):
        x.append(place)
        y.append(interval.estimate)

    # The gain of a norm at the branch's end stands next to the figure of the panel.
    if key == "out_norm_gain":
        return DepthCurve(label, x, y, PALE, dashed=True)
    return DepthCurve(label, x, y, INK)


def _earlier(report: Report, look: Look) -> DepthCurve:
    """Return the branch norms of the earlier model, dashed; empty without a comparison."""
    norms = {}
    if report.against is not None:
        norms = report.against.branch_norms
    at = places(report)
    x, y = [], []
    for row in report.sublayers:
        # The earlier model may lack a sub-layer.
        is_shown = row.kind in look.kinds and row.name in norms
        if not is_shown:
            continue
        _, estimate, _ = norms[row.name]
        if not _is_drawable(estimate):
            estimate = math.nan
        x.append(at[row.name])
        y.append(estimate)
    return DepthCurve("earlier", x, y, look.colour, dashed=True)


def _bound(report: Report, look: Look) -> DepthCurve:
    """Return the paper's bound, less 1; of weights alone it is the figure that is shown."""
    at = places(report)
    x, y = [], []
    for row in report.sublayers:
        is_shown = row.kind in look.kinds and _is_drawable(row.bound)
        if is_shown:
            x.append(at[row.name])
            y.append(_excess(row))
    if report.tier == "weights":
        return DepthCurve(look.label, x, y, look.colour, look.marker, dashed=True)
    return DepthCurve("paper's bound − 1", x, y, look.colour, dashed=True)


def _excess(row: SublayerRecord) -> float:
    """Return what the bound, which is on |I + J|, leaves for the branch: its excess over 1."""
    bound = row.bound
    assert bound is not None
    if bound > 1:
        return bound - 1
    return math.nan  # nothing, or a bound that was rounded below 1


def extent(curves: list[DepthCurve]) -> tuple[float, float]:
    """Return the smallest and largest value of a panel, bands included.

    The two are at least a factor of 3 apart.

    Args:
        curves: with at least one finite value.
    """
    # 1. All that is drawn.
    values: list[float] = []
    for curve in curves:
        values += curve.y
        values += curve.low or []
        values += curve.high or []
    finite = [value for value in values if math.isfinite(value)]

    # 2. Its ends, moved apart on the log scale if they are too near.
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
        norm = None
        if row.branch_norm:
            norm = row.branch_norm.estimate
        # A norm of 0 has a sign of its own.
        is_missing = norm != 0 and not _is_drawable(norm)
        if is_missing:
            missing.append(at[row.name])
    return missing


def _zeros(report: Report) -> list[float]:
    """Return places of branches that add nothing: a log scale has no place for 0."""
    at = places(report)
    zeros = []
    for row in report.sublayers:
        norm = row.branch_norm
        if norm and norm.estimate == 0:
            zeros.append(at[row.name])
    return zeros


def _worst(report: Report, at: dict[str, float]) -> WorstBranch | None:
    """Return the largest branch norm with its place on the depth axis."""
    worst = worst_branch(report)
    if worst is None:
        return None
    row, norm = worst
    return WorstBranch(row.name, at[row.name], norm)


def _limits(report: Report, field: str) -> list[Threshold]:
    """Return the thresholds on a figure at which a rule fires."""
    limits = []
    for level in ("warning", "error"):
        value = drawn_threshold(report, field, level)
        if value is None:
            continue
        limits.append(Threshold(level, value))
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
