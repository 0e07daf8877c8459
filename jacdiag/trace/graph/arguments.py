"""The arguments of a recorded call, without its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

# What is kept as it is. It cannot change, and holds no tensor.
_PLAIN = (bool, int, float, str, torch.dtype, EllipsisType, type(None))

_CONTAINERS = (tuple, list, dict, slice)


def is_of_torch(function: Any) -> bool:
    """Return whether a function is torch's own; a custom operator may have the name of one.

    >>> is_of_torch(torch.Tensor.add), is_of_torch(torch.ops.aten.gelu.default)
    (True, True)
    >>> is_of_torch(is_of_torch)
    False
    """
    # 1. Operators of the dispatcher: "aten::gelu".
    qualified = getattr(function, "_qualified_op_name", None)
    if qualified is None and isinstance(function, torch._ops.OpOverload):
        qualified = function.name()
    if qualified is not None:
        return str(qualified).startswith("aten::")

    # 2. Functions of torch's modules. Methods of tensors in C name no module.
    module = getattr(function, "__module__", None)
    return module is None or module.split(".")[0] == "torch"


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands for a tensor among the arguments of a call.

    Attributes:
        position: which tensor of the call, in order.
    """

    position: int


class Opaque:
    """Stands for an argument that is not kept, such as an object of the model's own."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a call was given.

    Attributes:
        positional: its positional arguments.
        named: its keyword arguments.

    Example:
        >>> import torch
        >>> arguments = Arguments.of((torch.ones(2, 3), 1), {"keepdim": True})
        >>> arguments.get(0, "input"), arguments.get(1, "dim"), arguments.get(2, "keepdim")
        (Operand(position=0), 1, True)
    """

    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Return the arguments of a call; a tensor is replaced by its position.

        Args:
            args: the positional arguments.
            kwargs: the keyword arguments.
        """
        outline = _Outline()
        positional = tuple(outline.of(value) for value in args)
        if not kwargs:
            return cls(positional)
        return cls(positional, {name: outline.of(value) for name, value in kwargs.items()})

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name.

        Args:
            position: among the positional arguments.
            *names: of the keyword argument; torch has two for some, such as "dim" and "axis".
            default: what is returned if it was not given.
        """
        if position < len(self.positional):
            return self.positional[position]
        named = self.named or {}
        for name in names:
            if name in named:
                return named[name]
        return default


class _Outline:
    """Numbers the tensors of a call in the order in which `collect` finds them."""

    def __init__(self) -> None:
        self.tensors = 0

    def of(self, value: Any) -> Any:
        """Return a value with each tensor in it replaced."""
        if isinstance(value, Tensor):
            self.tensors += 1
            return Operand(self.tensors - 1)
        if isinstance(value, _CONTAINERS):
            return self._of_container(value)
        if isinstance(value, _PLAIN):
            return value
        return Opaque()

    def _of_container(self, value: Any) -> Any:
        """Return a container with each tensor in it replaced; `torch.Size` is a tuple."""
        if isinstance(value, dict):
            return {name: self.of(item) for name, item in value.items()}
        if isinstance(value, slice):
            return slice(self.of(value.start), self.of(value.stop), self.of(value.step))
        if isinstance(value, list):
            return [self.of(item) for item in value]
        return tuple(self.of(item) for item in value)
