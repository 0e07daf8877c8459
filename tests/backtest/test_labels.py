"""What became of a run: curves that are made so, and the published definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jacdiag.backtest.outcomes import Label, label


def falling(steps: int = 1000, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    k = np.arange(steps)
    return (
        2.0
        + 2.5 * np.exp(-k / (steps / 15))
        + noise * np.random.default_rng(seed).normal(size=steps)
    )


def test_a_falling_loss_is_healthy() -> None:
    for seed in range(20):
        found = label(falling(seed=seed))
        assert (found.outcome, found.left, found.spike_rate) == ("healthy", None, 0.0)
        assert found.final == pytest.approx(2.0, abs=0.05)


def test_one_that_leaves_for_good_has_diverged() -> None:
    loss = falling()
    loss[700:] += np.minimum(1.5, 0.05 * np.arange(300))
    found = label(loss)
    assert found.outcome == "diverged" and found.left is not None and 700 <= found.left <= 710


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_that_is_not_finite_at_its_end_has_diverged(value: float) -> None:
    loss = falling()
    loss[640:] = value
    found = label(loss)
    assert (found.outcome, found.left) == ("diverged", 640) and math.isnan(found.final)


def test_one_that_leaves_its_band_before_it_is_not_finite_left_then() -> None:
    loss = falling()
    loss[600:640] += 0.05 * np.arange(40)
    loss[640:] = math.nan
    found = label(loss)
    assert found.outcome == "diverged" and found.left is not None and 603 <= found.left <= 608


def test_one_low_step_of_a_noisy_loss_is_no_return() -> None:
    loss = falling(noise=0.15)
    loss[600:] += 0.8
    loss[[700, 850]] -= 0.8
    found = label(loss)
    assert found.outcome == "diverged" and found.left is not None and 590 <= found.left <= 610


def test_a_step_counts_as_a_spike_where_both_definitions_see_it() -> None:
    loss = falling(noise=0.2, seed=3)
    assert label(loss).spike_rate > 100 and label(loss).outcome == "healthy", (
        "noise passes a median by 0.1"
    )
    loss[500] += 4.0
    assert (label(loss).outcome, label(loss).left) == ("spiked", 500)


def test_one_that_breaks_within_its_first_steps_left_there() -> None:
    assert label(np.array([5.0, 5.1, math.inf] + [math.nan] * 97)).left == 2


def test_one_that_comes_back_has_spiked() -> None:
    loss = falling()
    loss[500:506] += 1.0
    found = label(loss)
    assert (found.outcome, found.left) == ("spiked", 500)
    assert found.spike_rate == pytest.approx(1e4 * 6 / 1000) and 0 < found.spike_score <= 6 / 1000


def test_the_first_fall_is_no_spike_and_no_divergence() -> None:
    loss = falling()
    loss[:20] += 3.0
    assert label(loss).outcome == "healthy"


def test_one_that_never_learns_is_not_called_diverged() -> None:
    assert label(np.full(500, 5.5) + 0.01 * np.sin(np.arange(500))).outcome == "healthy"


def test_a_margin_is_a_margin() -> None:
    loss = falling(noise=0.0)
    loss[800:] = 2.0 + 0.6
    assert label(loss).outcome == "diverged" and label(loss, margin=0.7).outcome != "diverged"


def test_steps_that_were_not_logged_are_no_divergence() -> None:
    loss = falling()
    loss[::2] = math.nan
    loss[-1] = 2.0
    assert label(loss).outcome == "healthy"


def test_short_and_empty_runs_have_a_label() -> None:
    for steps in (0, 1, 5, 9):
        assert label(falling(max(steps, 1))[:steps]).outcome == "healthy"


def test_a_label_is_a_record() -> None:
    found = label(falling())
    assert Label.from_dict(found.to_dict()) == found
