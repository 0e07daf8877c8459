"""A run as a picture: a panel for each figure over steps, with the alerts.

Several runs are drawn over each other, each in a colour of its own.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jacdiag.errors import UsageError, clipped, printable
from jacdiag.records.output_file import write_output
from jacdiag.records.run_log import RunLog
from jacdiag.render.content.depth_curves import INK, PALE
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
from jacdiag.render.plots.picture_file import STYLE, check_suffix, picture_bytes
from jacdiag.render.plots.run_heatmap import Heat, heat_of
from jacdiag.render.plots.run_series import (
    Band,
    Series,
    band,
    clip_share,
    column,
    gradient,
    update_ratio,
)
from jacdiag.render.terminal.run_screen import shorten_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FIGURES = ("loss", "gradient", "gain", "lr", "update", "shortcut", "logits", "clip")
SIZES = {"slide": (12.8, 7.2), "page": (7.0, 8.6), "wide": (16.0, 6.0)}  # inches
_SIZE = re.compile(r"(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)")
_SMALLEST, _LARGEST = 3.0, 60.0  # inches of a side

_DPI = 150
_FONT = 12.0  # points, of a picture as wide as a slide
_ALERT = {"error": "#b3261e", "warning": "#c77700", "info": PALE}
_RUNS = ("#17406d", "#d1701c", "#3a8a58", "#8a3a86", "#6b6b6b", "#b3a100", "#2a9db0", "#a33a3a")
_RAW_OF_SEVERAL = 0.2
_RAW = 0.35  # opacity of what was measured, under its mean
_FEW = 12  # points up to which each has a marker: a line through two would hide where they are
_WITH_MEAN = ("loss", "gradient")  # the panels with the mean of the last steps, and its peaks
_LEAST_CLIP_WINDOW = 20  # steps whose share is drawn, at least
_LEAST_UPDATE_WINDOW = 10  # updates whose mean is drawn, at least
_MOST_PEAKS = 200  # that are drawn
_TITLES = {
    "loss": "loss",
    "gradient": "gradient norm",
    "gain": "branch norm ‖J‖",
    "lr": "learning rate",
    "update": "update / weight norm",
    "shortcut": "shortcut std",
    "logits": "largest attention logit",
    "clip": "clipped steps, %",
}
_ALERTS = 4  # that a title names
_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
_LOG_SCALE = ("gradient", "update", "shortcut", "logits", "gain")


@dataclass(frozen=True, kw_only=True)
class RunPlot:
    """How a run is drawn.

    Attributes:
        figures: which panels, in this order; all for which there is data if empty.
        size: width and height in inches.
        first, last: steps between which to draw; all of the run if not given.
        smooth: steps that the bold line is the mean of; a fiftieth of the steps if not given, 1 for
            no such line.
    """

    figures: tuple[str, ...] = ()
    size: tuple[float, float] = SIZES["slide"]
    first: int | None = None
    last: int | None = None
    smooth: int | None = None


@dataclass(frozen=True)
class _Drawn:
    """One run on its way to the picture."""

    run: RunLog
    name: str
    colour: str
    panels: Mapping[str, Series | Band]
    window: int


def parse_size(text: str) -> tuple[float, float]:
    """Return a size in inches: a name, or WIDTHxHEIGHT.

    Raises:
        UsageError: neither, or out of range.

    >>> parse_size("slide"), parse_size("8x4.5")
    ((12.8, 7.2), (8.0, 4.5))
    """
    # 1. A name.
    if text in SIZES:
        return SIZES[text]

    # 2. Two numbers, each in range.
    hint = f"{', '.join(SIZES)}, or inches such as 12.8x7.2, each {_SMALLEST:g} to {_LARGEST:g}"
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is no size of a picture", hint=hint)
    width, height = float(match[1]), float(match[2])
    for side in (width, height):
        if not _SMALLEST <= side <= _LARGEST:
            raise UsageError(f"'{text}' is no size of a picture", hint=hint)
    return width, height


def parse_figures(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas.

    Raises:
        UsageError: a name that no panel has.

    >>> parse_figures("loss, lr")
    ('loss', 'lr')
    """
    # 1. The names, each once; nothing stands for none.
    stripped = map(str.strip, text.split(","))
    names = tuple(dict.fromkeys(filter(None, stripped)))

    # 2. Whether there are such panels.
    hint = f"there are {', '.join(FIGURES)}"
    if not names:
        raise UsageError("no panel is named", hint=hint)
    for name in names:
        if name not in FIGURES:
            raise UsageError(f"no panel is called '{name}'", hint=hint)
    return names


def save_run(
    run: RunLog | Mapping[str, RunLog], path: str | os.PathLike[str], options: RunPlot = RunPlot()
) -> None:
    """Draw a run, or several by name, and write the picture.

    The suffix (.png, .svg, .pdf) chooses the format.

    Args:
        run: one run, or a mapping of names to runs.
        path: where to; "-" is stdout.
        options: size, range and panels.

    Raises:
        UsageError: another suffix, a folder that cannot be written to, or a run without a step to
            draw.
    """
    write_output(path, picture_of_run(run, check_suffix(path), options))


def picture_of_run(
    run: RunLog | Mapping[str, RunLog], suffix: str, options: RunPlot = RunPlot()
) -> bytes:
    """Return the picture of a run, or of several by name. The same logs give the same bytes.

    Args:
        run: one run, or a mapping of names to runs.
        suffix: of the format: .png, .svg or .pdf.
        options: size, range and panels.

    Raises:
        UsageError: a run without a step to draw.
    """
    style = {**STYLE, "font.size": _font(options)}
    return picture_bytes(lambda: draw_run(run, options), suffix, dpi=_DPI, style=style)


def _font(options: RunPlot) -> float:
    """Return the font size in points: a narrow picture is not shown over a full slide."""
    return min(max(_FONT * (options.size[0] / SIZES["slide"][0]) ** 0.5, 8.0), 20.0)


def draw_run(run: RunLog | Mapping[str, RunLog], options: RunPlot = RunPlot()) -> Figure:
    """Build the figure without writing it.

    Args:
        run: one run, or a mapping of names to runs.
        options: size, range and panels.
    """
    from matplotlib.figure import Figure

    # 1. What there is to draw. A single run needs no name.
    runs: dict[str, RunLog]
    if isinstance(run, RunLog):
        runs = {"": run}
    else:
        runs = dict(run)
    first, last = _range(runs, options)
    drawn = []
    for place, (name, log) in enumerate(runs.items()):
        drawn.append(_prepared(name, log, options, first, last, place))
    names = _panel_names(drawn, options)

    # 2. The panels: one column, or two if there are many.
    is_wide = options.size[0] >= options.size[1]
    columns = 1
    if len(names) > 3 and is_wide:
        columns = 2
    rows = -(-len(names) // columns)
    figure = Figure(figsize=options.size, facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    spots = [grid[k % rows][k // rows] for k in range(rows * columns)]
    for spot in spots[len(names) :]:
        spot.set_axis_off()
    panels = dict(zip(names, spots, strict=False))
    for name, panel in panels.items():
        _panel(figure, panel, name, drawn, first, last)

    # 3. Alerts and frames. A run of one step has an axis too.
    tops = {id(spot) for spot in grid[0]}
    axis_end = last
    if last <= first:
        axis_end = first + 1
    for panel in panels.values():
        _mark(panel, drawn, first, last, labelled=id(panel) in tops)
        _frame(panel, first, axis_end)

    # 4. The axis of steps below each column, and the title.
    in_order = list(panels.values())
    for begin in range(0, len(in_order), rows):
        *_, lowest = in_order[begin : begin + rows]
        lowest.set_xlabel("step")
        lowest.tick_params(labelbottom=True)
        _step_axis(lowest, first, last)
    _head(figure, drawn, options)
    return figure


def _frame(panel: Axes, first: float, axis_end: float) -> None:
    """Set the range of steps, and leave two of the four spines."""
    panel.set_xlim(first, axis_end)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e6e6e6", lw=0.6)
    panel.set_axisbelow(True)


def _panel_names(drawn: Sequence[_Drawn], options: RunPlot) -> list[str]:
    """Return the panels for which a run has data, in the order that was requested."""
    # 1. What the runs have.
    available: set[str] = set()
    for curve in drawn:
        available.update(curve.panels)

    # 2. What was requested of it.
    candidates = options.figures or FIGURES
    names = [name for name in candidates if name in available]
    if not names:
        raise UsageError(
            "there is nothing to draw",
            got=f"no {', '.join(options.figures)} in the log",
            hint="jacdiag plot RUN without --figures draws what there is",
        )
    return names


def _range(runs: Mapping[str, RunLog], options: RunPlot) -> tuple[float, float]:
    """Return the first and the last step that the axis shows."""
    # 1. The steps that there are.
    starts, ends = [], []
    for name, log in runs.items():
        _check_steps(name, log)
        probed = [row["step"] for row in log.probes[:1]]
        starts.append(float(min([log.steps[0]["step"], *probed])))
        ends.append(float(log.steps[-1]["step"]))

    # 2. Those that the user requested. The axis ends with the last step.
    first, last = min(starts), max(ends)
    if options.first is not None:
        first = float(options.first)
    if options.last is not None:
        last = min(float(options.last), max(ends))

    # 3. There has to be a step between them.
    if first > last:
        got = f"steps {first:,.0f} to {last:,.0f} of a run of {max(ends):,.0f}"
        raise UsageError(
            "there is no step in the range", got=got, hint="--from and --to are steps of the run"
        )
    return first, last


def _check_steps(name: str, log: RunLog) -> None:
    """Raise UsageError if a run has no step yet."""
    if log.steps:
        return
    got = "a run without a step"
    if name:
        got = f"{printable(name)}: {got}"
    raise UsageError("there is nothing to draw", got=got, hint="wait for log_every steps")


def _prepared(
    name: str, run: RunLog, options: RunPlot, first: float, last: float, place: int
) -> _Drawn:
    """Compute what the panels show of a run between two steps."""
    # 1. The figures for which there is data.
    makers: Mapping[str, Callable[[], Series | Band]] = {
        "loss": lambda: column(run, "loss"),
        "gradient": lambda: _either(gradient(run), column(run, "grad_norm_post")),
        "gain": lambda: band(run.probes, "branch_norm"),
        "lr": lambda: column(run, "lr"),
        "update": lambda: update_ratio(run),
        "shortcut": lambda: band(run.stats, "shortcut_std"),
        "logits": lambda: band(run.stats, "logit"),
        "clip": lambda: clip_share(run),
    }
    panels: dict[str, Series | Band] = {}
    for figure in options.figures or FIGURES:
        values = makers[figure]().within(first, last)
        if values.any:
            panels[figure] = values

    # 2. How many steps the bold line is the mean of.
    window = options.smooth
    if window is None:
        steps = sum(first <= row["step"] <= last for row in run.steps)
        window = min(max(steps // 50, 1), 1000)

    # 3. One of several runs has a colour of its own.
    colour = INK
    if name:
        colour = _RUNS[place % len(_RUNS)]
    return _Drawn(run, name, colour, panels, max(window, 1))


def _either(first: Series, second: Series) -> Series:
    """Return the first series, or the second if the first has no value."""
    has_value = first.any
    if has_value:
        return first
    return second


# -- panels ----------------------------------------------------------------------------------------
def _panel(
    figure: Figure, panel: Axes, name: str, drawn: Sequence[_Drawn], first: float, last: float
) -> None:
    """Draw one figure of all runs, and a note next to its title."""
    panel.set_title(_TITLES[name], loc="left", fontsize="medium", pad=4)
    several = len(drawn) > 1
    if name == "gain" and not several:
        heat = heat_of(drawn[0].run)
        _heat(figure, panel, heat, first, last)
        if heat.gaps_in_words:
            _write_note(panel, f"white: {heat.gaps_in_words}", PALE)
        return

    # 1. The lines.
    note, colour = "", PALE
    for curve in drawn:
        if name in curve.panels:
            note = _draw_run_curve(panel, name, curve, several) or note
    if name == "gradient" and not several:
        has_second = _second_gradient(panel, drawn[0], first, last)
        if has_second:
            note, colour = "orange: after clipping", _RUNS[1]

    if name == "gradient":
        note = note or _note_on_late_norms(drawn)

    # 2. The scale.
    _set_scale(panel, name, drawn)

    # 3. What cannot be drawn, in words next to the title.
    if name in ("loss", "gradient"):
        lost = _not_finite(panel, drawn, name)
        if lost:
            note, colour = "; ".join(filter(None, [note, lost])), _ALERT["error"]
    _write_note(panel, note, colour)


def _note_on_late_norms(drawn: Sequence[_Drawn]) -> str:
    """Return which runs show the norm after clipping, since the loop passed none before it."""
    late = []
    for curve in drawn:
        is_drawn = "gradient" in curve.panels
        if is_drawn and not gradient(curve.run).any:
            late.append(curve.name)
    if not late:
        return ""

    # A run that is alone in its picture, or several by name.
    words = "after clipping, if there was any"
    if len(late) == len(drawn):
        return words
    names = ", ".join(clipped(printable(name), 20) for name in late[:2])
    if len(late) > 2:
        names += f" and {len(late) - 2} more"
    return f"{names}: {words}"


def _write_note(panel: Axes, note: str, colour: str) -> None:
    """Write a note next to the title of a panel, at its right end."""
    panel.text(
        1.0,
        1.02,
        note,
        color=colour,
        ha="right",
        va="bottom",
        transform=panel.transAxes,
        fontsize="x-small",
    )


def _set_scale(panel: Axes, name: str, drawn: Sequence[_Drawn]) -> None:
    """Choose a log scale, per cent or a linear scale."""
    if name in _LOG_SCALE and _positive(drawn, name):
        panel.set_yscale("log")
        _log_ticks(panel.yaxis, panel.get_ylim())
    elif name == "clip":
        panel.set_ylim(-2, 102)
    else:
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_run_curve(panel: Axes, name: str, curve: _Drawn, several: bool) -> str:
    """Draw one figure of one run; return what the lines of a band are, in words."""
    # A band has its own lines.
    values = curve.panels[name]
    if isinstance(values, Band):
        return _draw_band(panel, name, values, curve, several)

    # Clipping is drawn as the share of steps that were clipped.
    if name == "clip":
        window = max(curve.window, _LEAST_CLIP_WINDOW)
        _line(panel, values.smoothed(window), curve.colour, 1.6)
        return _note_on_window(f"of the last {window:,} steps", several)

    _smoothed(panel, values, curve, several, name)
    if name == "update" and curve.window > 1:
        window = max(curve.window, _LEAST_UPDATE_WINDOW)
        return _note_on_window(f"line: mean of the last {window:,} dots", several)
    return ""


def _note_on_window(text: str, several: bool) -> str:
    """Return what a line is the mean of; "" for several runs, whose lines may differ in that."""
    if several:
        return ""

    return text


def _draw_band(panel: Axes, name: str, band: Band, curve: _Drawn, several: bool) -> str:
    """Draw the figure of all sub-layers of one run; return what its lines are, in words."""
    # Of the shortcut, small values are the dangerous ones.
    end = "largest"
    if name == "shortcut":
        end = "smallest"
    _band(panel, band, curve, several, largest=end == "largest")

    if several:
        return f"{end} over sub-layers"
    return f"{end}, median and range over sub-layers"


def _smoothed(panel: Axes, values: Series, curve: _Drawn, several: bool, name: str) -> None:
    """Draw what was measured, pale, and its mean over it.

    Args:
        panel: where to.
        values: of the figure.
        curve: the run.
        several: there are other runs in the panel.
        name: of the figure.
    """
    has_mean = curve.window > 1 and name != "lr"

    # 1. Dots, for a figure that jumps between parameter groups.
    if name == "update":
        dotted = values.sampled()
        size = 6
        if dotted.x.size > 100:
            size = 3
        panel.plot(
            dotted.x, dotted.y, ".", color=curve.colour, alpha=_RAW, ms=size, mew=0, clip_on=False
        )
        if has_mean:
            mean = values.smoothed(max(curve.window, _LEAST_UPDATE_WINDOW))
            _line(panel, mean, curve.colour, 1.6)
        return

    # 2. One line.
    if not has_mean:
        _line(panel, values, curve.colour, 1.4)
        return

    # 3. A pale line with its mean.
    pale = _RAW
    if several:
        pale = _RAW_OF_SEVERAL
    _line(panel, values, curve.colour, 0.7, alpha=pale)
    mean = values.smoothed(curve.window)
    _line(panel, mean, curve.colour, 1.8)
    _peaks(panel, values.peaks_over(mean, logarithm=name in _LOG_SCALE), curve.colour)


def _peaks(panel: Axes, peaks: Series, colour: str) -> None:
    """Draw a full dot at each value that stands far above the mean.

    In a mean of many steps a spike of one step is hardly seen, and the pale line under it is thin.
    """
    if not peaks.x.size:
        return
    shown = peaks.largest(_MOST_PEAKS)
    panel.plot(shown.x, shown.y, ".", color=colour, ms=5, mew=0, clip_on=False)


def _second_gradient(panel: Axes, curve: _Drawn, first: float, last: float) -> bool:
    """Draw the norm that the optimizer used if it is another one; return whether it is."""
    # Without clipping the two are the same.
    was_clipped = any(row.get("clipped") for row in curve.run.steps)
    if not was_clipped:
        return False
    after = column(curve.run, "grad_norm_post").within(first, last)
    if not after.any:
        return False
    _line(panel, after.smoothed(curve.window), _RUNS[1], 1.4)
    return True


def _band(panel: Axes, values: Band, curve: _Drawn, several: bool, *, largest: bool) -> None:
    """Draw sub-layers as a band with their median; of several runs the end that matters."""
    end = values.low
    if largest:
        end = values.high
    if several:
        _line(panel, end, curve.colour, 1.6)
        return
    panel.fill_between(
        values.low.x, values.low.y, values.high.y, color=curve.colour, alpha=0.15, lw=0
    )
    _line(panel, values.middle, curve.colour, 1.0, alpha=0.7)
    _line(panel, end, curve.colour, 1.8)


def _line(panel: Axes, values: Series, colour: str, width: float, alpha: float = 1.0) -> None:
    """Draw a line, and a dot at each point that it would not show.

    These are points without a neighbour, and all points if there are few of them.
    """
    thin = values.thinned()
    known = np.isfinite(thin.y)
    sides = np.concatenate([[False], known, [False]])
    lonely = known & ~sides[:-2] & ~sides[2:]
    panel.plot(thin.x, thin.y, color=colour, lw=width, alpha=alpha, solid_capstyle="round")

    # A few points are all marked.
    marked = lonely
    if known.sum() <= _FEW:
        marked = known
    if marked.any():
        panel.plot(
            thin.x[marked], thin.y[marked], ".", color=colour, alpha=alpha, ms=6, clip_on=False
        )


def _positive(drawn: Sequence[_Drawn], name: str) -> bool:
    """Return whether a log scale has something to show."""
    for curve in drawn:
        values = curve.panels.get(name)
        if isinstance(values, Band):
            values = values.middle
        if values is None:
            continue  # this run did not measure it
        finite = values.y[np.isfinite(values.y)]
        has_positive = bool((finite > 0).any())
        if has_positive:
            return True
    return False


def _log_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Write a few ticks as plain numbers.

    The default labels of a short log axis cover each other.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = limits
    ticks = _ticks_inside(low, high) or [low, high]
    every = -(-len(ticks) // 5)
    axis.set_major_locator(FixedLocator(ticks[::every]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _ticks_inside(low: float, high: float) -> list[float]:
    """Return round numbers between the limits: the coarsest series that has three of them."""
    from matplotlib.ticker import MaxNLocator

    # 1. From a tick per decade to eight.
    for mantissas in _MANTISSAS:
        ticks = _within(_log_series(low, high, mantissas), low, high)
        if len(ticks) >= 3:
            return ticks

    # 2. A range so short that its log scale is nearly a linear one.
    return _within(MaxNLocator(4).tick_values(low, high), low, high)


def _log_series(low: float, high: float, mantissas: Sequence[float]) -> list[float]:
    """Return the mantissas times each power of ten, from below the limits to above them."""
    lowest, highest = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = []
    for decade in range(lowest, highest + 1):
        ticks += [mantissa * 10.0**decade for mantissa in mantissas]
    return ticks


def _within(ticks: Iterable[float], low: float, high: float) -> list[float]:
    """Return the ticks between the limits."""
    return [tick for tick in ticks if low <= tick <= high]


def _not_finite(panel: Axes, drawn: Sequence[_Drawn], name: str) -> str:
    """Draw a cross at the foot for each step whose value is not finite; return since when."""
    # 1. The runs that lost a value.
    words = []
    for curve in drawn:
        values = curve.panels.get(name)
        if not isinstance(values, Series) or not values.lost.size:
            continue
        _draw_crosses(panel, values.lost)
        text = _lost_words(values.lost)
        if curve.name:
            text = f"{clipped(printable(curve.name), 20)}: {text}"
        words.append(text)

    # 2. Two of them are named.
    listed = "; ".join(words[:2])
    if len(words) > 2:
        listed += f" and {len(words) - 2} more"
    return listed


def _draw_crosses(panel: Axes, lost: NDArray[np.float64]) -> None:
    """Draw crosses at the foot of a panel, 200 at most."""
    marks = lost[:: -(-lost.size // 200)]
    panel.plot(
        marks,
        np.full(marks.size, 0.03),
        "x",
        color=_ALERT["error"],
        ms=5,
        transform=panel.get_xaxis_transform(),
        clip_on=False,
    )


def _lost_words(lost: NDArray[np.float64]) -> str:
    """Return since which step values are not finite, and at how many steps."""
    begins, count = lost[0], lost.size
    if count == 1:
        return f"not finite at {begins:,.0f}"
    return f"not finite from {begins:,.0f}, {count:,} steps"


def _heat(figure: Figure, panel: Axes, heat: Heat, first: float, last: float) -> None:
    """Draw the branch norms of one run: depth downwards, steps to the right."""
    from matplotlib.colors import LogNorm

    # 1. The cells.
    low, high = heat.extent
    if high <= low:
        high = low * 1.01
    edges = _edges([float(step) for step in heat.steps], first, last)
    rows = [float(k) - 0.5 for k in range(len(heat.names) + 1)]
    norm = LogNorm(low, high)
    mesh = panel.pcolormesh(
        edges, rows, heat.values, cmap="cividis", norm=norm, rasterized=len(heat.names) > 50
    )
    panel.invert_yaxis()

    # 2. The names of eight sub-layers at most.
    every = max(1, -(-len(heat.names) // 8))
    ticks = list(range(0, len(heat.names), every))
    names = shorten_names([printable(name) for name in heat.names], 16)
    panel.set_yticks(ticks, [names[k] for k in ticks], fontsize="x-small")

    # 3. The colour key.
    bar = figure.colorbar(mesh, ax=panel, pad=0.01)
    bar.ax.tick_params(labelsize="x-small", which="both")
    _log_ticks(bar.ax.yaxis, (norm.vmin or low, norm.vmax or high))


def _edges(steps: list[float], first: float, last: float) -> list[float]:
    """Return the edges of each probe's column, half-way to its neighbours."""
    middles = []
    for step, following in itertools.pairwise(steps):
        middles.append((step + following) / 2)

    # The first and the last column are as wide as the last one between two probes.
    half = (last - first) / 40
    if len(steps) > 1:
        half = (steps[-1] - steps[-2]) / 2
    half = max(half, 0.5)
    return [steps[0] - half, *middles, steps[-1] + half]


# -- alerts ----------------------------------------------------------------------------------------
def _mark(
    panel: Axes, drawn: Sequence[_Drawn], first: float, last: float, *, labelled: bool
) -> None:
    """Draw a line for each alert and a dotted one for each resume.

    Args:
        panel: where to.
        drawn: the runs.
        first: step that the panel begins with.
        last: step that it ends with.
        labelled: write what each line is at its head.
    """
    several = len(drawn) > 1
    span = (last - first) or 1.0
    labels: list[tuple[float, str]] = []
    for curve in drawn:
        for event in _events(curve, several=several):
            is_inside = first <= event.step <= last
            if not is_inside:
                continue
            panel.axvline(event.step, color=event.colour, lw=event.width, ls=event.dashes)
            if labelled and event.label:
                _at_head(panel, labels, event.step, event.label, event.colour, last, span)


@dataclass(frozen=True)
class _Event:
    """An upright line in a panel: an alert or a resume.

    Attributes:
        step: at which it stands.
        label: written at its head; "" for none.
        colour, width, dashes: how it is drawn.
    """

    step: float
    label: str
    colour: str
    width: float
    dashes: str


def _events(curve: _Drawn, *, several: bool) -> list[_Event]:
    """Return the resumes of a run, then its alerts.

    Args:
        curve: the run.
        several: of several runs, the colour of an alert says which run it is of; of a single run,
            how severe it is.
    """
    # 1. Resumes.
    events = [_Event(float(step), "resumed", PALE, 0.9, ":") for step in curve.run.resumes]

    # 2. Alerts. Observations have a line and no label.
    for row in alerts_of_run(curve.run):
        level = str(row.get("level"))
        colour = _ALERT.get(level, PALE)
        if several:
            colour = curve.colour
        label = str(row["code"])
        if level == "info":
            label = ""
        events.append(_Event(float(row["step"]), label, colour, 1.0, "--"))
    return events


def _at_head(
    panel: Axes,
    labels: list[tuple[float, str]],
    step: float,
    text: str,
    colour: str,
    last: float,
    span: float,
) -> None:
    """Write a word next to a line, below the words that stand there already, each word once."""
    # 1. The words that stand there.
    near = [word for at, word in labels if abs(at - step) < 0.14 * span]
    if text in near or len(near) >= 5:
        return
    labels.append((step, text))

    # 2. To the right of the line, or to its left near the panel's end.
    side, dx = "left", 3
    if step > last - 0.15 * span:
        side, dx = "right", -3
    panel.annotate(
        text,
        (step, 0.97),
        xycoords=panel.get_xaxis_transform(),
        xytext=(dx, -13 * len(near)),
        textcoords="offset points",
        ha=side,
        va="top",
        fontsize="small",
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        zorder=5,
    )


def _step_axis(panel: Axes, first: float, last: float) -> None:
    """Set a few ticks at integers; the last step is one of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if last <= first:
        panel.set_xticks([first])  # a run of one step
        return

    # 1. Round steps, none of which is so near the last that their labels would meet.
    near = 0.08 * (last - first)
    ticks = []
    for tick in MaxNLocator(5, integer=True).tick_values(first, last):
        is_clear = first <= tick and last - tick > near
        if is_clear:
            ticks.append(tick)

    # 2. Both ends.
    if not ticks or ticks[0] - first > near:
        ticks.insert(0, first)
    panel.set_xticks([*ticks, last])


def _head(figure: Figure, drawn: Sequence[_Drawn], options: RunPlot) -> None:
    """Write the title, and the names of several runs or what the bold line is."""
    from matplotlib.lines import Line2D

    # 1. The title.
    room = int(options.size[0] * 9)  # characters
    title = f"{len(drawn)} runs"
    if len(drawn) == 1:
        title = _title(drawn[0].run, room)
    figure.suptitle(title, x=0.01, ha="left", fontsize="large")

    # 2. The names of several runs.
    if len(drawn) > 1:
        _name_runs(figure, drawn, room)
        return

    # 3. What the lines of a single run are.
    with_mean = [_TITLES[name] for name in _WITH_MEAN if name in drawn[0].panels]
    if with_mean and drawn[0].window > 1:
        handles = [Line2D([], [], color=INK, lw=2.0)]
        labels = [f"{', '.join(with_mean)}: mean of the last {drawn[0].window:,} steps"]
        if _has_peak(drawn[0]):
            handles.append(Line2D([], [], color=INK, marker=".", ms=5, mew=0, lw=0))
            labels.append("a step far above the mean")
        figure.legend(
            handles,
            labels,
            loc="outside lower right",
            ncols=2,
            frameon=False,
            fontsize="small",
        )


def _has_peak(curve: _Drawn) -> bool:
    """Return whether a panel marks a step that stands far above the mean."""
    for name in _WITH_MEAN:
        values = curve.panels.get(name)
        if not isinstance(values, Series):
            continue
        mean = values.smoothed(curve.window)
        if values.peaks_over(mean, logarithm=name in _LOG_SCALE).x.size:
            return True
    return False


def _name_runs(figure: Figure, drawn: Sequence[_Drawn], room: int) -> None:
    """Write the name of each run in its colour, at the top right."""
    from matplotlib.lines import Line2D

    # 1. A line of its colour and a short name for each run.
    short = shorten_names([printable(curve.name) for curve in drawn], min(40, room // 2))
    handles = [Line2D([], [], color=curve.colour, lw=2.5) for curve in drawn]
    labels = []
    for name, curve in zip(short, drawn, strict=True):
        labels.append(f"{name}: {curve.run.steps[-1]['step']:,} steps")

    # 2. As many next to each other as there is room for.
    fitting = max((room - 10) // (max(map(len, labels)) + 6), 1)
    figure.legend(
        handles,
        labels,
        loc="outside upper right",
        ncols=min(len(drawn), fitting, 4),
        frameon=False,
    )


def _title(run: RunLog, room: int) -> str:
    """Return the model, how many steps it ran, its alerts and the report at the start.

    Args:
        run: that is drawn.
        room: characters of a line. The report has a line of its own if one is too short for both.
    """
    # 1. The model and its steps.
    model = clipped(printable(str(run.header.get("model", "?"))), 40)
    last = run.steps[-1]["step"]
    steps = f"{last:,} steps"
    if last == 1:
        steps = "1 step"
    title = f"{model}, {steps}; {_alerts_in_words(run)}"

    # 2. What the report at the start found.
    at_start = report_at_start(run)
    if at_start:
        codes = dict.fromkeys(str(row["code"]) for row in at_start)
        report = f"report at step {at_start[0]['step']:,}: {', '.join(codes)}"
        joint = "; "
        if len(title) + len(joint) + len(report) > room:
            joint = ";\n"
        title += f"{joint}{report}"

    # 3. A line that is still too long is cut.
    lines = title.splitlines()
    return "\n".join(clipped(line, room) for line in lines)


def _alerts_in_words(run: RunLog) -> str:
    """Return the first few alerts with their steps, and how many there are beyond."""
    alerts = [row for row in alerts_of_run(run) if row.get("level") != "info"]
    if not alerts:
        return "no alert"
    named = [f"{row['code']} at {row['step']:,}" for row in alerts[:_ALERTS]]
    text = f"alerts: {', '.join(named)}"
    if len(alerts) > _ALERTS:
        text += f" and {len(alerts) - _ALERTS} more"
    return text
