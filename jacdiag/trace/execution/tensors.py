"""Tensors among the arguments and results of a call, and what a call does to their memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from jacdiag.trace.graph.ops import IN_PLACE_OPERATORS


def collect(value: Any, into: list[Tensor]) -> None:
    """Append the tensors of nested tuples, lists, dicts and slices."""
    if isinstance(value, Tensor):
        into.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            collect(item, into)
    elif isinstance(value, dict):
        for item in value.values():
            collect(item, into)
    elif isinstance(value, slice):
        collect((value.start, value.stop, value.step), into)


def collect_deep(value: Any, into: list[Tensor], depth: int = 4) -> None:
    """Append the tensors of nested containers, dataclasses and plain objects.

    Model outputs and caches are such objects. Slices are not looked into.

    Args:
        value: what holds the tensors.
        into: the list that is appended to.
        depth: how many levels of containers are looked into.
    """
    # 1. A tensor.
    if isinstance(value, Tensor):
        into.append(value)
        return

    # 2. What the value holds, if it is not too deep inside others.
    if depth > 0:
        for item in _items_of(value):
            collect_deep(item, into, depth - 1)


def _items_of(value: Any) -> Iterable[Any]:
    """Return what a container or a plain object holds, () for anything else."""
    # 1. Containers. A named tuple is one, too.
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value

    # 2. Model outputs and caches.
    if _is_plain_object(value):
        return vars(value).values()

    # 3. Numbers, texts, modules and functions.
    return ()


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of nested containers, dataclasses and plain objects."""
    tensors: list[Tensor] = []
    collect_deep(value, tensors)
    return tensors


def _is_plain_object(value: Any) -> bool:
    """Return whether a value is an object that holds data and is no module or function."""
    # A module holds its weights, which are no outputs.
    is_code = isinstance(value, torch.nn.Module) or callable(value)
    if is_code:
        return False

    # Numbers and texts have no attributes of their own.
    return hasattr(value, "__dict__")


def device_of(value: Any) -> torch.device:
    """Return the device of the first tensor in nested arguments, the CPU if there is none."""
    tensors = tensors_in(value)
    if not tensors:
        return torch.device("cpu")
    return tensors[0].device


def is_identity(name: str, result: Any, read: Any) -> bool:
    """Return whether a call made nothing new: `x.to(x.dtype)`, dropout in eval mode.

    Args:
        name: of the call.
        result: what it returned.
        read: its arguments.
    """
    if writes_in_place(name):
        return False

    # Every result is one of the operands.
    results: list[Tensor] = []
    collect(result, results)
    operands: list[Tensor] = []
    collect(read, operands)
    ids = {id(t) for t in operands}
    return all(id(t) in ids for t in results)


def operand_at(args: Any, kwargs: Any, position: int) -> Tensor:
    """Return the tensor at a position among a call's arguments."""
    operands: list[Tensor] = []
    collect((args, kwargs), operands)
    return operands[position]


def pick(result: Any, read: Any, position: int) -> Tensor:
    """Return the tensor at a position of a call's results, or if negative, of what it read."""
    tensors: list[Tensor] = []
    if position >= 0:
        collect(result, tensors)
        return tensors[position]
    collect(read, tensors)
    return tensors[-1 - position]


def writes_in_place(name: str) -> bool:
    """Return whether a call writes to its first argument, by torch's own way of naming."""
    if name in IN_PLACE_OPERATORS:
        return True

    # As in `add_`, unlike `__add__`.
    return name.endswith("_") and not name.endswith("__")


def is_float(tensor: Tensor) -> bool:
    """Return whether a tensor holds real or complex floating-point numbers."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or Inf."""
    return bool(finite_flag(tensor))


def finite_flag(tensor: Tensor) -> Tensor:
    """Return whether no number is NaN or Inf, as a flag on the device of the tensor.

    Either shows in the least or the largest number, which one pass finds without a temporary.
    """
    if not is_float(tensor) or not tensor.numel():
        return torch.tensor(True)

    # A complex number is two real ones.
    real = tensor
    if tensor.is_complex():
        real = torch.view_as_real(tensor)

    # Nothing is computed with numbers of 8 bits.
    if real.element_size() < 2:
        real = real.float()
    least, largest = torch.aminmax(real)
    return torch.isfinite(least) & torch.isfinite(largest)


def storage_of(tensor: Tensor) -> int:
    """Return a number that names the memory of a tensor for as long as it lives.

    It is below 0 if the tensor has no storage and the name is the object's own.
    """
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # batched, sparse and other tensors without storage
        return -id(tensor)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor's memory was written to, as far as torch counts."""
    try:
        return tensor._version
    except RuntimeError:  # inference tensors do not count
        return 0
