"""What became of a run, from its loss alone: diverged, spiked by published definitions, or healthy;
and when it began.

Definitions:
    spike rate      steps whose loss lies over the median of the 201 steps around them by 0.1, per
                    10,000 steps (arXiv 2608.30320)
    spike score     share of the steps whose loss lies 7 standard deviations or more from the mean
                    of the 1,000 before (OLMo 2, arXiv 2501.00656)
    diverged        the loss is not finite, or its median over the last tenth of the run lies over
                    the lowest such median of any earlier tenth by `margin`: it left for good
    spiked          both of the first two saw the same step, behind the first tenth of the run; a
                    shorter run has shorter windows
    left            the first step of what is labelled, for lead times: of a spike, its own; of a
                    divergence, the first behind the last one around which the loss lay within half
                    the margin of the lowest median before
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from jacdiag.records.backtest import Label, Outcome

Floats = NDArray[np.float64]
WINDOW, OVER = 201, 0.1
MEMORY, DEVIATIONS, LEAST = 1000, 7.0, 60
MARGIN = 0.5
WARM = 0.1  # share of the run that the initial fall of the loss takes; no spike is counted in it


def label(loss: Floats, *, margin: float = MARGIN) -> Label:
    """Labels a run.

    Args:
        loss: one value a step that has one; a nan before the last finite loss is a gap, behind it
            the run broke.
        margin: of a divergence, in the unit of the loss.

    Example:
        >>> label(np.linspace(4.0, 2.0, 400)).outcome
        'healthy'
    """
    begun, loss = _carried(loss)
    count = len(loss)
    finite = np.isfinite(loss)
    spikes = _over_median(loss)
    far = _far_from_mean(loss)
    spikes[: int(WARM * count)] = far[: int(WARM * count)] = False
    both = spikes & far  # in small batches a tenth of a nat alone is noise
    left = _left_for_good(loss, margin)
    final = float(np.median(loss[-max(1, count // 10) :])) if count and finite[-1] else math.nan
    outcome: Outcome = "diverged" if left is not None else "spiked" if both.any() else "healthy"
    if outcome == "spiked":
        left = int(np.flatnonzero(both)[0])
    rate = 1e4 * float(spikes.mean()) if count else 0.0
    left = None if left is None else left + begun
    return Label(outcome, rate, float(far.mean()) if count else 0.0, left, final, count)


def _carried(loss: Floats) -> tuple[int, Floats]:
    """Where the first finite loss is, and the losses from there. Gaps take the last one, a broken
    end stays so.
    """
    made = np.array(loss, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(made))
    if not known.size:
        return 0, made
    for k in np.flatnonzero(np.isnan(made)):
        if known[0] < k < known[-1]:
            made[k] = made[k - 1]
    return int(known[0]), made[known[0] :]


def _over_median(loss: Floats) -> NDArray[np.bool_]:
    """Over the median of the window around each step by 0.1; a shorter run has a shorter window."""
    half = min(WINDOW, max(3, len(loss) // 5)) // 2
    found = np.zeros(len(loss), dtype=bool)
    for k, value in enumerate(loss):
        around = loss[max(0, k - half) : k + half + 1]
        around = around[np.isfinite(around)]
        found[k] = not math.isfinite(value) or (
            around.size > 0 and value > np.median(around) + OVER
        )
    return found


def _far_from_mean(loss: Floats) -> NDArray[np.bool_]:
    found = np.zeros(len(loss), dtype=bool)
    # a short run would carry its first fall in a long memory
    memory = min(MEMORY, max(LEAST, len(loss) // 5))
    for k in range(LEAST, len(loss)):
        before = loss[max(0, k - memory) : k]
        before = before[np.isfinite(before)]
        if before.size >= LEAST:
            deviation = max(float(before.std()), 1e-3 * abs(float(before.mean())), 1e-300)
            found[k] = (
                not math.isfinite(loss[k]) or abs(loss[k] - before.mean()) >= DEVIATIONS * deviation
            )
    return found


def _left_for_good(loss: Floats, margin: float) -> int | None:
    """The step at which a divergence began; None if there was none.

    A loss that ends up not finite has mostly left its band before: the earlier of the two counts.
    Whether it is in its band is asked of the median around a step, for in a noisy loss one low step
    is no return.
    """
    broken = np.flatnonzero(~np.isfinite(loss))
    known = loss[: broken[0]] if broken.size else loss
    tenth = max(1, len(loss) // 10)
    medians = [
        float(np.median(known[k : k + tenth])) for k in range(0, len(known) - tenth + 1, tenth)
    ]
    if not broken.size:
        if (
            len(medians) < 2
            or len(loss) < 10
            or float(np.median(loss[-tenth:])) <= min(medians[:-1]) + margin
        ):
            return None
        medians.pop()
    if not medians:
        return int(broken[0])
    half = tenth // 8
    around = np.array(
        [np.median(known[max(0, k - half) : k + half + 1]) for k in range(len(known))]
    )
    stayed = np.flatnonzero(around <= min(medians) + margin / 2)
    return (
        int(min(stayed[-1] + 1, len(loss) - 1))
        if stayed.size
        else int(broken[0] if broken.size else len(loss) - 1)
    )
