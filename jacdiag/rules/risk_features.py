"""Figures of an untrained model that might predict how its run ends, and trivial ones.

Every figure is larger where things look worse. One that was not measured is nan, never 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jacdiag.records.report import Interval, Report, SublayerRecord

Figure = Callable[["Report"], float]


def _branch(row: SublayerRecord) -> float:
    return _value(row.branch_norm)


def _excess(row: SublayerRecord) -> float:
    """Return how much a sub-layer adds to a perturbation.

    That is its residual norm over its shortcut's gain, minus 1.
    """
    gain = row.shortcut_gain or 1.0
    return _value(row.residual_norm) / gain - 1.0


def _bound(row: SublayerRecord) -> float:
    """Return how much a sub-layer may add at most, by its bound."""
    if row.bound is None:
        return math.nan
    return row.bound - 1.0


def _core(row: SublayerRecord) -> float:
    return _value(row.core_norm)


def _shortcut(row: SublayerRecord) -> float:
    """Return what the norm on the shortcut multiplies a gradient by."""
    gain = row.norm_gain
    if gain is None:
        return math.nan

    # Nearly the worst token counts, if tokens were kept.
    if gain.per_token is None:
        return gain.estimate
    return gain.per_token.p99


def _inverse_shortcut(row: SublayerRecord) -> float:
    """Return 1/σ of the shortcut's median token.

    A norm of the stream multiplies by it, wherever the norm is.
    """
    spread = row.shortcut_std
    if spread is None:
        return math.nan

    # A shortcut of zeros has no inverse.
    has_inverse = spread.median > 0
    if not has_inverse:
        return math.nan
    return 1.0 / spread.median


def _core_over_shortcut(row: SublayerRecord) -> float:
    return _core(row) * _inverse_shortcut(row)


def _value(interval: Interval | None) -> float:
    """Return the estimate of an interval; nan if it was not measured."""
    if interval is None:
        return math.nan
    return interval.estimate


def _known(values: Iterable[float]) -> list[float]:
    """Return the values that were measured."""
    return list(itertools.filterfalse(math.isnan, values))


def _worst(of: Callable[[SublayerRecord], float]) -> Figure:
    """Return the largest figure over the sub-layers."""

    def worst(report: Report) -> float:
        values = _known(map(of, report.sublayers))
        return max(values, default=math.nan)

    return worst


def _mean(of: Callable[[SublayerRecord], float]) -> Figure:
    """Return the mean figure over the sub-layers."""

    def mean(report: Report) -> float:
        values = _known(map(of, report.sublayers))
        if not values:
            return math.nan
        return math.fsum(values) / len(values)

    return mean


def _sum(of: Callable[[SublayerRecord], float]) -> Figure:
    """Return the sum of a figure over the sub-layers."""

    def total(report: Report) -> float:
        values = _known(map(of, report.sublayers))
        if not values:
            return math.nan
        return math.fsum(values)

    return total


def _sum_log(of: Callable[[SublayerRecord], float]) -> Figure:
    """Return the logarithm of the product of (1 + figure) over the sub-layers."""

    def total(report: Report) -> float:
        values = _known(map(of, report.sublayers))
        if not values:
            return math.nan

        # What is below zero adds nothing.
        positive = [max(value, 0.0) for value in values]
        return math.fsum(map(math.log1p, positive))

    return total


def _end_to_end(report: Report) -> float:
    """Return the norm of the network end to end; that of a part of it is another figure."""
    network = report.network
    if network is None:
        return math.nan
    if network.part is not None:
        return math.nan
    return _value(network.end_to_end)


def _gradient_growth(report: Report) -> float:
    """Return the exponent of the gradient's growth over depth, not over a part of it."""
    if report.network is None:
        return math.nan
    if report.network.part is not None:
        return math.nan

    # It is not known without a backward.
    growth = report.network.growth.gradient
    if growth is None:
        return math.nan
    return growth


def _by_width(figure: Figure) -> Figure:
    """Return the figure times d.

    The rate that Adam tolerates falls as 1/d in hidden matrices (Tensor Programs V, 2203.03466).
    """

    def times_width(report: Report) -> float:
        width = report.model.width or math.nan
        return figure(report) * width

    return times_width


_PLAIN: Mapping[str, Figure] = {
    "worst branch norm": _worst(_branch),
    "mean branch norm": _mean(_branch),
    "product of branches (log)": _sum_log(_branch),
    "mean excess": _mean(_excess),
    "sum of excess": _sum(_excess),
    "product of residuals (log)": _sum_log(_excess),
    "end-to-end norm": _end_to_end,
    "worst core norm": _worst(_core),
    "mean core norm": _mean(_core),
    "worst shortcut factor": _worst(_shortcut),
    "mean shortcut factor": _mean(_shortcut),
    "worst bound, Eq. 15 and 20": _worst(_bound),
    "mean bound, Eq. 15 and 20": _mean(_bound),
    "inverse of the smallest shortcut": _worst(_inverse_shortcut),
    "sum of cores over shortcuts": _sum(_core_over_shortcut),
    "gradient growth": _gradient_growth,
}
INIT: Mapping[str, Figure] = {
    **_PLAIN,
    **{f"{name} x width": _by_width(figure) for name, figure in _PLAIN.items()},
}

# Of closed forms: as good under --decide, where the norms are only as narrow as the rules need.
_CLOSED = (
    "worst shortcut factor",
    "mean shortcut factor",
    "worst bound, Eq. 15 and 20",
    "mean bound, Eq. 15 and 20",
    "inverse of the smallest shortcut",
)
EXACT = (*_CLOSED, *(f"{name} x width" for name in _CLOSED))


# Small sub-layers, large shortcut: a figure for each, of what the watch's probe measures before the
# first step, too.
CONDITIONS = ("product of branches (log) x width", "inverse of the smallest shortcut x width")


def init_figures(report: Report, lr: float | None = None) -> dict[str, float]:
    """Return all figures of a report; with a learning rate each once more times it.

    Args:
        report: of the model before its first step.
        lr: the peak learning rate of the run.

    Example:
        >>> init_figures(report, 1e-3)["worst branch norm x lr"]      # doctest: +SKIP
        0.0058
    """
    figures = {name: figure(report) for name, figure in INIT.items()}
    if lr is None:
        return figures

    # The figures themselves come first.
    with_rate = {f"{name} x lr": value * lr for name, value in figures.items()}
    return {**figures, **with_rate}
