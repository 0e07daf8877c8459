"""In what precision a model's code runs, decided call by call.

bf16 and fp16 weights are raised where an operation reads them and dropped right after it, so that no second copy of a
model, nor even of a block, is made while recording. Explicit casts down (`x.to(torch.bfloat16)`, `.float()` in a
float64 run) are answered with the run's own precision, so that every product has one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_RANK = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1, torch.float64: 2}
_LOOKUPS = {"embedding"}
_CAST_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


class Precision:
    """Raises tensors of a state to `dtype` as calls read them.

    Args:
        dtype: torch.float32 or torch.float64.
        state: id of a state tensor -> its name; only these are raised on sight.
    """

    def __init__(self, dtype: torch.dtype, state: Mapping[int, str]) -> None:
        self.dtype = dtype
        self.state = state
        self.rank = _RANK[dtype]

    def lower(self, dtype: Any) -> bool:
        """Whether `dtype` is a floating type below the run's."""
        return _RANK.get(dtype, self.rank) < self.rank

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `func` with its low-precision state raised and its casts down answered in the run's precision."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            result = func(*args, **kwargs)
            if isinstance(result, torch.dtype) and self.lower(result) and args and id(args[0]) in self.state:
                return self.dtype
            return result
        if name in _LOOKUPS:
            return self._raise(func(*args, **kwargs))
        cast = _CAST_METHODS.get(name)
        if cast is not None and self.lower(cast) and args and isinstance(args[0], Tensor):
            return args[0].to(self.dtype)
        args, kwargs = map_leaves(self._argument, args), map_leaves(self._argument, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            return func(*map_leaves(self._raise, args), **map_leaves(self._raise, kwargs))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._raise(value) if id(value) in self.state else value
        if isinstance(value, torch.dtype) and self.lower(value):
            return self.dtype
        return value

    def _raise(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and self.lower(value.dtype):
            return value.to(self.dtype)
        return value


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """Applies `fn` to the leaves of nested tuples, lists and dicts; untouched containers are returned as they are."""
    kind = type(value)
    if kind is tuple or kind is list:
        items = [map_leaves(fn, item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return kind(items)
    if kind is dict:
        entries = {key: map_leaves(fn, item) for key, item in value.items()}
        return value if all(entries[key] is value[key] for key in value) else entries
    if isinstance(value, tuple):  # namedtuple, torch.Size
        if kind is torch.Size:
            return value
        items = [map_leaves(fn, item) for item in value]
        return kind(*items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return fn(value)
