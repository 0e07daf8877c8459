"""What an audit shows while it measures: how the conditions come out as far as that is known."""

from __future__ import annotations

from jacdiag.records import Report
from jacdiag.render.content.sentences import (
    condition,
    headline,
    judged_sublayers,
    judged_words,
    status_words,
)

_NAMES = {"JD102": "large shortcut", "JD101": "small sub-layers"}


def first_look_lines(report: Report) -> list[str]:
    """Return the lines that are shown below the progress bar.

    Args:
        report: judged; its norms are wide, or not measured yet.

    Returns:
        The headline of the report once norms were measured. Before that, the condition that one
        forward decides, if it was decided.
    """
    has_norms = any(record.branch_norm is not None for record in report.sublayers)
    if has_norms:
        return [f"first look: {headline(report)}", "the intervals become narrower now"]

    # Without norms only the shortcut can be known.
    status = condition(report, "JD102")
    if status in ("unknown", "not selected"):
        return []
    judged = judged_words(judged_sublayers(report, "JD102"))
    shortcut = f"{_NAMES['JD102']} {status_words(status)}{judged}"
    return [f"first look: {shortcut}; {_NAMES['JD101']} not measured yet"]
