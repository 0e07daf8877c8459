"""The picture: branch gain over depth with its interval, and below it its two factors."""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jacdiag.errors import UsageError
from jacdiag.records import Report
from jacdiag.records.number_format import spoken
from jacdiag.records.output_file import is_streamed, leads_to_stdout, write_output
from jacdiag.render.plots.depth_curves import (
    INK,
    PALE,
    DepthCurve,
    DepthView,
    Threshold,
    extent,
)
from jacdiag.render.view import ReportView, build_view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_DPI = 160
_STYLE = {
    "font.size": 11.0,
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "jacdiag",
    "svg.fonttype": "path",
}
# characters; such a title is set in 9 points
_LONGEST_TITLE, _LONGEST_SUBTITLE, _LONGEST_NAME = 120, 108, 34
_BOUND_LABEL = "the paper's bound, less 1"
_LINE_HEIGHT = 0.20  # inches: the least distance between two direct labels
_MARKER_SIGNS = {"o": "●", "s": "■", "^": "▲"}


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
    from matplotlib import style

    suffix = check_suffix(path)
    # same report, same bytes
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[suffix]
    buffer = io.BytesIO()
    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name may hold characters that the font lacks
        draw(report).savefig(buffer, format=suffix[1:], dpi=_DPI, metadata=undated)
    write_output(path, buffer.getvalue())


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix that chooses a picture's format.

    What is written through (stdout, a device, a pipe) needs none of them: PNG is the default there.

    Args:
        path: where the picture goes.

    Raises:
        UsageError: no picture format has this suffix, or the picture would go to a terminal.
    """
    # 1. A terminal would show the bytes of a picture as text.
    if leads_to_stdout(path) and sys.stdout.isatty():
        raise UsageError(
            "a picture cannot be written to a terminal", hint="redirect stdout, or name a file"
        )

    # 2. The suffix, or PNG where there need be none.
    suffix = Path(path).suffix.lower()
    if suffix in FORMATS:
        return suffix
    if is_streamed(path):
        return ".png"
    raise UsageError(
        f"cannot draw to '{path}'", got=f"suffix '{suffix}'", hint="end it in .png, .svg or .pdf"
    )


def draw(report: Report) -> Figure:
    """Build the figure without writing it.

    Args:
        report: what to draw.
    """
    from matplotlib.figure import Figure

    view = build_view(report)
    depth = view.depth

    # 1. One panel, or two. The sizes are inches, in a slide's proportions.
    has_two = bool(depth.factors)
    size, ratios = (10.0, 4.4), [1.0]
    if has_two:
        size, ratios = (10.0, 6.4), [3.2, 2.0]
    figure = Figure(figsize=size, facecolor="white")
    panels = figure.subplots(
        len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    margins = {"top": 1 - 0.90 / size[1], "bottom": 0.62 / size[1]}
    figure.subplots_adjust(left=0.10, right=0.835, hspace=0.10, **margins)
    _title(figure, view)

    # 2. The gains.
    upper = panels[0]
    if depth.measured:
        _panel(upper, depth.gains, "branch gain ‖J‖", depth)
        _draw_limits(upper, depth.gain_limits, depth.gains, _gain_label(depth), depth)
    else:
        _panel(upper, depth.gains, _BOUND_LABEL, depth)
    _worst(upper, depth)
    _at_foot(upper, depth.missing, "x", "no finite value")
    _at_foot(upper, depth.zeros, "v", "0")

    # 3. The factors that carry them.
    if has_two and depth.is_split:
        _panel(panels[1], depth.factors, "its two factors", depth)
        _draw_limits(panels[1], depth.norm_gain_limits, depth.factors, "1/σ, ", None)
    elif has_two:
        _panel(panels[1], depth.factors, "residual map", depth)

    # 4. The shared axis, and the name of each curve at its end.
    _depth_axis(panels[-1], depth)
    for axes, curves in zip(panels, (depth.gains, depth.factors), strict=False):
        _direct_labels(axes, curves, size[1])
    return figure


def _title(figure: Figure, view: ReportView) -> None:
    """Write the verdict, and below it what was audited."""
    # 1. The verdict, in a smaller font if it is long.
    headline = _cut(view.verdict.headline, _LONGEST_TITLE)
    font_size = min(14.5, 14.5 * 76 / len(headline))
    height = float(figure.get_figheight())
    figure.text(
        0.03,
        1 - 0.22 / height,
        headline,
        fontsize=font_size,
        fontweight="bold",
        color=INK,
        va="top",
        parse_math=False,
    )

    # 2. The model.
    header = view.header
    about = _cut("  ·  ".join([header.name, header.model, header.state]), _LONGEST_SUBTITLE)
    figure.text(0.03, 1 - 0.53 / height, about, fontsize=10, color=PALE, va="top", parse_math=False)


def _cut(text: str, longest: int) -> str:
    """Shorten a text in its middle: a name's end says which one it is."""
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 1]}…{text[-tail:]}"


def _panel(axes: Axes, curves: list[DepthCurve], label: str, depth: DepthView) -> None:
    """Draw curves on a log scale, or say that there are none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # 1. The frame.
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.yaxis.set_label_coords(-0.095, 0.5)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if not curves:
        reason = "nothing could be measured"
        if depth.zeros:
            reason = "every branch gain is 0"
        axes.set_yticks([])
        axes.tick_params(axis="y", which="minor", left=False)
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", color=PALE)
        return

    # 2. The scale and the curves.
    low, high = extent(curves)
    spans_decades = high / low > 30
    mantissas: tuple[float, ...] = (1.0, 2.0, 5.0)
    if spans_decades:
        mantissas = (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=mantissas))
    headroom = (high / low) ** 0.06
    axes.set_ylim(low / 1.25, high * 1.35 * headroom)
    for curve in curves:
        _draw_curve(axes, curve)


def _tick(value: float) -> str:
    """Return the label of a tick: a plain number, or a power of ten if that would be long."""
    if 1e-4 <= value < 1e5:
        return f"{value:,.10g}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def _draw_curve(axes: Axes, curve: DepthCurve) -> None:
    """Draw a line with its band."""
    if curve.low and curve.high:
        _draw_interval_band(axes, curve, curve.low, curve.high)

    # 1. The line: dashed and thin, or solid.
    style: dict[str, Any] = {"linestyle": "-", "linewidth": 1.7}
    if curve.dashed:
        style = {"linestyle": (0, (5, 3)), "linewidth": 1.1}

    # 2. Its points.
    style |= _marker_style(curve)
    axes.plot(curve.x, curve.y, color=curve.colour, markeredgecolor="white", **style)


def _marker_style(curve: DepthCurve) -> dict[str, Any]:
    """Return a marker for every point, or a dot for each point without a neighbour."""
    # 1. Many markers would cover the line: they are smaller.
    has_many = len(curve.x) > 40
    size, edge = 6.0, 0.8
    if has_many:
        size, edge = 3.2, 0.4

    # 2. A line without markers would not show a single point.
    if not curve.marker:
        lonely = {"marker": "o", "markevery": curve.lonely, "markersize": 4.0}
        return {**lonely, "markeredgewidth": edge}
    return {"marker": curve.marker, "markersize": size, "markeredgewidth": edge}


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


def _gain_label(depth: DepthView) -> str:
    """Return which placement the thresholds on branch norms are for, if there are several."""
    stratum = depth.stratum
    if not stratum:
        return ""
    return f"{stratum}, "


def _draw_limits(
    axes: Axes,
    limits: list[Threshold],
    curves: list[DepthCurve],
    prefix: str,
    labelled: DepthView | None,
) -> None:
    """Draw thresholds as thin labelled lines, if they lie near enough to the data to matter.

    Args:
        axes: of the panel.
        limits: thresholds on its figure.
        curves: what the panel shows.
        prefix: what each label begins with.
        labelled: of a panel on which the worst branch has a label, which theirs must not meet.
    """
    if not curves:
        return
    # 1. The labels stand on the side without the label of the worst branch.
    side, x, dx = "right", 1.0, -4
    if labelled is not None and not _worst_is_left(labelled):
        side, x, dx = "left", 0.0, 4
    has_error = any(limit.level == "error" for limit in limits)

    low, high = extent(curves)
    for limit in limits:
        value = limit.value
        is_near = low / 10 <= value <= high * 10
        if not is_near:
            continue

        # 2. The line, and room for it.
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, value / 1.3), max(top, value * 1.5))
        line_style: Any = (0, (1, 2))
        if limit.level == "error":
            line_style = "-"
        axes.axhline(value, color=INK, linewidth=0.8, linestyle=line_style)

        # 3. Its label. Two labels are set apart, however near their thresholds lie.
        vertical, dy = "bottom", 3
        if limit.level == "warning" and has_error:
            vertical, dy = "top", -3
        axes.annotate(
            f"{prefix}{limit.level} above {_tick(float(f'{value:.3g}'))}",
            (x, value),
            xycoords=("axes fraction", "data"),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=side,
            va=vertical,
            fontsize=9,
            color=INK,
        )


def _worst(axes: Axes, depth: DepthView) -> None:
    """Write the name and the norm of the worst branch next to its point."""
    worst = depth.worst
    if worst is None or worst.norm.estimate <= 0:
        return

    # 1. Above the interval, or above the estimate if the interval has no upper bound.
    height = worst.norm.upper
    if not math.isfinite(height):
        height = worst.norm.estimate

    # 2. On the side with more room.
    side, dx = "right", -10
    if _worst_is_left(depth):
        side, dx = "left", 10
    axes.annotate(
        f"{spoken(worst.norm)}  {_cut(worst.name, _LONGEST_NAME)}",
        (worst.place, height),
        xytext=(dx, 4),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=9.5,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
        zorder=5,
        parse_math=False,
    )


def _worst_is_left(depth: DepthView) -> bool:
    """Return whether the worst branch stands in the left half: its label goes to its right."""
    return depth.worst is None or depth.worst.place <= 0.5 * depth.last


def _at_foot(axes: Axes, places: list[float], sign: str, text: str) -> None:
    """Draw signs at the foot of the panel where a branch norm cannot be drawn.

    A gap in a line is easily overlooked.
    """
    if not places:
        return
    # 1. Room below the curves.
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / (top / bottom) ** 0.12, top)

    # 2. The signs, and in words what they stand for next to the last one.
    foot = axes.get_xaxis_transform()
    axes.plot(
        places, [0.04] * len(places), sign, color=INK, transform=foot, markersize=6, clip_on=False
    )
    axes.annotate(
        text,
        (places[-1], 0.04),
        xycoords=foot,
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )


def _depth_axis(axes: Axes, depth: DepthView) -> None:
    """Set ticks at integer depths, with a margin on both sides."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("depth (layer)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))

    # A single depth has no width that the margin could be a share of.
    margin = 0.5
    if depth.last:
        margin = max(0.02 * depth.last, 0.08)
    axes.set_xlim(-margin, depth.last + margin)


def _direct_labels(axes: Axes, curves: list[DepthCurve], figure_height: float) -> None:
    """Name each curve at its right end, pushed apart if two labels would overlap.

    Curves of one name share one label.
    """
    if not curves:
        return

    # 1. The mean height at which the curves of each name end, as a logarithm.
    named: dict[str, list[DepthCurve]] = {}
    for curve in curves:
        named.setdefault(curve.label, []).append(curve)
    ends = []
    for label, same in named.items():
        mean = sum(math.log(curve.finite[-1]) for curve in same) / len(same)
        ends.append((mean, label))
    ends.sort()

    # 2. Where its label stands: a fraction of the panel's height.
    bottom, top = (math.log(end) for end in axes.get_ylim())
    fractions = [(end - bottom) / (top - bottom) for end, _ in ends]
    inches = axes.get_position().height * figure_height
    heights = _apart(fractions, _LINE_HEIGHT / inches)

    # 3. The labels. A label that several curves share has no colour of its own.
    for height, (_, label) in zip(heights, ends, strict=True):
        curve, *others = named[label]
        colour = curve.colour
        if others:
            colour = PALE
        axes.text(
            1.012,
            height,
            f"{_legend_sign(curve)} {label}",
            transform=axes.transAxes,
            color=colour,
            fontsize=10,
            va="center",
        )


def _legend_sign(curve: DepthCurve) -> str:
    """Return the character that looks like a curve's marker or line."""
    sign = _MARKER_SIGNS.get(curve.marker, "—")
    has_marker = curve.marker in _MARKER_SIGNS
    if curve.dashed and not has_marker:
        sign = "- -"
    return sign


def _apart(heights: list[float], least: float) -> list[float]:
    """Move sorted heights apart until neighbours differ by `least` and none is above 1."""
    moved = list(heights)
    for _ in range(200):
        # 1. Both neighbours give way by half of what is missing between them.
        for place in range(1, len(moved)):
            overlap = least - (moved[place] - moved[place - 1])
            if overlap > 0:
                moved[place] += overlap / 2
                moved[place - 1] -= overlap / 2

        # 2. The topmost may have left the panel.
        excess = max(0.0, moved[-1] - 1.0)
        if excess > 1e-9:
            moved = [height - excess for height in moved]
    return moved
