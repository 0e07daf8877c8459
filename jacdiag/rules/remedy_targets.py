"""Which findings remedies are tried against, and the figures that a remedy is judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from jacdiag.records import Finding, Report
from jacdiag.records.remedy import Outlook, RemedyRecord

_CONDITIONS = ("JD101", "JD102", "JD103", "JD104", "JD105")


def outlook(report: Report) -> Outlook:
    """Return the figures of a report that a remedy is judged by."""
    return Outlook(
        branch_norm=_worst(report, "branch_norm"),
        core_norm=_worst(report, "core_norm"),
        norm_gain=max(
            (_gain(row.norm_gain) for row in report.sublayers if row.norm_gain is not None),
            default=None,
        ),
        small_sublayers=report.conditions.small_sublayers,
        large_shortcut=report.conditions.large_shortcut,
        verdict=report.verdict,
        fired=list(dict.fromkeys(f.code for f in report.findings if f.level != "info")),
        undecided=[r.code for r in report.rules if r.status == "unknown"],
    )


def aims(report: Report) -> list[str]:
    """Return the rules that a remedy is looked for.

    They are the conditions, the contract and the baseline, at warning or above.
    """
    codes = dict.fromkeys(f.code for f in report.findings if f.level != "info")
    return [code for code in codes if code in (*_CONDITIONS, "JD110") or code.startswith("JD2")]


def with_fixes(findings: Iterable[Finding], remedies: Iterable[RemedyRecord]) -> list[Finding]:
    """Return the findings, with the recommended remedy as the verified fix of some.

    It is the fix of those that it answers.

    Args:
        findings: of a report.
        remedies: that were tried against them.
    """
    # 1. The remedy that is recommended, if there is one.
    best = next((remedy for remedy in remedies if remedy.recommended), None)
    if best is None:
        return list(findings)

    # 2. It answers findings at warning and above.
    with_fix = []
    for finding in findings:
        is_answered = finding.code in best.codes and finding.level != "info"
        if is_answered:
            finding = replace(finding, fix=best.title, verified=True)
        with_fix.append(finding)

    return with_fix


def _worst(report: Report, name: str) -> list[float] | None:
    """Return the largest lower and the largest upper end of a figure; None if it has none."""
    lowers = []
    uppers = []
    for row in report.sublayers:
        interval = getattr(row, name)
        if interval is not None:
            lowers.append(interval.lower)
            uppers.append(interval.upper)

    if not lowers:
        return None

    return [max(lowers), max(uppers)]


def _gain(interval: Any) -> float:
    return float(interval.per_token.p99 if interval.per_token is not None else interval.estimate)
