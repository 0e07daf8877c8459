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
from jacdiag.trace.execution.tensors import tensors_in

# What a copy of arguments shares with them.
_SHARED = (int, float, str, bool, torch.nn.Module)


class _Swap(TorchFunctionMode):
    """Lets copy.deepcopy copy containers and objects (caches), with their tensors shared.

    Args:
        swap: id of a tensor -> the tensor that takes its place in the copy.
    """

    def __init__(self, swap: dict[int, Tensor]) -> None:
        super().__init__()
        self.swap = swap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # 1. A tensor is shared, or replaced.
        if func is Tensor.__deepcopy__:
            return self.swap.get(id(args[0]), args[0])

        # 2. Any other call runs as it is.
        kwargs = kwargs or {}

        # No other mode counts what a copy does.
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

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
    # 1. What cannot change, or has its weights replaced in another way.
    if value is None or isinstance(value, _SHARED):
        return True

    # 2. Functions.
    if callable(value):
        return True

    # 3. Configurations, which a forward only reads.
    return type(value).__name__.endswith("Config")


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
        # 1. A value may come in twice: the last of its tensors stands for all.
        originals = tensors_in((args, kwargs))
        tensors = dict(zip(values, originals, strict=True))

        # 2. What the run writes to is kept as it is before.
        for value in mutated.intersection(tensors):
            tensors[value] = tensors[value].clone()

        # 3. The arguments with these tensors in them.
        swapper = _Swap({id(t): tensors[v] for v, t in zip(values, originals, strict=True)})
        return cls(module, swapper.copy(args), swapper.copy(kwargs), tensors)

    def arguments(
        self, replaced: Mapping[int, Tensor] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return fresh containers, so that a run cannot spoil the next one's.

        Args:
            replaced: value -> the tensor that takes its place.
        """
        # 1. Which tensors take the place of others.
        swap: dict[int, Tensor] = {}
        if replaced is not None:
            swap = {id(self.tensors[value]): tensor for value, tensor in replaced.items()}

        # 2. Containers are copied even if no tensor is replaced.
        swapper = _Swap(swap)
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

        # Autograd cannot save an inference tensor.
        leaf = leaf.detach()
        if leaf.is_inference():
            leaf = leaf.clone()

        # Tokens and masks keep their dtype.
        if leaf.is_floating_point():
            return leaf.to(dtype)
        return leaf

    # 1. The tensors.
    with torch.inference_mode(False):
        args = map_leaves(cast, args)
        kwargs = map_leaves(cast, kwargs)

    # 2. The cache.
    if "use_cache" in kwargs or not _takes_use_cache(model):
        return args, kwargs
    return args, {**kwargs, "use_cache": False}


def _takes_use_cache(model: torch.nn.Module) -> bool:
    """Return whether a model's forward has an argument that switches its KV cache."""
    try:
        parameters = inspect.signature(type(model).forward).parameters
    except (TypeError, ValueError):
        # A forward that is no Python function has no signature.
        return False
    return "use_cache" in parameters
