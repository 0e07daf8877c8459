"""A run as a picture: a panel for each figure over steps, with the alerts.

Several runs are drawn over each other, each in a colour of its own.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jacdiag.errors import UsageError, clipped, printable
from jacdiag.records.output_file import write_output
from jacdiag.records.run_log import RunLog
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
from jacdiag.render.plots.depth_curves import INK, PALE
from jacdiag.render.plots.report_plot import check_suffix
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
from jacdiag.render.terminal.run_screen import told_apart

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
_STYLE = {"font.family": "DejaVu Sans", "svg.hashsalt": "jacdiag", "svg.fonttype": "path"}
_ALERT = {"error": "#b3261e", "warning": "#c77700", "info": PALE}
_RUNS = ("#17406d", "#d1701c", "#3a8a58", "#8a3a86", "#6b6b6b", "#b3a100", "#2a9db0", "#a33a3a")
_RAW_OF_SEVERAL = 0.2
_RAW = 0.35  # opacity of what was measured, under its mean
_TITLES = {
    "loss": "loss",
    "gradient": "gradient norm",
    "gain": "branch gain ‖J‖",
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
    if text in SIZES:
        return SIZES[text]
    match = _SIZE.fullmatch(text)
    hint = f"{', '.join(SIZES)}, or inches such as 12.8x7.2, each {_SMALLEST:g} to {_LARGEST:g}"
    if match is None:
        raise UsageError(f"'{text}' is no size of a picture", hint=hint)
    width, height = float(match[1]), float(match[2])
    if not (_SMALLEST <= width <= _LARGEST and _SMALLEST <= height <= _LARGEST):
        raise UsageError(f"'{text}' is no size of a picture", hint=hint)
    return width, height


def parse_figures(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas.

    Raises:
        UsageError: a name that no panel has.

    >>> parse_figures("loss, lr")
    ('loss', 'lr')
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in FIGURES]
    if unknown or not names:
        what = f"no panel is called '{unknown[0]}'" if unknown else "no panel is named"
        raise UsageError(what, hint=f"there are {', '.join(FIGURES)}")
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
    from matplotlib import style

    suffix = check_suffix(path)
    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[
        suffix
    ]
    buffer = io.BytesIO()
    with (
        style.context({**_STYLE, "font.size": _font(options)}, after_reset=True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph")
        draw_run(run, options).savefig(buffer, format=suffix[1:], dpi=_DPI, metadata=undated)
    write_output(path, buffer.getvalue())


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

    # 1. What there is to draw.
    runs = {"": run} if isinstance(run, RunLog) else dict(run)
    first, last = _range(runs, options)
    drawn = [
        _prepared(name, log, options, first, last, k) for k, (name, log) in enumerate(runs.items())
    ]
    names = _panel_names(drawn, options)

    # 2. The panels: one column, or two if there are many.
    is_wide = options.size[0] >= options.size[1]
    columns = 2 if len(names) > 3 and is_wide else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=options.size, facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    spots = [grid[k % rows][k // rows] for k in range(rows * columns)]
    for spot in spots[len(names) :]:
        spot.set_axis_off()
    panels = dict(zip(names, spots, strict=False))
    for name, panel in panels.items():
        _panel(figure, panel, name, drawn, first, last)

    # 3. Alerts and frames.
    tops = {id(spot) for spot in grid[0]}
    for panel in panels.values():
        _mark(panel, drawn, first, last, labelled=id(panel) in tops)
        panel.set_xlim(first, last if last > first else first + 1)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e6e6e6", lw=0.6)
        panel.set_axisbelow(True)

    # 4. The axis of steps below each column, and the title.
    for k in range(columns):
        column_panels = list(panels.values())[k * rows : (k + 1) * rows]
        if column_panels:
            lowest = column_panels[-1]
            lowest.set_xlabel("step")
            lowest.tick_params(labelbottom=True)
            _step_axis(lowest, first, last)
    _head(figure, drawn, options)
    return figure


def _panel_names(drawn: Sequence[_Drawn], options: RunPlot) -> list[str]:
    """Return the panels for which a run has data, in the order that was asked for."""
    candidates = options.figures or FIGURES
    names = [name for name in candidates if any(name in curve.panels for curve in drawn)]
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
        if not log.steps:
            whose = f"{printable(name)}: " if name else ""
            raise UsageError(
                "there is nothing to draw",
                got=f"{whose}a run without a step",
                hint="wait for log_every steps",
            )
        probed = [row["step"] for row in log.probes[:1]]
        starts.append(float(min([log.steps[0]["step"], *probed])))
        ends.append(float(log.steps[-1]["step"]))

    # 2. Those that were asked for.
    first = float(options.first) if options.first is not None else min(starts)
    last = float(options.last) if options.last is not None else max(ends)
    last = min(last, max(ends))  # the axis ends with the last step
    if first > last:
        got = f"steps {first:,.0f} to {last:,.0f} of a run of {max(ends):,.0f}"
        raise UsageError(
            "there is no step in the range", got=got, hint="--from and --to are steps of the run"
        )
    return first, last


def _prepared(
    name: str, run: RunLog, options: RunPlot, first: float, last: float, place: int
) -> _Drawn:
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
    steps = sum(first <= row["step"] <= last for row in run.steps)
    window = options.smooth if options.smooth is not None else min(max(steps // 50, 1), 1000)
    return _Drawn(run, name, _RUNS[place % len(_RUNS)] if name else INK, panels, max(window, 1))


def _either(first: Series, second: Series) -> Series:
    return first if first.any else second


# -- panels ----------------------------------------------------------------------------------------
def _panel(
    figure: Figure, panel: Axes, name: str, drawn: Sequence[_Drawn], first: float, last: float
) -> None:
    """Draw one figure of all runs, and a note next to its title."""
    panel.set_title(_TITLES[name], loc="left", fontsize="medium", pad=4)
    several = len(drawn) > 1
    if name == "gain" and not several:
        _heat(figure, panel, heat_of(drawn[0].run), first, last)
        return

    # 1. The lines.
    note, colour = "", PALE
    for curve in drawn:
        if name in curve.panels:
            note = _draw_run_curve(panel, name, curve, several) or note
    if name == "gradient" and not several and _second_gradient(panel, drawn[0], first, last):
        note, colour = "orange: after clipping", _RUNS[1]

    # 2. The scale.
    if name in _LOG_SCALE and _positive(drawn, name):
        panel.set_yscale("log")
        _log_ticks(panel.yaxis, panel.get_ylim())
    elif name == "clip":
        panel.set_ylim(-2, 102)
    else:
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    # 3. What cannot be drawn, in words next to the title.
    lost = _not_finite(panel, drawn, name) if name in ("loss", "gradient") else ""
    if lost:
        note, colour = lost, _ALERT["error"]
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


def _draw_run_curve(panel: Axes, name: str, curve: _Drawn, several: bool) -> str:
    """Draw one figure of one run; return what the lines of a band are, in words."""
    values = curve.panels[name]
    if isinstance(values, Band):
        shows_largest = name != "shortcut"
        _band(panel, values, curve, several, largest=shows_largest)
        end = "largest" if shows_largest else "smallest"
        if several:
            return f"{end} over sub-layers"
        return f"{end}, median and range over sub-layers"
    if name == "clip":
        _line(panel, values.smoothed(max(curve.window, 20)), curve.colour, 1.6)
    else:
        _smoothed(panel, values, curve, several, dots=name == "update", plain=name == "lr")
    return ""


def _smoothed(
    panel: Axes, values: Series, one: _Drawn, several: bool, *, dots: bool, plain: bool
) -> None:
    """Draw what was measured, pale, and its mean over it."""
    short = one.window <= 1 or plain
    if dots:
        dotted = values.sampled()
        size = 3 if dotted.x.size > 100 else 6
        panel.plot(
            dotted.x, dotted.y, ".", color=one.colour, alpha=_RAW, ms=size, mew=0, clip_on=False
        )
        if not short:
            _line(panel, values.smoothed(max(one.window, 10)), one.colour, 1.6)
        return
    if short:
        _line(panel, values, one.colour, 1.4)
        return
    pale = _RAW_OF_SEVERAL if several else _RAW
    _line(panel, values, one.colour, 0.7, alpha=pale)
    _line(panel, values.smoothed(one.window), one.colour, 1.8)


def _second_gradient(panel: Axes, one: _Drawn, first: float, last: float) -> bool:
    """Draw the norm that the optimizer used if it is another one; return whether it is."""
    after = column(one.run, "grad_norm_post").within(first, last)
    if not any(row.get("clipped") for row in one.run.steps) or not after.any:
        return False
    _line(panel, after.smoothed(one.window), _RUNS[1], 1.4)
    return True


def _band(panel: Axes, values: Band, one: _Drawn, several: bool, *, largest: bool) -> None:
    """Draw sub-layers as a band with their median; of several runs the end that matters."""
    end = values.high if largest else values.low
    if several:
        _line(panel, end, one.colour, 1.6)
        return
    panel.fill_between(
        values.low.x, values.low.y, values.high.y, color=one.colour, alpha=0.15, lw=0
    )
    _line(panel, values.middle, one.colour, 1.0, alpha=0.7)
    _line(panel, end, one.colour, 1.8)


def _line(panel: Axes, values: Series, colour: str, width: float, alpha: float = 1.0) -> None:
    thin = values.thinned()
    known = np.isfinite(thin.y)
    sides = np.concatenate([[False], known, [False]])
    # a line alone would not show a point without a neighbour
    lonely = known & ~sides[:-2] & ~sides[2:]
    panel.plot(thin.x, thin.y, color=colour, lw=width, alpha=alpha, solid_capstyle="round")
    if lonely.any():
        panel.plot(
            thin.x[lonely], thin.y[lonely], ".", color=colour, alpha=alpha, ms=6, clip_on=False
        )


def _positive(drawn: Sequence[_Drawn], name: str) -> bool:
    """Return whether a log scale has something to show."""
    for one in drawn:
        values = one.panels.get(name)
        main = values.middle if isinstance(values, Band) else values
        if main is not None and bool((main.y[np.isfinite(main.y)] > 0).any()):
            return True
    return False


def _log_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Write a few ticks as plain numbers.

    The default labels of a short log axis cover each other.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = limits
    ticks = _ticks_inside(low, high)
    every = -(-len(ticks) // 5)
    axis.set_major_locator(FixedLocator(ticks[::every] if ticks else [low, high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _ticks_inside(low: float, high: float) -> list[float]:
    """Return round numbers between the limits: the coarsest series that has three of them."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _MANTISSAS:
        ticks = [mantissa * 10.0**decade for decade in decades for mantissa in mantissas]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside
    # a range so short that its log scale is nearly a linear one
    return [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _not_finite(panel: Axes, drawn: Sequence[_Drawn], name: str) -> str:
    """Draw a cross at the foot for each step whose value is not finite; return since when."""
    words = []
    for one in drawn:
        values = one.panels.get(name)
        if not isinstance(values, Series) or not values.lost.size:
            continue
        marks = values.lost[:: -(-values.lost.size // 200)]
        foot = panel.get_xaxis_transform()
        panel.plot(
            marks,
            np.full(marks.size, 0.03),
            "x",
            color=_ALERT["error"],
            ms=5,
            transform=foot,
            clip_on=False,
        )
        begins, count = values.lost[0], values.lost.size
        text = f"not finite from {begins:,.0f}, {count:,} steps"
        if count == 1:
            text = f"not finite at {begins:,.0f}"
        if one.name:
            text = f"{clipped(printable(one.name), 20)}: {text}"
        words.append(text)
    listed = "; ".join(words[:2])
    if len(words) > 2:
        listed += f" and {len(words) - 2} more"
    return listed


def _heat(figure: Figure, panel: Axes, heat: Heat, first: float, last: float) -> None:
    from matplotlib.colors import LogNorm

    low, high = heat.extent
    edges = _edges([float(s) for s in heat.steps], first, last)
    rows = [float(k) - 0.5 for k in range(len(heat.names) + 1)]
    norm = LogNorm(low, high if high > low else low * 1.01)
    mesh = panel.pcolormesh(
        edges, rows, heat.values, cmap="cividis", norm=norm, rasterized=len(heat.names) > 50
    )
    panel.invert_yaxis()
    some = max(1, -(-len(heat.names) // 8))
    ticks = list(range(0, len(heat.names), some))
    names = told_apart([printable(name) for name in heat.names], 16)
    panel.set_yticks(ticks, [names[k] for k in ticks], fontsize="x-small")
    bar = figure.colorbar(mesh, ax=panel, pad=0.01)
    bar.ax.tick_params(labelsize="x-small", which="both")
    _log_ticks(bar.ax.yaxis, (norm.vmin or low, norm.vmax or high))


def _edges(steps: list[float], first: float, last: float) -> list[float]:
    """Return the edges of each probe's column, half-way to its neighbours."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
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
        for resumed in curve.run.resumes:
            if not first <= resumed <= last:
                continue
            panel.axvline(resumed, color=PALE, lw=0.9, ls=":")
            if labelled:
                _at_head(panel, labels, float(resumed), "resumed", PALE, last, span)
        for row in alerts_of_run(curve.run):
            step, level = float(row["step"]), str(row.get("level"))
            if not first <= step <= last:
                continue
            colour = curve.colour if several else _ALERT.get(level, PALE)
            panel.axvline(step, color=colour, lw=1.0, ls="--")
            if labelled and level != "info":
                _at_head(panel, labels, step, str(row["code"]), colour, last, span)


def _at_head(
    panel: Axes,
    taken: list[tuple[float, str]],
    step: float,
    text: str,
    colour: str,
    last: float,
    span: float,
) -> None:
    """Write a word next to a line, below the words that stand there already, each word once."""
    near = [word for at, word in taken if abs(at - step) < 0.14 * span]
    if text in near or len(near) >= 5:
        return
    taken.append((step, text))
    at_right = step > last - 0.15 * span
    panel.annotate(
        text,
        (step, 0.97),
        xycoords=panel.get_xaxis_transform(),
        xytext=(-3 if at_right else 3, -13 * len(near)),
        textcoords="offset points",
        ha="right" if at_right else "left",
        va="top",
        fontsize="small",
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        zorder=5,
    )


def _step_axis(panel: Axes, first: float, last: float) -> None:
    """Set a few ticks at integers; the last step is one of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ticks = [t for t in MaxNLocator(5, integer=True).tick_values(first, last) if first <= t <= last]
    near = 0.08 * (last - first)
    ticks = [t for t in ticks if last - t > near]
    if not ticks or ticks[0] - first > near:
        ticks.insert(0, first)
    panel.set_xticks([*ticks, last] if last > first else [first])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _head(figure: Figure, drawn: Sequence[_Drawn], options: RunPlot) -> None:
    """Write the title, and the names of several runs or what the bold line is."""
    from matplotlib.lines import Line2D

    title = _title(drawn[0].run) if len(drawn) == 1 else f"{len(drawn)} runs"
    room = int(options.size[0] * 9)
    figure.suptitle(clipped(title, room), x=0.01, ha="left", fontsize="large")
    if len(drawn) > 1:
        short = told_apart([printable(one.name) for one in drawn], min(40, room // 2))
        handles = [Line2D([], [], color=one.colour, lw=2.5) for one in drawn]
        labels = [
            f"{name}: {one.run.steps[-1]['step']:,} steps"
            for name, one in zip(short, drawn, strict=True)
        ]
        fitting = max((room - 10) // (max(map(len, labels)) + 6), 1)
        figure.legend(
            handles,
            labels,
            loc="outside upper right",
            ncols=min(len(drawn), fitting, 4),
            frameon=False,
        )
        return
    if drawn[0].window > 1:
        handle = Line2D([], [], color=INK, lw=2.0)
        figure.legend(
            [handle],
            [f"mean of the last {drawn[0].window:,} steps"],
            loc="outside lower right",
            frameon=False,
            fontsize="small",
        )


def _title(run: RunLog) -> str:
    """Return the model, how many steps it ran, its alerts and the report at the start."""
    model = clipped(printable(str(run.header.get("model", "?"))), 40)
    last = run.steps[-1]["step"]
    steps = "1 step" if last == 1 else f"{last:,} steps"

    alerts = [row for row in alerts_of_run(run) if row.get("level") != "info"]
    state = "no alert"
    if alerts:
        listed = ", ".join(f"{row['code']} at {row['step']:,}" for row in alerts[:_ALERTS])
        more = f" and {len(alerts) - _ALERTS} more" if len(alerts) > _ALERTS else ""
        state = f"alerts: {listed}{more}"

    title = f"{model}, {steps}; {state}"
    at_start = report_at_start(run)
    if at_start:
        codes = ", ".join(dict.fromkeys(str(row["code"]) for row in at_start))
        title += f"; report at step {at_start[0]['step']:,}: {codes}"
    return title
