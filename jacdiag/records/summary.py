"""A report in a few lines: what `print(report)` shows."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jacdiag.records.report import Finding, Report

_NAMED = 3  # sub-layers or parameters that a finding lists before it counts the rest


def source_name(report: Report) -> str:
    """Return a short name of what was audited."""
    source = report.source
    named = report.settings.get("name") or source.get("name") or source.get("factory")
    return str(named or PurePath(str(source.get("path", "model"))).name)


def summary(report: Report) -> str:
    """Return the lines that `print(report)` shows.

    Args:
        report: of either tier and state.
    """
    model = report.model
    size = f"{_counted(model.layers, 'layer')}, {_counted(len(report.sublayers), 'sub-layer')}"
    lines = [
        (
            f"{type(report).__name__} of {source_name(report)} ({report.state or 'state unknown'}, "
            f"{report.tier})"
        ),
        f"  model     {model.name or 'unnamed'}, {size}, {model.parameters:,} parameters",
        f"  verdict   {report.verdict}",
    ]
    if worst := _worst(report):
        lines.append(f"  worst     {worst}")

    # One line for each rule that fired, the loudest first, as the report orders them.
    by_code: dict[str, list[Finding]] = {}
    for finding in report.findings:
        by_code.setdefault(finding.code, []).append(finding)
    lines += [f"  {code}     {_findings(group)}" for code, group in by_code.items()]
    if not by_code:
        lines.append("  findings  none")

    lines.append("  more      report.table(), report.findings, report.to_json()")
    return "\n".join(_printable(line) for line in lines)


def _printable(line: str) -> str:
    """Replace what is no printable character: names come out of files that somebody else made."""
    return "".join(sign if sign.isprintable() else " " for sign in line)


def _worst(report: Report) -> str:
    """Return the largest branch norm with its interval; of weights alone, the largest bound."""
    measured = [
        (row.branch_norm, row.name) for row in report.sublayers if row.branch_norm is not None
    ]
    finite = [(norm, name) for norm, name in measured if math.isfinite(norm.estimate)]
    if finite:
        norm, name = max(finite, key=lambda pair: pair[0].estimate)
        return f"branch norm {norm} at {name}"

    bounds = [
        (row.bound, row.name)
        for row in report.sublayers
        if row.bound is not None and math.isfinite(row.bound)
    ]
    if bounds:
        bound, name = max(bounds)
        return f"bound {bound:.3g} at {name}"
    return ""


def _findings(group: list[Finding]) -> str:
    """Return the level of a rule's findings and where they are."""
    levels = ", ".join(dict.fromkeys(finding.level for finding in group))
    where = list(dict.fromkeys(name for finding in group for name in finding.where))
    if not where:
        return levels
    more = f" and {len(where) - _NAMED} more" if len(where) > _NAMED else ""
    return f"{levels} at {', '.join(where[:_NAMED])}{more}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
