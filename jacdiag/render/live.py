"""The screen that follows a run: loss and gradient norm, gains over depth and time, alerts. Fits 80 x 24."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.text import Text

from jacdiag.errors import clipped, printable
from jacdiag.render.heat import Heat, heat_of
from jacdiag.render.lines import TIED
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
    lines += _waits(run, width)
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


def _waits(run: RunLog, width: int) -> list[str]:
    """The live rules that are not ready yet: a run is not guarded by those."""
    if not run.waits or run.ended is not None:
        return []
    return _wrapped(f"waiting  {' '.join(run.waits)}", width)


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
    low, high = heat.extent
    foot = _wrapped(f"steps {heat.steps[0]:,} to {heat.steps[-1]:,}", width)
    foot += _wrapped(f"‖J‖ {_SHADES[0]}{TIED}{three(low)} to {_SHADES[-1]}{TIED}{three(high)}", width)
    per = max(1, -(-len(heat.names) // max(height - len(foot) - 1, 1)))
    names = told_apart([printable(name) for name in heat.names[::per]], max(width - len(heat.steps) - 1, 6))
    name_width = max(map(len, names), default=0)
    wide = max((width - name_width - 1) // len(heat.steps), 1)
    text = Text(no_wrap=True)
    for k, name in enumerate(names):
        rows = heat.values[k * per : (k + 1) * per]
        text.append(name.ljust(name_width) + " ")
        for column in range(len(heat.steps)):
            values = [row[column] for row in rows if math.isfinite(row[column])]
            level = heat.level(max(values), len(_SHADES)) if values else None
            shade, style = ("?", "") if level is None else (_SHADES[level], _COLOURS[level])
            text.append(shade * wide, style=style)
        text.append("\n")
    text.append("\n".join(foot))
    return text


def told_apart(names: Sequence[str], width: int) -> list[str]:
    """Names cut to a width by the mildest of some ways that leaves them different.

    First go the leading parts that all share or that are more than three, then the end of the last part, its middle,
    its front.

    >>> told_apart(["layers.0.attention", "layers.0.feed_forward"], 9)
    ['0.attent…', '0.feed_f…']
    >>> told_apart(["layers.0.self_attn", "layers.0.self_mlp"], 8)
    ['0.s…attn', '0.s…_mlp']
    """
    short = [_last_parts(name, 3) for name in names]
    if max(map(len, short), default=0) <= width and len(set(short)) == len(set(names)):
        return short
    parts = [name.split(".") for name in names]
    most = min(map(len, parts), default=1) - 1
    shared = next((k for k in range(most) if len({tuple(p[: k + 1]) for p in parts}) > 1), max(most - 1, 0))
    own = [".".join(p[shared:]) for p in parts]
    half = (width - 1) // 2
    for kept in (width - 1, half, 0):
        cut = [_cut(name, kept, width) for name in own]
        if len(set(cut)) == len(set(names)):
            return cut
    return cut


def _cut(name: str, front: int, width: int) -> str:
    """A name without its middle: so many characters of its front, and as many of its end as there is room for."""
    end = width - 1 - front
    return name if len(name) <= width else f"{name[:front]}…{name[len(name) - end :]}"


def _last_parts(name: str, most: int) -> str:
    """The last parts of a name, which tell sub-layers apart."""
    return ".".join(name.split(".")[-most:])


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of words; a tied space is no place to break at."""
    words = textwrap.wrap(text.replace(TIED, "\0"), max(width, 1), break_on_hyphens=False)
    return [line.replace("\0", " ") for line in words]


# -- right, bottom -----------------------------------------------------------------------------------------------------
def _alerts(run: RunLog, width: int, height: int) -> RenderableType:
    """The newest first: what happened, the sub-layer that moved first, and as much of the sentence as there is room.

    What the probes say of the init stands below, apart: a report is no alert.
    """
    report = _report(run, width)
    if not run.alerts:
        return Text("\n".join(["none", *([""] if report else []), *report][:height]), no_wrap=True)
    height -= len(report)
    blocks: list[RenderableType] = []
    shown = list(reversed(run.alerts))[: max(height // 3, 1)]
    spare = height - 3 * len(shown)
    for row in shown:
        mark, level = _MARKS.get(str(row.get("level")), "·"), str(row.get("level"))
        style = {"error": "bold red", "warning": "yellow"}.get(level, "")
        where = printable(str((row.get("where") or [""])[0]))
        text = _wrapped(printable(str(row.get("what", ""))), width) or [""]
        room = 1 + max(0, min(spare, len(text) - 1))
        spare -= room - 1
        if room < len(text):
            text[room - 1] = clipped(f"{text[room - 1]} {text[room]}", width)
        blocks.append(Text(clipped(f"{mark} {row['code']} at {row['step']:,}", width), style=style, no_wrap=True))
        blocks.append(Text(_ending(where, width), no_wrap=True))
        blocks.append(Text("\n".join(text[:room]), style="dim", no_wrap=True))
    if report:
        blocks.append(Text("\n".join(report), no_wrap=True))
    return Group(*blocks)


def _report(run: RunLog, width: int) -> list[str]:
    """The codes of what the probes said of the model's init."""
    if not run.findings:
        return []
    codes = dict.fromkeys(str(row.get("code")) for row in run.findings)
    return _wrapped(f"init: {' '.join(codes)}", width)


def _ending(name: str, width: int) -> str:
    """As many of a name's last parts as fit, three at most."""
    return _fitting(width, *(_last_parts(name, most) for most in (3, 2)), _cut(_last_parts(name, 2), 0, width))


def _keys(run: RunLog, path: str, width: int) -> RenderableType:
    state = f"ended at step {run.ended['step']:,}" if run.ended is not None else "running"
    leave = "Ctrl-C leaves" if run.ended is not None else "Ctrl-C leaves; the run goes on"
    room = max(width - len(f" {state}  ·    ·  {leave}"), 12)
    return Text(clipped(f" {state}  ·  {_end_of(printable(path), room)}  ·  {leave}", width), style="reverse")


def _end_of(path: str, width: int) -> str:
    return path if len(path) <= width else f"…{path[1 - width :]}"
