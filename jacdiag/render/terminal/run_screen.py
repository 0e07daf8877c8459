"""The screen that follows a run: loss and gradient norm, gains over depth and time, alerts. Fits 80
x 24.
"""

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
from jacdiag.records.number_format import seconds, three
from jacdiag.records.run_log import RunLog, number
from jacdiag.records.run_state import Kind, RunState
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
from jacdiag.render.content.verdict import TIED
from jacdiag.render.terminal.gain_cells import CUTS, SHADES, GainCells, loudest

_BARS = "▁▂▃▄▅▆▇█"
_SHADES = SHADES
_STYLES = {"error": "bold red", "warning": "yellow"}
_TALLEST = 8  # lines of a curve
_TALLEST_ROW = 2  # lines of a sub-layer
_LOOK_BACK = 1000  # steps in which a last value is looked for first
_NARROW = 22  # columns of the heat map: below, its key is short
_SILENT = 60.0  # seconds without a line in the log
_MARKS = {"error": "●", "warning": "▲", "info": "·"}
_LEAST_PATH = 12  # columns of a path that still tells something
_RATE = 50  # steps that steps per second are taken over


def screen(
    run: RunLog,
    path: str,
    width: int,
    height: int,
    *,
    cells: GainCells | None = None,
    idle: float | None = None,
    state: RunState | None = None,
) -> RenderableType:
    """Build one frame.

    Args:
        run: as far as it has come.
        path: of its log, to be shown.
        width, height: of the terminal, in characters.
        cells: those of the frame before, which are then not made anew.
        idle: seconds since the log was last written to, if known.
        state: of the run, if there is a sign of life beside its log.
    """
    cells = cells if cells is not None else GainCells()
    cells.update(run)
    layout = Layout()
    layout.split_column(Layout(name="body"), Layout(_keys(run, path, width, idle, state), size=1))
    left, right = max(width * 34 // 100, 24), max(width * 32 // 100, 22)
    middle = width - left - right
    inside = height - 3
    layout["body"].split_row(
        Layout(Panel(_figures(run, left - 4, inside), title="run", title_align="left"), size=left),
        Layout(Panel(_gains(cells, middle - 4, inside), title="gain", title_align="left")),
        Layout(_right(run, right - 4, height - 1), size=right),
    )
    return layout


# -- left ------------------------------------------------------------------------------------------
def _figures(run: RunLog, width: int, height: int) -> RenderableType:
    if not run.steps:
        return Text("no step yet")

    # 1. The lines of text.
    last = run.steps[-1]
    lines: list[str] = []
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

    # 2. The curves take the room that is left, each a line of text and some lines of bars.
    curves = _curves(run, width)
    room = height - 1 - len(lines)
    while len(curves) > 2 and room < 3 * len(curves):
        curves.pop()
    tall = min(max(room // len(curves) - 1, 1), _TALLEST)
    shown = [f"step {last['step']:,}"]
    for head, values in curves:
        shown += [head, *chart(values, width, tall)]
    shown += lines
    return Text("\n".join(clipped(printable(line), width) for line in shown[:height]), no_wrap=True)


def _curves(run: RunLog, width: int) -> list[tuple[str, list[float]]]:
    """The head and the values of each curve, the most wanted first."""
    given = any(row.get("grad_norm") is not None for row in run.steps)
    key = "grad_norm" if given else "grad_norm_post"
    labels = ("gradient", "grad") if given else ("gradient, post-clip", "grad post-clip", "grad")
    curves = [
        (_head(("loss",), run, "loss", width), run.column("loss")),
        (_head(labels, run, key, width), run.column(key)),
    ]
    logits = _over_sublayers(run, "logit", largest=True)
    shortcuts = _over_sublayers(run, "shortcut_std", largest=False)
    updates = [number(row["update"].get("ratio")) for row in run.steps if row.get("update")]
    for label, short, values in (
        ("largest logit", "logit", logits),
        ("least shortcut", "shortcut", shortcuts),
        ("update/weight", "upd", updates),
    ):
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            last = three(finite[-1])
            curves.append(
                (_fitting(width, f"{label} {last}", f"{short} {last}"), _stretched(values, width))
            )
    rates = run.column("lr")
    if len(set(rates)) > 1:
        curves.append(("learning rate", rates))
    return curves


def _stretched(values: Sequence[float], width: int) -> list[float]:
    """As many values as there are columns at least: time runs over the whole width, as in the
    curves of the steps.
    """
    count = len(values)
    return [values[k * count // width] for k in range(width)] if 0 < count < width else list(values)


def _over_sublayers(run: RunLog, figure: str, *, largest: bool) -> list[float]:
    values = []
    for row in run.stats:
        known = [
            number(v) for v in (row.get("figures") or {}).get(figure, {}).values() if v is not None
        ]
        if known:
            values.append(max(known) if largest else min(known))
    return values


def _head(labels: Sequence[str], run: RunLog, key: str, width: int) -> str:
    """The last value that was measured, finite or not: a label is shortened, never a value."""
    measured = [
        (int(row["step"]), v)
        for row in run.steps[-_LOOK_BACK:]
        if (v := _measured(row, key)) is not None
    ]
    if measured and not any(math.isfinite(value) for _, value in measured):
        measured = [
            (int(row["step"]), v) for row in run.steps if (v := _measured(row, key)) is not None
        ]
    last = three(measured[-1][1]) if measured else "?"
    texts = [f"{label:8} {last}" for label in labels]
    since = _lost_since(measured)
    if since is not None:
        texts = [
            f"{label} {last} since{step} {since:,}" for step in (" step", "") for label in labels
        ] + texts
    return _fitting(width, *texts, f"{labels[-1]} {last}")


def _measured(row: Mapping[str, Any], key: str) -> float | None:
    """A figure of a step; None where it was not measured.

    The log has null for a norm before clipping that is nan, and says so by the norm behind it.
    """
    if row.get(key) is not None:
        return number(row[key])
    behind = row.get("grad_norm_post") if key == "grad_norm" else None
    return number(behind) if behind is not None and not math.isfinite(number(behind)) else None


def _lost_since(measured: Sequence[tuple[int, float]]) -> int | None:
    """The first of the last steps in a row whose value is not finite; None where the last one is
    finite.
    """
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
    """A series as a line of bars: as many as fit, each the mean of its share; a gap where nothing
    is finite.
    """
    return chart(values, width, 1)[0]


def chart(values: Sequence[float], width: int, rows: int) -> list[str]:
    """Return a series as bars of several lines, from the top; each bar is the mean of its share of
    the values.

    >>> chart([1.0, 2.0, 3.0], 3, 2)
    [' ▁█', '▁██']
    """
    empty = [""] * rows
    if not values or width < 1:
        return empty
    per = max(1, -(-len(values) // width))
    groups = [
        [v for v in values[k : k + per] if math.isfinite(v)] for k in range(0, len(values), per)
    ]
    means = [sum(group) / len(group) if group else math.nan for group in groups]
    finite = [m for m in means if math.isfinite(m)]
    if not finite:
        return empty
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    steps = 8 * rows - 1
    heights = [round((m - low) / span * steps) + 1 if math.isfinite(m) else 0 for m in means]
    lines = []
    for row in reversed(range(rows)):
        parts = [min(max(height - 8 * row, 0), 8) for height in heights]
        lines.append("".join(f" {_BARS}"[part] for part in parts))
    return lines


def _cost(run: RunLog, width: int) -> list[str]:
    probes = [number(row.get("seconds")) for row in run.probes]
    lines = [f"probe    {seconds(probes[-1])}"] if probes else []
    share = next((row["probe_share"] for row in reversed(run.prices) if "probe_share" in row), None)
    if share is None:
        return lines
    return [
        *lines,
        _fitting(width, f"         {share:.1%} of the time", f"         {share:.1%} time"),
    ]


# -- middle ----------------------------------------------------------------------------------------
def _gains(cells: GainCells, width: int, height: int) -> RenderableType:
    """Depth downwards, time to the right; what a cell shows does not depend on the run's own
    range.
    """
    if not cells.steps:
        return Text("no probe yet")

    # 1. The key below the map.
    foot = _wrapped(f"steps {cells.steps[0]:,} to {cells.steps[-1]:,}", width)
    sizes = [
        f"{SHADES[0]}{TIED}<{CUTS[0]:g}",
        *(f"{SHADES[k + 1]}{TIED}{cut:g}" for k, cut in enumerate(CUTS)),
    ]
    foot += _wrapped(f"‖J‖ {' '.join(sizes)}", width)
    marks = f"+{TIED}-: by a factor {cells.factor:g} off its last 8 ▲{TIED}●: a rule fired"
    if width < _NARROW:
        marks = f"+{TIED}-: factor{TIED}{cells.factor:g} ▲{TIED}●: rule"
    foot += _wrapped(marks, width)
    room = max(height - len(foot), 1)

    # 2. Rows: several lines for a sub-layer if there is room, several sub-layers in a line if there
    # is not.
    per = max(1, -(-len(cells.names) // room))
    shown = cells.names[::per]
    tall = max(min(room // max(len(shown), 1), _TALLEST_ROW), 1)
    names = told_apart(
        [printable(name) for name in shown], max(width - min(len(cells.steps), width // 2) - 1, 6)
    )
    name_width = max(map(len, names), default=0)
    space = max(width - name_width - 1, 1)
    _, columns = cells.binned(space)
    across = [columns[k * len(columns) // space] for k in range(space)]

    text = Text(no_wrap=True)
    for k, name in enumerate(names):
        members = cells.names[k * per : (k + 1) * per]
        for line in range(tall):
            text.append((name if line == 0 else "").ljust(name_width) + " ")
            for column in across:
                cell = loudest([column.get(member) for member in members])
                if cell is None:
                    text.append(" ")
                else:
                    text.append(cell.glyph, style=cell.style)
            text.append("\n")
    text.append("\n".join(foot))
    return text


def told_apart(names: Sequence[str], width: int) -> list[str]:
    """Names cut to a width by the mildest of some ways that leaves them different.

    First go the leading parts that all share or that are more than three, then the end of the last
    part, its middle, its front.

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
    shared = next(
        (k for k in range(most) if len({tuple(p[: k + 1]) for p in parts}) > 1), max(most - 1, 0)
    )
    own = [".".join(p[shared:]) for p in parts]
    half = (width - 1) // 2
    for kept in (width - 1, half, 0):
        cut = [_cut(name, kept, width) for name in own]
        if len(set(cut)) == len(set(names)):
            return cut
    return cut


def _cut(name: str, front: int, width: int) -> str:
    """A name without its middle: so many characters of its front, and as many of its end as there
    is room for.
    """
    end = width - 1 - front
    return name if len(name) <= width else f"{name[:front]}…{name[len(name) - end :]}"


def _last_parts(name: str, most: int) -> str:
    """The last parts of a name, which tell sub-layers apart."""
    return ".".join(name.split(".")[-most:])


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of words; a tied space is no place to break at."""
    words = textwrap.wrap(text.replace(TIED, "\0"), max(width, 1), break_on_hyphens=False)
    return [line.replace("\0", " ") for line in words]


# -- right, bottom ---------------------------------------------------------------------------------
def _right(run: RunLog, width: int, height: int) -> RenderableType:
    """Alerts of the run; below them, if there is such a thing, the report at the start, and what is
    off or noted.
    """
    start, notes = report_at_start(run), _notes(run, width)
    parts = Layout()
    layouts: list[Layout] = []
    rest = height
    if start:
        lines = _report_lines(start, width)
        size = min(len(lines) + 2, max(height // 4, 4))
        if size < len(lines) + 2:
            lines = [line for line in lines if line[1] != "dim"]  # the heads alone
        title = f"report at step {start[0]['step']:,}"
        layouts.append(
            Layout(
                Panel(_joined(lines, width, size - 2), title=title, title_align="left"), size=size
            )
        )
        rest -= size
    if notes:
        size = min(len(notes) + 2, max(height // 3, 5))
        title = "off, notes" if run.faults else "notes"
        layouts.append(
            Layout(
                Panel(_joined(notes, width, size - 2), title=title, title_align="left"), size=size
            )
        )
        rest -= size
    alerts = Layout(Panel(_alerts(run, width, rest - 2), title="alerts", title_align="left"))
    if not layouts:
        return alerts
    parts.split_column(alerts, *layouts)
    return parts


def _joined(lines: Sequence[tuple[str, str]], width: int, height: int) -> RenderableType:
    """Lines with their styles; the last one says that there are more."""
    shown = list(lines[:height])
    if len(lines) > height and shown:
        more = len(lines) - height + 1
        shown[-1] = (clipped(f"... {more} lines more", width), "dim")
    text = Text(no_wrap=True)
    for k, (line, style) in enumerate(shown):
        text.append(("\n" if k else "") + clipped(line, width), style=style)
    return text


def _report_lines(rows: Sequence[Mapping[str, Any]], width: int) -> list[tuple[str, str]]:
    """What the first probe said of the model: not something that happened in the run."""
    lines: list[tuple[str, str]] = []
    for row in rows:
        level = str(row.get("level"))
        where = printable(str((row.get("where") or [""])[0]))
        head = f"{_MARKS.get(level, '·')} {row.get('code')} {_ending(where, max(width - 8, 6))}"
        lines.append((head, _STYLES.get(level, "")))
        lines += [(line, "dim") for line in _wrapped(printable(str(row.get("what", ""))), width)]
    return lines


def _notes(run: RunLog, width: int) -> list[tuple[str, str]]:
    """Parts that are switched off, with the reason; rules that wait; the newest notes."""
    lines: list[tuple[str, str]] = []
    for row in run.faults:
        lines += [
            (line, "yellow")
            for line in _wrapped(f"× {printable(str(row.get('part')))} is off", width)
        ]
        reason = f"{row.get('error', '')}; {row.get('off', '')}"
        lines += [(line, "") for line in _wrapped(printable(reason), width)]
    waits = run.waits if run.ended is None else {}
    for code, what in waits.items():
        lines += [(line, "dim") for line in _wrapped(printable(f"{code} waits for {what}"), width)]
    for row in reversed(run.notes):
        at = f"{row['step']:,}: " if isinstance(row.get("step"), int) else ""
        wrapped = _wrapped(printable(f"· {at}{row.get('text', '')}"), width)
        lines += [(line, "dim") for line in wrapped]
    return lines


def _alerts(run: RunLog, width: int, height: int) -> RenderableType:
    """The newest first: what happened, the sub-layer that moved first, and as much of the sentence
    as there is room.
    """
    alerts = alerts_of_run(run)
    if not alerts:
        return Text("none")
    blocks: list[RenderableType] = []
    shown = list(reversed(alerts))[: max(height // 3, 1)]
    spare = height - 3 * len(shown)
    for row in shown:
        mark, level = _MARKS.get(str(row.get("level")), "·"), str(row.get("level"))
        style = _STYLES.get(level, "")
        where = printable(str((row.get("where") or [""])[0]))
        text = _wrapped(printable(str(row.get("what", ""))), width) or [""]
        room = 1 + max(0, min(spare, len(text) - 1))
        spare -= room - 1
        if room < len(text):
            text[room - 1] = clipped(f"{text[room - 1]} {text[room]}", width)
        blocks.append(
            Text(
                clipped(f"{mark} {row['code']} at {row['step']:,}", width),
                style=style,
                no_wrap=True,
            )
        )
        blocks.append(Text(_ending(where, width), no_wrap=True))
        blocks.append(Text("\n".join(text[:room]), style="dim", no_wrap=True))
    return Group(*blocks)


def _ending(name: str, width: int) -> str:
    """As many of a name's last parts as fit, three at most."""
    return _fitting(
        width, *(_last_parts(name, most) for most in (3, 2)), _cut(_last_parts(name, 2), 0, width)
    )


def _keys(
    run: RunLog, path: str, width: int, idle: float | None, state: RunState | None
) -> RenderableType:
    text, goes_on = _state_text(run, idle, state)
    leave = "Ctrl-C leaves; the run goes on" if goes_on else "Ctrl-C leaves"
    head, tail = f" {printable(text)}", f"  ·  {leave}"
    room = width - len(head) - len(tail) - len("  ·  ")
    if room >= _LEAST_PATH:
        line = f"{head}  ·  {_end_of(printable(path), room)}{tail}"
    else:  # what is known of the run matters most
        line = _fitting(width, head + tail, head)
    return Text(clipped(line, width), style="reverse")


def _state_text(run: RunLog, idle: float | None, state: RunState | None) -> tuple[str, bool]:
    """What is known of the run, and whether it goes on."""
    if state is not None:
        return state.text, state.kind is Kind.RUNNING
    if run.ended is not None:
        return f"ended at step {run.ended['step']:,}", False
    if idle is not None and idle >= _SILENT:
        # a dead run, or a slow one: the log does not tell
        return f"no line for {seconds(idle)}", False
    return "running", True


def _end_of(path: str, width: int) -> str:
    return path if len(path) <= width else f"…{path[1 - width :]}"
