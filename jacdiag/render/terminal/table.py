"""The screen: a report as a person reads it in a terminal, and the same in plain text where output
is piped.
"""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from jacdiag.records import Report
from jacdiag.render.ascii_symbols import spelled
from jacdiag.render.terminal import sentences as words
from jacdiag.render.terminal import verdict as below
from jacdiag.render.terminal.columns import Column, Gap, Grid, build
from jacdiag.render.terminal.flight_replay import replay_facts, replay_table, table_lines
from jacdiag.render.terminal.severity import SIGNS

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
    """Prints a report: header, one line per sub-layer, verdict by condition, what to do, cost.

    On a terminal, rows that do not fit lose columns and prose is wrapped; piped output has every
    column and no wrapping, whatever the width.

    Args:
        report: what to print.
        console: where to; its width, colours and terminal-ness decide the layout.
        all_rows: show every sub-layer, where long models are folded otherwise.
        sort: "depth" or "worst".

    Example:
        >>> from rich.console import Console
        >>> print_report(report, Console())                     # doctest: +SKIP
    """
    width = console.width if console.is_terminal else None
    report = words.legible(report)
    lines = _header(report, width)
    grid = build(report, all_rows=all_rows, sort=sort)
    columns = _fitting(grid.columns, width)
    lines += [Text(), *_table(grid, columns, width)]
    shown = {column.key for column in columns}
    dropped = [column.title for column in grid.columns if column.key not in shown]
    for note in [
        *([words.left_out(dropped)] if dropped and grid.rows else []),
        *below.footnotes(report),
    ]:
        lines += _hanging(Text(f"{_INDENT}– "), note, width, "dim")
    lines += [
        Text(),
        *_verdict(report, width),
        *_replay(report, width, all_rows),
        Text(),
        *_closing(report, width),
    ]
    for line in lines:
        line.rstrip()
        line = Text(line.plain) if console.no_color else line
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


def show_report(report: Report, width: int | None = None, **options: Any) -> None:
    """Print a report to stdout, spelled as its encoding can hold it.

    Args:
        report: what to print.
        width: characters a line; that of the terminal if not given.
        options: of `print_report`.
    """
    # With a width, the table is laid out as for a terminal of that width, wherever it goes.
    console = (
        Console() if width is None else Console(width=width, force_terminal=True, no_color=True)
    )
    with console.capture() as capture:
        print_report(report, console, **options)
    console.file.write(spelled(capture.get(), console.encoding))


def _header(report: Report, width: int | None) -> list[Text]:
    name = words.source_name(report)
    lines = []
    for number, parts in enumerate(words.header(report)):
        for place, row in enumerate(packed(parts, width)):
            line = Text(_INDENT * (place > 0) + row, style="dim" if number else "")
            if number == 0 and name in row:
                line.stylize("bold", line.plain.index(name), line.plain.index(name) + len(name))
            lines.append(line)
    return lines


def packed(parts: list[str], width: int | None) -> list[str]:
    """As many parts on each line as fit; one that fits on no line is wrapped."""
    if width is None:
        return [_JOINT.join(parts)]
    rows: list[str] = []
    for part in parts:
        joined = f"{rows[-1]}{_JOINT}{part}" if rows else part
        if rows and cell_len(joined) <= width - len(_INDENT):
            rows[-1] = joined
        else:
            rows += _wrapped(part, width - len(_INDENT))
    return rows


def _table(grid: Grid, columns: list[Column], width: int | None) -> list[Text]:
    if not grid.rows:
        return [Text(f"{_INDENT}no sub-layers")]
    lines = [_row([column.title for column in columns], columns, None, "dim")]
    for place in range(len(grid.rows) + 1):
        if place in grid.gaps:
            lines.append(_gap(grid.gaps[place], width))
        if place < len(grid.rows):
            lines.append(_row([column.cells[place] for column in columns], columns, place, ""))
    for line in lines:
        line.rstrip()
        if width is not None:
            line.truncate(width, overflow="ellipsis")
    return lines


def _gap(gap: Gap, width: int | None) -> Text:
    """A line for the rows that are folded away, as long as there is room for."""
    line = ""
    for text in (f"{gap.text}   (--all shows them)", gap.text, gap.brief):
        line = f"{_INDENT}  ...  {text}"
        if width is None or cell_len(line) <= width:
            break
    return Text(line, style="dim")


def _row(texts: list[str], columns: list[Column], place: int | None, style: str) -> Text:
    line = Text(_INDENT, style=style)
    for text, column in zip(texts, columns, strict=True):
        space = " " * (_width(column) - cell_len(text))
        left = column.left or (place is None and column.key == "who")
        loud = "" if place is None else _STYLES[column.levels[place]]
        line.append(
            text + space if left else space + text,
            style=loud or ("bold" if column.key == "who" else ""),
        )
        if column.marked:
            sign = SIGNS[column.levels[place]] if place is not None else ""
            line.append(f" {sign or ' '}", style=loud)
        line.append(_GAP)
    return line


def _width(column: Column) -> int:
    return max(cell_len(text) for text in [column.title, *column.cells])


def _total(columns: list[Column]) -> int:
    return (
        len(_INDENT)
        + sum(_width(column) + 2 * column.marked + len(_GAP) for column in columns)
        - len(_GAP)
    )


def _fitting(columns: list[Column], width: int | None) -> list[Column]:
    """Drops the least interesting columns but one figure until a row fits, then cuts the names from
    the left.
    """
    kept = list(columns)
    if width is None:
        return kept
    figures = sorted(
        (column for column in kept if column.key not in ("depth", "name")), key=lambda c: c.interest
    )
    for column in figures[:-1]:
        if _total(kept) > width:
            kept.remove(column)
    excess = _total(kept) - width
    return [
        _shortened(column, excess) if column.key == "name" and excess > 0 else column
        for column in kept
    ]


def _shortened(column: Column, excess: int) -> Column:
    room = max(_LEAST_NAME, _width(column) - excess)
    cells = [
        cell if cell_len(cell) <= room else f"…{_tail(cell, room - 1)}" for cell in column.cells
    ]
    return Column(column.key, column.title, column.interest, cells, column.levels, column.left)


def _tail(text: str, room: int) -> str:
    while cell_len(text) > room:
        text = text[1:]
    return text


def _verdict(report: Report, width: int | None) -> list[Text]:
    style = _VERDICTS[report.verdict]
    top = Text(_INDENT).append(f"{report.verdict.upper()}  ", style=f"bold {style}")
    rows = below.verdict_lines(report)
    label = max(len(row.label) for row in rows)
    status = max(cell_len(_status(row)) for row in rows)
    lines = _hanging(top, words.headline(report), width, "bold")
    for row in rows:
        head = Text(f"{_INDENT}{row.label:<{label}}  ")
        head.append(f"{_status(row):<{status}}  ", style=_STYLES[row.level])
        lines += _hanging(
            head, row.text + (f"   {row.code}" if row.code not in ("", row.label) else ""), width
        )
    return lines


def _replay(report: Report, width: int | None, all_rows: bool) -> list[Text]:
    """The replay of a flight: the sentence, the table of its batches, what stands out in them."""
    if report.replay is None:
        return []
    lines = [
        Text(),
        *_hanging(Text(f"{_INDENT}Replay  ", style="bold"), report.replay.sentence, width),
    ]
    for place, row in enumerate(table_lines(replay_table(report.replay, all_rows=all_rows))):
        lines.append(Text(_INDENT * 2 + row, style="" if place else "dim"))
    for line in lines[2:]:
        if width is not None:
            line.truncate(width, overflow="ellipsis")
    for fact in replay_facts(report.replay):
        lines += _hanging(Text(f"{_INDENT}– "), fact, width, "dim")
    return lines


def _status(row: below.Line) -> str:
    return " ".join(part for part in (row.status, SIGNS[row.level]) if part)


def _closing(report: Report, width: int | None) -> list[Text]:
    lines = []
    for place, advice in enumerate(below.to_do(report)):
        head = Text(f"{_INDENT}{'What to do' if place == 0 else '':<10}   ", style="bold")
        lines += _hanging(head, advice, width)
    command = report.settings.get("command")
    spent = below.cost(report) + (f"   again: {command}" if command else "")
    return lines + _hanging(Text(f"{_INDENT}{'Cost':<10}   ", style="bold"), spent, width)


def _hanging(head: Text, body: str, width: int | None, style: str = "") -> list[Text]:
    """Sets a body behind its head; where there is a width, wrapped under its own beginning."""
    if width is None:
        return [head + _prose(body, style)]
    if width - head.cell_len < _LEAST_PROSE and head.cell_len > len(_DEEPER):
        heads = [head] if head.plain.strip() else []
        return [
            *heads,
            *(Text(_DEEPER) + _prose(part, style) for part in _wrapped(body, width - len(_DEEPER))),
        ]
    first, *others = _wrapped(body, width - head.cell_len)
    indent = Text(" " * head.cell_len)
    return [head + _prose(first, style), *(indent + _prose(part, style) for part in others)]


def _prose(text: str, style: str) -> Text:
    line = Text(text.replace(below.TIED, " "), style=style)
    line.highlight_regex(r"JD\d{3}|again: .*", "dim")
    return line


def _pieces(word: str, room: int) -> list[str]:
    return chop_cells(word, room) if cell_len(word) > room > 1 else [word]


def _wrapped(text: str, room: int) -> list[str]:
    """Breaks at plain spaces only (`below.TIED` is none), and inside a word that has no room on any
    line.
    """
    lines = [""]
    for word in (piece for whole in text.split(" ") for piece in _pieces(whole, room)):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) > room and lines[-1].strip():
            lines.append(word)
        else:
            lines[-1] = joined
    return [line.rstrip() for line in lines]
