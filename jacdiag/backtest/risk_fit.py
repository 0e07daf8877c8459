"""Curves of the chance that a run goes wrong: logistic in a figure of the untrained model, the rate
and the warm-up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from jacdiag.backtest.metrics import LEAST_CLUSTERS, Bools, Floats, members

# runs' worth of pull towards no effect, per slope of a standardised feature: keeps separated runs
# finite
RIDGE = 0.5
_SIGNS = ((None, None), (0.0, None), (0.0, None), (None, 0.0))  # a longer warm-up does no harm


@dataclass(frozen=True)
class Curve:
    """chance = logistic(coefficients . (1, ln figure, ln lr, ln warmup)), and the covariance over
    resampled clusters.

    Runs that did not differ in their warm-up give a curve without it: three coefficients.
    """

    coefficients: Floats
    covariance: NDArray[np.float64]

    def chances(self, figure: Floats, lr: Floats, warmup: Floats | None = None) -> Floats:
        """One chance a run; nan where something that enters is not known or not above 0."""
        count = len(self.coefficients)
        return logistic(features(figure, lr, warmup)[:, :count] @ self.coefficients)


def logistic(x: Floats) -> Floats:
    return np.where(np.isnan(x), np.nan, np.exp(-np.logaddexp(0.0, -np.nan_to_num(x))))


def features(figure: Floats, lr: Floats, warmup: Floats | None) -> NDArray[np.float64]:
    """(runs, 4): 1, ln figure, ln lr, ln of the steps of warm-up, at least 1; nan where one is not
    known or above 0.
    """
    warmup = np.full(len(figure), np.nan) if warmup is None else warmup
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [
            np.where(values > 0, np.log(values), np.nan)
            for values in (figure, lr, np.maximum(warmup, 1.0))
        ]
    return np.stack([np.ones(len(figure)), *logs], axis=1)


def fit(
    figure: Floats,
    lr: Floats,
    bad: Bools,
    clusters: Sequence[Hashable],
    *,
    warmup: Floats | None = None,
    times: int = 200,
    seed: int = 0,
) -> Curve | None:
    """Fits a curve. No slope may say that a worse figure, a higher rate or a shorter warm-up is
    better.

    Args:
        figure, lr: one value a run, above 0; runs without one are left out.
        bad: which went wrong.
        clusters: runs of one cluster are resampled together for the covariance: of one init, for a
            curve is asked about models that it has not seen.
        warmup: steps, one value a run; enters where all know theirs and they differ.
        times: resamples; 0 leaves the covariance at 0.

    Returns:
        None where a class is empty: nothing can be fitted; or where a covariance is asked for, and
        there are fewer than five clusters, or one class is empty in most resamples.

    Example:
        >>> lr = np.array([1e-3, 1e-2, 1e-1, 1.0])
        >>> curve = fit(np.ones(4), lr, np.array([False, False, True, True]), range(4), times=0)
        >>> bool(curve.chances(np.ones(1), np.array([1.0]))[0] > 0.5)
        True
    """
    X = features(figure, lr, warmup)
    if np.isnan(X[:, 3]).any() or len(np.unique(X[:, 3])) < 2:
        X = X[:, :3]
    known: Bools = np.logical_not(np.isnan(X).any(axis=1))
    X, y = X[known], bad[known]
    if not y.any() or y.all():
        return None
    groups = members([c for c, k in zip(clusters, known.tolist(), strict=True) if k])
    if times and len(groups) < LEAST_CLUSTERS:
        return None
    best = _solved(X, y)
    draw, found = np.random.default_rng(seed), []
    for _ in range(times):
        chosen = np.concatenate([groups[k] for k in draw.integers(len(groups), size=len(groups))])
        if y[chosen].any() and not y[chosen].all():
            found.append(_solved(X[chosen], y[chosen]))
    if times and len(found) < max(2, times / 2):
        return None
    covariance = np.cov(np.array(found).T) if times else np.zeros((X.shape[1],) * 2)
    return Curve(best, covariance)


def _solved(X: NDArray[np.float64], y: Bools) -> Floats:
    """Penalised maximum likelihood on standardised features, given back for the features as they
    are.
    """
    mean, spread = X[:, 1:].mean(axis=0), X[:, 1:].std(axis=0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    Z = np.column_stack([X[:, 0], (X[:, 1:] - mean) / spread])
    signs = np.where(y, 1.0, -1.0)

    def loss(b: Floats) -> tuple[float, Floats]:
        margin = signs * (Z @ b)
        pull = np.array([0.0, *b[1:]])
        value = float(np.logaddexp(0.0, -margin).sum() + RIDGE * pull @ pull)
        return value, -(Z * (signs * logistic(-margin))[:, None]).sum(axis=0) + 2 * RIDGE * pull

    count = X.shape[1]
    b = minimize(loss, np.zeros(count), jac=True, method="L-BFGS-B", bounds=_SIGNS[:count]).x
    slopes = b[1:] / spread
    return np.array([b[0] - slopes @ mean, *slopes])
