"""Which alerts of a run are about the run, and which are the report on the model that the first
probe made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jacdiag.records.run_log import RunLog

_LIVE = "JD5"
_RATE = "JD105"  # about the learning rate, whatever the step


def is_of_report(row: Mapping[str, Any]) -> bool:
    """Return whether a line is what a rule of the audit says of the model, rather than a live rule
    of the run.
    """
    code = str(row.get("code", ""))
    return not code.startswith(_LIVE) and code != _RATE


def report_at_start(run: RunLog) -> list[dict[str, Any]]:
    """Return what the first probe's report says: lines with step, code, level, what and where;
    louder ones first.

    The lines `finding` of the log are taken, else the findings of the report itself, else the
    alerts of an older log.
    """
    lines = run.findings
    if lines:
        return sorted(lines, key=lambda row: (row.get("level") != "error", str(row.get("code"))))
    if not run.probes:
        return []
    first = run.probes[0]
    findings = (first.get("report") or {}).get("findings")
    if findings is not None:
        rows = [
            {**finding, "step": first["step"]}
            for finding in findings
            if finding.get("code", "") < "JD900"
        ]
    else:
        rows = [row for row in run.alerts if is_of_report(row) and row.get("step") == first["step"]]
    rows = [row for row in rows if row.get("level") != "info"]
    return sorted(rows, key=lambda row: (row.get("level") != "error", str(row.get("code"))))


def alerts_of_run(run: RunLog) -> list[dict[str, Any]]:
    """Return the alerts without those that repeat the first probe's report."""
    start = run.probes[0]["step"] if run.probes else None
    return [row for row in run.alerts if not (is_of_report(row) and row.get("step") == start)]
