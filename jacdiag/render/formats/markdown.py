"""The same screen as Markdown, for a pull request's comment or a notebook."""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.render.terminal import sentences as words
from jacdiag.render.terminal import verdict as lines
from jacdiag.render.terminal.columns import Grid, build
from jacdiag.render.terminal.flight_replay import replay_facts, replay_table
from jacdiag.render.terminal.severity import SIGNS

_SIGNS = {"pass": "✓", "warn": "▲", "fail": "●", "unknown": "?", "observed": "·"}


def render(report: Report, *, all_rows: bool = False, sort: str = "depth") -> str:
    """Renders a report as GitHub-flavoured Markdown: heading, table, verdict by condition, what to
    do, cost.

    Args:
        report: any report.
        all_rows: show every sub-layer, where long models are folded otherwise.
        sort: "depth" or "worst".

    Example:
        >>> print(render(report))                                 # doctest: +SKIP
    """
    report = words.legible(report)
    parts = [
        f"### {_SIGNS[report.verdict]} {report.verdict.upper()}: {_safe(words.headline(report))}",
        "\n".join(_safe(" · ".join(line)) + "  " for line in words.header(report)),
        _table(build(report, all_rows=all_rows, sort=sort)),
        _bullets(lines.footnotes(report)),
        _verdict(report),
        _replay(report, all_rows=all_rows),
        "**What to do**\n\n" + _bullets(lines.to_do(report)),
        _closing(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(grid: Grid) -> str:
    columns = grid.columns
    rows = [
        "| " + " | ".join(_safe(column.title) for column in columns) + " |",
        "|" + "|".join(":---" if column.left else "---:" for column in columns) + "|",
    ]
    for place in range(len(grid.rows) + 1):
        if place in grid.gaps:
            rows.append(f"| | *{grid.gaps[place].text}* |" + " |" * (len(columns) - 2))
        if place < len(grid.rows):
            cells = [
                f"{column.cells[place].strip()} {SIGNS[column.levels[place]]}".strip()
                for column in columns
            ]
            rows.append("| " + " | ".join(_safe(cell) for cell in cells) + " |")
    return "\n".join(rows)


def _verdict(report: Report) -> str:
    rows = ["| | | |", "|:---|:---|:---|"]
    for line in lines.verdict_lines(report):
        status = " ".join(part for part in (line.status, SIGNS[line.level]) if part)
        code = f" `{line.code}`" if line.code else ""
        rows.append(f"| **{_safe(line.label)}** | {status} | {_safe(line.text)}{code} |")
    return "\n".join(rows)


def _replay(report: Report, *, all_rows: bool) -> str:
    """The replay of a flight: the sentence, the table of its batches, what stands out in them."""
    if report.replay is None:
        return ""
    table = replay_table(report.replay, all_rows=all_rows)
    rows = ["| " + " | ".join(map(_safe, row)) + " |" for row in [table.header, *table.rows]]
    rows.insert(1, "|:---|" + "---:|" * (len(table.header) - 1))
    sentence = f"**Replay** {_safe(report.replay.sentence)}"
    return "\n\n".join([sentence, "\n".join(rows), _bullets(replay_facts(report.replay))])


def _closing(report: Report) -> str:
    command = report.settings.get("command")
    fence = "``" if command and "`" in command else "`"
    space = " " * (len(fence) - 1)
    again = f" · again: {fence}{space}{command}{space}{fence}" if command else ""
    return f"**Cost** {_safe(lines.cost(report))}{again}"


def _bullets(texts: list[str]) -> str:
    return "\n".join(f"- {_safe(text)}" for text in texts)


def _safe(text: str) -> str:
    """Takes the meaning out of characters that Markdown would read: a name may hold any of them."""
    for sign in "\\|*_~<&[`$":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
