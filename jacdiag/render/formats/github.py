"""Workflow commands of GitHub Actions: one annotation per rule, where the weight is drawn."""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.render.content.grouped_findings import Note, build_gate_view

_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


def render(report: Report) -> str:
    """Return annotations, then a plain line for the log.

    A step shows ten annotations of each kind: there is one per rule.

    Args:
        report: of `jacdiag gate` or of an audit.

    Example:
        >>> print(render(report))                                 # doctest: +SKIP
        ::error file=model.py,line=118,title=JD203 depth-scaling::h.*.mlp.c_proj (12 of 12)...
        gate: FAIL: 11 rules clean, 2 not applicable
    """
    gate = build_gate_view(report)
    lines = [_annotation(note) for note in gate.notes]
    summary = "; ".join([gate.counted, *gate.reservations])
    lines.append(f"{gate.command}: {gate.outcome}: {summary}")
    return "\n".join(lines) + "\n"


def _annotation(note: Note) -> str:
    """Return the workflow command of one rule."""
    # 1. How severe it is. What fails the gate is an error, whatever its level.
    kind = _COMMANDS[note.level]
    if note.fails:
        kind = "error"

    # 2. Where it is shown, if that is known.
    where = ""
    if note.file:
        where = f"file={_property(note.file)},"
        if note.line is not None:
            where += f"line={note.line},"

    # 3. What it says, what to do, and what is marked if it is not the weight's own line.
    title = _property(f"{note.code} {note.name}")
    lines = [note.text, *note.advice]
    if note.shown_at:
        lines.append(f"shown at {note.shown_at}")
    text = "\n".join(lines)
    return f"::{kind} {where}title={title}::{_data(text)}"


def _data(text: str) -> str:
    """Return a message as a workflow command holds it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """Return a property of a workflow command, in which commas and colons separate."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
