"""The picture: branch gain over depth with its interval, and below it the two factors that carry it
up.
"""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from jacdiag.errors import UsageError
from jacdiag.records import Report
from jacdiag.records.output_file import is_streamed, leads_to_stdout, write_output
from jacdiag.render.plots.depth_curves import (
    INK,
    PALE,
    Curve,
    extent,
    factors,
    gains,
    is_split,
    missing,
    places,
    zeros,
)
from jacdiag.render.terminal import sentences as words
from jacdiag.render.terminal.number_cells import spoken
from jacdiag.render.terminal.severity import drawn_threshold

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
_LINE_HEIGHT = 0.20  # inches: the least distance between two direct labels


def save(report: Report, path: str | os.PathLike[str]) -> None:
    """Draws a report and writes the picture; the suffix (.png, .svg, .pdf) chooses the format.

    Neither pyplot nor its current figure is touched, and the rcParams are as before. The file
    appears whole or not at all.

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
    if leads_to_stdout(path) and sys.stdout.isatty():
        raise UsageError(
            "a picture cannot be written to a terminal", hint="redirect stdout, or name a file"
        )
    suffix = Path(path).suffix.lower()
    if suffix in FORMATS:
        return suffix
    if is_streamed(path):
        return ".png"
    raise UsageError(
        f"cannot draw to '{path}'", got=f"suffix '{suffix}'", hint="end it in .png, .svg or .pdf"
    )


def draw(report: Report) -> Figure:
    """Builds the figure without writing it."""
    from matplotlib.figure import Figure

    report = words.legible(report)
    upper, lower = gains(report), factors(report)
    size = (10.0, 6.4) if lower else (10.0, 4.4)  # inches: a slide's proportions
    figure = Figure(figsize=size, facecolor="white")
    ratios = [3.2, 2.0] if lower else [1.0]
    panels = figure.subplots(
        len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    margins = {"top": 1 - 0.90 / size[1], "bottom": 0.62 / size[1]}
    figure.subplots_adjust(left=0.10, right=0.835, hspace=0.10, **margins)
    _title(figure, report)
    if report.tier == "measured":
        _panel(panels[0], upper, "branch gain ‖J‖", report, "branch_norm")
    else:
        _panel(panels[0], upper, "the paper's bound, less 1", report, None)
    _worst(panels[0], report)
    _at_foot(panels[0], missing(report), "x", "no finite value")
    _at_foot(panels[0], zeros(report), "v", "0")
    if lower and is_split(report):
        _panel(panels[1], lower, "its two factors", report, "norm_gain")
    elif lower:
        _panel(panels[1], lower, "residual map", report, None)
    _depth_axis(panels[-1], report)
    for axes, curves in zip(panels, (upper, lower), strict=False):
        _direct_labels(axes, curves, size[1])
    return figure


def _title(figure: Figure, report: Report) -> None:
    headline = _cut(words.headline(report), _LONGEST_TITLE)
    size = min(14.5, 14.5 * 76 / len(headline))
    height = float(figure.get_figheight())
    figure.text(
        0.03,
        1 - 0.22 / height,
        headline,
        fontsize=size,
        fontweight="bold",
        color=INK,
        va="top",
        parse_math=False,
    )
    about = "  ·  ".join(
        [words.source_name(report), words.model_words(report), words.state_words(report)]
    )
    about = _cut(about, _LONGEST_SUBTITLE)
    figure.text(0.03, 1 - 0.53 / height, about, fontsize=10, color=PALE, va="top", parse_math=False)


def _cut(text: str, longest: int) -> str:
    """Shortens a text in its middle: a name's end says which one it is."""
    if len(text) <= longest:
        return text
    tail = longest // 3
    return f"{text[: longest - tail - 1]}…{text[-tail:]}"


def _panel(
    axes: Axes, curves: list[Curve], label: str, report: Report, limited: str | None
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.yaxis.set_label_coords(-0.095, 0.5)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if not curves:
        what = "every branch gain is 0" if zeros(report) else "nothing could be measured"
        axes.set_yticks([])
        axes.tick_params(axis="y", which="minor", left=False)
        axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", color=PALE)
        return
    low, high = extent(curves)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 2.0, 5.0)))
    headroom = (high / low) ** 0.06
    axes.set_ylim(low / 1.25, high * 1.35 * headroom)
    for curve in curves:
        _draw_curve(axes, curve)
    if limited:
        _thresholds(axes, report, limited, (low, high))


def _tick(value: float) -> str:
    if 1e-4 <= value < 1e5:
        return f"{value:,.10g}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(power)}"


def _draw_curve(axes: Axes, curve: Curve) -> None:
    many = len(curve.x) > 40
    if curve.low and curve.high:
        endless = 1e3 * axes.get_ylim()[1]
        high = [endless if value == math.inf else value for value in curve.high]
        axes.fill_between(curve.x, curve.low, high, color=curve.colour, alpha=0.25, linewidth=0)
        for k in curve.lonely:
            axes.plot(
                [curve.x[k]] * 2,
                [curve.low[k], high[k]],
                color=curve.colour,
                alpha=0.25,
                linewidth=6,
            )
    axes.plot(
        curve.x,
        curve.y,
        color=curve.colour,
        linestyle=(0, (5, 3)) if curve.dashed else "-",
        linewidth=1.1 if curve.dashed else 1.7,
        marker=curve.marker or "o",
        markevery=None if curve.marker else curve.lonely,
        markersize=4 if not curve.marker else 3.2 if many else 6,
        markeredgecolor="white",
        markeredgewidth=0.4 if many else 0.8,
    )


def _thresholds(axes: Axes, report: Report, field: str, span: tuple[float, float]) -> None:
    """Draws the thresholds of a field as thin labelled lines, where they lie near enough to the
    data to matter.
    """
    low, high = span
    # where the worst branch's label is not
    at_left = field == "branch_norm" and not _leftish(report)
    for level in ("warning", "error"):
        value = drawn_threshold(report, field, level)
        if value is None or not low / 10 <= value <= high * 10:
            continue
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, value / 1.3), max(top, value * 1.5))
        axes.axhline(
            value, color=INK, linewidth=0.8, linestyle="-" if level == "error" else (0, (1, 2))
        )
        what = {"norm_gain": "1/σ, ", "branch_norm": _stratum(report)}[field]
        # The two labels are set apart, however near their thresholds lie.
        below = level == "warning" and drawn_threshold(report, field, "error") is not None
        axes.annotate(
            f"{what}{level} above {_tick(float(f'{value:.3g}'))}",
            (0.0 if at_left else 1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(4 if at_left else -4, -3 if below else 3),
            textcoords="offset points",
            ha="left" if at_left else "right",
            va="top" if below else "bottom",
            fontsize=9,
            color=INK,
        )


def _stratum(report: Report) -> str:
    """Which placement of the norm the threshold on branch norms is for, if the model has several;
    else "".
    """
    kinds = {row.placement for row in report.sublayers if row.placement is not None}
    if len(kinds) < 2:
        return ""
    usual = report.settings.get("stratum")
    return f"{usual}-norm, " if usual else "the most frequent placement, "


def _worst(axes: Axes, report: Report) -> None:
    worst = words.worst_branch(report)
    if worst is None or worst[1].estimate <= 0:
        return
    row, value = worst
    leftish = _leftish(report)
    axes.annotate(
        f"{spoken(value)}  {_cut(row.name, _LONGEST_NAME)}",
        (places(report)[row.name], value.upper if math.isfinite(value.upper) else value.estimate),
        xytext=(10 if leftish else -10, 4),
        textcoords="offset points",
        ha="left" if leftish else "right",
        va="bottom",
        fontsize=9.5,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
        zorder=5,
        parse_math=False,
    )


def _leftish(report: Report) -> bool:
    """Whether the worst branch stands in the left half, so that its label goes to its right."""
    worst = words.worst_branch(report)
    at = places(report)
    return worst is None or at[worst[0].name] <= 0.5 * max(at.values())


def _at_foot(axes: Axes, places: list[float], sign: str, text: str) -> None:
    """Signs at the foot of the panel where a branch norm cannot be drawn: a gap in a line is easily
    overlooked.
    """
    if not places:
        return
    foot = axes.get_xaxis_transform()
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / (top / bottom) ** 0.12, top)
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


def _depth_axis(axes: Axes, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("depth (layer)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    last = max(places(report).values(), default=1.0)
    margin = max(0.02 * last, 0.08) if last else 0.5
    axes.set_xlim(-margin, last + margin)


def _direct_labels(axes: Axes, curves: list[Curve], figure_height: float) -> None:
    """Names each curve at its right end, pushed apart where two would overlap; curves of one name
    share one label.
    """
    if not curves:
        return
    bottom, top = (math.log(end) for end in axes.get_ylim())
    named: dict[str, list[Curve]] = {}
    for curve in curves:
        named.setdefault(curve.label, []).append(curve)
    ends = sorted(
        (sum(math.log(curve.finite[-1]) for curve in same) / len(same), label)
        for label, same in named.items()
    )
    inches = axes.get_position().height * figure_height
    heights = _apart(
        [(height - bottom) / (top - bottom) for height, _ in ends], _LINE_HEIGHT / inches
    )
    for height, (_, label) in zip(heights, ends, strict=True):
        curve, *others = named[label]
        sign = {"o": "●", "s": "■", "^": "▲"}.get(curve.marker, "- -" if curve.dashed else "—")
        colour = PALE if others else curve.colour
        axes.text(
            1.012,
            height,
            f"{sign} {label}",
            transform=axes.transAxes,
            color=colour,
            fontsize=10,
            va="center",
        )


def _apart(heights: list[float], least: float) -> list[float]:
    """Moves sorted heights up, then the whole stack down, until neighbours are `least` apart and
    none is above 1.
    """
    moved = list(heights)
    for _ in range(200):
        for place in range(1, len(moved)):
            overlap = least - (moved[place] - moved[place - 1])
            if overlap > 0:
                moved[place] += overlap / 2
                moved[place - 1] -= overlap / 2
        excess = max(0.0, moved[-1] - 1.0)
        moved = [height - excess for height in moved] if excess > 1e-9 else moved
    return moved
