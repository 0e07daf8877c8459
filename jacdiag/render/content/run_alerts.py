"""Tell alerts about a run from the report on the model that its first probe made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jacdiag.records.run_log import RunLog

_LIVE = "JD5"
_RATE = "JD105"  # about the learning rate, whatever the step


def is_of_report(row: Mapping[str, Any]) -> bool:
    """Return whether a line is a finding of the audit on the model.

    Otherwise it is an alert of a live rule about the run.
    """
    code = str(row.get("code", ""))
    return not code.startswith(_LIVE) and code != _RATE


def report_at_start(run: RunLog) -> list[dict[str, Any]]:
    """Return the findings of the first probe's report, the most severe first.

    A line holds step, code, level, what and where.

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
