"""What the gate says on a terminal."""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.render.formats.grouped_findings import (
    accepting,
    counted,
    failing,
    not_applicable,
    notes,
    outcome,
    reservations,
)
from jacdiag.render.terminal.sentences import legible, source_name, why_state

_SIGNS = {"error": "✗", "warning": "▲", "info": "·"}


def render(report: Report) -> str:
    """The gate's screen: a line per finding, what was clean, the verdict with its price.

    Example:
        >>> print(render(report))                                 # doctest: +SKIP
        ✗ JD203 depth-scaling    h.*.mlp.c_proj (12 of 12): std 0.0200, the scheme of the rest ...
        model.py:118 ✓ 11 rules clean, 2 not applicable gate: FAIL in 31 s
    """
    report = legible(report)
    about = report.settings.get("gate", {})
    fatal = {n.code for n in failing(report)}
    lines = []
    for note in notes(report):
        sign = "✗" if note.code in fatal else _SIGNS[note.level]
        first, *others = note.text.splitlines()
        place = f"   {note.place}" if note.place else ""
        lines.append(f"{sign} {note.code} {note.name:<18} {first}{place}")
        lines += [f"{'':27}{line}" for line in others]
        if note.fix and note.code in fatal:
            lines.append(f"{'':27}try: {note.fix}")
    lines.append(f"✓ {counted(report)}{_baseline(report)}")
    lines += [f"  {line}" for line in [*reservations(report), *not_applicable(report)]]
    lines += [f"  state: {line}" for line in [why_state(report)] if line]
    lines += [f"  note: {line}" for line in report.notes]
    command = accepting(report)
    if command:
        lines.append(f"  accept the new figures: {command}")
    seeds = int(about.get("seeds", 1))
    over = f" over {seeds} seeds" if seeds > 1 else ""
    lines.append(
        f"gate: {outcome(report)}{over} in {float(about.get('seconds', 0)):.3g} s  "
        f"({source_name(report)})"
    )
    return "\n".join(lines) + "\n"


def _baseline(report: Report) -> str:
    if report.baseline is None:
        return ""
    return f"   against the baseline of {report.baseline.created[:10] or 'an unknown day'}"
