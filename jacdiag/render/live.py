"""The screen that follows a run: loss and gradient norm, gains over depth and time, alerts. Fits 80 x 24."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.text import Text

from jacdiag.errors import clipped, printable
from jacdiag.render.heat import Heat, heat_of
from jacdiag.render.numbers import seconds, three
from jacdiag.report.runlog import RunLog, number

_BARS = "▁▂▃▄▅▆▇█"
_SHADES = "·░▒▓█"
_COLOURS = ("grey35", "blue", "cyan", "yellow", "red")
_MARKS = {"error": "●", "warning": "▲", "info": "·"}
_RATE = 50  # steps that steps per second are taken over


def screen(run: RunLog, path: str, width: int, height: int) -> RenderableType:
    """Builds one frame.

    Args:
        run: as far as it has come.
        path: of its log, to be shown.
        width, height: of the terminal, in characters.
    """
    layout = Layout()
    layout.split_column(Layout(name="body"), Layout(_keys(run, path, width), size=1))
    left, right = max(width * 34 // 100, 24), max(width * 32 // 100, 22)
    middle = width - left - right
    inside = height - 3
    layout["body"].split_row(
        Layout(Panel(_figures(run, left - 4, inside), title="run", title_align="left"), size=left),
        Layout(Panel(_gains(heat_of(run, max(middle - 16, 4)), middle - 4, inside), title="gain", title_align="left")),
        Layout(Panel(_alerts(run, right - 4, inside), title="alerts", title_align="left"), size=right),
    )
    return layout


# -- left --------------------------------------------------------------------------------------------------------------
def _figures(run: RunLog, width: int, height: int) -> RenderableType:
    if not run.steps:
        return Text("no step yet")
    last = run.steps[-1]
    lines = [f"step {last['step']:,}", *_curve(("loss",), run, "loss", width)]
    given = any(row.get("grad_norm") is not None for row in run.steps)
    labels = ("gradient", "grad") if given else ("gradient, post-clip", "grad post-clip", "grad")
    lines += _curve(labels, run, "grad_norm" if given else "grad_norm_post", width)
    recent = [number(row.get("step_seconds")) for row in run.steps[-_RATE:]]
    recent = [value for value in recent if math.isfinite(value)]
    if recent:
        lines.append(f"steps/s  {three(len(recent) / max(sum(recent), 1e-9))}")
    for name, key in (("lr", "lr"), ("tokens", "tokens")):
        if last.get(key) is not None:
            lines.append(f"{name:8} {number(last[key]):,.4g}")
    clipped_ones = [row["clipped"] for row in run.steps if row.get("clipped") is not None]
    if clipped_ones:
        share = f"clipped  {sum(clipped_ones) / len(clipped_ones):.0%}"
        lines.append(_fitting(width, f"{share} of steps", share))
    skipped = sum(bool(row.get("skipped")) for row in run.steps)
    lines += [f"skipped  {skipped}"] if skipped else []
    lines += _cost(run, width)
    lines += [f"off      {row['part']}" for row in run.faults]
    return Text("\n".join(clipped(printable(line), width) for line in lines[:height]), no_wrap=True)


def _curve(labels: Sequence[str], run: RunLog, key: str, width: int) -> list[str]:
    """The last value that was measured, finite or not, and the curve: a label is shortened, never a value."""
    measured = [(int(row["step"]), v) for row in run.steps if (v := _measured(row, key)) is not None]
    last = three(measured[-1][1]) if measured else "?"
    texts = [f"{label:8} {last}" for label in labels]
    since = _lost_since(measured)
    if since is not None:
        texts = [f"{label} {last} since{step} {since:,}" for step in (" step", "") for label in labels] + texts
    return [_fitting(width, *texts, f"{labels[-1]} {last}"), spark(run.column(key), width)]


def _measured(row: Mapping[str, Any], key: str) -> float | None:
    """A figure of a step; None where it was not measured.

    The log has null for a norm before clipping that is nan, and says so by the norm behind it.
    """
    if row.get(key) is not None:
        return number(row[key])
    behind = row.get("grad_norm_post") if key == "grad_norm" else None
    return number(behind) if behind is not None and not math.isfinite(number(behind)) else None


def _lost_since(measured: Sequence[tuple[int, float]]) -> int | None:
    """The first of the last steps in a row whose value is not finite; None where the last one is finite."""
    since = None
    for step, value in reversed(measured):
        if math.isfinite(value):
            break
        since = step
    return since


def _fitting(width: int, *texts: str) -> str:
    """The first text that fits; the last one, cut, if none does."""
    return next((text for text in texts if len(text) <= width), clipped(texts[-1], width))


def spark(values: Sequence[float], width: int) -> str:
    """A series as a line of bars: as many as fit, each the mean of its share; a gap where nothing is finite."""
    if not values or width < 1:
        return ""
    per = max(1, -(-len(values) // width))
    groups = [[v for v in values[k : k + per] if math.isfinite(v)] for k in range(0, len(values), per)]
    means = [sum(group) / len(group) if group else math.nan for group in groups]
    finite = [m for m in means if math.isfinite(m)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    return "".join(_BARS[round((m - low) / span * 7)] if math.isfinite(m) else " " for m in means)


def _cost(run: RunLog, width: int) -> list[str]:
    probes = [number(row.get("seconds")) for row in run.probes]
    lines = [f"probe    {seconds(probes[-1])}"] if probes else []
    share = next((row["probe_share"] for row in reversed(run.prices) if "probe_share" in row), None)
    if share is None:
        return lines
    return [*lines, _fitting(width, f"         {share:.1%} of the time", f"         {share:.1%} time")]


# -- middle ------------------------------------------------------------------------------------------------------------
def _gains(heat: Heat, width: int, height: int) -> RenderableType:
    """Depth downwards, time to the right; a shade and a colour say the same."""
    if not heat.steps:
        return Text("no probe yet")
    room = max(height - 3, 1)
    per = max(1, -(-len(heat.names) // room))
    longest = max(len(_short(name)) for name in heat.names)
    name_width = min(longest, max(width - len(heat.steps) - 1, 6))
    wide = max((width - name_width - 1) // len(heat.steps), 1)
    text = Text(no_wrap=True)
    for k in range(0, len(heat.names), per):
        rows = heat.values[k : k + per]
        text.append(clipped(_short(printable(heat.names[k])), name_width).ljust(name_width)[:name_width] + " ")
        for column in range(len(heat.steps)):
            values = [row[column] for row in rows if math.isfinite(row[column])]
            level = heat.level(max(values), len(_SHADES)) if values else None
            shade, style = ("?", "") if level is None else (_SHADES[level], _COLOURS[level])
            text.append(shade * wide, style=style)
        text.append("\n")
    low, high = heat.extent
    text.append(clipped(f"steps {heat.steps[0]:,} to {heat.steps[-1]:,}", width) + "\n")
    text.append(clipped(f"‖J‖ {_SHADES[0]} {three(low)} to {_SHADES[-1]} {three(high)}", width))
    return text


def _short(name: str) -> str:
    """The last parts of a name, which tell sub-layers apart."""
    return ".".join(name.split(".")[-3:])


# -- right, bottom -----------------------------------------------------------------------------------------------------
def _alerts(run: RunLog, width: int, height: int) -> RenderableType:
    if not run.alerts:
        return Text("none")
    blocks: list[RenderableType] = []
    for row in list(reversed(run.alerts))[: max(height // 3, 1)]:
        mark, level = _MARKS.get(str(row.get("level")), "·"), str(row.get("level"))
        style = {"error": "bold red", "warning": "yellow"}.get(level, "")
        where = row.get("where") or [""]
        blocks.append(Text(clipped(f"{mark} {row['code']} at {row['step']:,}", width), style=style, no_wrap=True))
        blocks.append(Text(clipped(_short(printable(str(where[0]))), width), no_wrap=True))
        blocks.append(Text(clipped(printable(str(row.get("what", ""))), width), style="dim", no_wrap=True))
    return Group(*blocks)


def _keys(run: RunLog, path: str, width: int) -> RenderableType:
    state = f"ended at step {run.ended['step']:,}" if run.ended is not None else "running"
    return Text(clipped(f" {state}  ·  {printable(path)}  ·  Ctrl-C leaves; the run goes on", width), style="reverse")
