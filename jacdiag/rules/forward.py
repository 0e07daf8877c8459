"""JD301 to JD305: the residual stream over depth, and attention, in one forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.records import Finding, Level, SublayerRecord
from jacdiag.records.signal_propagation import ForwardRecord, Peak
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, Context, Outcome, Rule
from jacdiag.rules.thresholds import CUTS, Limits


@dataclass(frozen=True)
class Measured:
    """One figure and where it was measured: a sub-layer or a point of the stream."""

    where: str
    value: float


def beyond(limits: Limits, value: float) -> Level | None:
    """Return the highest cut that a value lies above; None for none, and for NaN."""
    passed = [cut for cut in CUTS if (limit := getattr(limits, cut)) is not None and value > limit]
    return passed[-1] if passed else None


def loudest(
    context: Context,
    rule: Rule,
    figures: Sequence[Measured],
    figure: str,
    sentence: Callable[[Measured], str],
    fix: str = "",
) -> list[Finding]:
    """Return one finding for the largest figure, with all names above the same cut."""
    limits = context.thresholds.limits(figure)
    # What is not finite is another rule's.
    known = [measured for measured in figures if math.isfinite(measured.value)]
    if not known:
        return []
    worst = max(known, key=lambda measured: measured.value)
    cut = beyond(limits, worst.value)
    if cut is None:
        return []
    limit = getattr(limits, cut)
    where = [measured.where for measured in known if measured.value > limit]
    evidence = {
        "field": figure,
        "at": worst.where,
        "value": worst.value,
        "threshold": limit,
        "count": len(where),
    }
    level = context.level(rule, cut)
    return [Finding(rule.code, level, where, sentence(worst), evidence, why=rule.summary, fix=fix)]


def _stream(context: Context, field: str) -> tuple[ForwardRecord | None, Outcome]:
    """Return the stream's record if it holds a field, else "not applicable" with the reason."""
    network = context.report.network
    record = network.forward if network is not None else None
    if record is None:
        return None, NOT_APPLICABLE
    if not getattr(record, field):
        return None, Outcome(0, note=record.notes.get(field, ""))
    return record, NOT_APPLICABLE


def _variance(context: Context, rule: Rule) -> Outcome:
    record, otherwise = _stream(context, "variance")
    if record is None or not record.variance:
        return otherwise
    findings = _superlinear(context, rule, record.points, record.variance)
    tops = [
        Measured(point, peak.value)
        for point, peak in zip(record.points, record.peaks or [], strict=False)
    ]

    def sentence(worst: Measured) -> str:
        return (
            f"the largest activation of the stream is {plain(worst.value)} at {worst.where}: "
            "Inf in float16"
        )

    findings += loudest(
        context,
        rule,
        tops,
        "stream_peak",
        sentence,
        "train in bfloat16, or scale the branches down",
    )
    return Outcome(len(record.variance), findings)


def _superlinear(
    context: Context, rule: Rule, points: Sequence[str], variances: Sequence[float]
) -> list[Finding]:
    """Return the variance at the end over that in the middle.

    A stream of two points has no middle.
    """
    middle = len(variances) // 2
    if len(variances) < 3 or variances[middle] <= 0:
        return []
    measured = Measured("end", variances[-1] / variances[middle])

    def sentence(worst: Measured) -> str:
        return (
            f"the stream's variance grows {plain(worst.value)}-fold from {points[middle]} to the "
            "end "
            "(linear growth gives at most 2)"
        )

    findings = loudest(context, rule, [measured], "variance_growth", sentence)
    first, last = variances[0], variances[-1]
    return [
        Finding(rule.code, f.level, [], f.what, {**f.evidence, "first": first, "last": last}, f.why)
        for f in findings
    ]


def _massive(context: Context, rule: Rule) -> Outcome:
    record, otherwise = _stream(context, "peaks")
    if record is None or not record.peaks:
        return otherwise
    least = context.thresholds.limits("massive_value").info
    ratio = context.thresholds.limits("massive_ratio").info
    if least is None or ratio is None:
        return Outcome(len(record.peaks))
    pairs = list(zip(record.points, record.peaks, strict=False))
    # Both must be passed: large by itself, and far above the rest.
    massive = [
        (point, peak)
        for point, peak in pairs
        if peak.value > least and peak.value > ratio * peak.median
    ]
    if not massive:
        return Outcome(len(record.peaks))
    point, worst = max(massive, key=lambda pair: pair[1].value)
    what = (
        f"{plain(worst.value)} at {point}, feature {worst.feature}{_place(worst)}; the median "
        f"is {plain(worst.median)}"
    )
    evidence = {
        "field": "massive_value",
        "value": worst.value,
        "median": worst.median,
        "feature": worst.feature,
        "threshold": least,
        "ratio": ratio,
        "count": len(massive),
    }
    where = [name for name, _ in massive]
    return Outcome(
        len(record.peaks),
        [Finding(rule.code, context.level(rule, "info"), where, what, evidence, why=rule.summary)],
    )


def _place(peak: Peak) -> str:
    if peak.position is None:
        return ""
    token = "" if peak.token is None else f" (token {peak.token})"
    return f", position {peak.position}{token}"


def _attention(
    context: Context,
    rule: Rule,
    value: Callable[[Any], float | None],
    figure: str,
    sentence: Callable[[Measured], str],
) -> Outcome:
    rows = [row for row in context.rows(rule) if row.attention is not None]
    if not rows:
        return Outcome(0, note=_why_no_attention(context.rows(rule)))
    figures = [
        Measured(row.name, number) for row in rows if (number := value(row.attention)) is not None
    ]
    unread = [
        row.name for row in context.rows(rule) if row.attention is None and row.kind == "attention"
    ]
    note = f"not read at {len(unread)} attention sub-layers" if unread else ""
    return Outcome(len(figures), loudest(context, rule, figures, figure, sentence), note=note)


def _why_no_attention(rows: Sequence[SublayerRecord]) -> str:
    reasons = [row.notes["attention"] for row in rows if "attention" in row.notes]
    return reasons[0] if reasons else ""


def _logits(context: Context, rule: Rule) -> Outcome:
    def sentence(worst: Measured) -> str:
        return f"the largest attention logit is {plain(worst.value)} at {worst.where}"

    return _attention(context, rule, lambda record: record.max_logit, "attention_logit", sentence)


def _entropy(context: Context, rule: Rule) -> Outcome:
    def focus(record: Any) -> float | None:
        return None if record.entropy_share is None else 1 - record.entropy_share

    def sentence(worst: Measured) -> str:
        return (
            f"attention at {worst.where} has {plain(100 * (1 - worst.value))}% of the entropy "
            "of uniform attention"
        )

    return _attention(context, rule, focus, "attention_focus", sentence)


def _rank(context: Context, rule: Rule) -> Outcome:
    record, otherwise = _stream(context, "token_cosine")
    if record is None or not record.token_cosine:
        return otherwise
    figures = [
        Measured(point, value)
        for point, value in zip(record.points, record.token_cosine, strict=False)
    ]

    def sentence(worst: Measured) -> str:
        return (
            f"the mean cosine between tokens is {plain(worst.value)} at {worst.where} (1 is "
            "one direction for all)"
        )

    return Outcome(len(figures), loudest(context, rule, figures, "token_cosine", sentence))


RULES = (
    Rule("JD301", "variance-growth", "warning", check=_variance),
    Rule("JD302", "massive-activations", "info", check=_massive),
    Rule("JD303", "attention-logits", "warning", check=_logits),
    Rule("JD304", "attention-entropy", "info", check=_entropy),
    Rule("JD305", "rank-collapse", "info", check=_rank),
)
