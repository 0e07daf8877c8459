"""Ranking statistics against definitions written out, SciPy, and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu

from jacdiag.backtest.metrics import (
    LEAST_CLUSTERS,
    auroc,
    auroc_interval,
    calibration,
    operating_point,
    pairs_won,
    wilson,
)

pytestmark = pytest.mark.check("backtest")

RUN = st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 2))
RUNS = st.lists(RUN, min_size=1, max_size=30)


def arrays(runs):  # type: ignore[no-untyped-def]
    scores, bad, strata = zip(*runs, strict=True)
    return np.array(scores, float), np.array(bad), list(strata)


@given(RUNS)
def test_auroc_is_the_share_of_pairs_within_strata(runs: list[tuple[int, bool, int]]) -> None:
    scores, bad, strata = arrays(runs)
    pairs = [
        (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
        for i, j in itertools.product(range(len(runs)), repeat=2)
        if bad[i] and not bad[j] and strata[i] == strata[j]
    ]
    found = auroc(scores, bad, strata)
    assert found == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_auroc_is_mann_whitneys_u() -> None:
    draw = np.random.default_rng(0)
    scores, bad = draw.normal(size=200).round(1), draw.random(200) < 0.3
    u = mannwhitneyu(scores[bad], scores[~bad]).statistic
    assert auroc(scores, bad) == pytest.approx(u / (bad.sum() * (~bad).sum()))


@given(RUNS)
def test_turning_the_scores_round_turns_the_auroc_round(runs: list[tuple[int, bool, int]]) -> None:
    scores, bad, strata = arrays(runs)
    one, other = auroc(scores, bad, strata), auroc(-scores, bad, strata)
    assert (one is None and other is None) or one + other == pytest.approx(1.0)  # type: ignore[operator]


def test_what_was_not_measured_makes_no_pair() -> None:
    scores = np.array([math.nan, 2.0, 1.0, math.nan])
    assert pairs_won(scores, np.array([True, True, False, False])) == (1.0, 1)
    assert auroc(scores[:1], np.array([True])) is None


def test_figure_explained_by_its_stratum_has_no_auroc_gain() -> None:
    """The figure only knows the architecture: within it, it is a coin."""
    strata = ["a"] * 40 + ["b"] * 40
    bad = np.array(([True] * 30 + [False] * 10) + ([True] * 10 + [False] * 30))
    scores = np.array([1.0] * 40 + [0.0] * 40)
    assert auroc(scores, bad) == pytest.approx(0.75)
    assert auroc(scores, bad, strata) == 0.5


@given(RUNS)
def test_what_was_not_measured_ties_where_it_is_not_left_out(
    runs: list[tuple[int, bool, int]],
) -> None:
    scores, bad, strata = arrays(runs)
    left, tied = auroc(scores, bad, strata), auroc(scores, bad, strata, missing_ties=True)
    assert (tied == pytest.approx(left)) if left is not None else tied is None
    scores[::2] = math.nan
    pairs = [
        (i, j) for i in np.flatnonzero(bad) for j in np.flatnonzero(~bad) if strata[i] == strata[j]
    ]
    won = [
        0.5 if math.isnan(scores[i] - scores[j]) else (1 + np.sign(scores[i] - scores[j])) / 2
        for i, j in pairs
    ]
    tied = auroc(scores, bad, strata, missing_ties=True)
    assert tied == (pytest.approx(np.mean(won)) if won else None)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    truth, hits, trials = 0.760, 0, 60  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt(2))
    draw = np.random.default_rng(1)
    for trial in range(trials):
        bad = np.arange(80) % 2 == 0
        scores = draw.normal(size=80) + bad

        found = auroc_interval(scores, bad, None, range(80), times=200, seed=trial)
        assert found.value is not None and found.lower <= found.value <= found.upper  # type: ignore[operator]
        hits += found.lower <= truth <= found.upper  # type: ignore[operator]
    assert binomtest(hits, trials, 0.95).pvalue > 1e-3


def test_clusters_are_drawn_together() -> None:
    bad, right = np.arange(100) % 2 == 0, np.arange(100) < 60
    # the first 60 are ranked rightly, the last 40 the other way
    scores = np.where(right, bad, ~bad).astype(float)
    apart = auroc_interval(scores, bad, None, range(100), times=300)
    tens = auroc_interval(scores, bad, None, [k // 10 for k in range(100)], times=300)
    assert apart.value == tens.value == auroc(scores, bad)
    assert apart.upper - apart.lower < 0.3 < 0.4 < tens.upper - tens.lower  # type: ignore[operator]
    two = auroc_interval(scores, bad, None, ["a"] * 60 + ["b"] * 40, times=300)
    assert two.value == apart.value and two.lower is two.upper is None, (
        "two clusters tell no interval"
    )
    assert auroc_interval(scores, bad & False, None, range(100)).value is None


@given(st.lists(RUN, min_size=LEAST_CLUSTERS, max_size=30), st.integers(0, 5))
def test_a_resample_weighs_pairs_as_drawing_runs_would(
    runs: list[tuple[int, bool, int]], seed: int
) -> None:
    scores, bad, strata = arrays(runs)
    found = auroc_interval(scores, bad, strata, range(len(runs)), times=1, seed=seed)
    assert found.value == (
        pytest.approx(auroc(scores, bad, strata)) if found.value is not None else None
    )
    drawn = np.random.default_rng(seed).integers(len(runs), size=(1, len(runs)))[0]
    expected = auroc(scores[drawn], bad[drawn], [strata[k] for k in drawn])
    if found.value is not None and expected is not None:
        assert found.lower == pytest.approx(expected) == found.upper


def test_the_operating_point_keeps_its_false_alarm_rate() -> None:
    good, ill = np.arange(100.0), np.array([50.0, 95.5, 98.5, 200.0])
    scores, bad = np.concatenate([good, ill]), np.array([False] * 100 + [True] * 4)
    at = operating_point(scores, bad, 0.05)
    assert at is not None and (at.threshold, at.false_alarms, at.recall) == (94.0, 0.05, 0.75)
    assert at.precision == pytest.approx(3 / 8)
    none = operating_point(scores, bad, 0.0)
    assert none is not None and (none.false_alarms, none.recall, none.precision) == (0.0, 0.25, 1.0)
    assert operating_point(good, bad[:100], 0.1) is None


def test_calibration_counts_every_run_once() -> None:
    draw = np.random.default_rng(2)
    chances = draw.random(500)
    bad = draw.random(500) < chances
    bins = calibration(chances, bad)
    assert sum(b.runs for b in bins) == 500 and [b.chance for b in bins] == sorted(
        b.chance for b in bins
    )
    assert all(b.lower <= b.chance <= b.upper for b in bins)


def test_wilson_interval_equals_scipy() -> None:
    for hits, count in ((0, 10), (3, 10), (10, 10), (40, 200)):
        known = binomtest(hits, count).proportion_ci(0.95, method="wilson")
        assert wilson(hits, count) == pytest.approx((known.low, known.high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
