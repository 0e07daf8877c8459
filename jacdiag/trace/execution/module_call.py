"""A module call that can be made again: arguments are snapshotted, and fresh for every run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jacdiag.trace.execution.precision import map_leaves
from jacdiag.trace.execution.tensors import collect_deep


class _Swap(TorchFunctionMode):
    """Lets copy.deepcopy copy containers and objects (caches), with their tensors shared.

    Args:
        swap: id of a tensor -> the tensor that takes its place in the copy.
    """

    def __init__(self, swap: dict[int, Tensor]) -> None:
        super().__init__()
        self.swap = swap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self.swap.get(id(args[0]), args[0])
        with torch._C.DisableTorchFunction():  # no other mode counts what a copy does
            return func(*args, **(kwargs or {}))

    def copy(self, value: Any) -> Any:
        """Return a copy of nested arguments; what cannot be copied is shared."""
        # 1. Tensors, and what is shared.
        if isinstance(value, Tensor):
            return self.swap.get(id(value), value)
        if _is_shared(value):
            return value

        # 2. Containers.
        kind = type(value)
        if kind in (tuple, list):
            return kind(self.copy(item) for item in value)
        if kind is dict:
            return {key: self.copy(item) for key, item in value.items()}

        # 3. Objects such as caches. Hooks run with torch functions disabled.
        try:
            with torch._C._EnableTorchFunction(), self:
                return copy.deepcopy(value)
        except Exception:
            return value


def _is_shared(value: Any) -> bool:
    """Return whether a copy of arguments holds a value itself, such as a number or a module."""
    if value is None or isinstance(value, (int, float, str, bool, torch.nn.Module)):
        return True
    return callable(value) or type(value).__name__.endswith("Config")


@dataclass
class Call:
    """One module call, ready to be made again.

    Attributes:
        module: its name.
        args: a snapshot of its positional arguments.
        kwargs: a snapshot of its keyword arguments.
        tensors: those among them, by value.
    """

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[int, Tensor]

    @classmethod
    def take(
        cls, module: str, args: Any, kwargs: Any, values: tuple[int, ...], mutated: set[int]
    ) -> Call:
        """Return a snapshot of a call; tensors that the run will write to are cloned.

        Args:
            module: name of the module.
            args: the positional arguments.
            kwargs: the keyword arguments.
            values: the values of the tensors among them, in order.
            mutated: values that the run writes to.
        """
        originals: list[Tensor] = []
        collect_deep((args, kwargs), originals)

        # A value may come in twice: the last of its tensors stands for all.
        by_value = dict(zip(values, originals, strict=True))
        tensors: dict[int, Tensor] = {}
        for value, tensor in by_value.items():
            tensors[value] = tensor.clone() if value in mutated else tensor
        swapper = _Swap({id(t): tensors[v] for v, t in zip(values, originals, strict=True)})
        return cls(module, swapper.copy(args), swapper.copy(kwargs), tensors)

    def arguments(
        self, replaced: Mapping[int, Tensor] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return fresh containers, so that a run cannot spoil the next one's.

        Args:
            replaced: value -> the tensor that takes its place.
        """
        replaced = replaced or {}
        swapper = _Swap({id(self.tensors[value]): tensor for value, tensor in replaced.items()})
        return swapper.copy(self.args), swapper.copy(self.kwargs)


def prepared(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a model's inputs, detached, floats in the precision of the run, without KV cache.

    Args:
        model: its forward says whether it has a cache.
        args: the positional arguments.
        kwargs: the keyword arguments.
        dtype: precision of the run.
    """

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if leaf.is_inference():
            leaf = leaf.clone()
        if leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    # 1. The tensors.
    with torch.inference_mode(False):
        args = map_leaves(cast, args)
        kwargs = map_leaves(cast, kwargs)

    # 2. The cache.
    try:
        parameters = inspect.signature(type(model).forward).parameters
    except (TypeError, ValueError):
        return args, kwargs
    if "use_cache" in parameters and "use_cache" not in kwargs:
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs
