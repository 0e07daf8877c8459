"""A run as a picture: loss, gradient norm, gains over depth and time, with the alerts on all of them."""

from __future__ import annotations

import io
import math
import os
import warnings
from typing import TYPE_CHECKING, Any

from jacdiag.errors import UsageError, clipped, printable
from jacdiag.render.curves import INK, PALE
from jacdiag.render.files import write_output
from jacdiag.render.heat import Heat, heat_of
from jacdiag.render.plot import check_suffix
from jacdiag.report.runlog import RunLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {"font.size": 10.0, "font.family": "DejaVu Sans", "svg.hashsalt": "jacdiag", "svg.fonttype": "path"}
_ALERT = {"error": "#b3261e", "warning": "#c77700", "info": PALE}


def save_run(run: RunLog, path: str | os.PathLike[str]) -> None:
    """Draws a run and writes the picture; the suffix (.png, .svg, .pdf) chooses the format.

    Raises:
        UsageError: another suffix, a folder that cannot be written to, or a run without a step.
    """
    from matplotlib import style

    suffix = check_suffix(path)
    if not run.steps:
        raise UsageError("there is nothing to draw", got="a run without a step", hint="wait for log_every steps")
    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[suffix]
    buffer = io.BytesIO()
    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        draw_run(run).savefig(buffer, format=suffix[1:], dpi=150, metadata=undated)
    write_output(path, buffer.getvalue())


def draw_run(run: RunLog) -> Figure:
    """Builds the figure without writing it."""
    from matplotlib.figure import Figure

    heat = heat_of(run)
    ratios = [2.0, 2.0, 2.6] if heat.steps else [1.0, 1.0]
    figure = Figure(figsize=(10.0, 7.2 if heat.steps else 5.0), facecolor="white", layout="constrained")
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    steps = [float(row["step"]) for row in run.steps]
    _line(panels[0], steps, run.column("loss"), INK, "loss")
    panels[0].set_ylabel("loss")
    before = run.column("grad_norm")
    if any(math.isfinite(v) for v in before):
        _line(panels[1], steps, before, INK, "before clipping")
    _line(panels[1], steps, run.column("grad_norm_post"), PALE, "as the optimiser sees it")
    panels[1].set_yscale("log")
    panels[1].set_ylabel("gradient norm")
    panels[1].legend(frameon=False, fontsize=8, loc="upper right")
    if heat.steps:
        _heat(figure, panels[2], heat)
    for panel in panels:
        _mark(panel, run)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    figure.suptitle(_title(run), x=0.01, ha="left", fontsize=11)
    return figure


def _line(panel: Axes, x: list[float], y: list[float], colour: str, label: str) -> None:
    marker = "." if len(x) < 3 else ""
    panel.plot(x, [v if math.isfinite(v) else math.nan for v in y], color=colour, lw=0.9, label=label, marker=marker)


def _heat(figure: Figure, panel: Axes, heat: Heat) -> None:
    from matplotlib.colors import LogNorm

    low, high = heat.extent
    edges = _edges([float(s) for s in heat.steps])
    rows = [float(k) - 0.5 for k in range(len(heat.names) + 1)]
    norm = LogNorm(low, high if high > low else low * 1.01)
    mesh = panel.pcolormesh(edges, rows, heat.values, cmap="cividis", norm=norm)
    panel.invert_yaxis()
    some = max(1, len(heat.names) // 12)
    ticks = list(range(0, len(heat.names), some))
    panel.set_yticks(ticks, [clipped(printable(heat.names[k]), 28) for k in ticks], fontsize=7)
    figure.colorbar(mesh, ax=panel, label="branch ‖J‖", pad=0.01)


def _edges(steps: list[float]) -> list[float]:
    """A probe's column begins at its step and goes on to the next one."""
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1.0
    return [*steps, steps[-1] + max(width, 1.0)]


def _mark(panel: Axes, run: RunLog) -> None:
    for row in run.alerts:
        panel.axvline(float(row["step"]), color=_ALERT.get(str(row.get("level")), PALE), lw=0.8, ls="--")


def _title(run: RunLog) -> str:
    model, last = printable(str(run.header.get("model", "?"))), run.steps[-1]["step"]
    loud = [row for row in run.alerts if row.get("level") != "info"]
    told = ", ".join(f"{row['code']} at {row['step']:,}" for row in loud[:4])
    more = f" and {len(loud) - 4} more" if len(loud) > 4 else ""
    return f"{clipped(model, 40)}, {last:,} steps; " + (f"alerts: {told}{more}" if loud else "no alert")
