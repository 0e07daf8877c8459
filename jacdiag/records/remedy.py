"""A change to a model that was tried on a copy, as plain data: what it is, what it did, its price,
how to make it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jacdiag.records.base import Record

if TYPE_CHECKING:
    from jacdiag.records.report import Finding, Report


_CONDITIONS = ("JD101", "JD102", "JD103", "JD104", "JD105")


@dataclass(frozen=True)
class Outlook(Record):
    """The figures that a remedy is judged by, each the worst over all sub-layers.

    Attributes:
        branch_norm, core_norm: [lower, upper] of the sub-layer with the largest upper end; None
            where not measured.
        norm_gain: 1 / sigma_x, the 99th percentile over tokens.
        small_sublayers, large_shortcut: the two conditions.
        verdict: of the report that the figures come from.
        fired: codes of the rules that found something at warning or above.
        undecided: codes of the rules that stayed unknown.
    """

    branch_norm: list[float] | None = None
    core_norm: list[float] | None = None
    norm_gain: float | None = None
    small_sublayers: str = "unknown"
    large_shortcut: str = "unknown"
    verdict: str = "unknown"
    fired: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RemedyRecord(Record):
    """One remedy, as it was tried.

    Attributes:
        name: short, such as "scaled-embed" or "scaled-embed + depth-scaling".
        title: what is done, in words.
        codes: the rules whose findings it was tried against.
        price: what it costs: parameters, operations, whether a run that has begun can take it.
        before, after: figures of the model as it was, and of the changed copy.
        sufficient: no warning or error of what it was tried against is left and none is new, on
            every seed of `seeds`. Infos may remain.
        recommended: the smallest sufficient one.
        keeps_function: meant to leave the function as it is; `function_change` is the largest
            relative difference of the outputs that was measured, None where it is not meant to.
        seeds: initialisations that it was tried on.
        patches: "pytorch", "huggingface", "megatron", "torchtitan" -> text.
    """

    name: str
    title: str
    codes: list[str]
    price: str
    before: Outlook
    after: Outlook
    sufficient: bool = False
    recommended: bool = False
    keeps_function: bool = False
    function_change: float | None = None
    seeds: list[int] = field(default_factory=list)
    patches: dict[str, str] = field(default_factory=dict)


def outlook(report: Report) -> Outlook:
    """The figures of a report that a remedy is judged by."""
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
    """The rules that a remedy is looked for: the conditions, the contract and the baseline, at
    warning or above.
    """
    found = dict.fromkeys(f.code for f in report.findings if f.level != "info")
    return [code for code in found if code in (*_CONDITIONS, "JD110") or code.startswith("JD2")]


def with_fixes(findings: Iterable[Finding], remedies: Iterable[RemedyRecord]) -> list[Finding]:
    """The findings, with the recommended remedy as the verified fix of those that it answers."""
    best = next((r for r in remedies if r.recommended), None)
    if best is None:
        return list(findings)
    answered = set(best.codes)
    return [
        replace(f, fix=best.title, verified=True) if f.code in answered and f.level != "info" else f
        for f in findings
    ]


def _worst(report: Report, name: str) -> list[float] | None:
    found = [interval for row in report.sublayers if (interval := getattr(row, name)) is not None]
    if not found:
        return None
    return [max(i.lower for i in found), max(i.upper for i in found)]


def _gain(interval: Any) -> float:
    return float(interval.per_token.p99 if interval.per_token is not None else interval.estimate)
