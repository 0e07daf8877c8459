"""Tensors among the arguments and results of a call: which they are, and what a call does to their
memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def collect(value: Any, into: list[Tensor]) -> None:
    """Appends the tensors of nested tuples, lists, dicts and slices."""
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
    """Like `collect`, and looks into dataclasses and plain objects as well (model outputs,
    caches).
    """
    if isinstance(value, (Tensor, tuple, list, dict, slice)):
        if isinstance(value, Tensor):
            into.append(value)
        elif depth:
            items = (
                value.values()
                if isinstance(value, dict)
                else value
                if not isinstance(value, slice)
                else ()
            )
            for item in items:
                collect_deep(item, into, depth - 1)
    elif (
        depth
        and hasattr(value, "__dict__")
        and not (isinstance(value, torch.nn.Module) or callable(value))
    ):
        for item in vars(value).values():
            collect_deep(item, into, depth - 1)


def device_of(value: Any) -> torch.device:
    """The device of the first tensor in nested arguments; the CPU where there is none."""
    found: list[Tensor] = []
    collect_deep(value, found)
    return found[0].device if found else torch.device("cpu")


def is_identity(name: str, result: Any, read: Any) -> bool:
    """Whether a call made nothing new: `x.to(x.dtype)`, dropout in eval mode."""
    if writes_in_place(name):
        return False
    made: list[Tensor] = []
    collect(result, made)
    given: list[Tensor] = []
    collect(read, given)
    ids = {id(t) for t in given}
    return all(id(t) in ids for t in made)


def operand_at(args: Any, kwargs: Any, position: int) -> Tensor:
    operands: list[Tensor] = []
    collect((args, kwargs), operands)
    return operands[position]


def pick(result: Any, read: Any, position: int) -> Tensor:
    tensors: list[Tensor] = []
    collect(result if position >= 0 else read, tensors)
    return tensors[position if position >= 0 else -1 - position]


_DUNDERS = {
    f"__i{op}__"
    for op in "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split()
} | {"__setitem__"}


def writes_in_place(name: str) -> bool:
    """Whether a call writes to its first argument, by torch's own way of naming."""
    return (name.endswith("_") and not name.endswith("__")) or name in _DUNDERS


def is_float(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or Inf: in one pass without a temporary, as either shows in the
    least or the largest.
    """
    if not is_float(tensor) or not tensor.numel():
        return True
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(real))


def storage_of(tensor: Tensor) -> int:
    """A name of the memory of a tensor, for as long as that lives; below 0 where it is the object's
    own.
    """
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # batched, sparse and other tensors without storage
        return -id(tensor)


def version_of(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors do not count
        return 0
