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
    """
    if isinstance(value, Tensor):
        into.append(value)
        return
    if not depth:
        return

    # What the value holds.
    items: Iterable[Any] = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif _is_plain_object(value):
        items = vars(value).values()

    for item in items:
        collect_deep(item, into, depth - 1)


def _is_plain_object(value: Any) -> bool:
    """Return whether a value is an object that holds data and is no module or function."""
    if not hasattr(value, "__dict__"):
        return False
    is_code = isinstance(value, torch.nn.Module) or callable(value)
    return not is_code


def device_of(value: Any) -> torch.device:
    """Return the device of the first tensor in nested arguments, the CPU if there is none."""
    tensors: list[Tensor] = []
    collect_deep(value, tensors)
    return tensors[0].device if tensors else torch.device("cpu")


def is_identity(name: str, result: Any, read: Any) -> bool:
    """Return whether a call made nothing new: `x.to(x.dtype)`, dropout in eval mode."""
    if writes_in_place(name):
        return False
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
    return name.endswith("_") and not name.endswith("__")


def is_float(tensor: Tensor) -> bool:
    """Return whether a tensor holds real or complex floating-point numbers."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or Inf.

    Either shows in the least or the largest number, which one pass finds without a temporary.
    """
    if not is_float(tensor) or not tensor.numel():
        return True
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(real))


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
