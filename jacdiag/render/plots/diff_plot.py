"""Two models as a picture of dumbbells: a row for each figure that differs, with both values."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jacdiag.comparison.match import Ends, Pair
from jacdiag.records.number_format import three
from jacdiag.records.output_file import write_output
from jacdiag.render.content.compared_figures import OUTSIDE, PARTS, change_size
from jacdiag.render.content.compared_models import ComparedModel, ComparisonView
from jacdiag.render.content.depth_curves import INK, LOOKS, PALE
from jacdiag.render.content.sentences import legible, plural
from jacdiag.render.plots.picture_file import STYLE, check_suffix, picture_bytes
from jacdiag.render.plots.text_layout import fit_headline, fit_lines, shorten, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 40

_DPI = 150
_STYLE = {**STYLE, "font.size": 10.0}
_WIDTH, _EDGE, _ROW = 11.5, 0.32, 0.22  # inches
_BELOW = 0.62  # of the rows, for the axis
_TEXT = 9.5  # points
_LONGEST_ROW = 3.6  # inches of what a row is called
_LONGEST_NAME = 32  # characters of what a model is called
_A_COLOUR, _B_COLOUR = LOOKS[1].colour, LOOKS[0].colour
_AXIS = "gain, norm or std (log scale); bar: its interval or range"
_WORDS = {
    "branch_norm": "branch norm",
    "core_norm": "core norm",
    "norm_gain": "norm gain 1/σ",
    "shortcut_std": "shortcut std",
    "end_to_end": "end-to-end gain",
}


def save(view: ComparisonView, path: str | os.PathLike[str]) -> None:
    """Draw what differs between two models, and write the picture.

    The suffix (.png, .svg, .pdf) chooses the format.

    Args:
        view: of the comparison.
        path: where to; "-" is stdout.

    Raises:
        UsageError: another suffix, or a path that cannot be written to.
    """
    write_output(path, picture_of_comparison(view, check_suffix(path)))


def picture_of_comparison(view: ComparisonView, suffix: str) -> bytes:
    """Return the picture of what differs between two models.

    Args:
        view: of the comparison.
        suffix: of the format: .png, .svg or .pdf.
    """
    return picture_bytes(lambda: draw(view), suffix, dpi=_DPI, style=_STYLE)


def draw(view: ComparisonView) -> Figure:
    """Build the figure without writing it.

    Args:
        view: of the comparison.
    """
    from matplotlib.figure import Figure

    # 1. The rows, and the texts above them.
    different = view.shown_pairs()
    is_trained = any(model.state == "trained" for model in view.models)
    rows = rows_of(different, branch_norms_first=is_trained)
    figure = Figure(figsize=(_WIDTH, 4.0), facecolor="white")
    header = _header(view, len(different), rows)

    # 2. The height of the picture follows from them.
    above = 0.5 + sum(1.5 * size / 72 for _, size, _ in header)
    rows_height = _ROW * max(len(rows), 3) + 0.1
    height = above + rows_height + _BELOW
    figure.set_size_inches(_WIDTH, height)
    _draw_header(figure, header, height)

    # 3. The panel between the names of the rows and their ratios.
    labels = [shorten(_row_name(pair), _is_short) for pair in rows]
    ratios = [_ratio(pair) for pair in rows]
    left = 2 * _EDGE + max((text_width(text, _TEXT) for text in labels), default=0.0)
    right = 2 * _EDGE + max(text_width(text, _TEXT) for text in [*ratios, "B / A"])
    width = _WIDTH - left - right
    rectangle = (left / _WIDTH, _BELOW / height, width / _WIDTH, rows_height / height)
    axes = figure.add_axes(rectangle)
    _draw_rows(axes, rows, ratios)
    axes.set_yticks(range(len(rows)), labels, fontsize=_TEXT, parse_math=False)

    # 4. What the two points are.
    _draw_key(axes, view.models, rows_height)
    return figure


# -- rows ------------------------------------------------------------------------------------------
def rows_of(different: Sequence[Pair], *, branch_norms_first: bool = False) -> list[Pair]:
    """Return the figures that have a row: by depth, and the largest ratios if there are many.

    Args:
        different: the figures that differ, in the order of depth.
        branch_norms_first: branch norms stay whatever their ratio. Of a trained model they are
            the figure that is a property of it.
    """
    # 1. Those that have a place on a logarithmic axis.
    drawable = [pair for pair in different if _is_drawable(pair.old) or _is_drawable(pair.new)]
    if len(drawable) <= MOST_ROWS:
        return drawable

    # 2. The largest ratios; the order of depth stays.
    def rank(place: int) -> tuple[bool, float]:
        pair = drawable[place]
        comes_first = branch_norms_first and pair.figure == "branch_norm"
        return not comes_first, -change_size(pair)

    ranked = sorted(range(len(drawable)), key=rank)
    return [drawable[place] for place in sorted(ranked[:MOST_ROWS])]


def _is_drawable(ends: Ends | None) -> bool:
    """Return whether a log scale has a place for a figure."""
    return ends is not None and math.isfinite(ends[1]) and ends[1] > 0


def _row_name(pair: Pair) -> str:
    """Return what a row is called: "layer 3  attention  branch norm"."""
    where = OUTSIDE
    if pair.depth is not None:
        where = f"layer {pair.depth}"
    part = PARTS.get(pair.part, pair.part)
    text: str = legible(f"{where}  ·  {part}  ·  {_WORDS.get(pair.figure, pair.figure)}")
    return text


def _is_short(name: str) -> bool:
    """Return whether the name of a row leaves enough room for the panel."""
    return text_width(name, _TEXT) <= _LONGEST_ROW


def _without_value(different: Sequence[Pair], rows: Sequence[Pair]) -> list[str]:
    """Return why figures that differ are not drawn though there is room for them.

    Args:
        different: all figures that differ.
        rows: those that are drawn.
    """
    # 1. A sub-layer of one model alone is no figure.
    left_out = [pair for pair in different if pair not in rows]
    alone = sum(pair.figure == "sub-layer" for pair in left_out)
    sentences = []
    if alone:
        sentences.append(f"Not drawn: {plural(alone, 'sub-layer')} in one model alone.")

    # 2. Values of 0, and values that are not finite.
    others = len(left_out) - alone
    if others:
        count = f"{others} of {len(different)}"
        sentences.append(f"{count} figures that differ have no value above 0 to draw.")
    return sentences


def _ratio(pair: Pair) -> str:
    """Return B over A in words, or which of them has no place on a log scale."""
    if _is_drawable(pair.old) and _is_drawable(pair.new):
        return f"× {three(pair.ratio)}"
    if _is_drawable(pair.old):
        return _absence("B", pair.b, pair.new)
    return _absence("A", pair.a, pair.old)


def _absence(letter: str, name: str, ends: Ends | None) -> str:
    """Return why a model has no point: it lacks the part, it was not measured, or its value."""
    if ends is not None:
        return f"{letter} is {three(ends[1])}"
    if name:
        return f"{letter} not measured"
    return f"not in {letter}"


# -- header ----------------------------------------------------------------------------------------
def _header(
    view: ComparisonView, different: int, rows: Sequence[Pair]
) -> list[tuple[str, float, str]]:
    """Return the lines above the rows: text, font size and weight of each."""
    room = _WIDTH - 2 * _EDGE

    def fits(text: str) -> bool:
        return text_width(text, _TEXT) <= room

    # 1. The verdict.
    headline = f"{view.verdict[0].upper()}{view.verdict[1:]}"
    texts, size = fit_headline(headline, room)
    lines = [(text, size, "bold") for text in texts]

    # 2. What changed most, by kind of figure.
    for kind in view.summary.kinds:
        text = shorten(f"{kind.kind}: {kind.text}", fits)
        lines.append((text, _TEXT, "normal"))

    # 3. What limits the comparison, and what is left out.
    for text in [*view.notes, *_left_out(different, rows, view)]:
        parts = fit_lines(text.split(" "), " ", fits, 2)
        lines += [(part, _TEXT, "normal") for part in parts]
    return lines


def _left_out(different: int, rows: Sequence[Pair], view: ComparisonView) -> list[str]:
    """Return what the picture does not show, one sentence each."""
    # 1. Nothing.
    beyond = different - len(rows)
    if not beyond:
        return []
    if len(rows) < MOST_ROWS:
        # 2. What has no place on a log scale.
        return _without_value(view.shown_pairs(), rows)

    # 3. What differs less.
    chosen = f"The {len(rows)} figures that differ most are drawn."
    if rows != rows_of(view.shown_pairs()):
        chosen = "Branch norms are drawn first, then the figures that differ most."
    return [f"{chosen} {beyond} of {different} that differ are left out."]


def _draw_header(figure: Figure, lines: Sequence[tuple[str, float, str]], height: float) -> None:
    """Write the lines above the rows."""
    below_top = 0.2
    for text, size, weight in lines:
        colour = INK
        if weight == "normal":
            colour = PALE
        figure.text(
            _EDGE / _WIDTH,
            1 - below_top / height,
            text,
            fontsize=size,
            fontweight=weight,
            color=colour,
            va="top",
            parse_math=False,
        )
        below_top += 1.5 * size / 72


def _draw_key(axes: Axes, models: Sequence[ComparedModel], rows_height: float) -> None:
    """Write above the panel which point is of which model."""
    # It begins at the picture's edge, where the names of the rows do.
    height = 1 + 0.14 / rows_height
    place = axes.get_position()
    begin = (_EDGE / _WIDTH - place.x0) / place.width
    handles: list[Any] = []
    for model, style in zip(models, _point_styles(), strict=True):
        text = shorten(model.name, lambda shorter: len(shorter) <= _LONGEST_NAME)
        label = ", ".join([f"{model.letter}: {text}", *model.stage])
        handles += axes.plot([], [], label=label, linestyle="none", **style)
    legend = axes.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(begin, height),
        ncols=2,
        frameon=False,
        borderaxespad=0.0,
        borderpad=0.0,
        fontsize=_TEXT,
        handletextpad=0.2,
    )
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    axes.text(
        1.0, height, "B / A", transform=axes.transAxes, fontsize=_TEXT, color=PALE, va="center"
    ).set_x(1 + 0.1 / (axes.get_position().width * _WIDTH))


# -- dumbbells -------------------------------------------------------------------------------------
def _point_styles() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how the points of A and of B are drawn: hollow and filled, for a print in grey."""
    shared = {"marker": "o", "markersize": 6.5, "markeredgewidth": 1.5}
    hollow = {"color": _A_COLOUR, "markerfacecolor": "white", "markeredgecolor": _A_COLOUR}
    filled = {"color": _B_COLOUR, "markeredgecolor": _B_COLOUR}
    return shared | hollow, shared | filled


def _draw_rows(axes: Axes, rows: Sequence[Pair], ratios: Sequence[str]) -> None:
    """Draw a dumbbell in each row, the first one at the top."""
    # 1. The frame.
    axes.set_xscale("log")
    axes.set_xlabel(_AXIS)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_ylim(max(len(rows), 3) - 0.4, -0.6)
    if not rows:
        axes.set_xticks([])
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", color=PALE)
        return
    _set_range(axes, rows)

    # 2. The dumbbells.
    beyond = 1 + 0.1 / (axes.get_position().width * _WIDTH)
    for height, (pair, ratio) in enumerate(zip(rows, ratios, strict=True)):
        _draw_dumbbell(axes, pair, height)
        axes.text(
            beyond,
            height,
            ratio,
            transform=axes.get_yaxis_transform(),
            fontsize=_TEXT,
            va="center",
        )

    # 3. A thin line where a new depth begins.
    for height in range(1, len(rows)):
        if rows[height].depth != rows[height - 1].depth:
            axes.axhline(height - 0.5, color="#d0d0d0", linewidth=0.6)


def _set_range(axes: Axes, rows: Sequence[Pair]) -> None:
    """Set the range of values and its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    # 1. All that is drawn.
    values: list[float] = []
    for pair in rows:
        for ends in (pair.old, pair.new):
            if ends is not None and _is_drawable(ends):
                values += [end for end in ends if math.isfinite(end) and end > 0]
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.03, 1.1)
    axes.set_xlim(low / margin, high * margin)

    # 2. Few ticks, as plain numbers.
    mantissas: tuple[float, ...] = (1.0, 2.0, 5.0)
    spans_decades = high / low > 3000
    if spans_decades:
        mantissas = (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=mantissas, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    """Return the label of a tick."""
    if 1e-4 <= value < 1e5:
        return f"{value:,.10g}"
    return f"{value:.0e}"


def _draw_dumbbell(axes: Axes, pair: Pair, height: int) -> None:
    """Draw both values of a figure, the line between them, and their intervals."""
    drawn = [ends for ends in (pair.old, pair.new) if ends is not None and _is_drawable(ends)]

    # 1. The line between them.
    middles = [ends[1] for ends in drawn]
    axes.plot(middles, [height] * len(middles), color=PALE, linewidth=1.2, zorder=1)

    # 2. The intervals.
    for ends, colour in ((pair.old, _A_COLOUR), (pair.new, _B_COLOUR)):
        if ends is not None and _is_drawable(ends):
            _draw_interval(axes, ends, height, colour)

    # 3. The points.
    for ends, style in zip((pair.old, pair.new), _point_styles(), strict=True):
        if ends is not None and _is_drawable(ends):
            axes.plot([ends[1]], [height], zorder=3, **style)


def _draw_interval(axes: Axes, ends: Ends, height: int, colour: str) -> None:
    """Draw an interval as a broad bar; an end that is 0 or inf lies at the panel's edge."""
    low, high = axes.get_xlim()
    lower, _, upper = ends
    lower = max(lower, low)
    upper = min(upper, high)
    if upper > lower:
        axes.plot([lower, upper], [height, height], color=colour, alpha=0.45, linewidth=5)
