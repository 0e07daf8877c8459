"""The figures of a model over seeds, with the intervals in which those of one more seed lie."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import chain

from scipy.special import stdtrit

from jacdiag.comparison.probe_facts import measured_with
from jacdiag.records.init_contract import FiguresRecord
from jacdiag.records.report import Interval, Report, SublayerRecord

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
            sublayers.setdefault(name, {})[figure] = _over_seeds(seeds, reach)

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


def _over_seeds(seeds: Sequence[_Ends], reach: float) -> list[float]:
    """Return lower end, middle and upper end of a figure over seeds.

    Args:
        seeds: lower end, estimate and upper end of each seed.
        reach: how far above the middle one more seed may lie, relative.
    """
    lowers, estimates, uppers = zip(*seeds, strict=True)
    middle = statistics.median(estimates)
    return [min(lowers), middle, max(*uppers, middle * (1 + reach))]


def _by_figure_and_kind(
    reports: Sequence[Report],
) -> dict[tuple[str, str], dict[str, list[_Ends]]]:
    """Return (figure, kind) -> sub-layer -> the figure of each seed."""
    values: dict[tuple[str, str], dict[str, list[_Ends]]] = {}
    rows = chain.from_iterable(report.sublayers for report in reports)
    for row in rows:
        for figure, ends in _figures(row).items():
            rows_of_kind = values.setdefault((figure, row.kind), {})
            seeds = rows_of_kind.setdefault(row.name, [])
            seeds.append(ends)

    return values


def _figures(row: SublayerRecord) -> dict[str, _Ends]:
    """Return lower end, estimate and upper end of each figure that was measured."""
    figures = {
        "branch_norm": _ends_of_norm(row.branch_norm),
        "core_norm": _ends_of_norm(row.core_norm),
        "norm_gain": _ends_of_gain(row.norm_gain),
    }
    return {name: ends for name, ends in figures.items() if ends is not None}


def _ends_of_norm(interval: Interval | None) -> _Ends | None:
    """Return lower end, estimate and upper end of a norm; None if it has no logarithm."""
    if interval is None:
        return None

    # The logarithm is taken later, so none of the ends may be zero.
    is_positive = interval.lower > 0
    if not is_positive or not math.isfinite(interval.upper):
        return None

    return (interval.lower, interval.estimate, interval.upper)


def _ends_of_gain(gain: Interval | None) -> _Ends | None:
    """Return the gain of a norm, which is exact, as an interval; None if it has no logarithm."""
    if gain is None:
        return None

    # 1. Nearly the largest over the tokens, if it varies from one to the next.
    value = gain.estimate
    if gain.per_token is not None:
        value = gain.per_token.p99

    # 2. The logarithm is taken later.
    if not 0 < value < math.inf:
        return None

    return (value, value, value)


def _spread(rows: Sequence[Sequence[_Ends]]) -> float | None:
    """Return the standard deviation of the logarithm from seed to seed, pooled over sub-layers.

    None if there is one seed only.
    """
    # 1. The variance of each sub-layer over its seeds.
    variances = []
    for seeds in rows:
        # One seed shows no spread.
        if len(seeds) > 1:
            logs = [math.log(estimate) for _, estimate, _ in seeds]
            variances.append(statistics.variance(logs))
    if not variances:
        return None

    # 2. Their mean: every sub-layer has as many seeds.
    return math.sqrt(sum(variances) / len(variances))


def _reach(spread: float, rows: int, count: int) -> float:
    """Return how far above the middle of `count` seeds one more lies at most, relative.

    That is Student's t on a log scale.
    """
    degrees_of_freedom = max(rows * (count - 1), 1)
    quantile = -float(stdtrit(degrees_of_freedom, _ALPHA))
    # The middle of the seeds is known with an error, too: hence 1 + 1 / count.
    return math.expm1(min(quantile * spread * math.sqrt(1 + 1 / count), 50.0))


def _weights(report: Report) -> dict[str, dict[str, object]]:
    """Return the draw of each weight, as a baseline holds it."""
    if report.contract is None:
        return {}

    draws: dict[str, dict[str, object]] = {}
    for weight in report.contract.weights:
        value = None
        # What was drawn has a mean by chance alone.
        if weight.family in ("zero", "constant"):
            value = weight.mean
        draws[weight.parameter] = {
            "role": weight.role,
            "family": weight.family,
            "std": weight.std,
            "lower": weight.lower,
            "upper": weight.upper,
            "value": value,
            "shape": list(weight.shape),
        }

    return draws
