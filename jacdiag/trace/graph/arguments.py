"""The arguments of a recorded call, without its tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from jacdiag.trace.execution.tensors import collect

# What is kept as it is. It cannot change, and holds no tensor.
_PLAIN = (bool, int, float, str, torch.Size, torch.dtype, EllipsisType, type(None))


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
    named: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
        """Return the arguments of a call; a tensor is replaced by its position.

        Args:
            args: the positional arguments.
            kwargs: the keyword arguments.

        Returns:
            None if a container among them is not understood, so that positions are not known.
        """
        numbers = itertools.count()

        def outline(leaf: Any) -> Any:
            """Return what is kept of one argument."""
            if isinstance(leaf, Tensor):
                return Operand(next(numbers))
            if isinstance(leaf, slice):
                return slice(outline(leaf.start), outline(leaf.stop), outline(leaf.step))
            if isinstance(leaf, _PLAIN):
                return leaf
            return Opaque()

        positional, named = tree_map(outline, (args, dict(kwargs)))
        tensors: list[Tensor] = []
        collect((args, kwargs), tensors)
        is_understood = next(numbers) == len(tensors)
        return cls(positional, named) if is_understood else None

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name.

        Args:
            position: among the positional arguments.
            *names: of the keyword argument; torch has two for some, such as "dim" and "axis".
            default: what is returned if it was not given.
        """
        # 1. By position.
        if position < len(self.positional):
            return self.positional[position]

        # 2. By one of its names.
        for name in names:
            if name in self.named:
                return self.named[name]

        # 3. It was not given.
        return default
