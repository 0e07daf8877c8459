"""When each live rule is ready: a young run is not guarded by all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jacdiag.detectors import drift
from jacdiag.detectors import recent_trend as recent
from jacdiag.detectors import update_jump as updates

if TYPE_CHECKING:
    from jacdiag.detectors.live_rules import LiveRules

Waits = dict[str, str]
"""Rule code -> what it waits for; a rule that is ready is not in it. A part of a rule has a key of
its own.
"""

OF_NORMS = "JD504 of branch norms"
"""The part of JD504 that looks at figures of probes. Statistics, which come more often, make the
other part ready.
"""

# steps before the exponential z-score of the gradient norm (ZClip, arXiv 2504.02507)
_EXPONENTIAL = 25


def waits_of(live: LiveRules) -> Waits:
    """Return what the rules of a run still wait for.

    JD505 waits for nothing. JD105 is left out: it needs a fresh model of a kind that recorded runs
    know.
    """
    waits: Waits = {}
    losses, gradients = live.recent_loss.count, live.recent_gradient.count
    if gradients < recent.LEAST:
        waits["JD501"] = f"{recent.LEAST} steps with gradients"
    if losses < recent.LEAST:
        waits["JD502"] = f"{recent.LEAST} steps with a loss"
    if live.z.count < _EXPONENTIAL:
        waits["JD503"] = f"{_EXPONENTIAL} steps with gradients"
    if live.drift.looks < drift.LEAST:
        waits["JD504"] = f"{drift.LEAST} rounds of statistics or probes"
    if live.probes < drift.LEAST:
        waits[OF_NORMS] = f"{drift.LEAST} probes"
    if _most(live.updates.samples) < updates.LEAST:
        waits["JD506"] = f"{updates.LEAST} update norms of one sub-layer at a steady learning rate"
    if live.probes < 1:
        waits["JD507"] = "a first probe"
    return waits


def _most(samples: Mapping[str, object]) -> int:
    return max((len(values) for values in samples.values()), default=0)  # type: ignore[arg-type]
