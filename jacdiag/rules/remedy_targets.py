"""Which findings remedies are tried against, and the figures that a remedy is judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from jacdiag.records import Finding, JudgedSublayers, Report
from jacdiag.records.remedy import Outlook, RemedyRecord

_CONDITIONS = ("JD101", "JD102", "JD103", "JD104", "JD105")


def outlook(report: Report) -> Outlook:
    """Return the figures of a report that a remedy is judged by."""
    undecided = [result.code for result in report.rules if result.status == "unknown"]
    return Outlook(
        branch_norm=_worst(report, "branch_norm"),
        core_norm=_worst(report, "core_norm"),
        norm_gain=_largest_gain(report),
        small_sublayers=report.conditions.small_sublayers,
        large_shortcut=report.conditions.large_shortcut,
        small_sublayers_judged=_counts(report.conditions.small_sublayers_judged),
        large_shortcut_judged=_counts(report.conditions.large_shortcut_judged),
        verdict=report.verdict,
        fired=_codes_that_fired(report),
        undecided=undecided,
    )


def _counts(judged: JudgedSublayers | None) -> JudgedSublayers | None:
    """Return at how many sub-layers a condition was judged, without their names."""
    if judged is None:
        return None
    return judged.without_names()


def _codes_that_fired(report: Report) -> list[str]:
    """Return the rules that fired at warning or above, each once."""
    findings = [finding for finding in report.findings if finding.level != "info"]
    return list(dict.fromkeys(finding.code for finding in findings))


def aims(report: Report) -> list[str]:
    """Return the rules that a remedy is looked for.

    They are the conditions, the contract and the baseline, at warning or above.
    """
    fired = _codes_that_fired(report)
    return list(filter(_is_aim, fired))


def _is_aim(code: str) -> bool:
    """Return whether a remedy may help against a rule."""
    is_of_contract = code.startswith("JD2")
    return is_of_contract or code in (*_CONDITIONS, "JD110")


def with_fixes(findings: Iterable[Finding], remedies: Iterable[RemedyRecord]) -> list[Finding]:
    """Return the findings, with the recommended remedy as the verified fix of some.

    It is the fix of those that it answers.

    Args:
        findings: of a report.
        remedies: that were tried against them.
    """
    # 1. The remedy that is recommended, if there is one.
    recommended = [remedy for remedy in remedies if remedy.recommended]
    if not recommended:
        return list(findings)
    best = recommended[0]

    # 2. It answers findings at warning and above.
    with_fix: list[Finding] = []
    for finding in findings:
        is_answered = finding.code in best.codes and finding.level != "info"
        if is_answered:
            finding = replace(finding, fix=best.title, verified=True)
        with_fix.append(finding)

    return with_fix


def _worst(report: Report, name: str) -> list[float] | None:
    """Return the largest lower and the largest upper end of a figure; None if it has none."""
    # 1. The ends of each sub-layer. A norm whose replay differs does not count.
    lowers = []
    uppers = []
    for row in report.sublayers:
        interval = getattr(row, name)
        is_trusted = row.name not in report.distrusted
        if interval is not None and is_trusted:
            lowers.append(interval.lower)
            uppers.append(interval.upper)

    # 2. A figure that was measured nowhere has no worst value.
    if not lowers:
        return None

    # 3. The two may be of different sub-layers.
    return [max(lowers), max(uppers)]


def _largest_gain(report: Report) -> float | None:
    """Return the largest gain of a norm on the stream; None if none was measured."""
    gains = [row.norm_gain for row in report.sublayers if row.norm_gain is not None]
    return max(map(_gain, gains), default=None)


def _gain(interval: Any) -> float:
    """Return the gain at nearly the worst token, if tokens were kept."""
    if interval.per_token is None:
        return float(interval.estimate)
    return float(interval.per_token.p99)
