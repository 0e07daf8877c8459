"""Say what each live rule still waits for: a young run is not guarded by all of them."""

from __future__ import annotations

from dataclasses import dataclass

from jacdiag.detectors import drift, recent_trend, update_jump

Waits = dict[str, str]
"""Rule code -> what it waits for. A rule that is ready has no entry.

A rule that judges two kinds of figures has two keys.
"""

OF_NORMS = "JD504 of branch norms"
"""Key of the figures of probes that JD504 judges.

It judges statistics as well. They come more often, and make that half of it ready sooner.
"""

# steps before the exponential z-score of the gradient norm (ZClip, arXiv 2504.02507)
_EXPONENTIAL = 25


@dataclass(frozen=True, kw_only=True)
class SampleCounts:
    """How many samples the live rules of a run have.

    Attributes:
        losses: steps with a loss, as the recent trend counts them.
        gradients: steps with a gradient norm, as the recent trend counts them.
        gradient_ema: steps in the exponential mean of the gradient norm.
        rounds: rounds of statistics and probes.
        probes: probes.
        updates_of_one: update norms of the sub-layer that has the most of them.
    """

    losses: int
    gradients: int
    gradient_ema: int
    rounds: int
    probes: int
    updates_of_one: int


def waits_of(counts: SampleCounts) -> Waits:
    """Return what the rules of a run still wait for.

    JD505 waits for nothing. JD105 is left out: it needs a fresh model of a kind that recorded runs
    know.

    Args:
        counts: of the samples so far.
    """
    # In the order of the codes, as they are shown.
    waits: Waits = {}
    if counts.gradients < recent_trend.LEAST:
        waits["JD501"] = f"{recent_trend.LEAST} steps with gradients"
    if counts.losses < recent_trend.LEAST:
        waits["JD502"] = f"{recent_trend.LEAST} steps with a loss"
    if counts.gradient_ema < _EXPONENTIAL:
        waits["JD503"] = f"{_EXPONENTIAL} steps with gradients"
    if counts.rounds < drift.LEAST:
        waits["JD504"] = f"{drift.LEAST} rounds of statistics or probes"
    if counts.probes < drift.LEAST:
        waits[OF_NORMS] = f"{drift.LEAST} probes"
    if counts.updates_of_one < update_jump.LEAST:
        waits["JD506"] = (
            f"{update_jump.LEAST} update norms of one sub-layer at a steady learning rate"
        )
    if counts.probes < 1:
        waits["JD507"] = "a first probe"
    return waits
