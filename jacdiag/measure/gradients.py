"""One forward and one backward of the model: gradients of the stream and the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacdiag.errors import MeasureError
from jacdiag.measure.attention import CALLS, AttentionWatch, attention_calls
from jacdiag.records.base import Record
from jacdiag.records.signal_propagation import AttentionRecord
from jacdiag.trace import Sites
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.execution.tensors import collect_deep

_CHUNK = 2**20  # elements whose squares are summed in float64 together


@dataclass(frozen=True)
class GradientProfile(Record):
    """What one forward and one backward gave.

    Attributes:
        norms: norm of dL/dx along the main stream, first shortcut first, the stream's end last. 0
            where none arrives.
        activations: norm of x at the same points.
        kind, loss: what was differentiated, and its value.
        parameters: name -> norm of its gradient, 0 where none arrives. None if it was not measured.
        attention: index of a sub-layer -> figures of its attention calls.
        why: field -> why it is missing; "attention INDEX" for one sub-layer.
    """

    norms: list[float]
    activations: list[float]
    kind: str
    loss: float
    parameters: dict[str, float] | None = None
    attention: dict[str, AttentionRecord] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def language_model_loss(output: Any, token_ids: Tensor | None, seed: int = 0) -> tuple[Tensor, str]:
    """Return a scalar loss and what it is.

    Next-token cross entropy where the output holds logits over a vocabulary for (B, T) token ids;
    for a model that gives logits of the last position only, cross entropy against random tokens;
    else a random linear functional.
    """
    logits = loss_input(output)
    if logits is None:
        raise MeasureError("the model's output holds no floating tensor: it has no loss")
    generator = torch.Generator().manual_seed(seed)
    if token_ids is not None and logits.dim() == 3 and logits.shape[0] == token_ids.shape[0]:
        if logits.shape[1] == token_ids.shape[1] > 1 and int(token_ids.max()) < logits.shape[2]:
            targets = token_ids[:, 1:].reshape(-1).to(logits.device).long()
            return torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets
            ), "next-token cross entropy"
        if logits.shape[1] == 1:
            targets = torch.randint(logits.shape[2], (logits.shape[0],), generator=generator).to(
                logits.device
            )
            return torch.nn.functional.cross_entropy(
                logits[:, 0], targets
            ), "cross entropy of the last position"
    weight = torch.randn(logits.shape, generator=generator).to(logits)
    return (weight * logits).sum() / logits.numel() ** 0.5, "random linear functional of the output"


def loss_input(output: Any) -> Tensor | None:
    """Return the tensor of the output that the loss is computed from."""
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    tensors: list[Tensor] = []
    collect_deep(output, tensors)
    return next((t for t in tensors if t.is_floating_point() and t.dim() >= 1), None)


def end_of(sites: Sites) -> int:
    """Return the value index of the main stream's end.

    It is the last sum, or the norm after it for post-norm. A final norm is the head's.
    """
    last = sites.streams.groups[sites.streams.main[-1]]
    return last.after if any(sites[k].post_norm is not None for k in last.sites) else last.output


def stream_values(sites: Sites) -> list[int]:
    """Return the value indices of the main stream: the shortcuts, then its end."""
    groups = [sites.streams.groups[k] for k in sites.streams.main]
    return list(dict.fromkeys([*(group.shortcut for group in groups), end_of(sites)]))


def gradient_profile(sites: Sites, token_ids: Tensor | None) -> GradientProfile | None:
    """Run the model forward and backward once, and read the stream on the way.

    Gradients of parameters and attention calls are read in the same run.

    Args:
        sites: of one recorded forward.
        token_ids: (B, T) ids of the probe, the targets of the loss.

    Returns:
        The profile, or None if no sub-layer lies on the stream.

    Raises:
        MeasureError: the output holds nothing that a loss can be computed from.
    """
    if not sites.streams.main:
        return None
    # 1. What is measured; attention is read in the same forward.
    values = stream_values(sites)
    watch = AttentionWatch(attention_calls(sites))
    why: dict[str, str] = {}
    names, reason = watchable_parameters(sites.skeleton)
    if reason:
        why["parameters"] = reason

    # 2. One run, and a second one without the parameters if the first fails.
    try:
        measured = run_backward(sites, token_ids, values, names, watch=watch)
    except RuntimeError as error:
        if not names:
            raise
        # Code that writes to a weight in place may refuse one that has a gradient.
        why["parameters"] = f"the backward failed with parameters: {str(error).splitlines()[0]}"
        names = []
        watch = AttentionWatch(attention_calls(sites))
        measured = run_backward(sites, token_ids, values, names, watch=watch)

    # 3. The run must have made the calls of the record, or figures would go to other sub-layers.
    calls = sum(node.name in CALLS for node in sites.graph.nodes)
    attention = watch.records(calls)
    why |= {f"attention {index}": text for index, text in watch.why.items()}

    # 4. In the order of the stream.
    reached = [value for value in values if value in measured.activations]
    parameters = None
    if names:
        parameters = {name: measured.parameters.get(name, 0.0) for name in names}
    return GradientProfile(
        norms=[measured.norms.get(value, 0.0) for value in values],
        activations=[measured.activations[value] for value in reached],
        kind=measured.kind,
        loss=measured.loss,
        parameters=parameters,
        attention={str(index): record for index, record in sorted(attention.items())},
        why=why,
    )


def watchable_parameters(skeleton: Skeleton) -> tuple[list[str], str]:
    """Return the parameters whose gradient can be measured, and the reason if there are none."""
    if skeleton.stored is not None:
        return [], "the weights are read from the file call by call"
    if skeleton.light:
        reason = (
            "the weights are raised call by call: their gradients would keep a raised copy of the "
            "model"
        )
        return [], reason
    return [name for name, t in skeleton.params.items() if t.is_floating_point()], ""


# -- one run ---------------------------------------------
@dataclass
class Backward:
    """What one forward and one backward gave, by value index and by parameter.

    An entry is absent where no gradient arrived.
    """

    norms: dict[int, float] = field(default_factory=dict)
    activations: dict[int, float] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)
    kind: str = ""
    loss: float = math.nan


def run_backward(
    sites: Sites,
    token_ids: Tensor | None,
    values: Iterable[int],
    parameters: Collection[str] = (),
    *,
    watch: TorchFunctionMode | None = None,
    visit: Callable[[int, Tensor], None] | None = None,
    backward: bool = True,
) -> Backward:
    """Run the model once, then the backward of the loss.

    Norms are taken as the gradients come by, and no gradient is held.

    Args:
        sites: of one recorded forward.
        token_ids: targets of the loss.
        values: of the stream, in order. One that has no gradient yet is cut off and becomes a leaf.
        parameters: names of those whose gradient is measured.
        watch: a mode that sees the calls of the forward.
        visit: sees (value, tensor) in the forward, before it becomes a leaf.
        backward: False leaves the backward out.
    """
    result = Backward()
    replayer = sites.replayer
    spots = {value: replayer.spot_of(value, 0) for value in values}
    order = {id(spot): value for value, spot in spots.items()}
    # 1. What is done with each point of the stream as the forward meets it.
    leaves: list[Tensor] = []
    squares: dict[int, Tensor] = {}

    def enter(value: int, tensor: Tensor) -> Tensor:
        if visit is not None:
            visit(value, tensor)
        result.activations[value] = norm(tensor.detach())
        out = tensor
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
            leaves.append(tensor)
            out = tensor.clone()  # code may write to it in place; a leaf must not be written to
        tensor.register_hook(lambda gradient: squares.__setitem__(value, sum_of_squares(gradient)))
        return out

    # 2. Points that are inputs of the model are replaced before it runs.
    replaced = {}
    for value, spot in spots.items():
        if spot.where is Where.ARGUMENT:
            value_before = replayer.calls[0].tensors[value].detach().clone()
            replaced[value] = enter(value, value_before)
    results = [spot for spot in spots.values() if spot.where is not Where.ARGUMENT]

    def enter_at(spot: Spot, tensor: Tensor) -> Tensor:
        return enter(order[id(spot)], tensor)

    # 3. One forward, one loss, one backward.
    with (
        torch.enable_grad(),
        replayer.whole_graph(),
        gradients_of(sites.skeleton, parameters) as (weights, squares_of_parameters),
    ):
        with watch or nullcontext():
            output = replayer.tapped(results, enter_at, replaced=replaced)
        loss, result.kind = language_model_loss(output, token_ids)
        result.loss = float(loss.detach())
        # Inputs are named, so that nothing is added to a gradient that the model's own code holds.
        inputs = [*leaves, *weights]
        if backward and loss.requires_grad and inputs:
            torch.autograd.backward(loss, inputs=inputs)
    result.norms = {value: math.sqrt(float(square)) for value, square in squares.items()}
    result.parameters = {
        name: math.sqrt(float(square)) for name, square in squares_of_parameters.items()
    }
    return result


@contextmanager
def gradients_of(
    skeleton: Skeleton, names: Collection[str]
) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
    """Let a backward inside sum the squares of these parameters' gradients.

    Each gradient is dropped at once.

    The skeleton's tensors share the memory of the model's own and nothing else: the model is not
    touched.
    """
    squares: dict[str, Tensor] = {}
    weights = [skeleton.params[name] for name in names]
    handles = []

    def take(name: str) -> Callable[[Tensor], None]:
        def taken(weight: Tensor) -> None:
            # Dropped at once: the backward never holds more than one of them.
            if weight.grad is not None:
                squares[name] = sum_of_squares(weight.grad)
                weight.grad = None

        return taken

    try:
        for name, weight in zip(names, weights, strict=True):
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(take(name)))
        yield weights, squares
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares in float64, taken in chunks."""
    flat = tensor.detach().reshape(-1)
    if flat.is_sparse:
        flat = flat.coalesce().values()
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for part in flat.split(_CHUNK):
        total += part.double().square().sum()
    return total


def norm(tensor: Tensor) -> float:
    """Return the Euclidean norm, summed in float64."""
    return math.sqrt(float(sum_of_squares(tensor)))
