"""The gate's result as the comment of a pull request."""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.records.number_format import three
from jacdiag.render.content.grouped_findings import FigureChange, Note
from jacdiag.render.content.sentences import plural
from jacdiag.render.formats.markdown import as_code, bullets, escaped
from jacdiag.render.view import ReportView, build_view

_SIGNS = {"PASS": "✓", "FAIL": "✗", "UNDECIDED": "?"}
_LEVEL_SIGNS = {"error": "●", "warning": "▲", "info": "·"}
_ROWS = 20


def render(report: Report) -> str:
    """Return GitHub-flavoured Markdown: the verdict, a row per rule, changes, how to accept them.

    Args:
        report: of `jacdiag gate` or of an audit.
    """
    view = build_view(report)
    gate = view.gate
    sections = [
        f"### {_SIGNS.get(gate.outcome, '·')} jacdiag {gate.command}: {gate.outcome}",
        _subject(view),
        _findings(gate.notes),
        _changes(gate.changes),
        f"{gate.counted}.",
        bullets([*gate.reservations, *gate.not_applicable, *view.report_notes]),
    ]
    if view.remedies:
        sections.append("**What to do**\n\n" + bullets(view.remedies))
    step = view.next_step
    sections.append(f"**Next** {as_code(step.command)} {escaped(step.purpose)}")
    if gate.accept:
        command = gate.accept.replace("```", "")
        sections.append(f"To accept the new figures, run and commit:\n\n```sh\n{command}\n```")
    return "\n\n".join(section for section in sections if section) + "\n"


def _subject(view: ReportView) -> str:
    """Return what was audited, and over how many seeds."""
    header = view.header
    seeds = plural(view.gate.seeds, "seed")
    return f"{escaped(header.name)} · {escaped(header.model)} · {seeds}"


def _findings(notes: list[Note]) -> str:
    """Return a table with a row for each rule that fired."""
    if not notes:
        return ""
    rows = ["| | rule | finding | where |", "|:---|:---|:---|:---|"]
    rows += map(_finding_row, notes)
    return "\n".join(rows)


def _finding_row(note: Note) -> str:
    """Return the row of one rule."""
    sign = _LEVEL_SIGNS[note.level]
    if note.fails:
        sign = "✗"
    # A cell has one line: <br> stands between its sentences.
    text = "<br>".join(map(escaped, note.text.splitlines()))
    return f"| {sign} | {note.code} {note.name} | {text} | {escaped(note.place)} |"


def _changes(changes: list[FigureChange]) -> str:
    """Return a table of the figures that differ from the baseline."""
    if not changes:
        return ""

    # A change of the init may change hundreds of figures: the first ones stand for all.
    rows = ["| changed | figure | old | new |", "|:---|:---|---:|---:|"]
    for change in changes[:_ROWS]:
        old, new = three(change.old), three(change.new)
        rows.append(f"| {escaped(change.where)} | {change.field} | {old} | {new} |")
    beyond = len(changes) - _ROWS
    if beyond > 0:
        rows.append(f"| *{beyond} more* | | | |")
    return "\n".join(rows)
