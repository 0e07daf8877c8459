"""JD505: what was not finite first, as far as the figures of the step decide it.

The optimizer spreads a value that is not finite over everything that it updates, and clipping by a
norm that is not finite does so with all gradients. So each sentence says only what the figures from
before the optimizer's step decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jacdiag.records.batch_values import BatchValues, NonFiniteArgument
from jacdiag.records.run_log import Alert

_OPEN = "the batch or the forward made it; which sub-layer did first is not known"
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
        first: "weight", "gradient", "forward", "backward" or "unknown"; see `explain_batch` for
            "batch".
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
        what = f"the loss is not finite, and every weight was before the optimizer's step: {_OPEN}"
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


def explain_batch(alert: Alert, batches: Sequence[BatchValues], ranks: int = 1) -> Alert:
    """Return an alert that also says what of the step's batches is not finite.

    A tensor of the batch is older than the loss and the gradients. It is what was first where all
    weights were finite.

    Args:
        alert: of JD505.
        batches: what the forwards of this step got, in order; empty if they were not kept.
        ranks: processes of the run. Only the batches of one of them are known.
    """
    first = alert.evidence.get("first")
    if not batches or first not in ("forward", "gradient", "backward", "unknown"):
        return alert
    evidence = {**alert.evidence, "batches": [batch.to_dict() for batch in batches]}
    unusual = [argument for batch in batches for argument in batch.unusual]
    # 1. The loss is not finite, the weights were: one of batch and forward made it.
    if first == "forward":
        start = alert.what.removesuffix(_OPEN)
        if unusual:
            evidence["first"] = "batch"
            what = (
                f"{start}the batch held such values when the forward got it: "
                f"{_list_arguments(batches)}"
            )
            return replace(alert, what=what, where=_names_of(unusual), evidence=evidence)
        return replace(alert, what=f"{start}{_explain_forward(batches, ranks)}", evidence=evidence)
    # 2. Only gradients are known not to be finite: the batch is a fact beside them.
    if not unusual:
        return replace(
            alert, what=f"{alert.what}. {_describe_fine(batches, ranks)}", evidence=evidence
        )
    held = "The batch held values that are not finite when the forward got it"
    what = f"{alert.what}. {held}: {_list_arguments(batches)}"
    where = alert.where
    if not where:
        where, evidence["first"] = _names_of(unusual), "batch"
    return replace(alert, what=what, where=where, evidence=evidence)


def describe_batch(values: BatchValues) -> str:
    """Return what of one batch is not finite, in words; "" if all of it is finite or was not looked
    at.
    """
    return "; ".join(_describe_argument(values, argument) for argument in values.arguments)


def _explain_forward(batches: Sequence[BatchValues], ranks: int) -> str:
    """Return who made a loss that is not finite if nothing in the batches is unusual."""
    fine = _describe_fine(batches, ranks)
    fine = fine[0].lower() + fine[1:]
    if any(batch.unread or _has_unknown(batch) for batch in batches):
        return f"{fine}, so that {_OPEN}"
    if ranks > 1:
        return (
            f"{fine}, so that a batch of another rank, the forward or a loss outside the model "
            "made it"
        )
    made = "the forward made it, or a loss outside the model"
    return f"{fine}, so that {made}; which sub-layer did first is not known"


def _describe_fine(batches: Sequence[BatchValues], ranks: int) -> str:
    """Return that the batches are finite, as far as they are known to be."""
    here = "" if ranks == 1 else f" on this rank, one of {ranks},"
    unread = sum(batch.unread for batch in batches)
    if unread:
        return f"{unread} tensors that the forward got{here} could not be looked at"
    if all(batch.is_finite for batch in batches):
        return f"Every tensor that the forward got{here} is finite"
    return (
        f"Of what the forward got{here} only these values are not finite: "
        f"{_list_arguments(batches)}"
    )


def _has_unknown(batch: BatchValues) -> bool:
    """Whether a tensor holds inf and there is no earlier batch to say whether that is usual."""
    return bool(batch.arguments) and not batch.earlier


def _names_of(arguments: Sequence[NonFiniteArgument]) -> list[str]:
    return list(dict.fromkeys(argument.name for argument in arguments))


def _list_arguments(batches: Sequence[BatchValues]) -> str:
    """Return the tensors that are not finite, the unusual ones first; of several micro-batches,
    which one.
    """
    parts: list[tuple[bool, str]] = []
    for number, batch in enumerate(batches, start=1):
        place = f" of micro-batch {number}" if len(batches) > 1 else ""
        for argument in batch.arguments:
            is_usual = not batch.unusual_kinds(argument)
            parts.append((is_usual, f"{_describe_argument(batch, argument)}{place}"))
    parts.sort(key=lambda part: part[0])
    return _listed([text for _, text in parts])


def _describe_argument(batch: BatchValues, argument: NonFiniteArgument) -> str:
    counts = " and ".join(f"{count} {kind}" for kind, count in argument.counts.items())
    text = f"{argument.name} has {counts} among {argument.size} values"
    if argument.sequences:
        noun = "sequence" if len(argument.sequences) == 1 else "sequences"
        text += f", in {noun} {_listed([str(row) for row in argument.sequences])} of {batch.rows}"
    if argument.usual:
        return f"{text} (as earlier batches: {', '.join(argument.usual)})"
    if not batch.earlier and "NaN" not in argument.counts:
        return f"{text} (whether that is usual is not known)"
    return text


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
