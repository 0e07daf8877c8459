"""The screen that follows a run: loss, gradient norm, gains over depth and time, alerts.

It fits 80 x 24.
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
from jacdiag.records.run_state import RunState, RunStatus
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
_LEAST_PATH = 12  # columns: a shorter end of a path would say nothing
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
        width: of the terminal, in characters.
        height: of the terminal, in lines.
        cells: those of the frame before, to which new ones are added.
        idle: seconds since the last write to the log, if known.
        state: of the run, if there is a sign of life next to its log.
    """
    # 1. The cells of the heat map, with those of new probes.
    if cells is None:
        cells = GainCells()
    cells.update(run)

    # 2. The panels, over a line of keys.
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
    """Return the left panel: curves, and lines of figures below them."""
    if not run.steps:
        return Text("no step yet")
    lines = _figure_lines(run, width)

    # The curves take the room that is left, each a line of text and some lines of bars.
    curves = _curves(run, width)
    room = height - 1 - len(lines)
    while len(curves) > 2 and room < 3 * len(curves):
        curves.pop()
    tall = min(max(room // len(curves) - 1, 1), _TALLEST)
    shown = [f"step {run.steps[-1]['step']:,}"]
    for head, values in curves:
        shown += [head, *chart(values, width, tall)]
    shown += lines
    return Text("\n".join(clipped(printable(line), width) for line in shown[:height]), no_wrap=True)


def _figure_lines(run: RunLog, width: int) -> list[str]:
    """Return speed, learning rate, tokens, clipping, skipped steps and cost, if they are known."""
    # 1. Speed, over the last steps.
    lines: list[str] = []
    durations = [number(row.get("step_seconds")) for row in run.steps[-_RATE:]]
    durations = [duration for duration in durations if math.isfinite(duration)]
    if durations:
        lines.append(f"steps/s  {three(len(durations) / max(sum(durations), 1e-9))}")

    # 2. Figures of the last step.
    last = run.steps[-1]
    for key in ("lr", "tokens"):
        if last.get(key) is not None:
            lines.append(f"{key:8} {number(last[key]):,.4g}")

    # 3. Counts over all steps.
    was_clipped = [row["clipped"] for row in run.steps if row.get("clipped") is not None]
    if was_clipped:
        share = f"clipped  {sum(was_clipped) / len(was_clipped):.0%}"
        lines.append(_fitting(width, f"{share} of steps", share))
    skipped = sum(bool(row.get("skipped")) for row in run.steps)
    if skipped:
        lines.append(f"skipped  {skipped}")
    return lines + _cost(run, width)


def _curves(run: RunLog, width: int) -> list[tuple[str, list[float]]]:
    """Return the head and the values of each curve, the most wanted first."""
    # 1. Loss and gradient norm.
    has_norm_before = any(row.get("grad_norm") is not None for row in run.steps)
    key = "grad_norm_post"
    labels: tuple[str, ...] = ("gradient, post-clip", "grad post-clip", "grad")
    if has_norm_before:
        key = "grad_norm"
        labels = ("gradient", "grad")
    curves = [
        (_head(("loss",), run, "loss", width), run.column("loss")),
        (_head(labels, run, key, width), run.column(key)),
    ]

    # 2. Figures of the sub-layers, at fewer steps.
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
            head = _fitting(width, f"{label} {last}", f"{short} {last}")
            curves.append((head, _stretched(values, width)))

    # 3. The learning rate, if it changes.
    rates = run.column("lr")
    if len(set(rates)) > 1:
        curves.append(("learning rate", rates))
    return curves


def _stretched(values: Sequence[float], width: int) -> list[float]:
    """Repeat values until there are as many as columns.

    Time then runs over the full width, as in the curves of the steps.
    """
    count = len(values)
    if count == 0 or count >= width:
        return list(values)
    return [values[k * count // width] for k in range(width)]


def _over_sublayers(run: RunLog, figure: str, *, largest: bool) -> list[float]:
    """Return the largest or the smallest value over sub-layers, for each row of statistics."""
    pick = min
    if largest:
        pick = max
    extremes = []
    for row in run.stats:
        by_name = (row.get("figures") or {}).get(figure, {})
        known = [number(value) for value in by_name.values() if value is not None]
        if known:
            extremes.append(pick(known))
    return extremes


def _head(labels: Sequence[str], run: RunLog, key: str, width: int) -> str:
    """Return the head of a curve, with the last value that was measured, finite or not.

    A label is shortened, never a value.
    """
    # 1. What was measured lately. All rows are read only if every recent value was lost.
    measured = _measured_values(run.steps[-_LOOK_BACK:], key)
    if measured and not any(math.isfinite(value) for _, value in measured):
        measured = _measured_values(run.steps, key)

    # 2. The last value, and since when it is not finite.
    last = "?"
    if measured:
        last = three(measured[-1][1])
    texts = [f"{label:8} {last}" for label in labels]
    since = _lost_since(measured)
    if since is not None:
        long = [f"{label} {last} since step {since:,}" for label in labels]
        short = [f"{label} {last} since {since:,}" for label in labels]
        texts = [*long, *short, *texts]
    return _fitting(width, *texts, f"{labels[-1]} {last}")


def _measured_values(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the rows in which a figure was measured."""
    measured = []
    for row in rows:
        value = _measured(row, key)
        if value is not None:
            measured.append((int(row["step"]), value))
    return measured


def _measured(row: Mapping[str, Any], key: str) -> float | None:
    """Return a figure of a step; None if it was not measured.

    The log has null for a norm before clipping that is nan. The norm after clipping then shows it.
    """
    if row.get(key) is not None:
        return number(row[key])
    if key != "grad_norm":
        return None
    after = row.get("grad_norm_post")
    if after is None or math.isfinite(number(after)):
        return None
    return number(after)


def _lost_since(measured: Sequence[tuple[int, float]]) -> int | None:
    """Return the first of the last steps in a row whose value is not finite.

    It is None if the last one is finite.
    """
    since = None
    for step, value in reversed(measured):
        if math.isfinite(value):
            break
        since = step
    return since


def _fitting(width: int, *texts: str) -> str:
    """Return the first text that fits; the last one, cut, if none does."""
    for text in texts:
        if len(text) <= width:
            return text
    return clipped(texts[-1], width)


def spark(values: Sequence[float], width: int) -> str:
    """Return a series as a line of bars, each the mean of its share of the values.

    There is a gap where nothing is finite.
    """
    return chart(values, width, 1)[0]


def chart(values: Sequence[float], width: int, rows: int) -> list[str]:
    """Return a series as bars of several lines, from the top.

    Each bar is the mean of the finite values in its share.

    Args:
        values: of the series; those that are not finite are left out.
        width: the most bars.
        rows: lines.

    >>> chart([1.0, 2.0, 3.0], 3, 2)
    [' ▁█', '▁██']
    """
    # 1. The mean of each bar.
    empty = [""] * rows
    if not values or width < 1:
        return empty
    per_bar = max(1, -(-len(values) // width))
    means = [_finite_mean(values[k : k + per_bar]) for k in range(0, len(values), per_bar)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return empty

    # 2. Its height in eighths of a line; 0 is a gap.
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    steps = 8 * rows - 1
    heights = []
    for mean in means:
        if math.isfinite(mean):
            heights.append(round((mean - low) / span * steps) + 1)
        else:
            heights.append(0)

    # 3. The lines, from the top.
    return [_bar_line(heights, row) for row in reversed(range(rows))]


def _bar_line(heights: Sequence[int], row: int) -> str:
    """Return one line of a chart; row 0 is the lowest.

    Args:
        heights: of the bars, in eighths of a line.
        row: of the line.
    """
    characters = []
    for height in heights:
        eighths = min(max(height - 8 * row, 0), 8)
        characters.append(f" {_BARS}"[eighths])
    return "".join(characters)


def _finite_mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values; nan if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan
    return sum(finite) / len(finite)


def _cost(run: RunLog, width: int) -> list[str]:
    """Return how long the last probe took, and the share of the run's time spent on probes."""
    lines = []
    if run.probes:
        lines.append(f"probe    {seconds(number(run.probes[-1].get('seconds')))}")
    for row in reversed(run.prices):
        if "probe_share" not in row:
            continue
        share = row["probe_share"]
        if share is not None:
            short = f"         {share:.1%} time"
            lines.append(_fitting(width, f"         {share:.1%} of the time", short))
        break
    return lines


# -- middle ----------------------------------------------------------------------------------------
def _gains(cells: GainCells, width: int, height: int) -> RenderableType:
    """Return the heat map: depth downwards, time to the right.

    What a cell shows does not depend on the run's own range.
    """
    if not cells.steps:
        return Text("no probe yet")

    foot = _map_key(cells, width)
    room = max(height - len(foot), 1)

    # 1. Rows: several lines for a sub-layer if there is room, several sub-layers in a line if there
    # is not.
    per = max(1, -(-len(cells.names) // room))
    shown = cells.names[::per]
    tall = max(min(room // max(len(shown), 1), _TALLEST_ROW), 1)
    names = shorten_names(
        [printable(name) for name in shown], max(width - min(len(cells.steps), width // 2) - 1, 6)
    )

    # 2. Columns: probes, stretched or gathered to the width.
    name_width = max(map(len, names), default=0)
    space = max(width - name_width - 1, 1)
    _, columns = cells.binned(space)
    across = [columns[k * len(columns) // space] for k in range(space)]

    # 3. The cells. The first line of a sub-layer begins with its name.
    text = Text(no_wrap=True)
    for k, name in enumerate(names):
        members = cells.names[k * per : (k + 1) * per]
        heads = [name, *[""] * (tall - 1)]
        for head in heads:
            text.append(head.ljust(name_width) + " ")
            for column in across:
                cell = loudest([column.get(member) for member in members])
                if cell is None:
                    text.append(" ")
                else:
                    text.append(cell.glyph, style=cell.style)
            text.append("\n")
    text.append("\n".join(foot))
    return text


def _map_key(cells: GainCells, width: int) -> list[str]:
    """Return the key below the heat map: its steps, its shades and its marks."""
    # 1. The steps.
    key = _wrapped(f"steps {cells.steps[0]:,} to {cells.steps[-1]:,}", width)

    # 2. The shades, each with the gain that it begins at.
    sizes = [f"{SHADES[0]}{TIED}<{CUTS[0]:g}"]
    for shade, cut in zip(SHADES[1:], CUTS, strict=False):
        sizes.append(f"{shade}{TIED}{cut:g}")
    key += _wrapped(f"‖J‖ {' '.join(sizes)}", width)

    # 3. The marks.
    marks = f"+{TIED}-: by a factor {cells.factor:g} off its last 8 ▲{TIED}●: a rule fired"
    if width < _NARROW:
        marks = f"+{TIED}-: factor{TIED}{cells.factor:g} ▲{TIED}●: rule"
    key += _wrapped(marks, width)
    return key


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Cut names to a width by the mildest of some ways that leaves them different.

    First go the leading parts that all share or that are more than three, then the end of the last
    part, its middle, its front.

    Args:
        names: dotted, of sub-layers.
        width: characters.

    >>> shorten_names(["layers.0.attention", "layers.0.feed_forward"], 9)
    ['0.attent…', '0.feed_f…']
    >>> shorten_names(["layers.0.self_attn", "layers.0.self_mlp"], 8)
    ['0.s…attn', '0.s…_mlp']
    """
    # 1. The last three parts of each.
    different = len(set(names))
    short = [_last_parts(name, 3) for name in names]
    longest = max(map(len, short), default=0)
    if longest <= width and len(set(short)) == different:
        return short

    # 2. Without the leading parts that all share, cut at the end, in the middle or at the front.
    parts = [name.split(".") for name in names]
    shared = _count_shared(parts)
    own = [".".join(part[shared:]) for part in parts]
    cut: list[str] = []
    for front in (width - 1, (width - 1) // 2, 0):
        cut = [_cut(name, front, width) for name in own]
        if len(set(cut)) == different:
            break
    return cut


def _count_shared(parts: Sequence[Sequence[str]]) -> int:
    """Count the leading parts that all names share; each keeps its last part."""
    most = min(map(len, parts), default=1) - 1
    for count in range(most):
        beginnings = {tuple(part[: count + 1]) for part in parts}
        if len(beginnings) > 1:
            return count
    return max(most - 1, 0)


def _cut(name: str, front: int, width: int) -> str:
    """Cut the middle out of a name that is too long.

    So many characters of its front stay, and as many of its end as there is room for.
    """
    if len(name) <= width:
        return name
    end = width - 1 - front
    return f"{name[:front]}…{name[len(name) - end :]}"


def _last_parts(name: str, most: int) -> str:
    """Return the last parts of a name, which differ between sub-layers."""
    return ".".join(name.split(".")[-most:])


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap words into lines; no line is broken at a tied space."""
    words = textwrap.wrap(text.replace(TIED, "\0"), max(width, 1), break_on_hyphens=False)
    return [line.replace("\0", " ") for line in words]


# -- right, bottom ---------------------------------------------------------------------------------
def _right(run: RunLog, width: int, height: int) -> RenderableType:
    """Return the right panels: alerts, the report at the start, and notes, if there are any."""
    layouts: list[Layout] = []
    room = height
    start = report_at_start(run)
    if start:
        lines = _report_lines(start, width)
        size = min(len(lines) + 2, max(height // 4, 4))
        if size < len(lines) + 2:
            lines = [line for line in lines if line[1] != "dim"]  # the heads alone
        title = f"report at step {start[0]['step']:,}"
        layouts.append(_lines_panel(lines, title, width, size))
        room -= size
    notes = _notes(run, width)
    if notes:
        size = min(len(notes) + 2, max(height // 3, 5))
        title = "notes"
        if run.faults:
            title = "off, notes"
        layouts.append(_lines_panel(notes, title, width, size))
        room -= size

    alerts = Layout(Panel(_alerts(run, width, room - 2), title="alerts", title_align="left"))
    if not layouts:
        return alerts
    panels = Layout()
    panels.split_column(alerts, *layouts)
    return panels


def _lines_panel(lines: Sequence[tuple[str, str]], title: str, width: int, size: int) -> Layout:
    panel = Panel(_joined(lines, width, size - 2), title=title, title_align="left")
    return Layout(panel, size=size)


def _joined(lines: Sequence[tuple[str, str]], width: int, height: int) -> RenderableType:
    """Return lines with their styles; the last one says that there are more."""
    shown = list(lines[:height])
    if len(lines) > height and shown:
        more = len(lines) - height + 1
        shown[-1] = (clipped(f"... {more} lines more", width), "dim")
    text = Text(no_wrap=True)
    line_break = ""
    for line, style in shown:
        text.append(line_break + clipped(line, width), style=style)
        line_break = "\n"
    return text


def _report_lines(rows: Sequence[Mapping[str, Any]], width: int) -> list[tuple[str, str]]:
    """Return what the first probe found in the model: it did not happen in the run."""
    lines: list[tuple[str, str]] = []
    for row in rows:
        level = str(row.get("level"))
        where = printable(str((row.get("where") or [""])[0]))
        head = f"{_MARKS.get(level, '·')} {row.get('code')} {_ending(where, max(width - 8, 6))}"
        lines.append((head, _STYLES.get(level, "")))
        lines += [(line, "dim") for line in _wrapped(printable(str(row.get("what", ""))), width)]
    return lines


def _notes(run: RunLog, width: int) -> list[tuple[str, str]]:
    """Return parts that are switched off, rules that wait, and the newest notes."""
    # 1. What is written, in which style.
    texts: list[tuple[str, str]] = []
    for row in run.faults:
        texts.append((f"× {printable(str(row.get('part')))} is off", "yellow"))
        texts.append((f"{row.get('error', '')}; {row.get('off', '')}", ""))
    if run.ended is None:
        for code, what in run.waits.items():
            texts.append((f"{code} waits for {what}", "dim"))
    for row in reversed(run.notes):
        note = str(row.get("text", ""))
        if isinstance(row.get("step"), int):
            note = f"{row['step']:,}: {note}"
        texts.append((f"· {note}", "dim"))

    # 2. Each text wrapped into lines of its style.
    lines: list[tuple[str, str]] = []
    for text, style in texts:
        for line in _wrapped(printable(text), width):
            lines.append((line, style))
    return lines


def _alerts(run: RunLog, width: int, height: int) -> RenderableType:
    """Return the alerts, the newest first.

    Each has a head, the sub-layer that moved first, and as much of its sentence as fits.
    """
    alerts = alerts_of_run(run)
    if not alerts:
        return Text("none")

    # 1. Three lines for each alert that fits; the sentences share the lines that are left.
    blocks: list[RenderableType] = []
    shown = list(reversed(alerts))[: max(height // 3, 1)]
    spare = height - 3 * len(shown)
    for row in shown:
        level = str(row.get("level"))
        mark = _MARKS.get(level, "·")
        style = _STYLES.get(level, "")
        where = printable(str((row.get("where") or [""])[0]))

        # 2. As much of the sentence as there is room for, cut in its last line.
        text = _wrapped(printable(str(row.get("what", ""))), width) or [""]
        room = 1 + max(0, min(spare, len(text) - 1))
        spare -= room - 1
        if room < len(text):
            text[room - 1] = clipped(f"{text[room - 1]} {text[room]}", width)

        # 3. Head, sub-layer, sentence.
        head = clipped(f"{mark} {row['code']} at {row['step']:,}", width)
        blocks.append(Text(head, style=style, no_wrap=True))
        blocks.append(Text(_ending(where, width), no_wrap=True))
        blocks.append(Text("\n".join(text[:room]), style="dim", no_wrap=True))
    return Group(*blocks)


def _ending(name: str, width: int) -> str:
    """Return as many of a name's last parts as fit, three at most."""
    return _fitting(
        width, *(_last_parts(name, most) for most in (3, 2)), _cut(_last_parts(name, 2), 0, width)
    )


def _keys(
    run: RunLog, path: str, width: int, idle: float | None, state: RunState | None
) -> RenderableType:
    """Return the lowest line: the run's state, its path and how to leave."""
    text, goes_on = _state_text(run, idle, state)
    leave = "Ctrl-C leaves"
    if goes_on:
        leave = "Ctrl-C leaves; the run goes on"
    head, tail = f" {printable(text)}", f"  ·  {leave}"
    room = width - len(head) - len(tail) - len("  ·  ")
    if room >= _LEAST_PATH:
        line = f"{head}  ·  {_end_of(printable(path), room)}{tail}"
    else:  # what is known of the run matters most
        line = _fitting(width, head + tail, head)
    return Text(clipped(line, width), style="reverse")


def _state_text(run: RunLog, idle: float | None, state: RunState | None) -> tuple[str, bool]:
    """Return what is known of the run, and whether it goes on."""
    if state is not None:
        return state.text, state.kind is RunStatus.RUNNING
    if run.ended is not None:
        return f"ended at step {run.ended['step']:,}", False
    if idle is not None and idle >= _SILENT:
        # a dead run, or a slow one: the log does not tell
        return f"no line for {seconds(idle)}", False
    return "running", True


def _end_of(path: str, width: int) -> str:
    """Cut the front off a path that is too long."""
    if len(path) <= width:
        return path
    return f"…{path[1 - width :]}"
