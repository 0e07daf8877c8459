"""The view of a report as lines of a terminal, or as plain text if output is piped."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from jacdiag.records import Report
from jacdiag.render.ascii_symbols import spelled
from jacdiag.render.content.flight_replay import table_lines
from jacdiag.render.content.sentences import left_out
from jacdiag.render.content.severity import SIGNS
from jacdiag.render.content.sublayer_table import Gap, Grid, SublayerColumn, explain_marks
from jacdiag.render.content.verdict import TIED, Line
from jacdiag.render.view import HeaderView, ReplayView, ReportView, VerdictView, build_view

_STYLES = {"error": "bold red", "warning": "yellow", "undecided": "cyan", "info": "", "": ""}
_VERDICTS = {
    "pass": "green",
    "warn": "yellow",
    "fail": "bold red",
    "unknown": "cyan",
    "observed": "cyan",
}
_GAP = "  "
_INDENT = "  "
_JOINT = "  ·  "
_LEAST_NAME = 9  # a sub-layer's name is never cut shorter than this
_LEAST_PROSE = 40  # a sentence with less room than this starts on a line of its own
_DEEPER = " " * 6


def print_report(
    report: Report, console: Console, *, all_rows: bool = False, sort: str = "depth"
) -> None:
    """Print a report: header, table, verdict by condition, what to do, next command, cost.

    On a terminal, rows that do not fit lose columns and prose is wrapped; piped output has every
    column and no wrapping, whatever the width.

    Args:
        report: what to print.
        console: where to; its width, colours and terminal-ness decide the layout.
        all_rows: show every sub-layer; else long models are folded.
        sort: "depth" or "worst".

    Example:
        >>> from rich.console import Console
        >>> print_report(report, Console())                     # doctest: +SKIP
    """
    # 1. Lay it out.
    view = build_view(report, all_rows=all_rows, sort=sort)
    width = None
    if console.is_terminal:
        width = console.width

    # 2. Print it line by line. Without colours nothing is bold, either.
    for line in _lines(view, width):
        line.rstrip()
        printed = line
        if console.no_color:
            printed = Text(line.plain)
        console.print(printed, soft_wrap=True, highlight=False, markup=False, emoji=False)


def show_report(report: Report, width: int | None = None, **options: Any) -> None:
    """Print a report to stdout, spelled as its encoding can hold it.

    Args:
        report: what to print.
        width: characters a line; that of the terminal if not given.
        options: of `print_report`.
    """
    console = Console()
    if width is not None:
        # The table is laid out as for a terminal of that width, wherever it goes.
        console = Console(width=width, force_terminal=True, no_color=True)
    with console.capture() as capture:
        print_report(report, console, **options)
    console.file.write(spelled(capture.get(), console.encoding))


def _lines(view: ReportView, width: int | None) -> list[Text]:
    """Return the screen, section by section.

    Args:
        view: of a report.
        width: characters a line; None for no limit.
    """
    # 1. Header and table.
    lines = _header(view.header, width)
    lines.append(Text())
    columns = _fitting(view.rows.columns, width)
    lines += _table(view.rows, columns, width)

    # 2. Why columns are missing.
    for note in _table_notes(view, columns):
        lines += _bullet(note, width)

    # 3. The verdict, the replay, what to do.
    lines.append(Text())
    lines += _verdict(view.verdict, width)
    if view.replay is not None:
        lines.append(Text())
        lines += _replay(view.replay, width)
    lines.append(Text())
    lines += _closing(view, width)
    return lines


def _table_notes(view: ReportView, columns: list[SublayerColumn]) -> list[str]:
    """Return the notes below the table: columns without room, marks, figures that are missing.

    Args:
        view: of a report.
        columns: those that are shown.
    """
    notes = view.notes
    meaning = explain_marks(view.rows, columns)
    if meaning:
        notes = [meaning, *notes]
    shown = {column.key for column in columns}
    dropped = [column.title for column in view.rows.columns if column.key not in shown]
    if not dropped or not view.rows.rows:
        return notes
    return [left_out(dropped), *notes]


# -- header ----------------------------------------------------------------------------------------
def _header(header: HeaderView, width: int | None) -> list[Text]:
    """Return the header: its first line plain, with the name in bold, the others dim."""
    first, *others = header.lines
    lines = _packed_lines(first, width, "")
    for line in lines:
        _embolden(line, header.name)
    for facts in others:
        lines += _packed_lines(facts, width, "dim")
    return lines


def _packed_lines(facts: list[str], width: int | None, style: str) -> list[Text]:
    """Return facts on as few lines as they fit on, all but the first indented."""
    lines = []
    indent = ""
    for row in packed(facts, width):
        lines.append(Text(indent + row, style=style))
        indent = _INDENT
    return lines


def _embolden(line: Text, name: str) -> None:
    """Set the first occurrence of a name in bold, if the line has it."""
    start = line.plain.find(name)
    if start >= 0:
        line.stylize("bold", start, start + len(name))


def packed(parts: list[str], width: int | None) -> list[str]:
    """Return lines with as many facts on each as fit; a fact that fits on no line is wrapped.

    Args:
        parts: the facts of one line, to be joined by a dot.
        width: characters a line; None for no limit.
    """
    if width is None:
        return [_JOINT.join(parts)]
    room = width - len(_INDENT)
    rows: list[str] = []
    for part in parts:
        # 1. At the end of the last line, if there is room.
        if rows:
            joined = f"{rows[-1]}{_JOINT}{part}"
            if cell_len(joined) <= room:
                rows[-1] = joined
                continue

        # 2. Else on a line of its own.
        rows += _wrapped(part, room)
    return rows


# -- table -----------------------------------------------------------------------------------------
def _table(grid: Grid, columns: list[SublayerColumn], width: int | None) -> list[Text]:
    """Return the title line, the visible rows, and a line for each fold."""
    if not grid.rows:
        return [Text(f"{_INDENT}no sub-layers")]

    # 1. The rows. A fold may also stand below the last one.
    lines = [_title_line(columns)]
    for place in range(len(grid.rows) + 1):
        if place in grid.gaps:
            lines.append(_gap(grid.gaps[place], width))
        if place < len(grid.rows):
            lines.append(_row(columns, place))

    # 2. Cut to the terminal, however long a name is.
    for line in lines:
        line.rstrip()
        _truncate(line, width)
    return lines


def _truncate(line: Text, width: int | None) -> None:
    """Cut a line to a width, if there is one, with a sign that it was cut."""
    if width is not None:
        line.truncate(width, overflow="ellipsis")


def _gap(gap: Gap, width: int | None) -> Text:
    """Return a line for rows that are folded away, with as many words as there is room for."""
    line = ""
    for text in (f"{gap.text}   (--all shows them)", gap.text, gap.brief):
        line = f"{_INDENT}  ...  {text}"
        has_room = width is None or cell_len(line) <= width
        if has_room:
            break  # else the shortest one
    return Text(line, style="dim")


def _title_line(columns: list[SublayerColumn]) -> Text:
    """Return the titles, each over its column."""
    line = Text(_INDENT, style="dim")
    for column in columns:
        title = _padded(column.title, column, is_left=column.left)
        line.append(title, style=_style_of(column))
        # Room over the marks.
        if column.marked:
            line.append("  ", style="")
        line.append(_GAP)
    return line


def _row(columns: list[SublayerColumn], place: int) -> Text:
    """Return one sub-layer: its cells, each with its mark in the colour of its level."""
    line = Text(_INDENT)
    for column in columns:
        # 1. The cell.
        level = column.levels[place]
        text = _padded(column.cells[place], column, is_left=column.left)
        line.append(text, style=_STYLES[level] or _style_of(column))

        # 2. Its mark, or room for it.
        if column.marked:
            sign = SIGNS[level] or " "
            line.append(f" {sign}", style=_STYLES[level])
        line.append(_GAP)
    return line


def _style_of(column: SublayerColumn) -> str:
    """Return the style of a column: that of the factor to blame is bold."""
    is_factor = column.key == "who"
    if is_factor:
        return "bold"
    return ""


def _padded(text: str, column: SublayerColumn, *, is_left: bool) -> str:
    """Fill a cell up to its column's width."""
    space = " " * (_width(column) - cell_len(text))
    if is_left:
        return text + space
    return space + text


def _width(column: SublayerColumn) -> int:
    """Return the width of a column's widest text."""
    return max(map(cell_len, [column.title, *column.cells]))


def _total(columns: list[SublayerColumn]) -> int:
    """Return the width of a row: indent, cells, room for marks, and gaps between the columns."""
    total = len(_INDENT)
    for column in columns:
        total += _width(column) + len(_GAP)
        if column.marked:
            total += 2
    # Nothing follows the last column.
    return total - len(_GAP)


def _fitting(columns: list[SublayerColumn], width: int | None) -> list[SublayerColumn]:
    """Return the columns that fit.

    The least interesting columns go first, but one figure stays. If a row is still too long, the
    names are cut at their front.
    """
    if width is None:
        return list(columns)

    # 1. Drop columns.
    fitting = list(columns)
    for column in _droppable(columns):
        if _total(fitting) > width:
            fitting.remove(column)

    # 2. Cut names.
    excess = _total(fitting) - width
    if excess > 0:
        names = next(column for column in fitting if column.key == "name")
        fitting[fitting.index(names)] = _shortened(names, excess)
    return fitting


def _droppable(columns: list[SublayerColumn]) -> list[SublayerColumn]:
    """Return the columns that may go, the least interesting first; one figure is not among them."""
    figures = [column for column in columns if column.key not in ("depth", "name")]
    figures.sort(key=lambda column: column.interest)
    return figures[:-1]


def _shortened(column: SublayerColumn, excess: int) -> SublayerColumn:
    """Return the column of names, cut at their front.

    Args:
        column: of the names.
        excess: characters that the row is too long.
    """
    room = max(_LEAST_NAME, _width(column) - excess)
    cells = []
    for cell in column.cells:
        if cell_len(cell) > room:
            cell = f"…{_tail(cell, room - 1)}"
        cells.append(cell)
    return dataclasses.replace(column, cells=cells)


def _tail(text: str, room: int) -> str:
    """Return as much of a text's end as there is room for."""
    # A character may be two cells wide.
    while cell_len(text) > room:
        text = text[1:]

    return text


# -- below the table -------------------------------------------------------------------------------
def _verdict(verdict: VerdictView, width: int | None) -> list[Text]:
    """Return the headline, and a line for each condition, rule and figure."""
    # 1. The verdict's word, then its headline.
    style = _VERDICTS[verdict.word]
    top = Text(_INDENT).append(f"{verdict.word.upper()}  ", style=f"bold {style}")
    lines = _hanging(top, verdict.headline, width, "bold")

    # 2. Room for the widest label and the widest state.
    label_width = max(len(line.label) for line in verdict.lines)
    status_width = max(cell_len(_status(line)) for line in verdict.lines)

    # 3. Its lines, with the rule's code at their ends.
    for line in verdict.lines:
        head = Text(f"{_INDENT}{line.label:<{label_width}}  ")
        head.append(f"{_status(line):<{status_width}}  ", style=_STYLES[line.level])
        text = line.text
        if line.code not in ("", line.label):
            text += f"   {line.code}"
        lines += _hanging(head, text, width)
    return lines


def _status(line: Line) -> str:
    """Return how a condition came out, with its mark."""
    return f"{line.status} {SIGNS[line.level]}".strip()


def _replay(replay: ReplayView, width: int | None) -> list[Text]:
    """Return the replay of a flight: the sentence, the table of its batches, what stands out."""
    # 1. The table, cut to the terminal.
    titles, *rows = table_lines(replay.table)
    table = [Text(_INDENT * 2 + titles, style="dim")]
    table += [Text(_INDENT * 2 + row) for row in rows]
    sentence = _hanging(Text(f"{_INDENT}Replay  ", style="bold"), replay.sentence, width)
    lines = [*sentence, *table]
    for line in lines[1:]:
        _truncate(line, width)

    # 2. What stands out in it.
    for fact in replay.facts:
        lines += _bullet(fact, width)
    return lines


def _closing(view: ReportView, width: int | None) -> list[Text]:
    """Return what to do, the next command, the cost, and the command that runs it again."""
    lines = []
    label = "What to do"
    for action in view.actions:
        lines += _labelled(label, action, width)
        label = ""  # stands next to the first action alone
    lines += _labelled("Next", view.next_step.text, width)
    cost = view.cost.text
    if view.cost.command:
        cost += f"   again: {view.cost.command}"
    return lines + _labelled("Cost", cost, width)


def _labelled(label: str, text: str, width: int | None) -> list[Text]:
    """Return a text after a bold label."""
    return _hanging(Text(f"{_INDENT}{label:<10}   ", style="bold"), text, width)


def _bullet(text: str, width: int | None) -> list[Text]:
    """Return a dim text after a dash."""
    return _hanging(Text(f"{_INDENT}– "), text, width, "dim")


# -- prose -----------------------------------------------------------------------------------------
def _hanging(head: Text, body: str, width: int | None, style: str = "") -> list[Text]:
    """Set a body after its head; if there is a width, wrapped under its own beginning."""
    if width is None:
        return [head + _prose(body, style)]

    # 1. With too little room next to the head, the body begins below it.
    room = width - head.cell_len
    is_narrow = room < _LEAST_PROSE
    if is_narrow and head.cell_len > len(_DEEPER):
        pieces = _wrapped(body, width - len(_DEEPER))
        lines = [Text(_DEEPER) + _prose(piece, style) for piece in pieces]
        if head.plain.strip():
            lines.insert(0, head)
        return lines

    # 2. Else next to it.
    first, *others = _wrapped(body, room)
    indent = Text(" " * head.cell_len)
    return [head + _prose(first, style), *(indent + _prose(piece, style) for piece in others)]


def _prose(text: str, style: str) -> Text:
    """Return a sentence in which codes of rules and the command are dim."""
    line = Text(text.replace(TIED, " "), style=style)
    line.highlight_regex(r"JD\d{3}|again: .*", "dim")
    return line


def _wrapped(text: str, room: int) -> list[str]:
    """Break a text into lines, at plain spaces only (`TIED` is none).

    A word that has no room on any line is broken inside.
    """
    # 1. Words, and pieces of those that are too long.
    pieces: list[str] = []
    for word in text.split(" "):
        pieces += _pieces(word, room)

    # 2. As many on each line as fit.
    lines = [""]
    for piece in pieces:
        joined = piece
        if lines[-1]:
            joined = f"{lines[-1]} {piece}"
        if cell_len(joined) > room and lines[-1].strip():
            lines.append(piece)
        else:
            lines[-1] = joined
    return [line.rstrip() for line in lines]


def _pieces(word: str, room: int) -> list[str]:
    """Break a word that has no room on a line."""
    is_too_long = cell_len(word) > room
    if is_too_long and room > 1:
        return chop_cells(word, room)
    return [word]
