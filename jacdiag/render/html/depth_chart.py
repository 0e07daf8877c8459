"""The geometry of a chart over depth, for the template that writes it as inline SVG.

A browser shows the text of a point when the mouse rests on it. So each point has its sub-layer and
its interval as a text, which a picture file cannot have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jacdiag.records.number_format import between, three
from jacdiag.render.content.compared_curves import ComparedCurves
from jacdiag.render.content.condition_panels import ConditionPanel
from jacdiag.render.content.depth_curves import LOOKS, DepthCurve, Threshold, extent
from jacdiag.render.content.depth_view import DepthView
from jacdiag.render.plots.text_layout import moved_apart

Scale = Callable[[float], float]

WIDTH, HEIGHT = 860.0, 300.0
_LEFT, _TOP, _BOTTOM = 58.0, 14.0, 38.0
_HANDLE = 26.0  # the piece of a line before its label
_GAP = 8.0  # on both sides of it
_INSET = 12.0  # between the last point and the labels
_CHARACTER = 6.9  # the width of one, on average, in bold
_FOOT = 9.0  # the signs of what has no place on the scale stand so far above the axis
_MOST_TICKS = 14  # on the depth axis
# Factors of the ticks of a logarithmic axis, from few to many.
_STEPS_OF_A_DECADE = ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0))
_TICK_STEPS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]
_CROWDED = 40  # points on a curve from which the markers are small
_LABEL_HEIGHT = 15.0  # of a label
_NO_INTERVAL = 1e-9  # relative width below which only one number is written
_UNIT = "(a factor, no unit)"
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
    """A curve: the corners of its segments, and its points.

    Attributes:
        style: of the kind of sub-layer; "plain" for figures of all kinds.
        dashes: classes of the style sheet: "dashed", or "earlier" for the earlier model, and
            "bare" if the points have no markers.
        segments: corners of each unbroken piece, as SVG has them ("x,y x,y").
    """

    style: str
    dashes: str
    segments: list[str]
    points: list[Point]


@dataclass(frozen=True)
class ChartLabel:
    """A label to the right of the chart, with a piece of the line that it names.

    No label stands among the data, so that none covers a line.

    Attributes:
        text: what it says.
        y: its height, moved apart from the other labels.
        style: of what it names: classes of the style sheet.
        kind: "curve", "limit" or "sign".
        has_marker: whether the points of the curve have markers.
    """

    text: str
    y: float
    style: str
    kind: str
    has_marker: bool = False


@dataclass(frozen=True)
class Tick:
    """A tick of an axis, in pixels, with its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Limit:
    """A threshold of a rule, in pixels. `style` is the level, or the kind that it is for."""

    y: float
    style: str


@dataclass(frozen=True)
class Chart:
    """A panel with everything in pixels.

    Attributes:
        title: what it shows, with its unit.
        marker: half the size of a point.
        labels: to the right of it.
        rings: points that miss their condition.
        signs: what has no place on the scale.
        handle: width of the piece of a line before a label.
        gap: on both sides of it.
        note: what its marks mean; "" if it has none of its own.
    """

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
    labels: list[ChartLabel]
    rings: list[tuple[float, float]]
    signs: list[tuple[float, float]]
    handle: float = _HANDLE
    gap: float = _GAP
    note: str = ""


@dataclass(frozen=True)
class _Panel:
    """What a chart shows, before it is laid out.

    Attributes:
        title: what it shows, with its unit.
        curves: with at least one finite value.
        limits: thresholds on the figure.
        missed: place and value of the points with a ring.
        named: the kinds of sub-layers are named in this chart.
        absent: places of what has no place on the scale.
        absent_words: what these have in place of a value.
        note: what its marks mean.
    """

    title: str
    curves: list[DepthCurve]
    limits: list[Threshold]
    missed: list[tuple[float, float]]
    named: bool = True
    absent: tuple[float, ...] = ()
    absent_words: str = ""
    note: str = ""


def charts_of(depth: DepthView) -> list[Chart]:
    """Return the charts of a report: gains over depth, and the two conditions of the paper.

    Args:
        depth: what a picture of the report draws.
    """
    # 1. The gains, or the bound if nothing was run.
    title, limits = "the paper's bound, less 1, over depth", []
    if depth.measured:
        title, limits = "branch norm ‖J‖ over depth", depth.gain_limits
    absent = tuple(depth.missing)
    gains = _Panel(
        f"{title} {_UNIT}",
        depth.gains,
        limits,
        [],
        absent=absent,
        absent_words=depth.missing_words,
    )
    panels = [gains]

    # 2. The two conditions, or the residual map. A kind is named once.
    named = {curve.label for curve in depth.gains}
    panels += [_condition_panel(condition, named) for condition in depth.conditions]
    panels.append(_Panel(f"residual map over depth {_UNIT}", depth.residuals, [], []))
    return [_build_chart(panel, depth.names, depth.last) for panel in panels if panel.curves]


def charts_of_comparison(compared: ComparedCurves) -> list[Chart]:
    """Return the charts of two models: a chart for each figure of their sub-layers.

    Args:
        compared: the curves of both models.
    """
    charts = []
    for panel in compared.panels:
        note = ""
        if panel.changed:
            note = "A ring: the intervals of A and B are apart."
        unit = _UNIT
        if panel.has_unit:
            unit = "(in the unit of the residual stream)"
        title = f"{panel.title} over depth {unit}"
        unlaid = _Panel(title, panel.curves, [], panel.changed, note=note)
        charts.append(_build_chart(unlaid, compared.names, compared.last))
    return charts


def _condition_panel(condition: ConditionPanel, named: set[str]) -> _Panel:
    """Return the panel of a condition: its figure with its targets."""
    labels = {curve.label for curve in condition.curves}
    return _Panel(
        title=f"{condition.title} ({condition.figure} over depth, a factor without unit)",
        curves=condition.curves,
        limits=condition.targets,
        missed=condition.missed,
        named=not labels <= named,
        note=" ".join(_notes(condition)),
    )


def _notes(condition: ConditionPanel) -> list[str]:
    """Return what the marks of a condition's chart mean, one sentence each."""
    notes = []
    if any(curve.over_tokens for curve in condition.curves):
        notes.append(
            "A point is the 99th percentile over tokens; its bar reaches from their median to the "
            "largest."
        )
    if condition.missed:
        notes.append("A ring: does not meet the condition in full.")
    return notes


def _build_chart(panel: _Panel, names: Mapping[float, str], last_place: float) -> Chart:
    """Lay out one panel.

    Args:
        panel: with at least one finite value.
        names: place on the depth axis -> name of the sub-layer.
        last_place: the end of the depth axis.
    """
    # 1. The range of values. A threshold near the data has a place in it.
    low, high = extent(panel.curves)
    limits = [limit for limit in panel.limits if low / 10 <= limit.value <= high * 10]
    values = [low, high, *(limit.value for limit in limits)]
    low, high = min(values) / 1.15, max(values) * 1.15

    # 2. The scales: depth is linear, gains are logarithmic. Labels take room on the right.
    labels = _texts(panel, limits)
    right = WIDTH - _label_room(labels)
    bottom = HEIGHT - _BOTTOM
    lowest = bottom
    if panel.absent:
        lowest -= 2 * _FOOT
    last = max(last_place, 1.0)

    def at_x(place: float) -> float:
        return round(_LEFT + place / last * (right - _INSET - _LEFT), 1)

    def at_y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        share = min(max(share, 0.0), 1.0)
        return round(lowest - share * (lowest - _TOP), 1)

    # 3. The curves.
    lines = []
    for curve in panel.curves:
        points = _points(curve, names, at_x, at_y)
        segments = _segments(curve, at_x, at_y)
        lines.append(ChartLine(_style(curve.colour), _dashes(curve), segments, points))
    most_points = max(len(line.points) for line in lines)

    # 4. Axes, thresholds and labels.
    return Chart(
        title=panel.title,
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
        limits=[Limit(at_y(limit.value), _limit_style(limit)) for limit in limits],
        labels=_placed(labels, at_y, bottom - _FOOT),
        rings=[(at_x(place), at_y(value)) for place, value in panel.missed],
        signs=[(at_x(place), bottom - _FOOT) for place in panel.absent],
        note=panel.note,
    )


# -- labels ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Text:
    """A label before it is placed. It stands at the mean of its values; at the foot without any."""

    text: str
    values: list[float]
    style: str
    kind: str
    has_marker: bool = False


def _texts(panel: _Panel, limits: list[Threshold]) -> list[_Text]:
    """Return the labels of a chart. One label stands for all curves of one name."""
    # 1. The curves.
    by_name: dict[str, list[DepthCurve]] = {}
    for curve in panel.curves:
        by_name.setdefault(curve.label, []).append(curve)
    texts = []
    for name, curves in by_name.items():
        first, *others = curves
        style = _style(first.colour)
        if others:
            style = "plain"
        is_shown = panel.named or not first.marker
        if is_shown:
            ends = [curve.finite[-1] for curve in curves]
            dashes = _dashes(first)
            has_marker = "bare" not in dashes
            texts.append(_Text(name, ends, f"{style} {dashes}", "curve", has_marker))

    # 2. Thresholds, and what has no place on the scale.
    for limit in limits:
        texts.append(_Text(limit.text, [limit.value], _limit_style(limit), "limit"))
    if panel.absent:
        texts.append(_Text(panel.absent_words, [], "", "sign"))
    return texts


def _label_room(labels: list[_Text]) -> float:
    """Return the room to the right of a chart that its labels need, in pixels."""
    longest = max((len(label.text) for label in labels), default=0)
    return 2 * _GAP + _HANDLE + _GAP + _CHARACTER * longest


def _placed(labels: list[_Text], at_y: Scale, foot: float) -> list[ChartLabel]:
    """Return labels at heights at which none lies on another."""
    heights = []
    for label in labels:
        height = foot
        if label.values:
            height = sum(map(at_y, label.values)) / len(label.values)
        heights.append(height)
    placed = []
    for label, y in zip(labels, _moved_apart(heights), strict=True):
        placed.append(
            ChartLabel(label.text, round(y, 1), label.style, label.kind, label.has_marker)
        )
    return placed


def _limit_style(limit: Threshold) -> str:
    """Return the style of a threshold: that of the kind that it is for, else its level."""
    style = _style(limit.colour)
    if style == "plain":
        return limit.level
    return style


def _dashes(curve: DepthCurve) -> str:
    """Return how the line of a curve is broken, as a class of the style sheet."""
    # 1. Solid.
    if not curve.dashed:
        return ""

    # 2. Broken in one of two ways. A line of points without markers is bare.
    dashes = "dashed"
    if curve.earlier:
        dashes = "earlier"
    if not curve.marker:
        dashes += " bare"
    return dashes


# -- geometry --------------------------------------------------------------------------------------
def _points(curve: DepthCurve, names: Mapping[float, str], at_x: Scale, at_y: Scale) -> list[Point]:
    """Return the finite points of a curve, each with the text that is shown under the mouse."""
    points = []
    for place, x in enumerate(curve.x):
        value = curve.y[place]
        if not math.isfinite(value):
            continue

        # 1. The ends of its interval, if it has one.
        low, high = value, value
        if curve.low is not None and curve.high is not None:
            low, high = curve.low[place], curve.high[place]

        # 2. What is said of it.
        name = names.get(x, "")
        words = _interval_text(low, value, high)
        if curve.over_tokens:
            words = f"{three(value)} (median to largest token {between(low, high)})"
        text = f"{name}: {curve.label} {words}"

        # 3. Where it is drawn. An interval without an upper end leaves the panel.
        top: float = _TOP
        if math.isfinite(high):
            top = at_y(high)
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


def _style(colour: str) -> str:
    """Return the class of a colour in the page's style sheet."""
    return _STYLES.get(colour, "plain")


def _depths(last: float) -> list[int]:
    """Return the depths that have a tick."""
    count = int(last) + 1
    step = next(step for step in _TICK_STEPS if count <= step * _MOST_TICKS)
    return list(range(0, count, step))


def _round_values(low: float, high: float) -> list[float]:
    """Return the values with a tick on a logarithmic axis: powers of 10, or 1, 2 and 5.

    A scale that is too short for two of these has finer ones.

    >>> _round_values(1e-13, 3e-13)
    [1e-13, 2e-13]
    >>> _round_values(0.8, 30), _round_values(0.25, 0.8)
    ([1.0, 2.0, 5.0, 10.0, 20.0], [0.25, 0.3, 0.4, 0.5, 0.6, 0.8])
    """
    first, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps: Sequence[Sequence[float]] = _STEPS_OF_A_DECADE[1:]
    if end - first > 3:
        steps = _STEPS_OF_A_DECADE[:1]

    values: list[float] = []
    for factors in steps:
        values = [factor * 10.0**power for power in range(first, end + 1) for factor in factors]
        # Products of floats have digits that nobody wants to read.
        values = [float(f"{value:.12g}") for value in values if low <= value <= high]
        if len(values) > 1:
            break
    return values


def _moved_apart(heights: list[float]) -> list[float]:
    """Move labels apart until none lies on another; their order stays."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    room = HEIGHT - _BOTTOM - _TOP
    shares = [(heights[place] - _TOP) / room for place in order]
    moved = list(heights)
    for place, share in zip(order, moved_apart(shares, _LABEL_HEIGHT / room), strict=True):
        moved[place] = _TOP + share * room
    return moved
