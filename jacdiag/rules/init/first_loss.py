"""What large logits do to the loss before the first step.

For small logits of random signs the loss is ln V plus half of their variance. For large ones it is
neither: a head that is tied to the embedding gives the token that it reads the largest logit, and
without one the largest of V draws bounds the sum. So the loss is measured, or no number is given.
"""

from __future__ import annotations

import math

from jacdiag.records import Report
from jacdiag.rules.finding_numbers import plain

_OF_NEXT_TOKENS = "next-token cross entropy"
UNKNOWN = "the first loss is far above ln V, that of a uniform guess"


def describe_first_loss(report: Report) -> str:
    """Return the loss at the probe and that of a uniform guess, as the part of a sentence.

    Without a measured loss of next tokens, no number is given.
    """
    # 1. The loss that was measured.
    loss = _loss_of_next_tokens(report)
    if loss is None or report.contract is None:
        return UNKNOWN

    # 2. What it is compared with.
    vocabulary = report.contract.sizes.get("V", 0.0)
    if vocabulary <= 1:
        return UNKNOWN
    guess = plain(math.log(vocabulary))
    return f"the loss at the probe is {plain(loss)}, that of a uniform guess ln V = {guess}"


def _loss_of_next_tokens(report: Report) -> float | None:
    """Return the loss of next tokens at the probe; None if it was not measured."""
    # 1. Without a backward there is none.
    network = report.network
    if network is None:
        return None

    # 2. Other outputs than logits have another one.
    record = network.loss or {}
    if record.get("kind") != _OF_NEXT_TOKENS:
        return None

    # 3. A loss that is not finite is another rule's.
    loss = record.get("value")
    if not isinstance(loss, float):
        return None
    if not math.isfinite(loss):
        return None

    return loss
