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
from jacdiag.records.number_format import ABSENT, of_step_time, seconds, three
from jacdiag.records.run_log import RunLog, number
from jacdiag.records.run_state import RunState, RunStatus
from jacdiag.render.content.next_probe import next_probe_step
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
from jacdiag.render.content.run_flights import RunFlight, alert_lines
from jacdiag.render.content.run_sublayers import sublayer_depths
from jacdiag.render.content.shared_names import ShownNames, depths_of_shared_names
from jacdiag.render.content.verdict import TIED
from jacdiag.render.terminal.gain_cells import CUTS, SHADES, Cell, GainCells, loudest

_BARS = "▁▂▃▄▅▆▇█"
_SHADES = SHADES
_STYLES = {"error": "bold red", "warning": "yellow"}
_TALLEST = 8  # lines of a curve
_TALLEST_ROW = 2  # lines of a sub-layer
_LOOK_BACK = 1000  # steps in which a last value is looked for first
_SHORTEST_NAME = 6  # characters that a sub-layer's name has at least
_NARROW = 22  # columns of the heat map: below, its key is short
_SILENT = 60.0  # seconds without a line in the log
_MARKS = {"error": "●", "warning": "▲", "info": "·"}
_LEAST_PATH = 12  # columns: a shorter end of a path would say nothing
_GOES_ON = " ..."  # ends a line whose sentence goes on
_IN_FULL = 8  # alerts that are printed in full below a frame
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
    is_followed: bool = True,
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
        is_followed: other frames come until a key ends them.
    """
    # 1. The cells of the heat map, with those of new probes.
    if cells is None:
        cells = GainCells()
    cells.update(run)

    # 2. The panels, over a line of keys.
    layout = Layout()
    text, goes_on = _state_text(run, idle, state)
    leave = ""
    if is_followed:
        leave = _how_to_leave(goes_on)
    layout.split_column(Layout(name="body"), Layout(_last_line(text, path, leave, width), size=1))
    left, right = max(width * 34 // 100, 24), max(width * 32 // 100, 22)
    middle = width - left - right
    inside = height - 3
    layout["body"].split_row(
        Layout(Panel(_figures(run, left - 4, inside), title="run", title_align="left"), size=left),
        Layout(Panel(_gains(run, cells, middle - 4, inside), title="gain", title_align="left")),
        Layout(_right(run, right - 4, height - 1), size=right),
    )
    return layout


# -- left ------------------------------------------------------------------------------------------
def _figures(run: RunLog, width: int, height: int) -> RenderableType:
    """Return the left panel: curves, and lines of figures below them."""
    if not run.steps:
        return Text("no step yet")

    # 1. The curves that have room, each a line of text and some lines of bars.
    lines = _figure_lines(run, width)
    curves = _curves(run, width)
    room = height - 1 - len(lines)
    while len(curves) > 2 and room < 3 * len(curves):
        curves.pop()
    tall = min(max(room // len(curves) - 1, 1), _TALLEST)

    # 2. From the top: the step, the curves, the figures.
    shown = [f"step {run.steps[-1]['step']:,}"]
    for head, values in curves:
        shown += [head, *chart(values, width, tall)]
    shown += lines
    cut = [clipped(printable(line), width) for line in shown[:height]]
    return Text("\n".join(cut), no_wrap=True)


def _figure_lines(run: RunLog, width: int) -> list[str]:
    """Return speed, learning rate, tokens, clipping, skipped steps and cost, if they are known."""
    # 1. Speed, over the last steps.
    lines: list[str] = []
    durations = [number(row.get("step_seconds")) for row in run.steps[-_RATE:]]
    known = list(filter(math.isfinite, durations))
    if known:
        lines.append(f"steps/s  {three(len(known) / max(sum(known), 1e-9))}")

    # 2. Figures of the last step.
    last = run.steps[-1]
    for key in ("lr", "tokens"):
        if last.get(key) is not None:
            lines.append(f"{key:8} {number(last[key]):,.4g}")

    # 3. Counts over all steps.
    lines += _clipped_steps(run, width)
    skipped = [row for row in run.steps if row.get("skipped")]
    if skipped:
        lines.append(f"skipped  {len(skipped)}")
    return lines + _cost(run, width)


def _clipped_steps(run: RunLog, width: int) -> list[str]:
    """Return the line on clipping; none if the log does not say which steps were clipped."""
    was_clipped = []
    for row in run.steps:
        if row.get("clipped") is not None:
            was_clipped.append(row["clipped"])
    if not was_clipped:
        return []
    share = f"clipped  {sum(was_clipped) / len(was_clipped):.0%}"
    return [_fitting(width, f"{share} of steps", share)]


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
    for label, short, values in (
        ("largest logit", "logit", _over_sublayers(run, "logit", largest=True)),
        ("least shortcut", "shortcut", _over_sublayers(run, "shortcut_std", largest=False)),
        ("update/weight", "upd", _update_ratios(run)),
    ):
        finite = list(filter(math.isfinite, values))
        if finite:
            last = three(finite[-1])
            head = _fitting(width, f"{label} {last}", f"{short} {last}")
            curves.append((head, _stretched(values, width)))

    # 3. The learning rate, if it changes.
    rates = run.column("lr")
    if len(set(rates)) > 1:
        curves.append(("learning rate", rates))
    return curves


def _update_ratios(run: RunLog) -> list[float]:
    """Return update norm over weight norm, of the steps at which it was measured."""
    ratios = []
    for row in run.steps:
        update = row.get("update")
        if update:
            ratios.append(number(update.get("ratio")))
    return ratios


def _stretched(values: Sequence[float], width: int) -> list[float]:
    """Repeat values until there are as many as columns.

    Time then runs over the full width, as in the curves of the steps.
    """
    count = len(values)
    if not 0 < count < width:
        return list(values)
    places = [k * count // width for k in range(width)]
    return [values[place] for place in places]


def _over_sublayers(run: RunLog, figure: str, *, largest: bool) -> list[float]:
    """Return the largest or the smallest value over sub-layers, for each row of statistics."""
    extremes = []
    for row in run.stats:
        by_name = (row.get("figures") or {}).get(figure, {})
        known = [number(value) for value in by_name.values() if value is not None]
        if not known:
            continue

        # Large logits are the dangerous ones, and small shortcuts.
        if largest:
            extremes.append(max(known))
        else:
            extremes.append(min(known))
    return extremes


def _head(labels: Sequence[str], run: RunLog, key: str, width: int) -> str:
    """Return the head of a curve, with the last value that was measured, finite or not.

    A label is shortened, never a value.
    """
    # 1. The last value.
    measured = _recently_measured(run, key)
    last = "?"
    if measured:
        last = three(measured[-1][1])
    texts = [f"{label:8} {last}" for label in labels]

    # 2. Since when it is not finite, in as many words as fit.
    since = _lost_since(measured)
    if since is not None:
        long = [f"{label} {last} since step {since:,}" for label in labels]
        short = [f"{label} {last} since {since:,}" for label in labels]
        texts = [*long, *short, *texts]
    return _fitting(width, *texts, f"{labels[-1]} {last}")


def _recently_measured(run: RunLog, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the last steps; of all steps if every recent value was lost."""
    recent = _measured_values(run.steps[-_LOOK_BACK:], key)
    has_finite = any(math.isfinite(value) for _, value in recent)
    if recent and not has_finite:
        return _measured_values(run.steps, key)
    return recent


def _measured_values(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the rows in which a figure was measured."""
    measured = []
    for row in rows:
        value = _measured(row, key)
        if value is None:
            continue
        step = int(row["step"])
        measured.append((step, value))
    return measured


def _measured(row: Mapping[str, Any], key: str) -> float | None:
    """Return a figure of a step; None if it was not measured.

    The log has null for a norm before clipping that is nan. The norm after clipping then shows it.
    """
    # 1. What the log holds.
    if row.get(key) is not None:
        return number(row[key])
    after = row.get("grad_norm_post")
    if key != "grad_norm" or after is None:
        return None

    # 2. A norm that was lost.
    value = number(after)
    if math.isfinite(value):
        return None
    return value


def _lost_since(measured: Sequence[tuple[int, float]]) -> int | None:
    """Return the first of the last steps in a row whose value is not finite.

    It is None if the last one is finite.
    """
    since = None
    # From the end, up to the last value that is finite.
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

    shortest = texts[-1]
    return clipped(shortest, width)


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
    empty = [""] * rows
    if not values or width < 1:
        return empty

    # 1. The mean of each bar.
    per_bar = max(1, -(-len(values) // width))
    means = []
    for begin in range(0, len(values), per_bar):
        means.append(_finite_mean(values[begin : begin + per_bar]))

    # 2. Its height, up to eight for each line.
    heights = _bar_heights(means, 8 * rows)
    if not any(heights):
        return empty

    # 3. The lines, from the top.
    return [_bar_line(heights, row) for row in reversed(range(rows))]


def _bar_heights(means: Sequence[float], most: int) -> list[int]:
    """Return the heights of bars: 1 for the smallest, `most` for the largest, 0 for a gap."""
    finite = list(filter(math.isfinite, means))
    if not finite:
        return [0] * len(means)
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0

    heights = []
    for mean in means:
        height = 0
        if math.isfinite(mean):
            height = round((mean - low) / span * (most - 1)) + 1
        heights.append(height)
    return heights


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
    finite = list(filter(math.isfinite, values))
    count = len(finite)
    if not count:
        return math.nan
    return sum(finite) / count


def _cost(run: RunLog, width: int) -> list[str]:
    """Return how long the last probe took, and how long probes take compared with the steps."""
    lines = []
    if run.probes:
        duration = number(run.probes[-1].get("seconds"))
        lines.append(f"probe    {seconds(duration)}")

    # The last line that says what the watch costs.
    shares = (row["probe_share"] for row in reversed(run.prices) if "probe_share" in row)
    share = next(shares, None)
    if share is not None:
        text = of_step_time(share)
        short = text.replace("times the time of the steps", "x steps' time")
        short = short.replace("of the time of the steps", "of steps' time")
        lines.append(_fitting(width, f"         {text}", f"         {short}", f"  {short}", short))
    return lines


# -- middle ----------------------------------------------------------------------------------------
def _gains(run: RunLog, cells: GainCells, width: int, height: int) -> RenderableType:
    """Return the heat map: depth downwards, time to the right, the last gain as a number.

    What a cell shows does not depend on the run's own range. A single probe has one column: a bar
    over the full width would look like a course over time.
    """
    if not cells.steps:
        return Text("\n".join(_wrapped(f"no probe yet{_next_probe(run)}", width)))

    has_numbers = _has_room_for_numbers(cells, width)
    foot = _map_key(run, cells, width, has_numbers)
    room = max(height - len(foot), 1)

    # 1. Rows: several lines for a sub-layer if there is room, several sub-layers in a line if there
    # is not.
    per = max(1, -(-len(cells.names) // room))
    shown = cells.names[::per]
    tall = max(min(room // max(len(shown), 1), _TALLEST_ROW), 1)
    values = _last_gains(cells, per)
    value_width = max(map(len, values), default=0) + 1
    if not has_numbers:
        values = [""] * len(values)
        value_width = 0
    for_names = max(width - value_width - min(len(cells.steps), width // 3) - 1, _SHORTEST_NAME)
    names = shorten_names([printable(name) for name in _labels(run, shown)], for_names)

    # 2. Columns: probes, stretched or gathered to the width.
    name_width = max(map(len, names), default=0)
    space = max(width - name_width - 1 - value_width, 1)
    if len(cells.steps) == 1:
        space = 1
    _, columns = cells.binned(space)
    across = [columns[k * len(columns) // space] for k in range(space)]

    # 3. The cells. The first line of a sub-layer begins with its name and ends with its gain.
    text = Text(no_wrap=True)
    for k, name in enumerate(names):
        members = cells.names[k * per : (k + 1) * per]
        ends = [values[k].rjust(value_width), *[""] * (tall - 1)]
        heads = [name, *[""] * (tall - 1)]
        for head, end in zip(heads, ends, strict=True):
            text.append(head.ljust(name_width) + " ")
            _append_cells(text, across, members)
            text.append(end + "\n")
    text.append("\n".join(foot))
    return text


def _has_room_for_numbers(cells: GainCells, width: int) -> bool:
    """Return whether a line has room for a name, a cell and the longest number, uncut."""
    longest = max(map(len, _last_gains(cells, 1)), default=0)
    return width >= _SHORTEST_NAME + len(" ") + 1 + len(" ") + longest


def _last_gains(cells: GainCells, per: int) -> list[str]:
    """Return the last gain of each line of the map; the largest if it stands for several.

    Args:
        cells: of the map.
        per: sub-layers in a line.
    """
    last = cells.rows[-1]
    texts = []
    for begin in range(0, len(cells.names), per):
        names = cells.names[begin : begin + per]
        values = [last[name].value for name in names if name in last]
        texts.append(_largest_gain(values))
    return texts


def _largest_gain(values: Sequence[float]) -> str:
    """Return the largest of some gains as text; one that is not finite comes first."""
    # 1. No probe has one.
    if not values:
        return ABSENT

    # 2. One that was lost, or the largest.
    for value in values:
        if not math.isfinite(value):
            return three(value)
    return three(max(values))


def _labels(run: RunLog, names: Sequence[str]) -> list[str]:
    """Return what the lines of the map are called.

    A module that is applied at several depths is named with its layer, as the table of an audit has
    it: "4 attention" for the call of `attention` in layer 4.
    """
    depths = depths_of_shared_names(sublayer_depths(run))
    labels = []
    for name in names:
        label = name
        if name in depths:
            module, depth = depths[name]
            label = f"{depth} {module}"
        labels.append(label)
    return labels


def _next_probe(run: RunLog) -> str:
    """Return when the next probe is due, as the end of a sentence; "" if that is not known."""
    step = next_probe_step(run)
    if step is None:
        return ""
    return f", next probe about step {step:,}"


def _append_cells(text: Text, across: Sequence[Mapping[str, Cell]], members: Sequence[str]) -> None:
    """Append one line of cells.

    Args:
        text: to append to.
        across: the cells of each column, by sub-layer.
        members: the sub-layers that the line stands for.
    """
    for column in across:
        cell = loudest([column.get(member) for member in members])
        if cell is None:
            text.append(" ")  # no probe of this column has one
        else:
            text.append(cell.glyph, style=cell.style)


def _map_key(run: RunLog, cells: GainCells, width: int, has_numbers: bool) -> list[str]:
    """Return the key below the heat map: its steps, its shades and its marks.

    Args:
        run: as far as it has come.
        cells: of the map.
        width: of the panel.
        has_numbers: each line ends with the last gain.
    """
    # 1. The steps.
    steps = f"steps {cells.steps[0]:,} to {cells.steps[-1]:,}"
    if len(cells.steps) == 1:
        steps = f"one probe, at step {cells.steps[0]:,}"
    elif cells.steps[0] == cells.steps[-1]:
        steps = f"{len(cells.steps)} probes, all at step {cells.steps[0]:,}"
    key = _wrapped(f"{steps}{_next_probe(run)}", width)

    # 2. The shades, each with the gain that it begins at.
    sizes = [f"{SHADES[0]}{TIED}<{CUTS[0]:g}"]
    for shade, cut in zip(SHADES[1:], CUTS, strict=False):
        sizes.append(f"{shade}{TIED}{cut:g}")
    figure = "‖J‖"
    if has_numbers:
        figure = "‖J‖, a number: the last"
    key += _wrapped(f"{figure} {' '.join(sizes)}", width)

    # 3. The marks: without a probe before there is no change.
    if len(cells.steps) == 1:
        return key + _wrapped(f"▲{TIED}●: a rule fired", width)
    marks = (
        f"+{TIED}-: a factor {cells.factor:g} above or below its last 8 "
        f"▲{TIED}●: a rule fired; the mark hides the shade"
    )
    if width < _NARROW:
        marks = f"+{TIED}-: factor{TIED}{cells.factor:g} ▲{TIED}●: rule"
    key += _wrapped(marks, width)
    return key


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Cut names to a width by the mildest of some ways that leaves them different.

    First go the leading segments that all share or that are more than three, then the end of the
    last segment, its middle, its front.

    Args:
        names: dotted, of sub-layers.
        width: characters.

    >>> shorten_names(["layers.0.attention", "layers.0.feed_forward"], 9)
    ['0.attent…', '0.feed_f…']
    >>> shorten_names(["layers.0.self_attn", "layers.0.self_mlp"], 8)
    ['0.s…attn', '0.s…_mlp']
    """
    # 1. The last three segments of each.
    different = len(set(names))
    short = [_last_parts(name, 3) for name in names]
    longest = max(map(len, short), default=0)
    if longest <= width and len(set(short)) == different:
        return short

    # 2. Without the leading segments that all share.
    split_names = [name.split(".") for name in names]
    shared = _count_shared(split_names)
    own = [".".join(segments[shared:]) for segments in split_names]

    # 3. Cut at the end, in the middle or at the front.
    shortened: list[str] = []
    for front in (width - 1, (width - 1) // 2, 0):
        shortened = [_cut(name, front, width) for name in own]
        if len(set(shortened)) == different:
            break
    return shortened


def _count_shared(parts: Sequence[Sequence[str]]) -> int:
    """Count the leading segments that all names share; each keeps its last one."""
    # Of each place in the names, the segments that stand there.
    most = min(map(len, parts), default=1) - 1
    for count in range(most):
        segments = {part[count] for part in parts}
        if len(segments) > 1:
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
    """Return the last segments of a name, which differ between sub-layers."""
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

    # 1. The report at the start: a quarter of the height at most, then its heads alone.
    start = report_at_start(run)
    if start:
        lines = _report_lines(start, width, ShownNames(sublayer_depths(run)))
        size = min(len(lines) + 2, max(height // 4, 4))
        if size < len(lines) + 2:
            lines = [line for line in lines if line[1] != "dim"]
        title = f"report at step {start[0]['step']:,}"
        layouts.append(_lines_panel(lines, title, width, size))
        room -= size

    # 2. Notes: a third of it at most.
    notes = _notes(run, width)
    if notes:
        size = min(len(notes) + 2, max(height // 3, 5))
        title = "notes"
        if run.faults:
            title = "off, notes"
        layouts.append(_lines_panel(notes, title, width, size))
        room -= size

    # 3. Alerts stand above them, in the room that is left.
    alerts = Layout(Panel(_alerts(run, width, room - 2), title="alerts", title_align="left"))
    if not layouts:
        return alerts
    panels = Layout()
    panels.split_column(alerts, *layouts)
    return panels


def _lines_panel(lines: Sequence[tuple[str, str]], title: str, width: int, size: int) -> Layout:
    """Return lines in a frame with a title."""
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


def _report_lines(
    rows: Sequence[Mapping[str, Any]], width: int, names: ShownNames
) -> list[tuple[str, str]]:
    """Return what the first probe found in the model: it did not happen in the run.

    Args:
        rows: of the findings.
        width: of the panel.
        names: of the sub-layers.
    """
    lines: list[tuple[str, str]] = []
    for row in rows:
        # 1. The head: how severe, which rule, and the first sub-layer.
        level = str(row.get("level"))
        where = printable(names.in_text(str((row.get("where") or [""])[0])))
        head = f"{_MARKS.get(level, '·')} {row.get('code')} {_ending(where, max(width - 8, 6))}"
        lines.append((head, _STYLES.get(level, "")))

        # 2. The sentence.
        sentence = printable(names.in_text(str(row.get("what", ""))))
        lines += [(line, "dim") for line in _wrapped(sentence, width)]
    return lines


def _notes(run: RunLog, width: int) -> list[tuple[str, str]]:
    """Return measurements that are switched off, rules that wait, and the newest notes."""
    lines: list[tuple[str, str]] = []
    for text, style in _note_texts(run):
        lines += [(line, style) for line in _wrapped(printable(text), width)]
    return lines


def _note_texts(run: RunLog) -> list[tuple[str, str]]:
    """Return what the notes say, each text with its style."""
    # 1. What is switched off, and why.
    texts: list[tuple[str, str]] = []
    for row in run.faults:
        part = printable(str(row.get("part")))
        error = row.get("error", "")
        consequence = row.get("off", "")
        texts.append((f"× {part} is off", "yellow"))
        texts.append((f"{error}; {consequence}", ""))

    # 2. Rules that wait; a run that has ended keeps nothing waiting.
    if run.ended is None:
        for code, what in run.waits.items():
            texts.append((f"{code} waits for {what}", "dim"))

    # 3. Notes, the newest first, with their steps.
    for row in reversed(run.notes):
        note = str(row.get("text", ""))
        step = row.get("step")
        if isinstance(step, int):
            note = f"{step:,}: {note}"
        texts.append((f"· {note}", "dim"))
    return texts


def _alerts(run: RunLog, width: int, height: int) -> RenderableType:
    """Return the alerts, the newest first.

    Each has a head, the sub-layer that moved first, and as much of its sentence as fits.
    """
    alerts = alerts_of_run(run)
    if not alerts:
        return Text("none")

    # 1. Three lines for each alert that fits; the sentences share the lines that are left.
    names = ShownNames(sublayer_depths(run))
    blocks: list[RenderableType] = []
    shown = list(reversed(alerts))[: max(height // 3, 1)]
    spare = height - 3 * len(shown)
    for row in shown:
        level = str(row.get("level"))
        mark = _MARKS.get(level, "·")
        style = _STYLES.get(level, "")
        where = printable(names.in_text(str((row.get("where") or [""])[0])))

        # 2. As much of the sentence as there is room for, cut in its last line.
        what = names.in_text(str(row.get("what", "")))
        text = _wrapped(printable(what), width) or [""]
        room = 1 + max(0, min(spare, len(text) - 1))
        spare -= room - 1
        if room < len(text):
            text[room - 1] = _with_ellipsis(text[room - 1], width)

        # 3. Head, sub-layer, sentence.
        head = clipped(f"{mark} {row['code']} at {row['step']:,}", width)
        blocks.append(Text(head, style=style, no_wrap=True))
        blocks.append(Text(_ending(where, width), no_wrap=True))
        blocks.append(Text("\n".join(text[:room]), style="dim", no_wrap=True))
    return Group(*blocks)


def _with_ellipsis(line: str, width: int) -> str:
    """Return a line that goes on, marked at its end; words make room for the mark."""
    # 1. The words that leave room for the mark.
    room = max(width - len(_GOES_ON), 5)
    words = textwrap.wrap(line, room, break_on_hyphens=False, break_long_words=False)

    # 2. A single word may be longer than that.
    beginning = clipped("".join(words[:1]), room)
    return f"{beginning}{_GOES_ON}"


def full_alerts(
    run: RunLog, frame: str, flights: Mapping[int, RunFlight], width: int | None
) -> list[str]:
    """Return the alerts whose sentence a frame cuts or that have a flight, in full.

    Args:
        run: as far as it has come.
        frame: that was printed.
        flights: of the run, by step.
        width: to wrap the lines to; None for no limit.
    """
    # 1. The newest ones. A frame without room marks what it cuts.
    alerts = [row for row in alerts_of_run(run) if row.get("level") != "info"]
    is_complete = _GOES_ON not in frame and len(alerts) <= 1
    newest = list(reversed(alerts))[:_IN_FULL]
    if not newest or (is_complete and not flights):
        return []

    # 2. Their sentences, wrapped.
    lines = ["alerts in full:"]
    names = ShownNames(sublayer_depths(run))
    for row in newest:
        sentence, *on_flight = alert_lines(row, flights)
        lines += _indented(printable(names.in_text(sentence)), width)
        # A command is not broken: it is to be copied.
        lines += [f"    {printable(text)}" for text in on_flight]

    # 3. The others.
    beyond = len(alerts) - len(newest)
    if beyond:
        lines.append(f"  {beyond} earlier; jacdiag plot RUN --html FILE lists them all")
    return lines


def _indented(text: str, width: int | None) -> list[str]:
    """Return a text in lines that are indented, the first one less."""
    if width is None:
        return [f"  {text}"]
    return textwrap.wrap(
        text,
        width,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _ending(name: str, width: int) -> str:
    """Return as many of a name's last segments as fit, three at most."""
    three_segments, two_segments = _last_parts(name, 3), _last_parts(name, 2)
    return _fitting(width, three_segments, two_segments, _cut(two_segments, 0, width))


def _how_to_leave(goes_on: bool) -> str:
    """Return which key ends a screen that follows a run, and what that does to the run."""
    if goes_on:
        return "Ctrl-C leaves; the run goes on"

    return "Ctrl-C leaves"


def _last_line(state: str, path: str, leave: str, width: int) -> RenderableType:
    """Return the lowest line: the run's state, its path and how to leave.

    Args:
        state: of the run, in words.
        path: of its log.
        leave: which key ends the screen; "" for a single frame.
        width: of the terminal.
    """
    # 1. The state, and the key.
    head, tail = f" {printable(state)}", ""
    if leave:
        tail = f"  ·  {leave}"

    # 2. The path between them, if there is room. What is known of the run matters most.
    room = width - len(head) - len(tail) - len("  ·  ")
    line = _fitting(width, head + tail, head)
    if room >= _LEAST_PATH:
        line = f"{head}  ·  {_end_of(printable(path), room)}{tail}"
    return Text(clipped(line, width), style="reverse")


def _state_text(run: RunLog, idle: float | None, state: RunState | None) -> tuple[str, bool]:
    """Return what is known of the run, and whether it goes on."""
    # 1. A sign of life next to the log, or the log's last line.
    if state is not None:
        return state.text, state.kind is RunStatus.RUNNING
    if run.ended is not None:
        return f"ended at step {run.ended['step']:,}", False

    # 2. A dead run, or a slow one: the log does not tell.
    is_silent = idle is not None and idle >= _SILENT
    if is_silent:
        return f"no line for {seconds(idle)}", False
    return "running", True


def _end_of(path: str, width: int) -> str:
    """Cut the front off a path that is too long."""
    excess = len(path) - width
    if excess <= 0:
        return path
    return f"…{path[excess + 1 :]}"
