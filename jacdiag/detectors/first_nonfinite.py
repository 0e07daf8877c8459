"""Explain JD505: what was not finite first, as far as the figures of the step decide it.

The optimizer spreads a value that is not finite over everything that it updates, and clipping by a
norm that is not finite does so with all gradients. So each sentence only says what the figures from
before the optimizer's step decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from jacdiag.detectors.group_counts import count_groups
from jacdiag.records.batch_values import BatchValues, NonFiniteArgument
from jacdiag.records.run_log import Alert

First = Literal["weight", "gradient", "forward", "backward", "batch", "unknown"]
"""What was not finite first. "backward" means that several gradients are known and their order is
that of the backward pass.
"""

_OPEN = "the batch or the forward made it; which sub-layer did first is not known"
_SHOWN = 4  # names in a sentence


@dataclass(frozen=True, kw_only=True)
class NonFiniteStep:
    """What was not finite at one step.

    Attributes:
        loss: of the step; None if the loop did not pass it.
        groups: sub-layers with a gradient that is not finite, the one nearest to the input first.
        weights: names of the weights that were not finite before the optimizer's step; None if
            they were not checked.
        gradients: names of the parameters whose gradient was not finite; None if they were not
            checked.
        parameters: how many parameters had a gradient; None if they were not counted.
        ordered: names that are sub-layers in the order of depth.
        previous: the last step whose loss and gradients were finite.
        weights_before: the weights were finite at `previous`.
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
        first: what kind of value it was. `explain_batch` may turn it into "batch".
    """

    what: str
    where: list[str] = field(default_factory=list)
    first: First = "unknown"


# -- from the figures of the step ------------------------------------------------------------------
def explain_nonfinite(step: NonFiniteStep) -> Explanation:
    """Return what the figures of one step say about the first value that was not finite.

    Args:
        step: its figures.

    Example:
        >>> explain_nonfinite(NonFiniteStep(loss=math.nan, weights=["head.weight"])).first
        'weight'
    """
    # 1. Weights come first: whatever is computed from them cannot be finite.
    if step.weights:
        return _explain_weights(step)
    are_weights_finite = step.weights is not None

    # 2. Then the loss, which comes before every gradient.
    is_loss_lost = step.loss is not None and not math.isfinite(step.loss)
    if is_loss_lost and are_weights_finite:
        what = f"the loss is not finite, and every weight was before the optimizer's step: {_OPEN}"
        return Explanation(what, [], "forward")
    if is_loss_lost:
        what = (
            "the loss is not finite; what was not finite first is not known, since the weights "
            "were not looked at before the optimizer's step"
        )
        return Explanation(what)

    # 3. Then the gradients.
    if step.gradients and are_weights_finite:
        return _explain_gradients(step)
    return _explain_groups(step.groups)


def _explain_weights(step: NonFiniteStep) -> Explanation:
    """Return that weights were broken before the step, and since when."""
    weights = list(step.weights or ())
    # 1. What was still finite one step before.
    since = ""
    if step.previous is not None:
        since = f"; the loss and the gradients of step {step.previous} were finite"
    if step.previous is not None and step.weights_before:
        since += (
            ", and its weights, so that the update of that step or a write from outside made it"
        )

    # 2. Which weights are broken.
    if len(weights) == 1:
        what = (
            f"the weight {weights[0]} was not finite before the optimizer's step, every other "
            f"weight was{since}"
        )
    else:
        what = (
            f"{len(weights)} weights were not finite before the optimizer's step, which of them "
            f"first is not known: {_listed(weights)}{since}"
        )
    return Explanation(what, weights, "weight")


def _explain_gradients(step: NonFiniteStep) -> Explanation:
    """Return which gradients are broken while every weight was finite."""
    gradients = list(step.gradients or ())
    finite = "every weight was finite before the optimizer's step"
    if step.loss is not None:
        finite = f"the loss and {finite}"

    # 1. One gradient, or all of them.
    if len(gradients) == 1:
        what = f"the gradient of {gradients[0]} is not finite, every other gradient is; {finite}"
        return Explanation(what, gradients, "gradient")
    if len(gradients) == step.parameters:
        what = (
            f"every gradient is not finite; {finite}. Which was first is not known: clipping by a "
            "norm that is not finite spreads one to all (clip_grad_norm_(..., "
            "error_if_nonfinite=True) raises before it does)"
        )
        return Explanation(what)

    # 2. Some of them: the backward pass meets the deepest sub-layer first.
    affected = [name for name in step.ordered if name in step.groups]
    what = (
        f"the gradients of {len(gradients)} of {step.parameters} parameters are not finite; "
        f"{finite}"
    )
    if not affected:
        what += f": {_listed(gradients)}; which was first is not known"
        return Explanation(what, gradients, "unknown")
    deepest_first = affected[::-1]
    what += f". The backward meets {deepest_first[0]} first of the sub-layers among them"
    return Explanation(what, deepest_first, "backward")


def _explain_groups(groups: Sequence[str]) -> Explanation:
    """Return what gradients by sub-layer say: the order of a list is no order in time."""
    if not groups:
        return Explanation("gradients are not finite; where is not known")
    if len(groups) == 1:
        what = f"gradients are not finite, only in {groups[0]}"
        return Explanation(what, list(groups), "gradient")
    what = (
        f"gradients are not finite in {count_groups(groups)}, which first is not known: "
        f"{_listed(groups)}"
    )
    return Explanation(what, list(groups), "unknown")


# -- from the batch --------------------------------------------------------------------------------
def explain_batch(alert: Alert, batches: Sequence[BatchValues], ranks: int = 1) -> Alert:
    """Return an alert that also says what in the step's batches is not finite.

    A tensor of the batch is older than the loss and the gradients. It is what was first if all
    weights were finite.

    Args:
        alert: of JD505.
        batches: the arguments of the forwards of this step, in order; empty if they were not kept.
        ranks: processes of the run. Only the batches of one of them are known.
    """
    first = alert.evidence.get("first")
    if not batches or first not in ("forward", "gradient", "backward", "unknown"):
        return alert
    evidence = {**alert.evidence, "batches": [batch.to_dict() for batch in batches]}
    unusual = [argument for batch in batches for argument in batch.unusual]
    names = list(dict.fromkeys(argument.name for argument in unusual))

    # 1. The loss is not finite and the weights were: the batch or the forward made it.
    if first == "forward":
        start = alert.what.removesuffix(_OPEN)
        if not unusual:
            what = f"{start}{_explain_forward(batches, ranks)}"
            return replace(alert, what=what, evidence=evidence)
        evidence["first"] = "batch"
        what = (
            f"{start}the batch held such values when the forward got it: {_list_arguments(batches)}"
        )
        return replace(alert, what=what, where=names, evidence=evidence)

    # 2. Only gradients are known not to be finite: the batch is one more fact.
    if not unusual:
        what = f"{alert.what}. {_describe_finite(batches, ranks)}"
        return replace(alert, what=what, evidence=evidence)
    what = (
        f"{alert.what}. The batch held values that are not finite when the forward got it: "
        f"{_list_arguments(batches)}"
    )
    if alert.where:
        return replace(alert, what=what, evidence=evidence)
    evidence["first"] = "batch"
    return replace(alert, what=what, where=names, evidence=evidence)


def describe_batch(values: BatchValues) -> str:
    """Return what in one batch is not finite, in words; "" if nothing is known not to be."""
    return "; ".join(_describe_argument(values, argument) for argument in values.arguments)


def _explain_forward(batches: Sequence[BatchValues], ranks: int) -> str:
    """Return what made a loss that is not finite if nothing in the batches is unusual."""
    finite = _describe_finite(batches, ranks)
    finite = finite[0].lower() + finite[1:]
    # 1. The batch may still have made it: not all of it is known.
    is_partly_unknown = any(batch.unread or _has_unknown(batch) for batch in batches)
    if is_partly_unknown:
        return f"{finite}, so that {_OPEN}"

    # 2. The batch of this rank did not.
    if ranks > 1:
        return (
            f"{finite}, so that a batch of another rank, the forward or a loss outside the model "
            "made it"
        )
    return (
        f"{finite}, so that the forward made it, or a loss outside the model; which sub-layer did "
        "first is not known"
    )


def _describe_finite(batches: Sequence[BatchValues], ranks: int) -> str:
    """Return that the batches are finite, as far as they are known to be."""
    on_rank = "" if ranks == 1 else f" on this rank, one of {ranks},"
    unread = sum(batch.unread for batch in batches)
    if unread:
        return f"{unread} tensors that the forward got{on_rank} could not be looked at"
    if all(batch.is_finite for batch in batches):
        return f"Every tensor that the forward got{on_rank} is finite"
    return (
        f"Of what the forward got{on_rank} only these values are not finite: "
        f"{_list_arguments(batches)}"
    )


def _has_unknown(batch: BatchValues) -> bool:
    """Return whether a tensor holds inf and no earlier batch says whether that is usual."""
    return bool(batch.arguments) and not batch.earlier


def _list_arguments(batches: Sequence[BatchValues]) -> str:
    """Return the tensors that are not finite, the unusual ones first.

    Of several micro-batches, each tensor also says which one it belongs to.
    """
    unusual, usual = [], []
    for number, batch in enumerate(batches, start=1):
        place = f" of micro-batch {number}" if len(batches) > 1 else ""
        for argument in batch.arguments:
            text = f"{_describe_argument(batch, argument)}{place}"
            if batch.unusual_kinds(argument):
                unusual.append(text)
            else:
                usual.append(text)
    return _listed([*unusual, *usual])


def _describe_argument(batch: BatchValues, argument: NonFiniteArgument) -> str:
    """Return what in a tensor is not finite, where, and whether that is usual."""
    # 1. What is not finite, and in which sequences.
    counts = [f"{count} {kind}" for kind, count in argument.counts.items()]
    text = f"{argument.name} has {' and '.join(counts)} among {argument.size} values"
    if argument.sequences:
        noun = "sequence" if len(argument.sequences) == 1 else "sequences"
        rows = _listed(list(map(str, argument.sequences)))
        text += f", in {noun} {rows} of {batch.rows}"

    # 2. Whether that is usual. NaN never is, but inf may be the value of a mask.
    if argument.usual:
        return f"{text} (as earlier batches: {', '.join(argument.usual)})"
    may_be_usual = "NaN" not in argument.counts
    if may_be_usual and not batch.earlier:
        return f"{text} (whether that is usual is not known)"
    return text


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
