"""The audit repeated on further probes: how much its figures depend on the data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.request import Request
from jacdiag.records import Cost, Interval, NetworkRecord, ProbeSpread, Report, SublayerRecord

FIGURES = ("branch_norm", "core_norm", "residual_norm", "joint_residual_norm", "norm_gain")


def check_probes(probes: int, *, inputs: Any, products: bool) -> None:
    """Raise if several probes are asked for, and there can be one only.

    Args:
        probes: how many.
        inputs: the input itself, where it was passed.
        products: whether any norm is measured.

    Raises:
        UsageError: the input was passed and cannot be varied, or no norm is measured.
    """
    if probes == 1:
        return
    if inputs is not None:
        got = f"--probes {probes} and one fixed batch (passed as inputs, or by --replay)"
        hint = (
            "leave --probes out; or give --tokens FILE, or --inputs with a factory that draws "
            "its input"
        )
        raise UsageError("--probes needs an input that varies", got=got, hint=hint)
    if not products:
        raise UsageError(
            "--probes has nothing to repeat: no norm is asked for", hint="leave --probes out"
        )


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
    if request.probes == 1:
        return report
    begun = time.perf_counter()
    again = replace(
        audit.request, state=report.state, remedies="none", probes=1, confidence_all=None
    )
    others = []
    for probe in audit.further:
        other = Audit(again, probe)
        other.share_stats(audit)
        others.append(again.judged(other.run()))

    reports = [report, *others]
    sublayers = [_with_spread(row, others) for row in report.sublayers]
    facts: dict[str, Any] = {"count": len(reports), "verdicts": [one.verdict for one in reports]}
    drawn = [one.probe.seed for one in reports if one.probe is not None and one.probe.is_drawn]
    if drawn:
        facts["seeds"] = drawn
    return replace(
        report,
        sublayers=sublayers,
        network=_network(reports),
        cost=_cost(report.cost, others, time.perf_counter() - begun),
        settings={**report.settings, "probes": facts},
        notes=[*report.notes, *_notes(request, others)],
    )


def _with_spread(row: SublayerRecord, others: Iterable[Report]) -> SublayerRecord:
    """Return a sub-layer's record with the spread of its figures; a sub-layer is known by its
    name.
    """
    by_name = [{other.name: other for other in report.sublayers} for report in others]
    rows = [row, *(names.get(row.name) for names in by_name)]
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
    estimates = [None if interval is None else interval.estimate for interval in intervals]
    known = [value for value in estimates if value is not None and not math.isnan(value)]
    if len(known) < 2:
        return None
    return ProbeSpread(least=min(known), most=max(known), estimates=estimates)


def _network(reports: Sequence[Report]) -> NetworkRecord | None:
    first = reports[0].network
    if first is None:
        return None
    whole = spread_of([None if one.network is None else one.network.end_to_end for one in reports])
    return first if whole is None else replace(first, over_probes={"end_to_end": whole})


def _cost(first: Cost, others: Iterable[Report], seconds: float) -> Cost:
    """Return what all probes cost together."""
    costs = [first, *(report.cost for report in others)]
    return replace(
        first,
        forward_equivalents=math.fsum(cost.forward_equivalents or 0.0 for cost in costs),
        products=sum(cost.products or 0 for cost in costs),
        seconds=(first.seconds or 0.0) + seconds,
        peak_memory_mb=max(cost.peak_memory_mb or 0.0 for cost in costs),
        phases={**first.phases, "probes": seconds},
    )


def _notes(request: Request, others: Sequence[Report]) -> list[str]:
    if not request.decide or not others:
        return []
    return [
        "with --decide each norm stops once its rules are decided: the spread over probes holds "
        "the widths of the "
        "intervals, too; without --decide it is that of the data"
    ]
