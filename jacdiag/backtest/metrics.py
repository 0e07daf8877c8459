"""How well a figure ranks bad runs above good ones: AUROC within strata, bootstrap, precision.

Nothing here knows what a run is: all functions take arrays with one entry per run.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from jacdiag.records.backtest import LEAST_RUNS, Bin, Estimate, Operating

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_LEVEL = 0.9500000018071152  # 1.959964 standard deviations on either side
LEAST_CLUSTERS = 5  # fewer, drawn with replacement, say nothing of what others would have shown


def pairs_won(scores: Floats, is_wrong: Bools) -> tuple[float, int]:
    """Count the pairs (bad run, good run) in which the bad one scores higher, and all pairs.

    A tie counts half. Not-a-number scores are left out with their runs.

    Args:
        scores: one a run, larger meaning worse.
        is_wrong: which runs went wrong.
    """
    known = ~np.isnan(scores)
    high = np.sort(scores[known & is_wrong])
    low = np.sort(scores[known & ~is_wrong])

    # For each bad run, the good ones that score lower, and with ties.
    below = np.searchsorted(low, high, side="left")
    up_to = np.searchsorted(low, high, side="right")
    won = float(np.sum(below + 0.5 * (up_to - below)))
    return won, int(high.size * low.size)


def auroc(
    scores: Floats,
    is_wrong: Bools,
    strata: Sequence[Hashable] | None = None,
    *,
    missing_ties: bool = False,
) -> float | None:
    """Return the chance that a bad run scores above a good one, a tie counting half.

    Args:
        scores: one a run, larger meaning worse; nan where the figure was not measured.
        is_wrong: which runs went wrong.
        strata: only runs of the same stratum are compared; strata count by their pairs.
        missing_ties: pairs with a run that has no score count half, too, and are not left out. So
            figures that were measured on different runs can be compared.

    Returns:
        None if no pair can be made.

    Example:
        >>> auroc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False]))
        1.0
    """
    # 1. The runs that are compared with each other.
    groups = [np.arange(len(scores))]
    if strata is not None:
        groups = members(strata)

    # 2. Count over all groups.
    won_in_all = 0.0
    count_of_all = 0
    for places in groups:
        won, count = pairs_won(scores[places], is_wrong[places])
        if missing_ties:
            bad = is_wrong[places].sum()
            good = (~is_wrong[places]).sum()
            every = int(bad * good)
            won += 0.5 * (every - count)
            count = every
        won_in_all += won
        count_of_all += count

    # 3. The share that the bad runs win.
    if not count_of_all:
        return None
    return won_in_all / count_of_all


def members(keys: Sequence[Hashable]) -> list[NDArray[np.intp]]:
    """Return the places of equal keys, group by group.

    Args:
        keys: one an entry.
    """
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [np.array(group) for group in places.values()]


@dataclass(frozen=True)
class RunPairs:
    """All pairs of a bad run and a good one that may be compared by a score.

    Attributes:
        high, low: places of the bad runs and of the good ones.
        counted: 1 for a pair that counts, (bad runs, good runs).
        won: what the bad run wins in it: 1, or 1/2 in a tie.
    """

    high: NDArray[np.intp]
    low: NDArray[np.intp]
    counted: Floats
    won: Floats

    @property
    def runs(self) -> tuple[int, int]:
        """How many bad runs and how many good ones are in some pair."""
        bad = int(self.counted.any(axis=1).sum())
        good = int(self.counted.any(axis=0).sum())
        return bad, good

    @property
    def enough(self) -> bool:
        """Whether as many runs of either outcome are in pairs as an AUROC needs."""
        return min(self.runs) >= LEAST_RUNS

    @property
    def auroc(self) -> float:
        """The share of the pairs that the bad runs win."""
        return float(self.won.sum() / self.counted.sum())

    def resampled(self, weights: Floats) -> Floats:
        """Return the AUROC of each resample; nan for one without a pair.

        Each resample only weighs the pairs: a run that was drawn twice makes every pair of its own
        twice.

        Args:
            weights: how often each run is drawn, (resamples, runs).
        """
        above = ((weights[:, self.high] @ self.won) * weights[:, self.low]).sum(axis=1)
        counts = ((weights[:, self.high] @ self.counted) * weights[:, self.low]).sum(axis=1)
        shares = np.full(len(weights), np.nan)
        np.divide(above, counts, out=shares, where=counts > 0)
        return shares


def pair_runs(scores: Floats, is_wrong: Bools, strata: Sequence[Hashable] | None) -> RunPairs:
    """Return the pairs of a bad run and a good one.

    Args:
        scores: one a run, larger meaning worse; a run whose score is nan is in no pair.
        is_wrong: which runs went wrong.
        strata: runs of one stratum are compared with each other; None compares all.
    """
    # 1. Which pairs count.
    known = ~np.isnan(scores)
    high = np.flatnonzero(known & is_wrong)
    low = np.flatnonzero(known & ~is_wrong)
    difference = scores[high][:, None] - scores[low][None, :]
    counted = np.ones_like(difference)
    if strata is not None:
        codes = _codes_of(strata)
        counted = (codes[high][:, None] == codes[low][None, :]).astype(np.float64)

    # 2. Which of them the bad run wins. A tie counts half.
    won = counted * ((difference > 0) + 0.5 * (difference == 0))
    return RunPairs(high, low, counted, won)


def auroc_interval(
    scores: Floats,
    is_wrong: Bools,
    strata: Sequence[Hashable] | None,
    clusters: Sequence[Hashable],
    *,
    times: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the AUROC with its percentile interval over resampled clusters.

    Args:
        scores: one value a run; nan where it is not known. See `auroc`.
        is_wrong: which runs went wrong.
        strata: runs of one stratum are compared with each other; None compares all.
        clusters: runs of one cluster (the same setting with other seeds) are drawn together, for
            they are not independent.
        times: resamples; no interval from fewer than five clusters.
        level: confidence of the interval.
        seed: of the resamples.

    Returns:
        No value if fewer than `LEAST_RUNS` runs of either outcome are in some pair.
    """
    # 1. The value.
    pairs = pair_runs(scores, is_wrong, strata)
    if not pairs.enough:
        return Estimate(None, level=level)
    value = pairs.auroc

    # 2. The interval, if there are enough clusters to resample.
    if not _enough_clusters(clusters, ~np.isnan(scores)):
        return Estimate(value, level=level)
    resampled = pairs.resampled(_resampled(clusters, times, seed))
    return _with_interval(value, resampled, level)


def lead_interval(
    scores: Floats,
    rival: Floats,
    is_wrong: Bools,
    strata: Sequence[Hashable] | None,
    clusters: Sequence[Hashable],
    *,
    times: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return by how much the AUROC of one score exceeds that of another, with its interval.

    Both are taken over the runs that have both scores, and over the same resamples of them.

    Args:
        scores: one value a run; nan where it is not known.
        rival: the other score.
        is_wrong: which runs went wrong. This and the others are those of `auroc_interval`.
        strata: runs of one stratum are compared with each other; None compares all.
        clusters: runs that are drawn together.
        times: resamples.
        level: confidence of the interval.
        seed: of the resamples.
    """
    # 1. The difference, on the runs that have both.
    known = ~np.isnan(scores) & ~np.isnan(rival)
    own_pairs = pair_runs(np.where(known, scores, np.nan), is_wrong, strata)
    rival_pairs = pair_runs(np.where(known, rival, np.nan), is_wrong, strata)
    if not own_pairs.enough:
        return Estimate(None, level=level)
    value = own_pairs.auroc - rival_pairs.auroc

    # 2. Its interval.
    if not _enough_clusters(clusters, known):
        return Estimate(value, level=level)
    weights = _resampled(clusters, times, seed)
    differences = own_pairs.resampled(weights) - rival_pairs.resampled(weights)
    return _with_interval(value, differences, level)


def _enough_clusters(clusters: Sequence[Hashable], known: Bools) -> bool:
    """Return whether the runs that have a score are of enough clusters to resample them."""
    known_clusters = [c for c, is_known in zip(clusters, known.tolist(), strict=True) if is_known]
    return len(members(known_clusters)) >= LEAST_CLUSTERS


def _with_interval(value: float, resampled: Floats, level: float) -> Estimate:
    """Return an estimate with the percentiles of its resamples; one without a pair is nan."""
    defined = resampled[~np.isnan(resampled)]
    if not defined.size:
        return Estimate(value, level=level)
    lower, upper = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(lower), float(upper), level, int(defined.size))


def _codes_of(keys: Sequence[Hashable]) -> NDArray[np.intp]:
    """Return a number for each key, the same for equal ones."""
    codes = np.empty(len(keys), dtype=np.intp)
    for code, places in enumerate(members(keys)):
        codes[places] = code
    return codes


def _resampled(clusters: Sequence[Hashable], times: int, seed: int) -> NDArray[np.float64]:
    """Draw clusters with replacement; return how often each run is drawn, (times, runs)."""
    groups = members(clusters)
    chosen = np.random.default_rng(seed).integers(len(groups), size=(times, len(groups)))
    weights = np.zeros((times, len(clusters)))
    for k, places in enumerate(groups):
        weights[:, places] = (chosen == k).sum(axis=1)[:, None]
    return weights


def operating_point(scores: Floats, is_wrong: Bools, false_alarms: float) -> Operating | None:
    """Return the lowest threshold whose false-alarm rate is at most `false_alarms`.

    Args:
        scores: one a run, larger meaning worse; nan where the figure was not measured.
        is_wrong: which runs went wrong.
        false_alarms: share of the good runs.

    Returns:
        None if there are no good runs, or no bad ones.
    """
    known = ~np.isnan(scores)
    good = np.sort(scores[known & ~is_wrong])
    bad_scores = scores[known & is_wrong]
    if not good.size or not bad_scores.size:
        return None

    # 1. The good run of which as many score higher as may be alarmed on.
    allowed = int(np.floor(false_alarms * good.size + 1e-9))
    threshold = float("-inf")
    if allowed < good.size:
        threshold = float(good[good.size - allowed - 1])

    # 2. What an alarm above its score does.
    is_hit = bad_scores > threshold
    is_false_alarm = good > threshold
    hits = int(np.sum(is_hit))
    alarms = int(np.sum(is_false_alarm)) + hits
    precision = None
    if alarms:
        precision = hits / alarms
    return Operating(
        threshold=threshold,
        false_alarms=float(np.mean(is_false_alarm)),
        recall=float(np.mean(is_hit)),
        precision=precision,
    )


def calibration(chances: Floats, is_wrong: Bools, bins: int = 5) -> list[Bin]:
    """Return bins of equal count by chance, each with the share that went wrong.

    Args:
        chances: one a run; nan where none could be given.
        is_wrong: which runs went wrong.
        bins: how many; fewer if there are fewer runs.
    """
    # 1. The runs in the order of their chance.
    known = ~np.isnan(chances)
    order = np.flatnonzero(known)[np.argsort(chances[known], kind="stable")]
    count = min(bins, max(len(order), 1))

    # 2. Bins of as many runs each. Only without any run is one empty.
    calibrated = []
    for places in np.array_split(order, count):
        if not places.size:
            continue
        size = int(places.size)
        hits = int(is_wrong[places].sum())
        lower, upper = wilson(hits, size)
        chance = float(chances[places].mean())
        calibrated.append(Bin(chance, runs=size, bad=hits, lower=lower, upper=upper))
    return calibrated


def wilson(hits: int, count: int, level: float = _LEVEL) -> tuple[float, float]:
    """Return the Wilson score interval of a share.

    Args:
        hits: of `count` trials.
        count: trials; of none the interval is 0 to 1.
        level: confidence.
    """
    if count == 0:
        return 0.0, 1.0
    interval = binomtest(hits, count).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)
