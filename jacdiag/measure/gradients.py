"""One forward and one backward of the model: gradients of the stream and the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacdiag.devices.accelerators import widest
from jacdiag.devices.packed_download import download
from jacdiag.errors import MeasureError
from jacdiag.measure.attention import CALLS, AttentionWatch, attention_calls
from jacdiag.records.base import Record
from jacdiag.records.signal_propagation import AttentionRecord
from jacdiag.trace import Sites
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.execution.tensors import collect_deep

_CHUNK = 2**20  # elements whose squares are summed in float64 together
_NO_TARGET = -100  # torch leaves such a position out
_Key = TypeVar("_Key")


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

    Args:
        output: of the model.
        token_ids: (B, T) ids of the probe; None if it has none.
        seed: of random tokens, and of the random functional.

    Raises:
        MeasureError: the output holds no floating tensor.
    """
    logits = loss_input(output)
    if logits is None:
        raise MeasureError("the model's output holds no floating tensor: it has no loss")

    generator = torch.Generator().manual_seed(seed)

    # 1. Logits of each position.
    if token_ids is not None and _are_logits_of(logits, token_ids):
        if _has_next_tokens(logits, token_ids):
            # The last position counts for nothing. To cut it off would copy all logits.
            targets = torch.full(token_ids.shape, _NO_TARGET, device=logits.device)
            targets[:, :-1] = token_ids[:, 1:]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=_NO_TARGET
            )
            return loss, "next-token cross entropy"

        # 2. Logits of the last position. What follows it is not in the probe.
        if logits.shape[1] == 1:
            targets = torch.randint(logits.shape[2], (logits.shape[0],), generator=generator)
            loss = torch.nn.functional.cross_entropy(logits[:, 0], targets.to(logits.device))
            return loss, "cross entropy of the last position"

    # 3. No logits.
    weight = torch.randn(logits.shape, generator=generator).to(logits)
    return (weight * logits).sum() / logits.numel() ** 0.5, "random linear functional of the output"


def _are_logits_of(logits: Tensor, token_ids: Tensor) -> bool:
    """Return whether a tensor is (B, positions, V) for (B, T) token ids."""
    return logits.dim() == 3 and logits.shape[0] == token_ids.shape[0]


def _has_next_tokens(logits: Tensor, token_ids: Tensor) -> bool:
    """Return whether logits stand for each of several positions, and the ids are in their range."""
    is_for_each_position = logits.shape[1] == token_ids.shape[1] > 1
    if not is_for_each_position:
        return False

    return int(token_ids.max()) < logits.shape[2]


def loss_input(output: Any) -> Tensor | None:
    """Return the tensor of the output that the loss is computed from."""
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named

    # The first floating tensor, unless it is a scalar: a loss of the model's own.
    tensors: list[Tensor] = []
    collect_deep(output, tensors)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dim() >= 1:
            return tensor

    return None


def end_of(sites: Sites) -> int:
    """Return the value index of the main stream's end.

    It is the last sum, or the norm after it for post-norm. A final norm is the head's.
    """
    last = sites.streams.groups[sites.streams.main[-1]]
    is_post_norm = any(sites[index].post_norm is not None for index in last.sites)
    if is_post_norm:
        return last.after

    return last.output


def stream_values(sites: Sites) -> list[int]:
    """Return the value indices of the main stream: the shortcuts, then its end."""
    shortcuts = [sites.streams.groups[index].shortcut for index in sites.streams.main]
    # Parallel branches share a shortcut.
    return list(dict.fromkeys([*shortcuts, end_of(sites)]))


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
    activations = measured.activations
    return GradientProfile(
        norms=[measured.norms.get(value, 0.0) for value in values],
        activations=[activations[value] for value in values if value in activations],
        kind=measured.kind,
        loss=measured.loss,
        parameters=_norms_by_name(names, measured.parameters),
        attention={str(index): record for index, record in sorted(attention.items())},
        why=why,
    )


def _norms_by_name(
    names: Collection[str], measured: Mapping[str, float]
) -> dict[str, float] | None:
    """Return the norm of the gradient of each parameter, 0 where none arrived; None of none."""
    if not names:
        return None

    return {name: measured.get(name, 0.0) for name in names}


def watchable_parameters(skeleton: Skeleton) -> tuple[list[str], str]:
    """Return the parameters whose gradient can be measured, and the reason if there are none."""
    # 1. Weights that are not in memory, or only for the time of a call.
    if skeleton.stored is not None:
        return [], "the weights are read from the file call by call"
    if skeleton.light:
        reason = (
            "the weights are converted to the precision of the audit call by call; their gradients "
            "would need a converted copy of the model"
        )
        return [], reason

    # 2. Integers have no gradient.
    floating = [name for name, t in skeleton.params.items() if t.is_floating_point()]
    return floating, ""


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
    activations: dict[int, Tensor] = {}

    def enter(value: int, tensor: Tensor) -> Tensor:
        if visit is not None:
            visit(value, tensor)
        activations[value] = sum_of_squares(tensor.detach())
        out = tensor
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
            leaves.append(tensor)
            out = tensor.clone()  # code may write to it in place; a leaf must not be written to
        tensor.register_hook(lambda gradient: squares.__setitem__(value, sum_of_squares(gradient)))
        return out

    # 2. Points that are inputs of the model are replaced before it runs.
    replaced = {}
    results = []
    for value, spot in spots.items():
        if spot.where is Where.ARGUMENT:
            value_before = replayer.calls[0].tensors[value].detach().clone()
            replaced[value] = enter(value, value_before)
        else:
            results.append(spot)

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
        del output  # the backward does not need the logits, which may be large
        result.loss = float(loss.detach())
        # Inputs are named, so that nothing is added to a gradient that the model's own code holds.
        inputs = [*leaves, *weights]
        if backward and loss.requires_grad and inputs:
            torch.autograd.backward(loss, inputs=inputs)

    # 4. Norms from sums of squares.
    result.activations = _roots(activations)
    result.norms = _roots(squares)
    result.parameters = _roots(squares_of_parameters)
    return result


def _roots(squares: Mapping[_Key, Tensor]) -> dict[_Key, float]:
    """Return the square root of each sum of squares."""
    sums = download(list(squares.values()))
    return {key: math.sqrt(float(total)) for key, total in zip(squares, sums, strict=True)}


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

    def take(name: str, weight: Tensor) -> None:
        if weight.grad is None:
            return

        squares[name] = sum_of_squares(weight.grad)
        # Dropped at once: the backward never holds more than one of them.
        weight.grad = None

    try:
        # 1. Give each a gradient, which its hook takes.
        for name, weight in zip(names, weights, strict=True):
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(partial(take, name)))
        yield weights, squares
    finally:
        # 2. Leave no trace of it.
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def sum_of_squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares in float64, taken in chunks."""
    flat = tensor.detach().reshape(-1)
    # What a sparse tensor does not hold is zero.
    if flat.is_sparse:
        flat = flat.coalesce().values()

    total = torch.zeros((), dtype=widest(flat.device), device=flat.device)
    for part in flat.split(_CHUNK):
        total += part.to(total.dtype).square().sum()

    return total
