"""How well a figure ranks bad runs above good ones: AUROC within strata, bootstrap, precision at a
false-alarm rate.

All are plain numpy on a few hundred runs; nothing here knows what a run is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from jacdiag.records.backtest import Bin, Estimate, Operating

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
LEAST_CLUSTERS = 5  # fewer, drawn with replacement, say nothing of what others would have shown


def pairs_won(scores: Floats, bad: Bools) -> tuple[float, int]:
    """How many pairs (bad run, good run) have the bad one higher, a tie counting half; and how many
    pairs there are.

    Not-a-number scores are left out with their runs.
    """
    known = ~np.isnan(scores)
    high, low = np.sort(scores[known & bad]), np.sort(scores[known & ~bad])
    below = np.searchsorted(low, high, side="left")
    upto = np.searchsorted(low, high, side="right")
    return float(np.sum(below + 0.5 * (upto - below))), int(high.size * low.size)


def auroc(
    scores: Floats,
    bad: Bools,
    strata: Sequence[Hashable] | None = None,
    *,
    missing_ties: bool = False,
) -> float | None:
    """The chance that a bad run scores above a good one, a tie counting half.

    Args:
        scores: one a run, larger meaning worse; nan where the figure was not measured.
        bad: which runs went wrong.
        strata: only runs of the same stratum are compared; strata count by their pairs.
        missing_ties: pairs with a run that has no score count half, too, and are not left out: so
            figures that were measured on different runs can be compared.

    Returns:
        None where no pair can be made.

    Example:
        >>> auroc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False]))
        1.0
    """
    won, count = 0.0, 0
    for chosen in [np.arange(len(scores))] if strata is None else members(strata):
        w, n = pairs_won(scores[chosen], bad[chosen])
        every = int(bad[chosen].sum() * (~bad[chosen]).sum()) if missing_ties else n
        won, count = won + w + 0.5 * (every - n), count + every
    return won / count if count else None


def members(keys: Sequence[Hashable]) -> list[NDArray[np.intp]]:
    """The places of equal keys, group by group."""
    places: dict[Hashable, list[int]] = {}
    for k, key in enumerate(keys):
        places.setdefault(key, []).append(k)
    return [np.array(found) for found in places.values()]


def auroc_interval(
    scores: Floats,
    bad: Bools,
    strata: Sequence[Hashable] | None,
    clusters: Sequence[Hashable],
    *,
    times: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The AUROC with its percentile interval over resampled clusters.

    Args:
        scores, bad, strata: see `auroc`.
        clusters: runs of one cluster (the same setting with other seeds) are drawn together, for
            they are not independent.
        times: resamples; no interval from fewer than five clusters. Each only weighs the pairs of
            runs, which are compared once: a run that was drawn twice makes every pair of its own
            twice.
    """
    known = ~np.isnan(scores)
    high, low = np.flatnonzero(known & bad), np.flatnonzero(known & ~bad)
    difference = scores[high][:, None] - scores[low][None, :]
    pairs = np.ones_like(difference)
    if strata is not None:
        codes = np.empty(len(scores), dtype=np.intp)
        for code, places in enumerate(members(strata)):
            codes[places] = code
        pairs = (codes[high][:, None] == codes[low][None, :]).astype(np.float64)
    won = pairs * ((difference > 0) + 0.5 * (difference == 0))
    count = pairs.sum()
    if not count:
        return Estimate(None, level=level)
    groups = members([c for c, k in zip(clusters, known.tolist(), strict=True) if k])
    if len(groups) < LEAST_CLUSTERS:
        return Estimate(float(won.sum() / count), level=level)
    weights = _resampled(clusters, times, seed)
    above, all_of = (((weights[:, high] @ m) * weights[:, low]).sum(axis=1) for m in (won, pairs))
    found = above[all_of > 0] / all_of[all_of > 0]
    value = float(won.sum() / count)
    if not found.size:
        return Estimate(value, level=level)
    lower, upper = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(lower), float(upper), level, int(found.size))


def _resampled(clusters: Sequence[Hashable], times: int, seed: int) -> NDArray[np.float64]:
    """(times, runs): how often each run is drawn when whole clusters are drawn with replacement."""
    groups = members(clusters)
    chosen = np.random.default_rng(seed).integers(len(groups), size=(times, len(groups)))
    weights = np.zeros((times, len(clusters)))
    for k, places in enumerate(groups):
        weights[:, places] = (chosen == k).sum(axis=1)[:, None]
    return weights


def operating_point(scores: Floats, bad: Bools, false_alarms: float) -> Operating | None:
    """The lowest threshold whose false-alarm rate is at most `false_alarms`; None where a class is
    empty.
    """
    known = ~np.isnan(scores)
    good, ill = np.sort(scores[known & ~bad]), scores[known & bad]
    if not good.size or not ill.size:
        return None
    allowed = int(np.floor(false_alarms * good.size + 1e-9))
    threshold = float(good[good.size - allowed - 1]) if allowed < good.size else float("-inf")
    rate = float(np.mean(good > threshold))
    alarms = int(np.sum(good > threshold) + np.sum(ill > threshold))
    precision = float(np.sum(ill > threshold)) / alarms if alarms else None
    return Operating(threshold, rate, float(np.mean(ill > threshold)), precision)


def calibration(chances: Floats, bad: Bools, bins: int = 5) -> list[Bin]:
    """Runs in bins of equal count by their chance, each with the share that went wrong and its
    Wilson interval.
    """
    known = ~np.isnan(chances)
    order = np.flatnonzero(known)[np.argsort(chances[known], kind="stable")]
    made = []
    for part in np.array_split(order, min(bins, max(len(order), 1))):
        if part.size:
            count = int(bad[part].sum())
            made.append(
                Bin(
                    float(chances[part].mean()),
                    int(part.size),
                    count,
                    *wilson(count, int(part.size)),
                )
            )
    return made


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95% by default."""
    if count == 0:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
