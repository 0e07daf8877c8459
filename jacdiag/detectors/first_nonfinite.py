"""JD505: what was not finite first, as far as the figures of the step decide it.

The optimizer spreads a value that is not finite over everything that it updates, and clipping by a
norm that is not finite does so with all gradients. So each sentence says only what the figures from
before the optimizer's step decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_SHOWN = 4  # names in a sentence


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """What was not finite at one step.

    Attributes:
        loss: of the step; None if the loop did not pass it.
        groups: sub-layers with a gradient that is not finite, the one nearest to the input first.
        weights: names of the weights that were not finite before the optimizer's step; None if
            nobody looked.
        gradients: names of the parameters whose gradient was not finite; None if nobody looked.
        parameters: how many parameters had a gradient; None if nobody looked.
        ordered: names that are sub-layers in the order of depth.
        previous: the last step whose loss and gradients were finite.
        weights_before: the weights were seen to be finite at `previous`.
    """

    loss: float | None
    groups: Sequence[str] = ()
    weights: Sequence[str] | None = None
    gradients: Sequence[str] | None = None
    parameters: int | None = None
    ordered: Sequence[str] = ()
    previous: int | None = None
    weights_before: bool = False


@dataclass(frozen=True)
class Explanation:
    """A sentence and the names in it.

    Attributes:
        what: the sentence.
        where: what was not finite first, as far as it is known; empty if it is not.
        first: "weight", "gradient", "forward", "backward" or "unknown".
    """

    what: str
    where: list[str] = field(default_factory=list)
    first: str = "unknown"


def explain_nonfinite(found: NonFinite) -> Explanation:
    """Return what the figures of one step say of the first value that was not finite."""
    lost = found.loss is not None and not math.isfinite(found.loss)
    if found.weights:
        return _explain_weights(found)
    if lost and found.weights is not None:
        what = (
            "the loss is not finite, and every weight was before the optimizer's step: the batch "
            "or the forward made "
            "it; which sub-layer did first is not known"
        )
        return Explanation(what, [], "forward")
    if lost:
        what = (
            "the loss is not finite; what was not finite first is not known, since the weights "
            "were not looked at"
        )
        return Explanation(what + " before the optimizer's step")
    if found.gradients and found.weights is not None:
        return _explain_gradients(found)
    return _explain_groups(found.groups)


def _explain_weights(found: NonFinite) -> Explanation:
    weights = list(found.weights or ())
    since = ""
    if found.previous is not None:
        since = f"; the loss and the gradients of step {found.previous} were finite"
    if found.previous is not None and found.weights_before:
        since += (
            ", and its weights, so that the update of that step or a write from outside made it"
        )
    if len(weights) == 1:
        what = (
            f"the weight {weights[0]} was not finite before the optimizer's step, every other "
            f"weight was{since}"
        )
        return Explanation(what, weights, "weight")
    what = (
        f"{len(weights)} weights were not finite before the optimizer's step, which of them first "
        "is not known: "
        f"{_listed(weights)}{since}"
    )
    return Explanation(what, weights, "weight")


def _explain_gradients(found: NonFinite) -> Explanation:
    gradients = list(found.gradients or ())
    fine = "every weight was finite before the optimizer's step"
    if found.loss is not None:
        fine = f"the loss and {fine}"
    if len(gradients) == 1:
        what = f"the gradient of {gradients[0]} is not finite, every other gradient is; {fine}"
        return Explanation(what, gradients, "gradient")
    if len(gradients) == found.parameters:
        what = (
            f"every gradient is not finite; {fine}. Which was first is not known: clipping by a "
            "norm that is not "
            "finite spreads one to all (clip_grad_norm_(..., error_if_nonfinite=True) raises "
            "before it does)"
        )
        return Explanation(what, [], "unknown")
    affected = [name for name in found.ordered if name in found.groups]
    what = (
        f"the gradients of {len(gradients)} of {found.parameters} parameters are not finite; {fine}"
    )
    if not affected:
        return Explanation(
            f"{what}: {_listed(gradients)}; which was first is not known", gradients, "unknown"
        )
    nearest = affected[-1]
    what += f". The backward meets {nearest} first of the sub-layers among them"
    return Explanation(what, [nearest, *affected[-2::-1]], "backward")


def _explain_groups(groups: Sequence[str]) -> Explanation:
    """Return what gradients by sub-layer say: the order of a list is no order in time."""
    if not groups:
        return Explanation("gradients are not finite; where is not known")
    if len(groups) == 1:
        return Explanation(
            f"gradients are not finite, only in {groups[0]}", list(groups), "gradient"
        )
    what = (
        f"gradients are not finite in {len(groups)} sub-layers, which first is not known: "
        f"{_listed(groups)}"
    )
    return Explanation(what, list(groups), "unknown")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
