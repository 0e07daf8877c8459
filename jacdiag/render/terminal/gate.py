"""The gate's result on a terminal."""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.render.content.grouped_findings import GateView, Note
from jacdiag.render.view import build_view

_SIGNS = {"error": "✗", "warning": "▲", "info": "·"}
_INDENT = " " * 27  # below the first line of a note's text


def render(report: Report) -> str:
    """Return the gate's screen: a line per finding, what was clean, the outcome, the next command.

    Args:
        report: of `jacdiag gate`.

    Example:
        >>> print(render(report))                                 # doctest: +SKIP
        ✗ JD203 depth-scaling    h.*.mlp.c_proj (12 of 12): std 0.0200, the scheme of the rest ...
        model.py:118 ✓ 11 rules clean, 2 not applicable gate: FAIL in 31 s
    """
    view = build_view(report)
    gate = view.gate

    # 1. What was found.
    lines: list[str] = []
    for note in gate.notes:
        lines += _note_lines(note)
    lines.append(f"✓ {gate.counted}{_baseline(gate)}")

    # 2. What the outcome does not say by itself.
    remarks = [*gate.reservations, *gate.not_applicable]
    if view.header.why_state:
        remarks.append(f"state: {view.header.why_state}")
    remarks += [f"note: {note}" for note in view.report_notes]
    if gate.accept:
        remarks.append(f"accept the new figures: {gate.accept}")
    lines += [f"  {remark}" for remark in remarks]

    # 3. The outcome.
    over = ""
    if gate.seeds > 1:
        over = f" over {gate.seeds} seeds"
    seconds = gate.seconds or 0.0
    lines.append(f"gate: {gate.outcome}{over} in {seconds:.3g} s  ({view.header.name})")
    lines.append(f"next: {view.next_step.text}")
    return "\n".join(lines) + "\n"


def _note_lines(note: Note) -> list[str]:
    """Return the lines of one rule: its sentences, and a remedy if the gate fails by it."""
    # 1. The first line, with the place in the repository.
    sign = _SIGNS[note.level]
    if note.fails:
        sign = "✗"
    place = ""
    if note.place:
        place = f"   {note.place}"
    first, *others = note.text.splitlines()
    lines = [f"{sign} {note.code} {note.name:<18} {first}{place}"]

    # 2. What stands below it.
    if note.fix and note.fails:
        others.append(f"try: {note.fix}")
    lines += [f"{_INDENT}{line}" for line in others]
    return lines


def _baseline(gate: GateView) -> str:
    """Return the day of the baseline, "" without one."""
    day = gate.baseline_day
    if day is None:
        return ""
    return f"   against the baseline of {day or 'an unknown day'}"
