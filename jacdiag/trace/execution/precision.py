"""In what precision a model's code runs, decided call by call.

bf16 and fp16 weights are raised where an operation reads them and dropped right after it, so that
no second copy of a model, nor even of a block, is made while recording; a graph through the whole
model keeps the low ones (`Raisings`). Explicit casts down (`x.to(torch.bfloat16)`, `.float()` in a
float64 run) are answered with the run's own precision, so that every product has one rounding.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacdiag.trace.execution.lazy_weights import Stored
from jacdiag.trace.execution.meta_values import KnownValues

_RANK = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1, torch.float64: 2}
_LOOKUPS = {"embedding"}
_GROUPED = {"_grouped_mm", "grouped_mm"}
_LARGE = 4096  # elements from which a tensor is worth looking at
_CAST_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


class Raisings:
    """Which tensors are raised copies of low ones, so that autograd need not keep them."""

    def __init__(self) -> None:
        self._low: dict[int, tuple[weakref.ref[Tensor], Callable[[], Tensor]]] | None = None

    @contextmanager
    def not_kept(self) -> Iterator[None]:
        """Inside, a graph keeps no raised tensor: it is raised, or read from its file, again
        whenever it is needed.

        Nor does it keep zeros: the transpose of a pull is taken at zero, and would hold a zero for
        every cotangent.
        """
        self._low = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._low = None

    def add(self, raised: Tensor, again: Callable[[], Tensor]) -> None:
        """Notes a tensor that `again` makes once more."""
        if self._low is not None:
            self._low[raised.untyped_storage().data_ptr()] = (weakref.ref(raised), again)

    def _pack(self, saved: Tensor) -> Any:
        if _is_zero(saved):
            return partial(torch.zeros, saved.size(), dtype=saved.dtype, device=saved.device)
        entry = None if self._low is None else self._low.get(saved.untyped_storage().data_ptr())
        if entry is None or entry[0]() is None or saved.requires_grad:
            return saved
        return entry[1], saved.size(), saved.stride(), saved.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, partial):
            zeros: Tensor = packed()
            return zeros
        again, *layout = packed
        raised: Tensor = again()
        self.add(raised, again)
        return raised.as_strided(*layout)


def _is_zero(tensor: Tensor) -> bool:
    """Whether a tensor is all zero; one that is not is mostly told by its first element."""
    if (
        tensor.is_meta
        or tensor.dim() == 0
        or tensor.numel() < _LARGE
        or tensor[(0,) * tensor.dim()] != 0
    ):
        return False
    return not bool(tensor.any())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, what names no dtype is made in this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Precision:
    """Raises tensors of a state to `dtype` as calls read them.

    Args:
        dtype: torch.float32 or torch.float64.
        state: id of a state tensor -> its name; only these are raised on sight.
        raisings: told of every tensor of the state that is raised.
        valueless: the state is on the meta device.
        stored: reads the state's tensors, which are outlines only.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        state: Mapping[int, str],
        raisings: Raisings | None = None,
        valueless: bool = False,
        stored: Stored | None = None,
    ) -> None:
        self.known = KnownValues() if valueless else None
        self.dtype = dtype
        self.state = state
        self.stored = stored
        self.raisings = raisings
        self.rank = _RANK[dtype]

    def lower(self, dtype: Any) -> bool:
        """Whether `dtype` is a floating type below the run's."""
        return _RANK.get(dtype, self.rank) < self.rank

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls `func` with its low-precision state raised and its casts down answered in the run's
        precision.
        """
        name = getattr(func, "__name__", "")
        if name == "__get__":
            result = func(*args, **kwargs)
            if (
                isinstance(result, torch.dtype)
                and self.lower(result)
                and args
                and id(args[0]) in self.state
            ):
                return self.dtype
            if self.stored is not None and self.stored.asks(func, args):
                return self._raise(self.stored.answer(func, args, kwargs))
            return result
        if self.stored is not None:
            if self.stored.asks(func, args):
                return self.stored.answer(func, args, kwargs)
            if name in _LOOKUPS:  # of a few rows: they are raised, not the table
                args, kwargs = (
                    map_leaves(self.stored.filled, args),
                    map_leaves(self.stored.filled, kwargs),
                )
        if name in _LOOKUPS:
            return self._raise(func(*args, **kwargs))
        cast = _CAST_METHODS.get(name)
        if cast is not None and self.lower(cast) and args and isinstance(args[0], Tensor):
            return self._raise(args[0]).to(self.dtype)
        args, kwargs = map_leaves(self._argument, args), map_leaves(self._argument, kwargs)
        if name in _GROUPED and self.dtype is torch.float64:
            return grouped_mm(*args, **kwargs)
        if self.known is not None:
            return self.known.call(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "overflow" in str(error) and self.dtype is torch.float64:
                with default_dtype(self.dtype):  # torch.full((), finfo(x.dtype).min)
                    return func(*args, **kwargs)
            if "dtype" not in str(error):
                raise
            args, kwargs = self.raised(args, kwargs)
            return func(*args, **kwargs)

    def raised(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with every tensor of lower precision raised."""
        return map_leaves(self._raise, args), map_leaves(self._raise, kwargs)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.state:
                return value
            raised: Tensor = self._raise(value)
            if raised is not value and self.raisings is not None:
                self.raisings.add(raised, lambda: self._raise(value))
            return raised
        if isinstance(value, torch.dtype) and self.lower(value):
            return self.dtype
        return value

    def _raise(self, value: Any) -> Any:
        if self.stored is not None:
            value = self.stored.filled(value)
        if isinstance(value, Tensor) and value.is_floating_point() and self.lower(value.dtype):
            return value.to(self.dtype)
        return value


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """The product of row groups of `a` (n, k) with their own matrices `b` (g, k, m); the kernel
    refuses float64.

    Args:
        a: rows, sorted by group.
        b: one matrix per group.
        offs: (g,) where each group ends.
    """
    if offs is None or a.dim() != 2 or b.dim() != 3:
        out = a @ b
    else:
        ends = [0, *offs.tolist()]
        rows = [a[start:end] @ b[g] for g, (start, end) in enumerate(itertools.pairwise(ends))]
        out = torch.cat([*rows, a.new_zeros(a.shape[0] - ends[-1], b.shape[-1])])
    return out if bias is None else out + bias


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """Applies `fn` to the leaves of nested tuples, lists and dicts; untouched containers are
    returned as they are.
    """
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
        return (
            kind(*items)
            if any(new is not old for new, old in zip(items, value, strict=True))
            else value
        )
    return fn(value)
