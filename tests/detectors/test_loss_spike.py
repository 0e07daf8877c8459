"""JD502: the sentence names the test that found the spike, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jacdiag.detectors.joint_detector import StepScores
from jacdiag.detectors.loss_spike import find_spike
from jacdiag.detectors.step_figures import StepFigures, StepLimits, StepSignals
from jacdiag.rules.thresholds import load_thresholds

LIMITS = StepLimits.from_thresholds(load_thresholds())
STEP = StepFigures(500, 3.0, 2.0)
ALL = StepSignals(high_loss=True, high_gradient=True, above_median=True, gradient_vote=True)
NONE = StepSignals(high_loss=False, high_gradient=False, above_median=False, gradient_vote=False)
OUT, IN = LIMITS.one_signal + 1, 1.0


def test_spike_over_the_line_of_the_last_steps_names_that_line() -> None:
    scores = StepScores(loss_recent=OUT, gradient_recent=OUT)
    what = find_spike(STEP, scores, NONE, LIMITS, usual_loss=2.0)
    assert what is not None
    assert what.endswith("above the line of the last 48 steps")
    assert "gradient norm" in what


def test_spike_by_the_published_signals_does_not_name_the_line() -> None:
    scores = StepScores(loss=7.5, gradient_ema=4.5, loss_recent=IN, gradient_recent=IN)
    what = find_spike(STEP, scores, ALL, LIMITS, usual_loss=2.0)
    assert what == (
        "the loss stands 7.50 standard deviations above the mean of the steps before "
        "(at most 1,000), and the gradient norm 4.50 above its exponential mean"
    )


def test_gradient_norm_without_a_score_is_not_named() -> None:
    clipped = replace(STEP, after_clipping=True)
    scores = StepScores(loss_recent=OUT, gradient_ema=4.5)
    what = find_spike(clipped, scores, NONE, LIMITS, usual_loss=2.0)
    assert what is not None
    assert "gradient norm" not in what


@pytest.mark.parametrize("left_out", ["high_loss", "above_median", "gradient_vote"])
def test_two_of_the_three_published_signals_are_no_spike(left_out: str) -> None:
    signals = replace(ALL, **{left_out: False})
    scores = StepScores(loss=7.5, gradient_ema=4.5, loss_recent=IN, gradient_recent=IN)
    assert find_spike(STEP, scores, signals, LIMITS, usual_loss=2.0) is None


@pytest.mark.parametrize(
    ("loss_z", "gradient_z", "is_spike"),
    [
        (LIMITS.one_signal, OUT, False),  # on the limit
        (OUT, LIMITS.gradient_vote, False),  # on the limit
        (OUT, LIMITS.gradient_vote + 0.1, True),
    ],
)
def test_limits_of_the_line(loss_z: float, gradient_z: float, is_spike: bool) -> None:
    scores = StepScores(loss_recent=loss_z, gradient_recent=gradient_z)
    what = find_spike(STEP, scores, NONE, LIMITS, usual_loss=2.0)
    assert (what is not None) is is_spike
