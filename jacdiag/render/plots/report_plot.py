"""The picture of a report: branch norm over depth, and below it the two conditions of the paper.

No label stands among the data, so that none covers a line: names, thresholds and signs stand to the
right of their panel, and the worst branch above it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jacdiag.records import Report
from jacdiag.records.number_format import spoken
from jacdiag.records.output_file import write_output
from jacdiag.render.content.condition_panels import ConditionPanel
from jacdiag.render.content.depth_curves import INK, PALE, DepthCurve, Threshold, extent
from jacdiag.render.content.depth_view import DepthView
from jacdiag.render.content.sentences import confidence_words
from jacdiag.render.plots.picture_file import STYLE, check_suffix, picture_bytes
from jacdiag.render.plots.text_layout import (
    SideLabel,
    draw_side_labels,
    fit_headline,
    fit_lines,
    label_room,
    shorten,
    text_width,
)
from jacdiag.render.view import ReportView, build_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 160
_STYLE = {**STYLE, "font.size": 10.5}

# -- sizes in inches -------------------------------------------------------------------------------
_WIDTH = 11.5
_EDGE = 0.32  # between the picture's edge and its texts
_LEFT = 1.14  # of a panel, for its vertical axis
_UPPER, _LOWER, _ALONE = 2.45, 1.65, 3.3  # heights of panels
_TITLE_LINE = 0.19  # the second line of a title
_ABOVE = 0.34  # of a panel, for its title or for the worst branch
_BELOW = 0.52  # of a panel, for its horizontal axis
_FOOT = 0.30  # for the line that says what shades and rings mean

# -- texts -----------------------------------------------------------------------------------------
_FACTS, _TITLE, _NOTE = 10.0, 10.5, 8.5  # points
_MOST_FACTS = 3  # lines
_LONGEST_FACT = 0.45  # of the width: a longer name is shortened in its middle
_DEPTH = "depth: layer"
_MANY = 40  # points on a curve from which markers are small

# -- strokes ---------------------------------------------------------------------------------------
_DASHES, _DASHES_AND_DOTS, _DOTS = (0, (5, 3)), (0, (6, 2, 1.2, 2)), (0, (1, 2))


@dataclass(frozen=True)
class _Panel:
    """One panel before it is drawn.

    Attributes:
        figure: what the vertical axis shows.
        curves: on a log scale; the panel says `reason` if there are none.
        limits: thresholds that lie near enough to the data to matter.
        signs: marker, words and places of what has no place on the scale.
        title: above it.
        missed: points with a ring.
        named: the kinds of sub-layers are named in this panel.
        reason: why there is no curve.
    """

    figure: str
    curves: list[DepthCurve]
    limits: list[Threshold]
    signs: list[tuple[str, str, list[float]]]
    title: str = ""
    missed: Sequence[tuple[float, float]] = ()
    named: bool = True
    reason: str = "nothing could be measured"


def save(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw a report and write the picture; the suffix (.png, .svg, .pdf) chooses the format.

    Neither pyplot nor its current figure is touched, and the rcParams are as before. The file
    appears completely or not at all.

    Args:
        report: what to draw.
        path: where to; the string "-" is stdout. See `jacdiag.records.output_file.write_output` for
            devices and links.

    Raises:
        UsageError: another suffix, or a path that cannot be written to.

    Example:
        >>> save(report, "gain.png")                              # doctest: +SKIP
    """
    suffix = check_suffix(path)
    write_output(path, picture_bytes(lambda: draw(report), suffix, dpi=_DPI, style=_STYLE))


def draw(report: Report) -> Figure:
    """Build the figure without writing it.

    Args:
        report: what to draw.
    """
    from matplotlib.figure import Figure

    # 1. The panels and the texts around them.
    view = build_view(report)
    depth = view.depth
    upper = _gain_panel(depth)
    lower = _lower_panels(depth)
    figure = Figure(figsize=(_WIDTH, 6.0), facecolor="white")
    header, header_height = _header(view)

    # 2. The height of the picture follows from them.
    rows = [_ALONE]
    if lower:
        rows = [_UPPER, _LOWER]
    height = header_height + sum(rows) + len(rows) * (_ABOVE + _BELOW) + _FOOT
    if any("\n" in panel.title for panel in lower):
        height += _TITLE_LINE
    figure.set_size_inches(_WIDTH, height)
    _draw_header(figure, header)

    # 3. Two panels of the entire width end at the same place.
    room = label_room(_labels(upper, None))
    if len(lower) == 1:
        room = max(room, label_room(_labels(lower[0], None)))

    # 4. The upper panel, over the entire width.
    top = height - header_height - _ABOVE
    place = _Room(0.0, _WIDTH, top - rows[0], rows[0], room)
    first = _place(figure, upper, place, depth, None)
    _draw_worst(first, depth)

    # 5. Those below it, next to each other.
    share = _WIDTH / max(len(lower), 1)
    for number, panel in enumerate(lower):
        if len(lower) > 1:
            room = label_room(_labels(panel, None))
        place = _Room(number * share, (number + 1) * share, _FOOT + _BELOW, _LOWER, room)
        _place(figure, panel, place, depth, first)
    _draw_note(figure, [upper, *lower], report)
    return figure


# -- what is in the panels -------------------------------------------------------------------------
def _gain_panel(depth: DepthView) -> _Panel:
    """Return the upper panel: branch norms, or the paper's bound if nothing was run."""
    # 1. The figure. The bound has no thresholds.
    figure = "the paper's bound, less 1"
    limits = []
    if depth.measured:
        figure = "branch norm ‖J‖"
        limits = _near(depth.gain_limits, depth.gains)

    # 2. What the panel says if it has no curve.
    reason = "nothing could be measured"
    if depth.zeros:
        reason = "every branch norm is 0"

    # 3. Sub-layers whose value has no place on the scale.
    signs = [("x", depth.missing_words, depth.missing), ("v", "0", depth.zeros)]
    return _Panel(
        figure=figure,
        curves=depth.gains,
        limits=limits,
        signs=[sign for sign in signs if sign[2]],
        reason=reason,
    )


def _lower_panels(depth: DepthView) -> list[_Panel]:
    """Return a panel for each condition, one for the residual map, or none."""
    # 1. The two conditions. A kind is named once in the picture.
    named = {curve.label for curve in depth.gains}
    panels = []
    for condition in depth.conditions:
        panels.append(_condition_panel(condition, named))

    # 2. What a model without them has.
    if depth.residuals:
        panels.append(_Panel("residual map", depth.residuals, [], []))
    return panels


def _condition_panel(condition: ConditionPanel, named: set[str]) -> _Panel:
    """Return the panel of one condition; its kinds are named if they are not yet."""
    labels = {curve.label for curve in condition.curves}
    fits = partial(_has_room, _WIDTH / 2 - 1.5 * _EDGE)
    title = fit_lines(condition.title.split(), " ", fits, 2)
    return _Panel(
        figure=condition.figure,
        curves=condition.curves,
        limits=_near(condition.targets, condition.curves),
        signs=[],
        title="\n".join(title),
        missed=condition.missed,
        named=not labels <= named,
    )


def _near(limits: Sequence[Threshold], curves: list[DepthCurve]) -> list[Threshold]:
    """Return the thresholds that lie near enough to the data to matter."""
    if not curves:
        return []
    low, high = extent(curves)
    return [limit for limit in limits if low / 10 <= limit.value <= high * 10]


# -- header and note -------------------------------------------------------------------------------
@dataclass(frozen=True)
class _HeaderLine:
    """One line of the header: its distance from the top in inches, and its font."""

    text: str
    below_top: float
    size: float
    weight: str
    colour: str


def _header(view: ReportView) -> tuple[list[_HeaderLine], float]:
    """Return the lines of the header, and its height in inches."""
    # 1. The verdict. A name in it is that of the picture.
    headline = view.verdict.headline
    worst = view.depth.worst
    if worst is not None and headline.endswith(worst.name):
        headline = headline.removesuffix(worst.name) + worst.shown
    lines_of_verdict, size = fit_headline(headline, _WIDTH - 2.6 * _EDGE)
    texts = [(line, size) for line in lines_of_verdict]

    # 2. The model. Its facts are kept whole.
    header = view.header
    facts = [header.name, *header.model.split(", "), *header.state.split(", ")]
    short = partial(_fits, _LONGEST_FACT)
    pieces = [shorten(fact, short) for fact in facts]
    fits = partial(_fits, 1.0)
    texts += [(line, _FACTS) for line in fit_lines(pieces, "  ·  ", fits, _MOST_FACTS)]

    # 3. Their places.
    return _place_lines(texts)


def _place_lines(texts: Sequence[tuple[str, float]]) -> tuple[list[_HeaderLine], float]:
    """Return lines below each other, and their height in inches.

    Args:
        texts: each with its font size. The verdict has a larger one than the facts.
    """
    lines = []
    below_top = 0.22
    for text, size in texts:
        weight, colour = "normal", PALE
        if size > _FACTS:
            weight, colour = "bold", INK
        lines.append(_HeaderLine(text, below_top, size, weight, colour))
        below_top += size * 1.45 / 72
    return lines, below_top + 0.12


def _fits(share: float, text: str) -> bool:
    """Return whether a fact has room in a share of the picture's width."""
    return text_width(text, _FACTS) <= share * (_WIDTH - 2 * _EDGE)


def _draw_header(figure: Figure, lines: Sequence[_HeaderLine]) -> None:
    """Write the verdict, and below it what was audited."""
    height = float(figure.get_figheight())
    for line in lines:
        figure.text(
            _EDGE / _WIDTH,
            1 - line.below_top / height,
            line.text,
            fontsize=line.size,
            fontweight=line.weight,
            color=line.colour,
            va="top",
            parse_math=False,
        )


def _draw_note(figure: Figure, panels: Sequence[_Panel], report: Report) -> None:
    """Say at the foot what shades and rings mean, if there are any."""
    notes = []

    # 1. The shades.
    curves = [curve for panel in panels for curve in panel.curves]
    has_intervals = any(curve.low and not curve.over_tokens for curve in curves)
    if has_intervals:
        shade = confidence_words(report.settings) or "intervals"
        notes.append(f"shaded: {shade}")
    if any(curve.over_tokens for curve in curves):
        notes.append("1/σ: 99th percentile over tokens, shaded from their median to the largest")

    # 2. The rings, or ticks in their place.
    for panel in panels:
        if panel.missed:
            sign = "a ring"
            if _is_crowded(panel):
                sign = "a tick at the foot"
            notes.append(f"{sign}: does not meet the condition in full")
            break
    figure.text(
        _EDGE / _WIDTH,
        0.11 / float(figure.get_figheight()),
        ". ".join(note[0].upper() + note[1:] for note in notes),
        fontsize=_NOTE,
        color=PALE,
        va="bottom",
    )


# -- panels ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Room:
    """The room of a panel in inches: left and right end, lower end, height, room for labels."""

    left: float
    right: float
    bottom: float
    height: float
    labels: float


def _place(
    figure: Figure, panel: _Panel, room: _Room, depth: DepthView, shared: Axes | None
) -> Axes:
    """Draw a panel with its labels.

    Args:
        figure: that it is in.
        panel: what it shows.
        room: where it stands.
        depth: gives the end of the depth axis.
        shared: the panel whose depth axis it shares.
    """
    # 1. Its place: the labels to its right take what they need.
    left = room.left + _LEFT
    width = room.right - left - room.labels
    wide, high = figure.get_size_inches()
    rectangle = (left / wide, room.bottom / high, width / wide, room.height / high)
    axes = figure.add_axes(rectangle, sharex=shared)

    # 2. The scales, the curves, and what has no place on the scale.
    _frame(axes, panel)
    for curve in panel.curves:
        _draw_curve(axes, curve)
    _draw_rings(axes, panel)
    for sign, _, places in panel.signs:
        foot = axes.get_xaxis_transform()
        heights = [0.05] * len(places)
        axes.plot(places, heights, sign, color=INK, transform=foot, markersize=6, clip_on=False)
    for limit in panel.limits:
        axes.axhline(limit.value, **_limit_style(limit))
    _depth_axis(axes, depth)

    # 3. Its labels.
    draw_side_labels(axes, _labels(panel, axes), width, room.height)
    if panel.title:
        place = (room.left + _EDGE - left) / width
        _write_above(axes, place, panel.title, _TITLE, "bold", "left")
    return axes


def _has_room(room: float, text: str) -> bool:
    """Return whether a title has room, in inches."""
    return text_width(text, _TITLE, "bold") <= room


def _frame(axes: Axes, panel: _Panel) -> None:
    """Set the log scale and its axis, or say why there is no curve."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # 1. The frame.
    axes.set_yscale("log")
    axes.set_ylabel(f"{panel.figure}\n(a factor, no unit)", linespacing=1.3)
    axes.yaxis.set_label_coords(-0.64 / _inches_wide(axes), 0.5)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if not panel.curves:
        axes.set_yticks([])
        axes.tick_params(axis="y", which="minor", left=False)
        axes.text(0.5, 0.5, panel.reason, transform=axes.transAxes, ha="center", color=PALE)
        return

    # 2. The range: all that is drawn, and the signs at its foot.
    low, high = extent(panel.curves)
    values = [low, high, *(limit.value for limit in panel.limits)]
    bottom, top = min(values) / 1.25, max(values) * 1.3
    if panel.signs:
        bottom /= (top / bottom) ** 0.15
    axes.set_ylim(bottom, top)

    # 3. Its ticks.
    mantissas: tuple[float, ...] = (1.0, 2.0, 5.0)
    spans_decades = top / bottom > 300
    if spans_decades:
        mantissas = (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=mantissas, numticks=9))


def _inches_wide(axes: Axes) -> float:
    """Return the width of a panel in inches."""
    return float(axes.bbox.width / axes.figure.dpi)


def _tick(value: float) -> str:
    """Return the label of a tick: a plain number, or a power of ten if that would be long."""
    if 1e-3 <= value < 1e5:
        return f"{value:,.10g}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def _depth_axis(axes: Axes, depth: DepthView) -> None:
    """Set ticks at integer depths, with a margin on both sides."""
    from matplotlib.ticker import MaxNLocator

    # 1. A narrow panel has room for fewer ticks and fewer words.
    title, bins = _DEPTH, 6
    if _inches_wide(axes) > 5:
        title, bins = ", ".join(filter(None, [_DEPTH, depth.order])), 12
    axes.set_xlabel(title, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=bins, integer=True, min_n_ticks=1))

    # 2. A single depth has no width that the margin could be a share of.
    margin = 0.5
    if depth.last:
        margin = max(0.02 * depth.last, 0.08)
    axes.set_xlim(-margin, depth.last + margin)


# -- curves ----------------------------------------------------------------------------------------
def _draw_curve(axes: Axes, curve: DepthCurve) -> None:
    """Draw a line with its band."""
    if curve.low and curve.high:
        _draw_interval_band(axes, curve, curve.low, curve.high)
    style = _line_style(curve)
    if not curve.marker:
        # A line without markers would not show a single point.
        style |= {"marker": "o", "markevery": curve.lonely, "markersize": 4.0}
    axes.plot(curve.x, curve.y, **style)


def _line_style(curve: DepthCurve) -> dict[str, Any]:
    """Return how a curve is drawn, as `Line2D` takes it."""
    # 1. The line: solid, or thin and broken.
    style: dict[str, Any] = {"color": curve.colour, "linestyle": "-", "linewidth": 1.7}
    if curve.dashed:
        style |= {"linestyle": _DASHES, "linewidth": 1.1}
    if curve.earlier:
        style["linestyle"] = _DASHES_AND_DOTS

    # 2. Its markers. Many of them would cover the line: they are smaller.
    size = 6.0
    edge = 0.8
    if len(curve.x) > _MANY:
        size = 3.2
        edge = 0.4
    style |= {"markeredgecolor": "white", "markeredgewidth": edge}

    # 3. The sign of the kind of sub-layer.
    if curve.marker:
        style |= {"marker": curve.marker, "markersize": size}
    return style


def _limit_style(limit: Threshold) -> dict[str, Any]:
    """Return how a threshold is drawn: dotted, or solid where an error begins."""
    line_style: Any = _DOTS
    if limit.level == "error":
        line_style = "-"
    return {"color": limit.colour, "linewidth": 1.0, "linestyle": line_style}


def _draw_interval_band(
    axes: Axes, curve: DepthCurve, lower: list[float], upper: list[float]
) -> None:
    """Draw the intervals of a curve. A bar stands for the band of a point without a neighbour."""
    # 1. An interval without an upper bound leaves the panel at its top.
    beyond_top = 1e3 * axes.get_ylim()[1]
    high = []
    for value in upper:
        if value == math.inf:
            value = beyond_top
        high.append(value)
    axes.fill_between(curve.x, lower, high, color=curve.colour, alpha=0.25, linewidth=0)

    # 2. The bars.
    for k in curve.lonely:
        ends = [lower[k], high[k]]
        axes.plot([curve.x[k]] * 2, ends, color=curve.colour, alpha=0.25, linewidth=6)


def _draw_rings(axes: Axes, panel: _Panel) -> None:
    """Draw a ring around each point that misses its condition, or a tick at the foot below it."""
    if not panel.missed:
        return
    places, values = zip(*panel.missed, strict=True)
    style: dict[str, Any] = {"linestyle": "none", "markeredgecolor": INK, "markerfacecolor": "none"}
    if not _is_crowded(panel):
        axes.plot(places, values, marker="o", markersize=11.0, markeredgewidth=0.9, **style)
        return

    # Rings of many neighbours would be one black band.
    foot = axes.get_xaxis_transform()
    heights = [0.04] * len(places)
    axes.plot(places, heights, marker="|", markersize=7, transform=foot, **style)


def _is_crowded(panel: _Panel) -> bool:
    """Return whether rings around the points of a panel would overlap."""
    return any(len(curve.x) > _MANY for curve in panel.curves)


# -- labels ----------------------------------------------------------------------------------------
def _labels(panel: _Panel, axes: Axes | None) -> list[SideLabel]:
    """Return the labels to the right of a panel: curves, thresholds, signs at the foot.

    Args:
        panel: what it shows.
        axes: gives the heights of the labels; None if only their widths matter.
    """

    def at(value: float) -> float:
        if axes is None:
            return 0.0
        return _height_of(axes, value)

    # 1. The curves. One label stands for all of one name.
    named: dict[str, list[DepthCurve]] = {}
    for curve in panel.curves:
        named.setdefault(curve.label, []).append(curve)
    labels = []
    for text, same in named.items():
        first, *others = same
        style = _line_style(first)
        if others:
            style["color"] = PALE
        is_shown = panel.named or not first.marker
        if is_shown:
            labels.append(SideLabel(_mean_end(same, at), text, style))

    # 2. The thresholds.
    for limit in panel.limits:
        labels.append(SideLabel(at(limit.value), limit.text, _limit_style(limit)))

    # 3. The signs.
    for sign, text, _ in panel.signs:
        handle = {"linestyle": "none", "marker": sign, "color": INK, "markersize": 6}
        labels.append(SideLabel(0.05, text, handle))
    return labels


def _mean_end(curves: Sequence[DepthCurve], at: Callable[[float], float]) -> float:
    """Return the mean height at which curves end."""
    return sum(at(curve.finite[-1]) for curve in curves) / len(curves)


def _height_of(axes: Axes, value: float) -> float:
    """Return where a value stands, as a fraction of the panel's height."""
    bottom, top = axes.get_ylim()
    return math.log(value / bottom) / math.log(top / bottom)


def _draw_worst(axes: Axes, depth: DepthView) -> None:
    """Write the worst branch above the panel, with a thin line down to its point."""
    worst = depth.worst
    if worst is None or worst.norm.estimate <= 0:
        return

    # 1. The line: it ends above the interval, or at the estimate if that has no upper bound.
    end = worst.norm.upper
    if not math.isfinite(end):
        end = worst.norm.estimate
    axes.plot(
        [worst.place] * 2,
        [min(_height_of(axes, end), 1.0), 1.0],
        color=PALE,
        linewidth=0.8,
        transform=axes.get_xaxis_transform(),
    )

    # 2. The label, on the side with more room.
    left, right = axes.get_xlim()
    place = (worst.place - left) / (right - left)
    side = "right"
    if place <= 0.5:
        side = "left"
    room = 0.8 * _inches_wide(axes)
    text = f"worst: {spoken(worst.norm)} at "
    name = shorten(worst.shown, lambda shorter: text_width(text + shorter, _TITLE) <= room)
    _write_above(axes, place, text + name, _TITLE, "normal", side)


def _write_above(axes: Axes, place: float, text: str, size: float, weight: str, side: str) -> None:
    """Write a text just above a panel."""
    axes.annotate(
        text,
        (place, 1.0),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=size,
        fontweight=weight,
        color=INK,
        parse_math=False,
        annotation_clip=False,
    )
