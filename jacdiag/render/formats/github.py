"""Workflow commands of GitHub Actions: one annotation per rule, at the class of the module that it
speaks of.
"""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.render.formats.grouped_findings import (
    Note,
    counted,
    failing,
    notes,
    outcome,
    reservations,
)

_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


def render(report: Report) -> str:
    """Annotations, then a plain line for the log. A step shows ten of each kind: there is one per
    rule.

    Example:
        >>> print(render(report))                                 # doctest: +SKIP
        ::error file=model.py,line=118,title=JD203 depth-scaling::h.*.mlp.c_proj (12 of 12)...
    """
    fatal = {n.code for n in failing(report)}
    lines = [_command(note, note.code in fatal) for note in notes(report)]
    command = "gate" if "gate" in report.settings else "audit"
    summary = "; ".join([counted(report), *reservations(report)])
    return "\n".join([*lines, f"{command}: {outcome(report)}: {summary}"]) + "\n"


def _command(note: Note, fatal: bool) -> str:
    where = f"file={_property(note.file)},line={note.line}," if note.file else ""
    kind = "error" if fatal else _COMMANDS[note.level]
    fix = f"\n{note.fix}" if note.fix else ""
    return (
        f"::{kind} {where}title={_property(f'{note.code} {note.name}')}::{_data(note.text + fix)}"
    )


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
