"""The audit repeated on further probes: how much its figures depend on the data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.request import Request
from jacdiag.records import Cost, Interval, NetworkRecord, ProbeSpread, Report, SublayerRecord

FIGURES = ("branch_norm", "core_norm", "residual_norm", "joint_residual_norm", "norm_gain")


def with_probes(request: Request, audit: Audit, report: Report) -> Report:
    """Measure the model on further probes, and add how far the estimates lie apart.

    Intervals, findings and verdict stay those of the first probe. Each further probe has the same
    size, and the random starts of the solver are the same, so that only the data differ.

    Args:
        request: of the audit, with the number of probes.
        audit: as it ran on the first probe.
        report: what it found, judged.

    Returns:
        The report with `over_probes` of its sub-layers and network, and `settings["probes"]`.
    """
    if request.options.probes == 1:
        return report

    # 1. Measure the model on each further probe.
    start = time.perf_counter()
    again = audit.request.with_options(
        state=report.state,
        remedies="none",
        probes=1,
        confidence=audit.confidence,
        confidence_all=None,
    )
    others = []
    for probe in audit.further:
        other = Audit(again, probe)
        other.share_stats(audit)
        others.append(again.judged(other.run()))

    # 2. Put the spread of each figure into the first report.
    reports = [report, *others]
    sublayers = [_with_spread(row, others) for row in report.sublayers]
    return replace(
        report,
        sublayers=sublayers,
        network=_network_with_spread(reports),
        cost=_total_cost(report.cost, others, time.perf_counter() - start),
        settings={**report.settings, "probes": _facts_of_probes(reports)},
        notes=[*report.notes, *_notes(request, others)],
    )


def _facts_of_probes(reports: Sequence[Report]) -> dict[str, Any]:
    """Return how many probes there were, the verdict on each, and the seeds of those drawn."""
    facts: dict[str, Any] = {
        "count": len(reports),
        "verdicts": [report.verdict for report in reports],
    }

    # Tokens of a file have no seed.
    probes = [report.probe for report in reports if report.probe is not None]
    seeds = [probe.seed for probe in probes if probe.is_drawn]
    if seeds:
        facts["seeds"] = seeds
    return facts


def _with_spread(row: SublayerRecord, others: Iterable[Report]) -> SublayerRecord:
    """Return a sub-layer's record with the spread of its figures; sub-layers match by name."""
    # 1. Its record on each probe; None where that one has no such sub-layer.
    rows: list[SublayerRecord | None] = [row]
    for report in others:
        by_name = {other.name: other for other in report.sublayers}
        rows.append(by_name.get(row.name))

    # 2. The spread of each figure.
    spreads = {}
    for figure in FIGURES:
        spread = spread_of([getattr(other, figure, None) for other in rows])
        if spread is not None:
            spreads[figure] = spread
    return replace(row, over_probes=spreads)


def spread_of(intervals: Sequence[Interval | None]) -> ProbeSpread | None:
    """Return the spread of one figure; None if the first probe or all others gave none.

    Args:
        intervals: one for each probe; None where it was not measured.

    Example:
        >>> print(spread_of([Interval.exact(2.0), None, Interval.exact(1.5)]))
        1.50 to 2.00
    """
    if intervals[0] is None:
        return None

    # 1. The estimates, and the numbers among them.
    estimates: list[float | None] = []
    numbers = []
    for interval in intervals:
        estimate = None if interval is None else interval.estimate
        estimates.append(estimate)
        if estimate is not None and not math.isnan(estimate):
            numbers.append(estimate)

    # 2. One number has no spread.
    if len(numbers) < 2:
        return None
    return ProbeSpread(least=min(numbers), most=max(numbers), estimates=estimates)


def _network_with_spread(reports: Sequence[Report]) -> NetworkRecord | None:
    """Return the first report's figures of the network, with the spread of the end-to-end norm."""
    first = reports[0].network
    if first is None:
        return None
    spread = spread_of([_end_to_end(report) for report in reports])

    # It is None too if only one probe gave a number.
    if spread is None:
        return first
    return replace(first, over_probes={"end_to_end": spread})


def _end_to_end(report: Report) -> Interval | None:
    """Return the end-to-end norm of a report; None if it was not measured."""
    if report.network is None:
        return None
    return report.network.end_to_end


def _total_cost(first: Cost, others: Iterable[Report], seconds: float) -> Cost:
    """Return what all probes cost together."""
    # 1. What each probe cost. What was not measured counts as nothing.
    costs = [first, *(report.cost for report in others)]
    forwards = [cost.forward_equivalents or 0.0 for cost in costs]
    products = [cost.products or 0 for cost in costs]
    peaks = [cost.peak_memory_mb or 0.0 for cost in costs]

    # 2. Their sums, and the largest peak. Further probes are a phase of the audit.
    return replace(
        first,
        forward_equivalents=math.fsum(forwards),
        products=sum(products),
        seconds=(first.seconds or 0.0) + seconds,
        peak_memory_mb=max(peaks),
        phases={**first.phases, "probes": seconds},
    )


def _notes(request: Request, others: Sequence[Report]) -> list[str]:
    """Return a note if the spread holds the widths of intervals, too."""
    if not request.options.decide or not others:
        return []
    return [
        "with --decide each norm stops once its rules are decided: the spread over probes holds "
        "the widths of the intervals, too; without --decide it is that of the data"
    ]
