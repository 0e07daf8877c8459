"""Curves of the chance that a run goes wrong.

The curve is logistic in a figure of the untrained model, the learning rate and the warm-up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from jacdiag.backtest.metrics import LEAST_CLUSTERS, Bools, Floats, members

# The pull towards no effect, in runs, on the slope of a standardized feature. It keeps the slopes
# finite when a feature separates the runs.
RIDGE = 0.5

# Bounds of the coefficients: a worse figure and a higher rate do no good, a longer warm-up no harm.
_SIGNS = ((None, None), (0.0, None), (0.0, None), (None, 0.0))


@dataclass(frozen=True)
class Curve:
    """Coefficients and their covariance over resampled clusters.

    The chance is logistic(coefficients . (1, ln figure, ln lr, ln warmup)). Runs that did not
    differ in their warm-up give a curve without it: three coefficients.
    """

    coefficients: Floats
    covariance: NDArray[np.float64]

    def chances(self, figure: Floats, lr: Floats, warmup: Floats | None = None) -> Floats:
        """Return one chance a run; nan where an input is not known or not above 0.

        Args:
            figure: one value a run.
            lr: one learning rate a run.
            warmup: steps, one value a run.
        """
        count = len(self.coefficients)
        log_odds = features(figure, lr, warmup)[:, :count] @ self.coefficients
        return np.asarray(expit(log_odds), dtype=np.float64)


def features(figure: Floats, lr: Floats, warmup: Floats | None) -> NDArray[np.float64]:
    """Return (runs, 4): 1, ln figure, ln lr, ln of the steps of warm-up.

    A warm-up is at least 1 step. A logarithm is nan if its argument is not known or not above 0.

    Args:
        figure: one value a run.
        lr: one learning rate a run.
        warmup: steps, one value a run; not known if None.
    """
    if warmup is None:
        warmup = np.full(len(figure), np.nan)
    columns = [
        np.ones(len(figure)),
        _logarithm(figure),
        _logarithm(lr),
        _logarithm(np.maximum(warmup, 1.0)),
    ]
    return np.stack(columns, axis=1)


def _logarithm(values: Floats) -> Floats:
    """Return natural logarithms; nan where a value is not known or not above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values > 0, np.log(values), np.nan)


def fit(
    figure: Floats,
    lr: Floats,
    is_wrong: Bools,
    clusters: Sequence[Hashable],
    *,
    warmup: Floats | None = None,
    times: int = 200,
    seed: int = 0,
) -> Curve | None:
    """Fit a curve.

    No slope may say that a worse figure, a higher rate or a shorter warm-up is better.

    Args:
        figure: one value a run, above 0; runs without one are left out.
        lr: one learning rate a run, above 0; runs without one are left out.
        is_wrong: which went wrong.
        clusters: runs of one cluster are resampled together for the covariance. A cluster is an
            init, because a curve is used for models that it has not seen.
        warmup: steps, one value a run; enters if all runs know theirs and they differ.
        times: resamples; 0 leaves the covariance at 0.
        seed: of the resamples.

    Returns:
        None if all runs ended alike, so that nothing can be fitted. None also if a covariance is
        wanted, and there are fewer than five clusters, or most resamples ended alike.

    Example:
        >>> lr = np.array([1e-3, 1e-2, 1e-1, 1.0])
        >>> curve = fit(np.ones(4), lr, np.array([False, False, True, True]), range(4), times=0)
        >>> bool(curve.chances(np.ones(1), np.array([1.0]))[0] > 0.5)
        True
    """
    # 1. The runs of which everything is known.
    X = features(figure, lr, warmup)
    if not _warmups_differ(X):
        X = X[:, :3]
    known: Bools = np.logical_not(np.isnan(X).any(axis=1))
    X = X[known]
    y = is_wrong[known]
    if not _has_both(y):
        return None

    # 2. The curve.
    known_clusters = [clusters[place] for place in np.flatnonzero(known).tolist()]
    groups = members(known_clusters)
    if times and len(groups) < LEAST_CLUSTERS:
        return None
    best = _maximize_likelihood(X, y)

    # 3. Its covariance, which is left at 0 without resamples.
    if not times:
        count = X.shape[1]
        return Curve(best, np.zeros((count, count)))

    # 4. The covariance over resampled clusters.
    resampled = _resampled_coefficients(X, y, groups, times, seed)
    if len(resampled) < max(2, times / 2):
        return None
    return Curve(best, np.cov(np.array(resampled).T))


def _warmups_differ(X: NDArray[np.float64]) -> bool:
    """Return whether all runs know their warm-up, and not all have the same."""
    warmups = X[:, 3]
    if np.isnan(warmups).any():
        return False
    return len(np.unique(warmups)) >= 2


def _has_both(y: Bools) -> bool:
    """Return whether some runs went wrong and some did not."""
    return bool(y.any() and not y.all())


def _resampled_coefficients(
    X: NDArray[np.float64], y: Bools, groups: Sequence[NDArray[np.intp]], times: int, seed: int
) -> list[Floats]:
    """Fit again to clusters that are drawn with replacement.

    Draws in which all runs ended alike are left out.
    """
    generator = np.random.default_rng(seed)
    coefficients = []
    for _ in range(times):
        drawn = generator.integers(len(groups), size=len(groups))
        rows = np.concatenate([groups[k] for k in drawn])
        if _has_both(y[rows]):
            coefficients.append(_maximize_likelihood(X[rows], y[rows]))
    return coefficients


def _maximize_likelihood(X: NDArray[np.float64], y: Bools) -> Floats:
    """Maximize the penalized likelihood; return the coefficients of the features as they are.

    Args:
        X: (runs, features), the first column 1.
        y: which runs went wrong.
    """
    # 1. Standardize the features: the penalty treats all slopes alike.
    mean = X[:, 1:].mean(axis=0)
    spread = X[:, 1:].std(axis=0)
    spread = np.where(spread > 1e-12, spread, 1.0)
    Z = np.column_stack([X[:, 0], (X[:, 1:] - mean) / spread])
    signs = np.where(y, 1.0, -1.0)

    def loss(b: Floats) -> tuple[float, Floats]:
        """Return the penalized loss and its gradient."""
        margin = signs * (Z @ b)
        # The intercept is not pulled.
        pull = np.array([0.0, *b[1:]])
        value = float(np.logaddexp(0.0, -margin).sum() + RIDGE * pull @ pull)
        gradient = -(Z * (signs * expit(-margin))[:, None]).sum(axis=0) + 2 * RIDGE * pull
        return value, gradient

    # 2. Solve, and undo the standardization.
    count = X.shape[1]
    b = minimize(loss, np.zeros(count), jac=True, method="L-BFGS-B", bounds=_SIGNS[:count]).x
    slopes = b[1:] / spread
    return np.array([b[0] - slopes @ mean, *slopes])
