"""JD301 to JD305: the residual stream over depth, and attention, in one forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jacdiag.records import Finding, SublayerRecord
from jacdiag.records.signal_propagation import ForwardRecord, Peak
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.rule import NOT_APPLICABLE, CheckOutcome, Rule, RuleContext


@dataclass(frozen=True)
class Measured:
    """One figure and where it was measured: a sub-layer or a point of the stream."""

    where: str
    value: float


def loudest(
    context: RuleContext,
    rule: Rule,
    figures: Sequence[Measured],
    figure: str,
    sentence: Callable[[Measured], str],
    fix: str = "",
) -> list[Finding]:
    """Return one finding for the largest figure, with all names above the same cut.

    Args:
        context: of the evaluation.
        rule: that fires.
        figures: the values, each with its place.
        figure: the name that the thresholds have for it.
        sentence: from the largest value to what the finding says.
        fix: what to do.

    Returns:
        The finding alone, or [] if no value is above a cut.
    """
    # 1. The largest value. What is not finite is another rule's.
    known = [measured for measured in figures if math.isfinite(measured.value)]
    worst = max(known, key=lambda measured: measured.value, default=None)
    if worst is None:
        return []

    # 2. The highest cut below it.
    limits = context.thresholds.limits(figure)
    cut = limits.beyond(worst.value)
    if cut is None:
        return []

    limit = limits.named_cuts[cut]

    # 3. The finding, with every place above that cut.
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


def _stream(context: RuleContext, field: str) -> tuple[ForwardRecord | None, CheckOutcome]:
    """Return the stream's record if it holds a field, else "not applicable" with the reason."""
    network = context.report.network
    if network is None or network.forward is None:
        return None, NOT_APPLICABLE

    # The record says why a field is missing.
    record = network.forward
    is_known = bool(getattr(record, field))
    if not is_known:
        return None, CheckOutcome(0, note=record.notes.get(field, ""))
    return record, NOT_APPLICABLE


def _variance(context: RuleContext, rule: Rule) -> CheckOutcome:
    record, otherwise = _stream(context, "variance")
    if record is None or not record.variance:
        return otherwise

    # 1. Variance that grows faster than linearly with depth.
    findings = _superlinear(context, rule, record.points, record.variance)

    # 2. Values that float16 cannot hold.
    tops = []
    for point, peak in zip(record.points, record.peaks or [], strict=False):
        tops.append(Measured(point, peak.value))

    def sentence(worst: Measured) -> str:
        return (
            f"the largest activation of the stream is {plain(worst.value)} at {worst.where}: "
            "Inf in float16"
        )

    fix = "train in bfloat16, or scale the branches down"
    findings += loudest(context, rule, tops, "stream_peak", sentence, fix)
    return CheckOutcome(len(record.variance), findings)


def _superlinear(
    context: RuleContext, rule: Rule, points: Sequence[str], variances: Sequence[float]
) -> list[Finding]:
    """Return the finding about the variance at the end over that in the middle.

    A stream of two points has no middle.
    """
    # 1. The growth over the second half.
    middle = len(variances) // 2
    if len(variances) < 3:
        return []
    if variances[middle] <= 0:
        return []

    measured = Measured("end", variances[-1] / variances[middle])
    end = "the end"
    network = context.report.network
    if network is not None and network.part is not None:
        end = f"the sum of {network.part.last}"

    def sentence(worst: Measured) -> str:
        return (
            f"the stream's variance grows {plain(worst.value)}-fold from {points[middle]} to {end} "
            "(linear growth gives at most 2)"
        )

    # 2. The finding is about the entire stream, and names no sub-layer.
    findings = loudest(context, rule, [measured], "variance_growth", sentence)
    first, last = variances[0], variances[-1]
    about_the_stream = []
    for finding in findings:
        evidence = {**finding.evidence, "first": first, "last": last}
        about_the_stream.append(
            Finding(rule.code, finding.level, [], finding.what, evidence, finding.why)
        )

    return about_the_stream


def _massive(context: RuleContext, rule: Rule) -> CheckOutcome:
    record, otherwise = _stream(context, "peaks")
    if record is None or not record.peaks:
        return otherwise

    least = context.thresholds.limits("massive_value").info
    ratio = context.thresholds.limits("massive_ratio").info
    if least is None or ratio is None:
        return CheckOutcome(len(record.peaks))

    # 1. Both limits must be passed: large by itself, and far above the rest.
    massive: list[tuple[str, Peak]] = []
    for point, peak in zip(record.points, record.peaks, strict=False):
        is_large = peak.value > least
        is_far_above = peak.value > ratio * peak.median
        if is_large and is_far_above:
            massive.append((point, peak))

    if not massive:
        return CheckOutcome(len(record.peaks))

    # 2. The finding about the largest.
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
    level = context.level(rule, "info")
    finding = Finding(rule.code, level, where, what, evidence, why=rule.summary)
    return CheckOutcome(len(record.peaks), [finding])


def _place(peak: Peak) -> str:
    """Return the position of a peak in words, with its token if that is known."""
    if peak.position is None:
        return ""

    place = f", position {peak.position}"

    # Probes of pixels have no tokens.
    if peak.token is not None:
        place += f" (token {peak.token})"
    return place


def _attention(
    context: RuleContext,
    rule: Rule,
    value: Callable[[Any], float | None],
    figure: str,
    sentence: Callable[[Measured], str],
) -> CheckOutcome:
    """Compare a figure of every attention with its cuts.

    Args:
        context: of the evaluation.
        rule: that checks.
        value: from an attention's record to the figure.
        figure: the name that the thresholds have for it.
        sentence: from the largest value to what the finding says.
    """
    # 1. The attentions that could be read, and those that could not.
    rows = context.rows(rule)
    figures: list[Measured] = []
    is_any_read = False
    unread = 0
    for row in rows:
        if row.attention is not None:
            is_any_read = True
            number = value(row.attention)
            if number is not None:
                figures.append(Measured(row.name, number))
        elif row.kind == "attention":
            unread += 1

    if not is_any_read:
        return CheckOutcome(0, note=_why_no_attention(rows))

    # 2. The largest figure.
    note = ""
    if unread:
        note = f"not read at {unread} attention sub-layers"
    return CheckOutcome(len(figures), loudest(context, rule, figures, figure, sentence), note=note)


def _why_no_attention(rows: Sequence[SublayerRecord]) -> str:
    """Return the reason that the first sub-layer with one gives."""
    for row in rows:
        if "attention" in row.notes:
            return row.notes["attention"]

    # A model may have no attention at all.
    return ""


def _logits(context: RuleContext, rule: Rule) -> CheckOutcome:
    def sentence(worst: Measured) -> str:
        return f"the largest attention logit is {plain(worst.value)} at {worst.where}"

    return _attention(context, rule, lambda record: record.max_logit, "attention_logit", sentence)


def _entropy(context: RuleContext, rule: Rule) -> CheckOutcome:
    def focus(record: Any) -> float | None:
        # Larger is worse, as for every figure that has cuts.
        if record.entropy_share is None:
            return None

        return float(1 - record.entropy_share)

    def sentence(worst: Measured) -> str:
        return (
            f"attention at {worst.where} has {plain(100 * (1 - worst.value))}% of the entropy "
            "of uniform attention"
        )

    return _attention(context, rule, focus, "attention_focus", sentence)


def _rank(context: RuleContext, rule: Rule) -> CheckOutcome:
    record, otherwise = _stream(context, "token_cosine")
    if record is None or not record.token_cosine:
        return otherwise

    # 1. The cosine at each point of the stream.
    figures = [
        Measured(point, value)
        for point, value in zip(record.points, record.token_cosine, strict=False)
    ]

    # 2. The largest cosine.
    def sentence(worst: Measured) -> str:
        return (
            f"the mean cosine between tokens is {plain(worst.value)} at {worst.where} (1 is "
            "one direction for all)"
        )

    return CheckOutcome(len(figures), loudest(context, rule, figures, "token_cosine", sentence))


RULES = (
    Rule("JD301", "variance-growth", "warning", check=_variance),
    Rule("JD302", "massive-activations", "info", check=_massive),
    Rule("JD303", "attention-logits", "warning", check=_logits),
    Rule("JD304", "attention-entropy", "info", check=_entropy),
    Rule("JD305", "rank-collapse", "info", check=_rank),
)
