"""In what precision a model's code runs, decided call by call.

bf16 and fp16 weights are raised where an operation reads them and dropped right after it, so that
no second copy of a model, nor even of a block, is made while recording; a graph through the entire
model keeps the low ones (`Raisings`). Explicit casts down (`x.to(torch.bfloat16)`, `.float()` in a
float64 run) are answered with the run's own precision, so that every product has one rounding.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jacdiag.trace.execution.lazy_weights import Stored
from jacdiag.trace.execution.meta_values import KnownValues
from jacdiag.trace.graph.ops import GROUPED_PRODUCTS, LOOKUPS, RECURRENT

_RANK = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1, torch.float64: 2}
_LARGE = 4096  # elements from which a tensor is worth looking at
_CAST_METHODS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


class Raisings:
    """Which tensors are raised copies of low ones, so that autograd need not keep them."""

    def __init__(self) -> None:
        self._low: dict[int, tuple[weakref.ref[Tensor], Callable[[], Tensor]]] | None = None

    @contextmanager
    def not_kept(self) -> Iterator[None]:
        """Keep no raised tensor in a graph: raise it, or read it from its file, when needed.

        Nor are zeros kept. The transpose of a pull is taken at zero, and would hold a zero for
        every cotangent.
        """
        self._low = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._low = None

    def add(self, raised: Tensor, again: Callable[[], Tensor]) -> None:
        """Note a tensor that `again` makes once more."""
        if self._low is not None:
            self._low[raised.untyped_storage().data_ptr()] = (weakref.ref(raised), again)

    def _pack(self, saved: Tensor) -> Any:
        """Return what a graph keeps in place of a tensor."""
        # 1. Zeros are made again.
        if _is_zero(saved):
            return partial(torch.zeros, saved.size(), dtype=saved.dtype, device=saved.device)

        # 2. An operation may keep its own result. To return that would tie the graph to itself, and
        # nothing would ever free it: torch puts the graph back when it unpacks.
        if saved.requires_grad:
            return saved.detach()

        # 3. A raised tensor is made again too, when it is needed.
        entry = None
        if self._low is not None:
            entry = self._low.get(saved.untyped_storage().data_ptr())
        if entry is None:
            return saved

        # 4. Another tensor may have the memory of one that is gone.
        raised, again = entry
        if raised() is None:
            return saved
        return again, saved.size(), saved.stride(), saved.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        """Return the tensor that `_pack` put away."""
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
    """Return whether a large tensor is all zero."""
    # 1. A small one costs nothing to keep.
    if tensor.is_meta or tensor.dim() == 0:
        return False
    if tensor.numel() < _LARGE:
        return False

    # 2. The first element of a tensor that is not all zero mostly shows it.
    first = tensor[(0,) * tensor.dim()]
    if first != 0:
        return False
    return not bool(tensor.any())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make what names no dtype in this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Compute without the kernels of cuDNN: those of recurrent layers have no second derivative.

    They have a first one in training mode only.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


class Precision:
    """Raises tensors of a state to `dtype` as calls read them.

    Args:
        dtype: torch.float32 or torch.float64.
        state: id of a state tensor -> its name; only these are raised on sight.
        raisings: is given every tensor of the state that is raised.
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
        """Return whether `dtype` is a floating type below the run's."""
        return _RANK.get(dtype, self.rank) < self.rank

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func` with its low-precision state raised.

        Casts down are answered in the run's precision.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read_attribute(func, args, kwargs)

        # 1. Weights that are not in memory.
        if self.stored is not None:
            if self.stored.asks(func, args):
                return self.stored.answer(func, args, kwargs)
            if name in LOOKUPS:
                args = map_leaves(self.stored.filled, args)
                kwargs = map_leaves(self.stored.filled, kwargs)

        # 2. A lookup reads a few rows: they are raised, not the table.
        if name in LOOKUPS:
            return self._raise(func(*args, **kwargs))

        # 3. A cast below the run's precision.
        cast = _CAST_METHODS.get(name)
        is_cast_down = cast is not None and self.lower(cast)
        if is_cast_down and args and isinstance(args[0], Tensor):
            return self._raise(args[0]).to(self.dtype)

        # 4. Its arguments in the run's precision.
        args = map_leaves(self._argument, args)
        kwargs = map_leaves(self._argument, kwargs)

        # 5. Torch's own grouped product refuses float64.
        if name in GROUPED_PRODUCTS and self.dtype is torch.float64:
            return grouped_mm(*args, **kwargs)

        # 6. On the meta device, some values are known even so.
        if self.known is not None:
            return self.known.call(func, args, kwargs)

        # 7. A recurrent layer, by a kernel that has a derivative in eval mode.
        if name in RECURRENT:
            with _without_cudnn():
                return self._call_raised_if_needed(func, args, kwargs)
        return self._call_raised_if_needed(func, args, kwargs)

    def _read_attribute(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return an attribute of a tensor; a low dtype of the state is the run's own."""
        result = func(*args, **kwargs)

        # 1. The dtype of a weight.
        reads_state = bool(args) and id(args[0]) in self.state
        if reads_state and isinstance(result, torch.dtype):
            is_low = self.lower(result)
            return self.dtype if is_low else result

        # 2. Anything of a weight that is not in memory.
        if self.stored is not None and self.stored.asks(func, args):
            return self._raise(self.stored.answer(func, args, kwargs))
        return result

    def _call_raised_if_needed(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call `func`; if dtypes do not agree, call it again with every low tensor raised."""
        # 1. Most calls run as they are.
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            message = str(error)

            # 2. A number that only float64 holds, as in torch.full((), finfo(x.dtype).min).
            is_too_large = "overflow" in message
            if is_too_large and self.dtype is torch.float64:
                with default_dtype(self.dtype):
                    return func(*args, **kwargs)

            # 3. Tensors of two types, which torch calls "dtype", "scalar type" or "input type".
            # Any other error is the model's own.
            if "type" not in message:
                raise
            raised_args, raised_kwargs = self.raised(args, kwargs)
            if raised_args is args and raised_kwargs is kwargs:
                raise
            return func(*raised_args, **raised_kwargs)

    def raised(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with every tensor of lower precision raised."""
        return map_leaves(self._raise, args), map_leaves(self._raise, kwargs)

    def _argument(self, value: Any) -> Any:
        """Return an argument with a tensor of the state raised, and a low dtype replaced."""
        # 1. A dtype below the run's.
        if isinstance(value, torch.dtype):
            return self.dtype if self.lower(value) else value

        # 2. Anything else that is not of the state.
        if not isinstance(value, Tensor) or id(value) not in self.state:
            return value

        # 3. A tensor of the state. A graph that saves it can make it again.
        raised: Tensor = self._raise(value)
        if raised is not value and self.raisings is not None:
            self.raisings.add(raised, lambda: self._raise(value))
        return raised

    def _raise(self, value: Any) -> Any:
        """Return a floating tensor in the run's precision, and anything else as it is."""
        # 1. A weight that is not in memory.
        if self.stored is not None:
            value = self.stored.filled(value)

        # 2. Its precision. No type but a floating one is below the run's.
        if isinstance(value, Tensor) and self.lower(value.dtype):
            return value.to(self.dtype)
        return value


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """Return the product of row groups of `a` with their own matrices `b`, for float64.

    The kernel of torch refuses float64.

    Args:
        a: (n, k) rows, sorted by group.
        b: (g, k, m), one matrix per group.
        offs: (g,) where each group ends.
        bias: is added to the product.
        **_: options of torch's kernel, which do not change the product.

    Returns:
        (n, m); rows after the last group are 0.
    """
    # 1. Without groups of rows it is one product.
    has_rows = a.dim() == 2 and b.dim() == 3
    if has_rows and offs is not None:
        product = _product_by_group(a, b, offs)
    else:
        product = a @ b

    # 2. The bias.
    if bias is None:
        return product
    return product + bias


def _product_by_group(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Return a product for each group of rows, and zeros for the rows that belong to none."""
    # 1. A product for each group.
    products: list[Tensor] = []
    start = 0
    for group, end in enumerate(offs.tolist()):
        products.append(a[start:end] @ b[group])
        start = end

    # 2. The rows after the last group.
    zeros = a.new_zeros(a.shape[0] - start, b.shape[-1])
    return torch.cat([*products, zeros])


def map_leaves(fn: Callable[[Any], Any], value: Any) -> Any:
    """Apply `fn` to the leaves of nested tuples, lists and dicts.

    Containers of which no leaf changes are returned as they are. `torch.utils._pytree` would take
    the containers apart that libraries register (caches, model outputs), which are leaves here.

    Args:
        fn: the function.
        value: a leaf, or a container of them.
    """
    # 1. A shape is no container of leaves.
    if isinstance(value, torch.Size):
        return value
    kind = type(value)

    # 2. Tuples and lists. A named tuple takes its items one by one.
    if isinstance(value, tuple) or kind is list:
        items = [map_leaves(fn, item) for item in value]
        if _same_objects(items, value):
            return value
        is_plain = kind is tuple or kind is list
        return kind(items) if is_plain else kind(*items)

    # 3. Dicts.
    if kind is dict:
        entries = {key: map_leaves(fn, item) for key, item in value.items()}
        if _same_objects(entries.values(), value.values()):
            return value
        return entries

    # 4. A leaf.
    return fn(value)


def _same_objects(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Return whether two containers of one length hold the same objects."""
    return all(map(operator.is_, first, second))
