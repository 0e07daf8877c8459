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
    # 1. What the log lists.
    if run.findings:
        return sorted(run.findings, key=_errors_first)
    if not run.probes:
        return []

    # 2. What the report holds, or what an older log repeated as alerts.
    rows = _findings_in_report(run.probes[0])
    if rows is None:
        rows = [row for row in run.alerts if _repeats_report(row, run)]

    # 3. Observations are no news at the start.
    to_report = [row for row in rows if row.get("level") != "info"]
    return sorted(to_report, key=_errors_first)


def _errors_first(row: Mapping[str, Any]) -> tuple[bool, str]:
    """Return the key that sorts errors to the front, and lines of one level by code."""
    return row.get("level") != "error", str(row.get("code"))


def _findings_in_report(probe: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the findings about the model in a probe's report; None if there is no report."""
    report = probe.get("report") or {}
    findings = report.get("findings")
    if findings is None:
        return None

    about_model = []
    for finding in findings:
        # JD9xx is about the measurement, not about the model.
        if finding.get("code", "") < "JD900":
            about_model.append({**finding, "step": probe["step"]})
    return about_model


def alerts_of_run(run: RunLog) -> list[dict[str, Any]]:
    """Return the alerts without those that repeat the first probe's report."""
    return [row for row in run.alerts if not _repeats_report(row, run)]


def _repeats_report(row: Mapping[str, Any], run: RunLog) -> bool:
    """Return whether an alert repeats a finding of the first probe's report."""
    if not is_of_report(row):
        return False
    start = None
    if run.probes:
        start = run.probes[0]["step"]
    return bool(row.get("step") == start)
