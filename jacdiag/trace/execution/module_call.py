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
        kind = type(value)
        if isinstance(value, Tensor):
            return self.swap.get(id(value), value)
        if value is None or isinstance(value, (int, float, str, bool, torch.nn.Module)):
            return value
        if kind in (tuple, list):
            return kind(self.copy(item) for item in value)
        if kind is dict:
            return {key: self.copy(item) for key, item in value.items()}
        if callable(value) or kind.__name__.endswith("Config"):
            return value
        try:
            with torch._C._EnableTorchFunction(), self:  # hooks run with torch functions disabled
                return copy.deepcopy(value)
        except Exception:
            return value


@dataclass
class Call:
    """One module call, ready to be made again.

    Attributes:
        module: its name.
        args, kwargs: a snapshot of its arguments.
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
            args, kwargs: the arguments.
            values: the values of the tensors among them, in order.
            mutated: values that the run writes to.
        """
        given: list[Tensor] = []
        collect_deep((args, kwargs), given)
        by_value = dict(zip(values, given, strict=True))
        tensors = {v: t.clone() if v in mutated else t for v, t in by_value.items()}
        swap = _Swap({id(t): tensors[v] for v, t in zip(values, given, strict=True)})
        return cls(module, swap.copy(args), swap.copy(kwargs), tensors)

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
    """Return a model's inputs, detached, floats in the precision of the run, without KV cache."""

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if leaf.is_inference():
            leaf = leaf.clone()
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    with torch.inference_mode(False):
        args, kwargs = map_leaves(cast, args), map_leaves(cast, kwargs)
    try:
        parameters = inspect.signature(type(model).forward).parameters
    except (TypeError, ValueError):
        return args, kwargs
    if "use_cache" in parameters and "use_cache" not in kwargs:
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs
