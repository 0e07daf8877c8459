"""Judge JD502: a spike of the loss at one step that the gradient norm confirms.

A corrupted batch does not last for the three steps that JD501 waits for. So one step is enough if
several signals agree: the three published ones, or loss and gradient norm compared with the line
through the last 48 steps.
"""

from __future__ import annotations

from jacdiag.detectors.joint_detector import EARLIER_STEPS, StepScores
from jacdiag.detectors.recent_trend import WINDOW
from jacdiag.detectors.step_figures import StepFigures, StepLimits, StepSignals
from jacdiag.rules.finding_numbers import plain


def find_spike(
    figures: StepFigures,
    scores: StepScores,
    signals: StepSignals,
    limits: StepLimits,
    usual_loss: float | None,
) -> str | None:
    """Return what stands out at a step, or None if it is no spike.

    Args:
        figures: of the step.
        scores: how far loss and gradient norm stand above the steps before, in standard deviations.
        signals: which single signals stand out.
        limits: of the signals.
        usual_loss: of the last steps; None while there are too few.

    Returns:
        A sentence that names the test which found it, with its figures.
    """
    if is_recent_spike(figures, scores, limits, usual_loss):
        return _describe_recent(scores)
    if signals.high_loss and signals.above_median and signals.gradient_vote:
        return (
            f"the loss stands {plain(scores.loss)} standard deviations above {EARLIER_STEPS}, "
            f"and the gradient norm {plain(scores.gradient_ema)} above its exponential mean"
        )
    return None


def is_recent_spike(
    figures: StepFigures, scores: StepScores, limits: StepLimits, usual_loss: float | None
) -> bool:
    """Return whether loss and gradient norm stand out of the last 48 steps at this very step.

    The loss has to stand out, because batches differ in their gradient norm by much more than in
    their loss. It has to be 0.1 above its usual value too, unless the gradient norm stands as far
    out as the loss. Over 375,000 steps of the lab's healthy runs this is true once. Without the
    gradient norm it is true twice. The gradient norm is left out if it is only known after
    clipping.
    """
    # 1. The loss must stand out of its own line.
    loss_z = scores.loss_recent
    if loss_z is None or loss_z <= limits.one_signal:
        return False
    if figures.loss is None or usual_loss is None:
        return False
    is_loss_high = figures.loss > usual_loss + limits.median_vote

    # 2. So must the gradient norm, as far as it is known.
    if figures.after_clipping:
        return is_loss_high
    if scores.gradient_recent is None:
        return False
    if is_loss_high:
        return scores.gradient_recent > limits.gradient_vote
    # The loss of a model of which little is trained hardly moves, and hardly scatters.
    return scores.gradient_recent > limits.one_signal


def _describe_recent(scores: StepScores) -> str:
    """Return how far loss and gradient norm stand above the line of the last steps."""
    line = f"above the line of the last {WINDOW} steps"
    loss_z = plain(scores.loss_recent)
    if scores.gradient_recent is None:
        return f"the loss stands {loss_z} standard deviations {line}"
    gradient_z = plain(scores.gradient_recent)
    return f"the loss stands {loss_z} and the gradient norm {gradient_z} standard deviations {line}"
