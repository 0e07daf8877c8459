"""Figures of sub-layers as curves over depth: plain lists, with how each is drawn.

The picture of a report and the charts of its page draw them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jacdiag.records import Interval, Report, SublayerRecord
from jacdiag.records.number_format import three

INK, PALE = "#222222", "#6b6b6b"
_NOTHING = Interval.exact(math.nan)


@dataclass(frozen=True)
class Look:
    """How a kind of sub-layer is drawn. The tones differ in lightness, for a print in grey.

    A reader who cannot tell red from green tells them by the same lightness.
    """

    label: str
    kinds: tuple[str, ...]
    colour: str
    marker: str


LOOKS = (
    Look("attention", ("attention",), "#17406d", "o"),
    Look("FFN", ("mlp", "moe"), "#d67d22", "s"),
    Look("other", ("mixer", "conv", "other"), "#276f51", "^"),
)
ALL_KINDS = tuple(kind for look in LOOKS for kind in look.kinds)


@dataclass(frozen=True)
class DepthCurve:
    """Values over depth.

    Attributes:
        label: its name at the right end.
        x: places on the depth axis.
        y: positive values; nan where there is none.
        colour, marker, dashed: how it is drawn.
        earlier: it is of the earlier model; drawn in dashes and dots.
        over_tokens: it is the 99th percentile over tokens, and its band is their range from the
            median to the largest.
        low, high: the band, if there is one. A `high` that is inf stands for an interval without
            an upper end.
    """

    label: str
    x: list[float]
    y: list[float]
    colour: str
    marker: str = ""
    dashed: bool = False
    earlier: bool = False
    over_tokens: bool = False
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
    """A threshold on the figure of a panel.

    Attributes:
        level: of the rule that fires above it; "info" where a condition ceases to be met.
        value: where it lies.
        text: its label.
        colour: of the kind of sub-layer that it is for.
    """

    level: str
    value: float
    text: str
    colour: str = INK


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
def branch_curves(report: Report) -> list[DepthCurve]:
    """Return branch norms per kind with their bands; bounds and earlier norms are dashed."""
    norms, bounds, earlier = [], [], []
    for look in LOOKS:
        norms.append(interval_curve(report, look, "branch_norm", look.label))
        bounds.append(_bound(report, look))
        earlier.append(_earlier(report, look))
    return drawable_curves([*norms, *bounds, *earlier])


def drawable_curves(curves: list[DepthCurve]) -> list[DepthCurve]:
    """Return the curves that have something to show."""
    return [curve for curve in curves if curve.finite]


def is_split(report: Report) -> bool:
    """Return whether branch norms come with their two factors.

    Only a norm at the branch's beginning gives them.
    """
    return any(row.norm_gain and row.core_norm for row in report.sublayers)


def residual_curves(report: Report) -> list[DepthCurve]:
    """Return the residual map and the gain of a norm at the branch's end.

    Nothing of branches that begin with a norm: those are split into two factors.
    """
    if report.tier == "weights" or is_split(report):
        return []
    curves = [
        _single(report, "residual_norm", _residual_label(report)),
        _single(report, "out_norm_gain", "out-norm gain"),
    ]
    return drawable_curves(curves)


def _residual_label(report: Report) -> str:
    """Return the symbol of the residual map. In post-norm it holds the norm after the sum."""
    placements = {row.placement for row in report.sublayers}
    if "post" not in placements:
        return "‖aI + J‖"
    if placements == {"post"}:
        return "‖J_norm (aI + J)‖"
    return "residual norm"


def is_drawable(value: float | None) -> bool:
    """Return whether a log scale has a place for a value."""
    return value is not None and math.isfinite(value) and value > 0


def points_of_kinds(
    report: Report, kinds: tuple[str, ...], key: str
) -> list[tuple[float, Interval]]:
    """Return place and interval of a figure; an interval of nan where nothing can be drawn."""
    at = places(report)
    points = []
    for row in report.sublayers:
        if row.kind not in kinds:
            continue

        # A gap, so that the line does not cross a sub-layer without a figure.
        interval: Interval | None = getattr(row, key)
        if interval is None or not is_drawable(interval.estimate):
            interval = _NOTHING
        points.append((at[row.name], interval))
    return points


def interval_curve(report: Report, look: Look, key: str, label: str) -> DepthCurve:
    """Return a figure of one kind of sub-layers with its intervals as a band."""
    x, y, low, high = [], [], [], []
    for place, interval in points_of_kinds(report, look.kinds, key):
        x.append(place)
        y.append(interval.estimate)
        # 0 has no place on a log scale.
        low.append(max(interval.lower, 1e-3 * interval.estimate))
        high.append(interval.upper)
    return DepthCurve(label, x, y, look.colour, look.marker, low=low, high=high)


def _single(report: Report, key: str, label: str) -> DepthCurve:
    """Return a figure of all kinds of sub-layers as one curve without a band."""
    x, y = [], []
    for place, interval in points_of_kinds(report, ALL_KINDS, key):
        x.append(place)
        y.append(interval.estimate)

    # The gain of a norm at the branch's end stands next to the figure of the panel.
    if key == "out_norm_gain":
        return DepthCurve(label, x, y, PALE, dashed=True)
    return DepthCurve(label, x, y, INK)


def _earlier(report: Report, look: Look) -> DepthCurve:
    """Return the branch norms of the earlier model, dashed; empty without a comparison."""
    # 1. What the earlier model has.
    norms = {}
    if report.against is not None:
        norms = report.against.branch_norms

    # 2. Its norms at the places of this model's sub-layers. It may lack some of them.
    at = places(report)
    x = []
    y = []
    for row in report.sublayers:
        is_shown = row.kind in look.kinds and row.name in norms
        if not is_shown:
            continue

        # A log scale has no place for 0: the curve has a gap there.
        _, estimate, _ = norms[row.name]
        if not is_drawable(estimate):
            estimate = math.nan
        x.append(at[row.name])
        y.append(estimate)
    return DepthCurve("earlier model", x, y, look.colour, dashed=True, earlier=True)


def _bound(report: Report, look: Look) -> DepthCurve:
    """Return the paper's bound, less 1; of weights alone it is the figure that is shown."""
    at = places(report)
    x, y = [], []
    for row in report.sublayers:
        is_shown = row.kind in look.kinds and is_drawable(row.bound)
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


def write_threshold(value: float) -> str:
    """Return a threshold as the user wrote it: 12.5, not 12.5000."""
    if 1e-4 <= value < 1e5:
        return f"{float(f'{value:.3g}'):,.10g}"
    return three(value)
