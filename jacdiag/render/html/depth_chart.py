"""The geometry of a chart over depth, for the template that writes it as inline SVG.

A browser shows the text of a point when the mouse rests on it. So each point has its sub-layer and
its interval as a text, which a picture file cannot have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jacdiag.records.number_format import between, three
from jacdiag.render.plots.depth_curves import LOOKS, DepthCurve, DepthView, Threshold, extent

Scale = Callable[[float], float]

WIDTH, HEIGHT = 860.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 150.0, 14.0, 38.0
_MOST_TICKS = 14  # on the depth axis
_CROWDED = 40  # points on a curve from which the markers are small
_LABEL_HEIGHT = 15.0  # of a label at the right end of a curve
_NO_INTERVAL = 1e-9  # relative width below which only one number is written
_STYLES = dict(zip((look.colour for look in LOOKS), ("attention", "ffn", "other"), strict=True))


@dataclass(frozen=True)
class Point:
    """One sub-layer of a curve, in pixels. `low` and `high` are the ends of its interval."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class ChartLine:
    """A curve: the corners of its segments, its points and its label at the right end.

    Attributes:
        style: number of the colour and marker among the kinds of sub-layers; "plain" for figures of
            all kinds.
        segments: corners of each unbroken piece, as SVG has them ("x,y x,y").
        label_y: height of the label, moved apart from the other labels.
    """

    label: str
    style: str
    dashed: bool
    segments: list[str]
    points: list[Point]
    label_y: float


@dataclass(frozen=True)
class Tick:
    """A tick of an axis, in pixels, with its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Limit:
    """A threshold of a rule, in pixels."""

    y: float
    level: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A panel with everything in pixels. `marker` is half the size of a point."""

    title: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    marker: float
    lines: list[ChartLine]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    limits: list[Limit]


def charts_of(depth: DepthView) -> list[Chart]:
    """Return the charts of a report: gains over depth, and the two factors of the gains.

    Args:
        depth: what a picture of the report draws.
    """
    gain_title = "branch gain ‖J‖ over depth" if depth.measured else "the paper's bound over depth"
    panels = [
        (gain_title, depth.gains, depth.gain_limits),
        ("its two factors: core ‖J‖ and 1/σ", depth.factors, depth.norm_gain_limits),
    ]
    return [
        build_chart(title, curves, limits, depth)
        for title, curves, limits in panels
        if any(curve.finite for curve in curves)
    ]


def build_chart(
    title: str, curves: list[DepthCurve], limits: list[Threshold], depth: DepthView
) -> Chart:
    """Lay out one panel.

    Args:
        title: of the panel.
        curves: with at least one finite value.
        limits: thresholds on the figure of the panel.
        depth: gives the names of the sub-layers and the end of the depth axis.
    """
    # 1. The scales: depth is linear, gains are logarithmic.
    low, high = extent(curves)
    low, high = low / 1.15, high * 1.15
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    last = max(depth.last, 1.0)

    def at_x(place: float) -> float:
        return round(_LEFT + place / last * (right - _LEFT), 1)

    def at_y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        share = min(max(share, 0.0), 1.0)
        return round(bottom - share * (bottom - _TOP), 1)

    # 2. The curves, with labels that do not lie on each other.
    ends = [at_y(curve.finite[-1]) for curve in curves if curve.finite]
    heights = _moved_apart(ends)
    lines = []
    for curve, label_y in zip([c for c in curves if c.finite], heights, strict=True):
        points = _points(curve, depth, at_x, at_y)
        segments = _segments(curve, at_x, at_y)
        lines.append(
            ChartLine(curve.label, _style(curve), curve.dashed, segments, points, round(label_y, 1))
        )

    # 3. Axes and thresholds.
    most_points = max(len(line.points) for line in lines)
    return Chart(
        title=title,
        width=WIDTH,
        height=HEIGHT,
        left=_LEFT,
        right=right,
        top=_TOP,
        bottom=bottom,
        marker=2.0 if most_points > _CROWDED else 3.8,
        lines=lines,
        x_ticks=[Tick(at_x(depth_of), str(depth_of)) for depth_of in _depths(last)],
        y_ticks=[Tick(at_y(value), three(value)) for value in _round_values(low, high)],
        limits=[
            Limit(at_y(limit.value), limit.level, f"{limit.level} above {three(limit.value)}")
            for limit in limits
            if low <= limit.value <= high
        ],
    )


def _points(curve: DepthCurve, depth: DepthView, at_x: Scale, at_y: Scale) -> list[Point]:
    """Return the finite points of a curve, each with the text that is shown under the mouse."""
    points = []
    for place, x in enumerate(curve.x):
        value = curve.y[place]
        if not math.isfinite(value):
            continue
        low, high = value, value
        if curve.low is not None and curve.high is not None:
            low, high = curve.low[place], curve.high[place]
        name = depth.names.get(x, "")
        text = f"{name}: {curve.label} {_interval_text(low, value, high)}"
        top = at_y(high) if math.isfinite(high) else _TOP
        points.append(Point(at_x(x), at_y(value), at_y(low), top, text))
    return points


def _interval_text(low: float, value: float, high: float) -> str:
    if not math.isfinite(high):
        return f"at least {three(low)}"
    if high - low <= _NO_INTERVAL * value:
        return three(value)
    return between(low, high)


def _segments(curve: DepthCurve, at_x: Scale, at_y: Scale) -> list[str]:
    """Return the corners of each unbroken piece of a curve."""
    segments: list[list[str]] = [[]]
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(y):
            segments[-1].append(f"{at_x(x)},{at_y(y)}")
        elif segments[-1]:
            segments.append([])
    return [" ".join(corners) for corners in segments if len(corners) > 1]


def _style(curve: DepthCurve) -> str:
    """Return the name of a curve's style in the page's style sheet."""
    return _STYLES.get(curve.colour, "plain")


def _depths(last: float) -> list[int]:
    """Return the depths that have a tick."""
    count = int(last) + 1
    step = math.ceil(count / _MOST_TICKS)
    return list(range(0, count, step))


def _round_values(low: float, high: float) -> list[float]:
    """Return the values with a tick on a logarithmic axis: powers of 10, or 1, 2 and 5."""
    first, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors: tuple[float, ...] = (1.0, 2.0, 5.0)
    if end - first > 3:
        factors = (1.0,)
    values = [factor * 10.0**power for power in range(first, end + 1) for factor in factors]
    return [value for value in values if low <= value <= high]


def _moved_apart(heights: list[float]) -> list[float]:
    """Move labels down until none lies on another; their order stays."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    moved = list(heights)
    lowest_free = -math.inf
    for place in order:
        moved[place] = max(heights[place], lowest_free)
        lowest_free = moved[place] + _LABEL_HEIGHT
    overhang = lowest_free - _LABEL_HEIGHT - (HEIGHT - _BOTTOM)
    if overhang > 0:
        moved = [height - overhang for height in moved]
    return moved
