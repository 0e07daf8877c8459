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

# Of the spike rate: steps of the window, and nats over its median.
WINDOW = 201
OVER = 0.1

# Of the spike score: steps before, standard deviations, and how many steps there must be.
MEMORY = 1000
DEVIATIONS = 7.0
LEAST = 60

# Nats over the lowest median that a run diverges by.
MARGIN = 0.5
# Share of the run that the initial fall of the loss takes. No spike is counted in it.
WARM = 0.1


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
    begin, loss = _without_gaps(loss)
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


def _without_gaps(loss: Floats) -> tuple[int, Floats]:
    """Return where the first finite loss is, and the losses from there with their gaps filled.

    A gap takes the loss before it. An end that broke stays so.
    """
    filled = np.array(loss, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(filled))
    if not known.size:
        return 0, filled
    first, last = known[0], known[-1]
    for k in np.flatnonzero(np.isnan(filled)):
        is_gap = first < k < last
        if is_gap:
            filled[k] = filled[k - 1]
    return int(first), filled[first:]


def _over_median(loss: Floats) -> NDArray[np.bool_]:
    """Return which losses lie over the median of the window around their step by 0.1.

    A shorter run has a shorter window. A loss that is not finite counts as over it.
    """
    window = min(WINDOW, max(3, len(loss) // 5))
    half = window // 2
    is_over = ~np.isfinite(loss)
    for k in np.flatnonzero(~is_over):
        around = loss[max(0, k - half) : k + half + 1]
        around = around[np.isfinite(around)]
        is_over[k] = loss[k] > np.median(around) + OVER
    return is_over


def _far_from_mean(loss: Floats) -> NDArray[np.bool_]:
    """Return which losses lie 7 standard deviations or more from the mean of those before."""
    is_far = np.zeros(len(loss), dtype=bool)

    # A short run would carry its first fall in a long memory.
    memory = min(MEMORY, max(LEAST, len(loss) // 5))
    for k in range(LEAST, len(loss)):
        # 1. The finite losses before.
        before = loss[max(0, k - memory) : k]
        before = before[np.isfinite(before)]
        if before.size < LEAST:
            continue

        # 2. How far this one is from them.
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
    is_broken = broken.size > 0
    known = loss[: broken[0]] if is_broken else loss
    tenth = max(1, len(loss) // 10)
    begins = range(0, len(known) - tenth + 1, tenth)
    medians = [float(np.median(known[k : k + tenth])) for k in begins]

    # 2. Whether the run diverged at all. Its own last tenth is no earlier one.
    if not is_broken:
        if not _ends_high(loss, tenth, medians, margin):
            return None
        medians.pop()

    # Without a full tenth there is no band that the loss could leave.
    if not medians:
        return int(broken[0])

    # 3. The first step after the last one in the band.
    last = len(loss) - 1
    around = _medians_around(known, half=tenth // 8)
    in_band = np.flatnonzero(around <= min(medians) + margin / 2)
    if in_band.size:
        return int(min(in_band[-1] + 1, last))

    # 4. A run that was never in its band began where it broke.
    if is_broken:
        return int(broken[0])
    return last


def _ends_high(loss: Floats, tenth: int, medians: list[float], margin: float) -> bool:
    """Return whether the last tenth of a run lies over every earlier one by the margin."""
    is_short = len(medians) < 2 or len(loss) < 10
    if is_short:
        return False
    final = float(np.median(loss[-tenth:]))
    return not final <= min(medians[:-1]) + margin


def _medians_around(loss: Floats, half: int) -> Floats:
    """Return the median of the losses around each step, `half` on either side."""
    medians = [np.median(loss[max(0, k - half) : k + half + 1]) for k in range(len(loss))]
    return np.array(medians)
