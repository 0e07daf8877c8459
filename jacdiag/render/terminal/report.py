"""The view of a report as lines of a terminal, or as plain text if output is piped."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from jacdiag.records import Report
from jacdiag.render.ascii_symbols import spelled
from jacdiag.render.content.flight_replay import table_lines
from jacdiag.render.content.sentences import left_out
from jacdiag.render.content.severity import SIGNS
from jacdiag.render.content.sublayer_table import Gap, Grid, SublayerColumn
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
    """Print a report: header, one line per sub-layer, verdict by condition, what to do, cost.

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
    view = build_view(report, all_rows=all_rows, sort=sort)
    width = None
    if console.is_terminal:
        width = console.width
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
    shown = {column.key for column in columns}
    dropped = [column.title for column in view.rows.columns if column.key not in shown]
    notes = list(view.notes)
    if dropped and view.rows.rows:
        notes.insert(0, left_out(dropped))
    for note in notes:
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


# -- header ----------------------------------------------------------------------------------------
def _header(header: HeaderView, width: int | None) -> list[Text]:
    """Return the header: its first line plain, with the name in bold, the others dim."""
    lines = []
    style = ""
    for number, facts in enumerate(header.lines):
        indent = ""
        for row in packed(facts, width):
            line = Text(indent + row, style=style)
            if number == 0 and header.name in row:
                start = line.plain.index(header.name)
                line.stylize("bold", start, start + len(header.name))
            lines.append(line)
            indent = _INDENT  # of a line that is continued
        style = "dim"
    return lines


def packed(parts: list[str], width: int | None) -> list[str]:
    """Return lines with as many parts on each as fit; a part that fits on no line is wrapped.

    Args:
        parts: of one line, to be joined by a dot.
        width: characters a line; None for no limit.
    """
    if width is None:
        return [_JOINT.join(parts)]
    room = width - len(_INDENT)
    rows: list[str] = []
    for part in parts:
        if rows:
            joined = f"{rows[-1]}{_JOINT}{part}"
            if cell_len(joined) <= room:
                rows[-1] = joined
                continue
        rows += _wrapped(part, room)
    return rows


# -- table -----------------------------------------------------------------------------------------
def _table(grid: Grid, columns: list[SublayerColumn], width: int | None) -> list[Text]:
    """Return the title line, the visible rows, and a line for each fold."""
    if not grid.rows:
        return [Text(f"{_INDENT}no sub-layers")]
    lines = [_title_line(columns)]
    for place in range(len(grid.rows) + 1):
        if place in grid.gaps:
            lines.append(_gap(grid.gaps[place], width))
        if place < len(grid.rows):
            lines.append(_row(columns, place))
    for line in lines:
        line.rstrip()
        if width is not None:
            line.truncate(width, overflow="ellipsis")
    return lines


def _gap(gap: Gap, width: int | None) -> Text:
    """Return a line for rows that are folded away, with as many words as there is room for."""
    line = ""
    for text in (f"{gap.text}   (--all shows them)", gap.text, gap.brief):
        line = f"{_INDENT}  ...  {text}"
        if width is None or cell_len(line) <= width:
            break
    return Text(line, style="dim")


def _title_line(columns: list[SublayerColumn]) -> Text:
    line = Text(_INDENT, style="dim")
    for column in columns:
        is_left = column.left or column.key == "who"
        line.append(_padded(column.title, column, is_left=is_left), style=_style_of(column))
        if column.marked:
            line.append("  ", style="")
        line.append(_GAP)
    return line


def _row(columns: list[SublayerColumn], place: int) -> Text:
    line = Text(_INDENT)
    for column in columns:
        level_style = _STYLES[column.levels[place]]
        text = _padded(column.cells[place], column, is_left=column.left)
        line.append(text, style=level_style or _style_of(column))
        if column.marked:
            sign = SIGNS[column.levels[place]] or " "
            line.append(f" {sign}", style=level_style)
        line.append(_GAP)
    return line


def _style_of(column: SublayerColumn) -> str:
    if column.key == "who":
        return "bold"
    return ""


def _padded(text: str, column: SublayerColumn, *, is_left: bool) -> str:
    """Fill a cell up to its column's width."""
    space = " " * (_width(column) - cell_len(text))
    if is_left:
        return text + space
    return space + text


def _width(column: SublayerColumn) -> int:
    return max(cell_len(text) for text in [column.title, *column.cells])


def _total(columns: list[SublayerColumn]) -> int:
    """Return the width of a row: indent, cells, room for marks, and gaps between the columns."""
    total = len(_INDENT) - len(_GAP)
    for column in columns:
        total += _width(column) + len(_GAP)
        if column.marked:
            total += 2
    return total


def _fitting(columns: list[SublayerColumn], width: int | None) -> list[SublayerColumn]:
    """Return the columns that fit.

    The least interesting columns go first, but one figure stays. If a row is still too long, the
    names are cut at their front.
    """
    if width is None:
        return list(columns)

    # 1. Drop columns.
    fitting = list(columns)
    figures = [column for column in columns if column.key not in ("depth", "name")]
    figures.sort(key=lambda column: column.interest)
    for column in figures[:-1]:
        if _total(fitting) > width:
            fitting.remove(column)

    # 2. Cut names.
    excess = _total(fitting) - width
    if excess <= 0:
        return fitting
    return [_shortened(column, excess) if column.key == "name" else column for column in fitting]


def _shortened(column: SublayerColumn, excess: int) -> SublayerColumn:
    room = max(_LEAST_NAME, _width(column) - excess)
    cells = []
    for cell in column.cells:
        if cell_len(cell) <= room:
            cells.append(cell)
        else:
            cells.append(f"…{_tail(cell, room - 1)}")
    return SublayerColumn(
        column.key, column.title, column.interest, cells, column.levels, column.left
    )


def _tail(text: str, room: int) -> str:
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

    # 2. Its lines: labels and states are aligned.
    label_width = max(len(line.label) for line in verdict.lines)
    status_width = max(cell_len(_status(line)) for line in verdict.lines)
    for line in verdict.lines:
        head = Text(f"{_INDENT}{line.label:<{label_width}}  ")
        head.append(f"{_status(line):<{status_width}}  ", style=_STYLES[line.level])
        text = line.text
        if line.code not in ("", line.label):
            text += f"   {line.code}"
        lines += _hanging(head, text, width)
    return lines


def _status(line: Line) -> str:
    return f"{line.status} {SIGNS[line.level]}".strip()


def _replay(replay: ReplayView, width: int | None) -> list[Text]:
    """Return the replay of a flight: the sentence, the table of its batches, what stands out."""
    lines = _hanging(Text(f"{_INDENT}Replay  ", style="bold"), replay.sentence, width)
    titles, *rows = table_lines(replay.table)
    lines.append(Text(_INDENT * 2 + titles, style="dim"))
    for row in rows:
        lines.append(Text(_INDENT * 2 + row))
    if width is not None:
        for line in lines[1:]:
            line.truncate(width, overflow="ellipsis")
    for fact in replay.facts:
        lines += _bullet(fact, width)
    return lines


def _closing(view: ReportView, width: int | None) -> list[Text]:
    """Return what to do, the cost, and the command that runs the audit again."""
    lines = []
    label = "What to do"
    for action in view.actions:
        lines += _labelled(label, action, width)
        label = ""  # stands next to the first action alone
    cost = view.cost.text
    if view.cost.command:
        cost += f"   again: {view.cost.command}"
    return lines + _labelled("Cost", cost, width)


def _labelled(label: str, text: str, width: int | None) -> list[Text]:
    return _hanging(Text(f"{_INDENT}{label:<10}   ", style="bold"), text, width)


def _bullet(text: str, width: int | None) -> list[Text]:
    return _hanging(Text(f"{_INDENT}– "), text, width, "dim")


# -- prose -----------------------------------------------------------------------------------------
def _hanging(head: Text, body: str, width: int | None, style: str = "") -> list[Text]:
    """Set a body after its head; if there is a width, wrapped under its own beginning."""
    if width is None:
        return [head + _prose(body, style)]

    # 1. With too little room next to the head, the body begins below it.
    is_narrow = width - head.cell_len < _LEAST_PROSE
    if is_narrow and head.cell_len > len(_DEEPER):
        lines = []
        if head.plain.strip():
            lines.append(head)
        for piece in _wrapped(body, width - len(_DEEPER)):
            lines.append(Text(_DEEPER) + _prose(piece, style))
        return lines

    # 2. Else next to it.
    first, *others = _wrapped(body, width - head.cell_len)
    indent = Text(" " * head.cell_len)
    return [head + _prose(first, style), *(indent + _prose(piece, style) for piece in others)]


def _prose(text: str, style: str) -> Text:
    line = Text(text.replace(TIED, " "), style=style)
    line.highlight_regex(r"JD\d{3}|again: .*", "dim")
    return line


def _wrapped(text: str, room: int) -> list[str]:
    """Break a text into lines, at plain spaces only (`TIED` is none).

    A word that has no room on any line is broken inside.
    """
    lines = [""]
    for word in text.split(" "):
        for piece in _pieces(word, room):
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
    if cell_len(word) > room > 1:
        return chop_cells(word, room)
    return [word]
