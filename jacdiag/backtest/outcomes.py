"""What became of a run, from its loss alone: diverged, spiked or healthy, and when it began.

Definitions:
    spike rate      steps whose loss lies over the median of the 201 steps around them by 0.1, per
                    10,000 steps (arXiv 2608.30320)
    spike score     share of the steps whose loss lies 7 standard deviations or more from the mean
                    of the 1,000 before (OLMo 2, arXiv 2501.00656)
    diverged        the loss is not finite, or its median over the last tenth of the run lies over
                    the lowest such median of any earlier tenth by `margin`: it left for good
    spiked          both of the first two saw the same step, after the first tenth of the run; a
                    shorter run has shorter windows
    left            the first step of what is labelled, for lead times: of a spike, its own; of a
                    divergence, the first after the last one around which the loss lay within half
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
    """Label a run by its outcome.

    Args:
        loss: one value for each step that has one. A nan before the last finite loss is a gap;
            after it the run broke.
        margin: of a divergence, in the unit of the loss.

    Example:
        >>> label(np.linspace(4.0, 2.0, 400)).outcome
        'healthy'
    """
    begin, loss = _carried(loss)
    count = len(loss)

    # 1. Spikes, by both definitions.
    over_median = _over_median(loss)
    far_from_mean = _far_from_mean(loss)
    warm = int(WARM * count)
    over_median[:warm] = False
    far_from_mean[:warm] = False
    both = over_median & far_from_mean  # in small batches a tenth of a nat alone is noise

    # 2. The outcome, and the step at which it began.
    left = _left_for_good(loss, margin)
    outcome: Outcome = "healthy"
    if left is not None:
        outcome = "diverged"
    elif both.any():
        outcome = "spiked"
        left = int(np.flatnonzero(both)[0])
    if left is not None:
        left += begin

    # 3. The figures.
    if not count:
        return Label(outcome, 0.0, 0.0, left, math.nan, count)
    final = math.nan
    if math.isfinite(loss[-1]):
        final = float(np.median(loss[-max(1, count // 10) :]))
    spike_rate = 1e4 * float(over_median.mean())
    spike_score = float(far_from_mean.mean())
    return Label(outcome, spike_rate, spike_score, left, final, count)


def _carried(loss: Floats) -> tuple[int, Floats]:
    """Return where the first finite loss is, and the losses from there with their gaps filled.

    A gap takes the loss before it. An end that broke stays so.
    """
    filled = np.array(loss, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(filled))
    if not known.size:
        return 0, filled
    for k in np.flatnonzero(np.isnan(filled)):
        is_gap = known[0] < k < known[-1]
        if is_gap:
            filled[k] = filled[k - 1]
    return int(known[0]), filled[known[0] :]


def _over_median(loss: Floats) -> NDArray[np.bool_]:
    """Return which losses lie over the median of the window around their step by 0.1.

    A shorter run has a shorter window. A loss that is not finite counts as over it.
    """
    half = min(WINDOW, max(3, len(loss) // 5)) // 2
    is_over = ~np.isfinite(loss)
    for k in np.flatnonzero(~is_over):
        around = loss[max(0, k - half) : k + half + 1]
        around = around[np.isfinite(around)]
        is_over[k] = loss[k] > np.median(around) + OVER
    return is_over


def _far_from_mean(loss: Floats) -> NDArray[np.bool_]:
    """Return which losses lie 7 standard deviations or more from the mean of those before."""
    is_far = np.zeros(len(loss), dtype=bool)
    # a short run would carry its first fall in a long memory
    memory = min(MEMORY, max(LEAST, len(loss) // 5))
    for k in range(LEAST, len(loss)):
        before = loss[max(0, k - memory) : k]
        before = before[np.isfinite(before)]
        if before.size < LEAST:
            continue
        if not math.isfinite(loss[k]):
            is_far[k] = True
            continue
        mean = before.mean()
        deviation = max(float(before.std()), 1e-3 * abs(float(mean)), 1e-300)
        is_far[k] = abs(loss[k] - mean) >= DEVIATIONS * deviation
    return is_far


def _left_for_good(loss: Floats, margin: float) -> int | None:
    """Return the step at which a divergence began; None if there was none.

    A loss that ends up not finite has mostly left its band before: the earlier of the two counts.
    Whether it is in its band is decided by the median around a step, for in a noisy loss one low
    step is no return.
    """
    # 1. The medians of the tenths of the run, as far as its loss is finite.
    broken = np.flatnonzero(~np.isfinite(loss))
    known = loss[: broken[0]] if broken.size else loss
    tenth = max(1, len(loss) // 10)
    begins = range(0, len(known) - tenth + 1, tenth)
    medians = [float(np.median(known[k : k + tenth])) for k in begins]

    # 2. Whether the run diverged at all.
    if not broken.size:
        is_short = len(medians) < 2 or len(loss) < 10
        if is_short or float(np.median(loss[-tenth:])) <= min(medians[:-1]) + margin:
            return None
        medians.pop()
    if not medians:
        return int(broken[0])

    # 3. The first step after the last one in the band.
    half = tenth // 8
    around = np.array(
        [np.median(known[max(0, k - half) : k + half + 1]) for k in range(len(known))]
    )
    in_band = np.flatnonzero(around <= min(medians) + margin / 2)
    last = len(loss) - 1
    if in_band.size:
        return int(min(in_band[-1] + 1, last))
    return int(broken[0]) if broken.size else last
