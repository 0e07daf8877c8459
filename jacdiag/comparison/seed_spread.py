"""The figures of a model over seeds, with the intervals in which those of one more seed lie: what a
baseline keeps.
"""

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
    """The figures of a model over the reports of its seeds.

    A figure varies from seed to seed by about the same share in all sub-layers of a kind. That
    share is measured over the seeds, and gives the interval in which one more seed lies (Student's
    t). One seed shows none: then `margin` is taken.

    Args:
        reports: one per seed, of the same model.
        margin: relative, for one seed.
    """
    first, count = reports[0], len(reports)
    values: dict[tuple[str, str], dict[str, list[_Ends]]] = {}
    for report in reports:
        for row in report.sublayers:
            for figure, pair in _figures(row).items():
                values.setdefault((figure, row.kind), {}).setdefault(row.name, []).append(pair)
    sublayers: dict[str, dict[str, list[float]]] = {}
    spreads = []
    for (figure, _), rows in values.items():
        whole = [pairs for pairs in rows.values() if len(pairs) == count]
        spread = _spread(whole)
        spreads += [] if spread is None else [spread]
        reach = margin if spread is None else _reach(spread, len(whole), count)
        for name, pairs in rows.items():
            low, high = min(p[0] for p in pairs), max(p[2] for p in pairs)
            middle = statistics.median(p[1] for p in pairs)
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


def _figures(row: SublayerRecord) -> dict[str, _Ends]:
    """Lower end, estimate and upper end of each figure that was measured."""
    found = {}
    for name in ("branch_norm", "core_norm"):
        interval = getattr(row, name)
        if interval is not None and interval.lower > 0 and math.isfinite(interval.upper):
            found[name] = (interval.lower, interval.estimate, interval.upper)
    gain = row.norm_gain
    if gain is not None:
        value = gain.per_token.p99 if gain.per_token is not None else gain.estimate
        if value > 0 and math.isfinite(value):
            found["norm_gain"] = (value, value, value)
    return found


def _spread(rows: Sequence[Sequence[_Ends]]) -> float | None:
    """Standard deviation of the logarithm from seed to seed, pooled over sub-layers."""
    squares = [
        statistics.variance([math.log(p[1]) for p in pairs]) for pairs in rows if len(pairs) > 1
    ]
    return math.sqrt(sum(squares) / len(squares)) if squares else None


def _reach(spread: float, rows: int, count: int) -> float:
    """How far above the middle of `count` seeds one more lies at most, relative: Student's t on a
    log scale.
    """
    quantile = -float(stdtrit(max(rows * (count - 1), 1), _ALPHA))
    return math.expm1(min(quantile * spread * math.sqrt(1 + 1 / count), 50.0))


def _weights(report: Report) -> dict[str, dict[str, object]]:
    if report.contract is None:
        return {}
    return {
        w.parameter: {
            "role": w.role,
            "family": w.family,
            "std": w.std,
            "lower": w.lower,
            "upper": w.upper,
            "value": w.mean if w.family in ("zero", "constant") else None,
        }
        for w in report.contract.weights
    }
