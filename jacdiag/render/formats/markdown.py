"""The view of a report as Markdown, for a pull request's comment or a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jacdiag.records import Report
from jacdiag.render.content.severity import SIGNS
from jacdiag.render.content.sublayer_table import Grid, SublayerColumn, explain_marks
from jacdiag.render.view import CostView, ReplayView, VerdictView, build_view

_SIGNS = {"pass": "✓", "warn": "▲", "fail": "●", "unknown": "?", "observed": "·"}
_SPECIAL = "\\|*_~<&[`$"


def render(report: Report, *, all_rows: bool = False, sort: str = "depth") -> str:
    """Return a report as GitHub-flavoured Markdown: heading, table, verdict, what to do, cost.

    Args:
        report: any report.
        all_rows: show every sub-layer; else long models are folded.
        sort: "depth" or "worst".

    Example:
        >>> print(render(report))                                 # doctest: +SKIP
    """
    view = build_view(report, all_rows=all_rows, sort=sort)
    verdict = view.verdict
    sections = [
        f"### {_SIGNS[verdict.word]} {verdict.word.upper()}: {escaped(verdict.headline)}",
        "\n".join(escaped(" · ".join(line)) + "  " for line in view.header.lines),
        _table(view.rows),
        bullets(filter(None, [explain_marks(view.rows, view.rows.columns), *view.notes])),
        _verdict(verdict),
        _replay(view.replay),
        "**What to do**\n\n" + bullets(view.actions),
        f"**Next** {as_code(view.next_step.command)} {escaped(view.next_step.purpose)}",
        _cost(view.cost),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escaped(text: str) -> str:
    """Return a text in which no character has a meaning in Markdown: a name may hold any of them.

    >>> escaped("h.*.attn  a|b")
    'h.\\\\*.attn a\\\\|b'
    """
    # The backslash is first: later ones are escapes.
    for sign in _SPECIAL:
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())  # on one line


def bullets(texts: Iterable[str]) -> str:
    """Return a list with one item per text."""
    return "\n".join(f"- {escaped(text)}" for text in texts)


def table_row(cells: Iterable[str]) -> str:
    """Return a row of a table; its cells are escaped."""
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def _table(grid: Grid) -> str:
    """Return the table of sub-layers, with a line for each fold."""
    # 1. The titles.
    columns = grid.columns
    lines = [
        table_row(column.title for column in columns),
        _rule_of(map(_alignment, columns)),
    ]

    # 2. The rows. A fold may also stand below the last one.
    for place in range(len(grid.rows) + 1):
        if place in grid.gaps:
            empty_cells = " |" * (len(columns) - 2)
            lines.append(f"| | *{grid.gaps[place].text}* |{empty_cells}")
        if place < len(grid.rows):
            lines.append(table_row(_cell(column, place) for column in columns))
    return "\n".join(lines)


def _alignment(column: SublayerColumn) -> str:
    """Return how Markdown aligns a column."""
    if not column.left:
        return "---:"
    return ":---"


def _cell(column: SublayerColumn, place: int) -> str:
    """Return a cell with its mark."""
    sign = SIGNS[column.levels[place]]
    return f"{column.cells[place].strip()} {sign}".strip()


def _rule_of(alignments: Iterable[str]) -> str:
    """Return the line below the titles of a table."""
    return "|" + "|".join(alignments) + "|"


def _verdict(verdict: VerdictView) -> str:
    """Return the lines of the verdict as a table without titles."""
    rows = ["| | | |", "|:---|:---|:---|"]
    for line in verdict.lines:
        status = f"{line.status} {SIGNS[line.level]}".strip()
        # The rule's code is set as code: nothing in it needs an escape.
        code = ""
        if line.code:
            code = f" `{line.code}`"
        label = ""
        if line.label:
            label = f"**{escaped(line.label)}**"
        rows.append(f"| {label} | {status} | {escaped(line.text)}{code} |")
    return "\n".join(rows)


def _replay(replay: ReplayView | None) -> str:
    """Return the replay of a flight: the sentence, the table of its batches, what stands out."""
    if replay is None:
        return ""
    names: Sequence[str] = replay.table.header
    rows = [
        table_row(names),
        _rule_of([":---"] + ["---:"] * (len(names) - 1)),
        *(table_row(row) for row in replay.table.rows),
    ]
    sentence = f"**Replay** {escaped(replay.sentence)}"
    return "\n\n".join([sentence, "\n".join(rows), bullets(replay.facts)])


def _cost(cost: CostView) -> str:
    """Return the cost, and the command that runs the audit again."""
    text = f"**Cost** {escaped(cost.text)}"
    if not cost.command:
        return text  # the library was called
    return f"{text} · again: {as_code(cost.command)}"


def as_code(text: str) -> str:
    """Return a text set as code; two quotes around it let it hold one."""
    if "`" in text:
        return f"`` {text} ``"
    return f"`{text}`"
