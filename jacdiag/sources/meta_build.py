"""Models built on the meta device, without memory for their parameters, and given memory later.

What a module computes for itself (its buffers) must be real: no file has a buffer that is not
persistent, such as a rotary table or a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError
from jacdiag.sources.foreign_code import own_frames

_NAMED = 5  # tensors that an error lists


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Move every parameter that a module registers inside to the meta device at once.

    None is then filled. Buffers stay as they are.
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        registered = module._parameters[name]
        # One that is on the meta device has been here before: a tie keeps its object.
        if registered is not None and not registered.is_meta:
            module._parameters[name] = _on_meta(registered)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def materialise(model: nn.Module, spec: str, *, init: bool = True) -> None:
    """Give a model on the meta device memory, and weights by its own initialization.

    That is `init_weights`, or the `reset_parameters` of its modules. Every tensor is first filled
    with a mark, so that one that nothing initialized is found and named.

    Args:
        model: changed in place.
        spec: the name of its factory, for messages.
        init: False if a checkpoint is to fill the parameters. Then only the buffers must be
            initialized.

    Raises:
        SourceError: the initialization raised, or left a tensor out.
    """
    # 1. Memory, filled with marks.
    model.to_empty(device="cpu")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(_mark_for(tensor))
        # 2. The model's own numbers in their place.
        _initialize(model, spec)

    # 3. Nothing is left out that no checkpoint holds.
    needed = set(tensors) if init else _computed_buffers(model)
    _check_initialized(model, spec, needed)


def compute_buffers(model: nn.Module, spec: str) -> None:
    """Give buffers on the meta device memory, and the numbers of the model's own initialization.

    Args:
        model: changed in place.
        spec: the name of its factory, for messages.

    Raises:
        SourceError: the initialization raised, or left a buffer out.
    """
    # 1. Memory, filled with marks.
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                empty = torch.empty_like(buffer, device="cpu")
                module._buffers[key] = empty.fill_(_mark_for(buffer))

    # 2. The model's own numbers in their place.
    with torch.no_grad():
        _initialize(model, spec)
    _check_initialized(model, spec, _computed_buffers(model))


def _on_meta(param: nn.Parameter) -> nn.Parameter:
    """Return a parameter of the same class and attributes on the meta device."""
    empty: Any = type(param)(param.detach().to("meta"), requires_grad=param.requires_grad)
    empty.__dict__.update(param.__dict__)
    return empty


def _computed_buffers(model: nn.Module) -> set[str]:
    """Return the names of the buffers that no checkpoint holds."""
    return {name for name, _ in model.named_buffers()} - set(model.state_dict())


def _initialize(model: nn.Module, spec: str) -> None:
    """Run the model's own initialization."""
    try:
        for initialize in _initializers(model):
            initialize()
    # foreign code may raise anything
    except Exception as error:
        raise SourceError(
            f"initialising what '{spec}' built failed", got=own_frames(error)
        ) from error


def _initializers(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Yield what initializes a model: one method of its own, or one of each of its modules."""
    init_weights = getattr(model, "init_weights", None)
    if callable(init_weights):
        yield init_weights
        return
    for module in model.modules():
        # nn.Transformer and nn.MultiheadAttention have the second one.
        reset = getattr(module, "reset_parameters", None)
        reset = reset or getattr(module, "_reset_parameters", None)
        if callable(reset):
            yield reset


def _check_initialized(model: nn.Module, spec: str, names: set[str]) -> None:
    """Raise if a tensor of these names still holds its mark."""
    # 1. The tensors that nothing has written.
    tensors = [*model.named_parameters(), *model.named_buffers()]
    needed = [(name, tensor) for name, tensor in tensors if name in names]
    left_out = [name for name, tensor in needed if _holds_mark(tensor)]
    if not left_out:
        return

    # 2. Name the first of them.
    shown = ", ".join(left_out[:_NAMED])
    if len(left_out) > _NAMED:
        shown += " ..."
    raise SourceError(
        f"'{spec}' builds on the meta device, and not all of its tensors are initialised",
        got=f"{len(left_out)} of {len(tensors)}: {shown}",
        hint=(
            "give it an init_weights(), or its modules reset_parameters(), that fills them; "
            "or build on the CPU"
        ),
    )


def _mark_for(tensor: Tensor) -> float | int | bool:
    """Return a number that no initialization gives: NaN, the largest integer, or True."""
    if _has_nan(tensor):
        return float("nan")

    # torch has no limits of a bool
    if tensor.dtype == torch.bool:
        return True

    return torch.iinfo(tensor.dtype).max


def _has_nan(tensor: Tensor) -> bool:
    """Return whether a tensor's type has a NaN."""
    return tensor.is_floating_point() or tensor.is_complex()


def _holds_mark(tensor: Tensor) -> bool:
    """Return whether a tensor still holds its mark: any NaN, or the largest integer everywhere."""
    # Two values leave no room for a mark, and no values for any.
    if tensor.dtype == torch.bool or tensor.numel() == 0:
        return False

    # One NaN is enough: no initialization gives it.
    if _has_nan(tensor):
        return bool(torch.isnan(tensor).any())

    # The largest integer may be a number of the model, but not all of its numbers.
    return bool((tensor == _mark_for(tensor)).all())
