"""What a baseline holds for a weight that a rule of the init contract names.

Such a rule compares a weight with a scheme, and JD110 compares it with the baseline. Where both
name a weight, a reader meets two values to go back to. So the finding says what the baseline has.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jacdiag.records import FiguresRecord, Finding, Report
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.regression import MovedFigure, weight_changes

_CODES = ("JD202", "JD203", "JD204", "JD205")  # compare the std of a weight with a scheme


def with_baseline_values(findings: Iterable[Finding], report: Report) -> list[Finding]:
    """Return findings in which those about a scheme say what the baseline holds.

    Args:
        findings: of the rules on a report.
        report: with the figures of the baseline, if there is one.
    """
    # 1. Without a baseline there is no second value. An earlier model is none.
    current, before = report.figures, report.baseline
    if current is None or before is None or report.against is not None:
        return list(findings)

    # 2. Add what it holds.
    moved = {change.where: change for change in weight_changes(current, before)}
    added = []
    for finding in findings:
        words = ""
        if finding.code in _CODES:
            words = _baseline_words(finding, before, moved)
        added.append(replace(finding, what=finding.what + words))
    return added


def _baseline_words(finding: Finding, before: FiguresRecord, moved: dict[str, MovedFigure]) -> str:
    """Return what the baseline holds for the weights of a finding, as the end of its sentence.

    Args:
        finding: about weights that differ from a scheme.
        before: the figures of the baseline.
        moved: weights that differ from the baseline, by name.
    """
    # 1. The weights that the baseline knows.
    known = []
    for name in finding.evidence.get("parameters", ()):
        if name in before.weights:
            known.append(str(name))
    if not known:
        return ""

    # 2. All of them are as they were.
    changed = [name for name in known if name in moved]
    if not changed:
        return "; the baseline has the same std"

    # 3. What the first of them was.
    first = moved[changed[0]]
    return f"; the baseline has {first.figure} {plain(first.old)} (JD110 compares with that)"
