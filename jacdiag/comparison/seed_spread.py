"""The figures of a model over seeds, with the intervals in which those of one more seed lie."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from jacdiag.comparison.probe_facts import measured_with
from jacdiag.records.init_contract import FiguresRecord
from jacdiag.records.report import Report, SublayerRecord

_ALPHA = 1e-6  # chance, per figure, that another seed of the same init lies outside
_Ends = tuple[float, float, float]


def figures_of(reports: Sequence[Report], margin: float, command: str = "") -> FiguresRecord:
    """Return the figures of a model over the reports of its seeds, as a baseline holds them.

    A figure varies from seed to seed by about the same share in all sub-layers of a kind. That
    share is measured over the seeds, and gives the interval in which one more seed lies (Student's
    t). One seed shows none: then `margin` is taken.

    Args:
        reports: one per seed, of the same model.
        margin: relative, for one seed.
        command: that writes the baseline; "" if none does.
    """
    first, count = reports[0], len(reports)
    sublayers: dict[str, dict[str, list[float]]] = {}
    spreads = []
    for (figure, _), rows in _by_figure_and_kind(reports).items():
        # 1. How far a figure reaches above its middle, from its spread over the seeds.
        complete = [seeds for seeds in rows.values() if len(seeds) == count]
        spread = _spread(complete)
        reach = margin
        if spread is not None:
            spreads.append(spread)
            reach = _reach(spread, len(complete), count)

        # 2. The interval of each sub-layer.
        for name, seeds in rows.items():
            low = min(ends[0] for ends in seeds)
            high = max(ends[2] for ends in seeds)
            middle = statistics.median(ends[1] for ends in seeds)
            sublayers.setdefault(name, {})[figure] = [low, middle, max(high, middle * (1 + reach))]
    return FiguresRecord(
        model=first.model.name,
        parameters=first.model.parameters,
        layers=first.model.layers,
        width=first.model.width,
        seeds=count,
        spread=max(spreads, default=None),
        sublayers=sublayers,
        weights=_weights(first),
        created=first.created,
        jacdiag=first.jacdiag,
        command=command,
        probe=measured_with(first),
    )


def _by_figure_and_kind(
    reports: Sequence[Report],
) -> dict[tuple[str, str], dict[str, list[_Ends]]]:
    """Return (figure, kind) -> sub-layer -> the figure of each seed."""
    values: dict[tuple[str, str], dict[str, list[_Ends]]] = {}
    for report in reports:
        for row in report.sublayers:
            for figure, ends in _figures(row).items():
                values.setdefault((figure, row.kind), {}).setdefault(row.name, []).append(ends)
    return values


def _figures(row: SublayerRecord) -> dict[str, _Ends]:
    """Return lower end, estimate and upper end of each figure that was measured."""
    figures = {}
    # 1. Norms, with their interval. The logarithm is taken later, so none may be zero.
    for name in ("branch_norm", "core_norm"):
        interval = getattr(row, name)
        if interval is None:
            continue
        if interval.lower > 0 and math.isfinite(interval.upper):
            figures[name] = (interval.lower, interval.estimate, interval.upper)

    # 2. The gain of the norm, which is exact.
    gain = row.norm_gain
    if gain is None:
        return figures
    value = gain.estimate
    if gain.per_token is not None:
        value = gain.per_token.p99
    if value > 0 and math.isfinite(value):
        figures["norm_gain"] = (value, value, value)
    return figures


def _spread(rows: Sequence[Sequence[_Ends]]) -> float | None:
    """Return the standard deviation of the logarithm from seed to seed, pooled over sub-layers.

    None if there is one seed only.
    """
    # 1. The variance of each sub-layer over its seeds.
    variances = []
    for seeds in rows:
        logs = [math.log(estimate) for _, estimate, _ in seeds]
        if len(logs) > 1:
            variances.append(statistics.variance(logs))
    if not variances:
        return None

    # 2. Their mean: every sub-layer has as many seeds.
    return math.sqrt(sum(variances) / len(variances))


def _reach(spread: float, rows: int, count: int) -> float:
    """Return how far above the middle of `count` seeds one more lies at most, relative.

    That is Student's t on a log scale.
    """
    quantile = -float(stdtrit(max(rows * (count - 1), 1), _ALPHA))
    return math.expm1(min(quantile * spread * math.sqrt(1 + 1 / count), 50.0))


def _weights(report: Report) -> dict[str, dict[str, object]]:
    """Return the draw of each weight, as a baseline holds it."""
    if report.contract is None:
        return {}
    draws: dict[str, dict[str, object]] = {}
    for weight in report.contract.weights:
        is_constant = weight.family in ("zero", "constant")
        draws[weight.parameter] = {
            "role": weight.role,
            "family": weight.family,
            "std": weight.std,
            "lower": weight.lower,
            "upper": weight.upper,
            "value": weight.mean if is_constant else None,
        }
    return draws
