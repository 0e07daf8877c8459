"""The values that a model's code may read on the meta device, where tensors have shapes only.

Small tensors that the code makes from nothing (positions, causal masks) are computed on the CPU as
well, so that `if mask.all():` finds its answer. A question about anything else raises torch's own
error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from jacdiag.trace.execution.tensors import writes_in_place
from jacdiag.trace.graph.ops import NAMES_OF_DRAWS, VALUE_QUESTIONS

_LARGEST = 2**20


class KnownValues:
    """CPU copies of the small meta tensors that depend on no weight and no input."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func`, or answer a question about a meta tensor from its copy.

        Copies are kept up to date.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        # 1. A question about values that are known.
        name = getattr(func, "__name__", "")
        tensors = _tensors_in((args, kwargs))
        is_known = self._are_known(tensors)
        if is_known and name in VALUE_QUESTIONS:
            return func(*self._real(args), **self._real(kwargs))

        # 2. The call itself. What it writes to is not known any more.
        result = func(*args, **kwargs)
        results = _tensors_in(result)
        if writes_in_place(name):
            self._forget([*tensors[:1], *results])
            return result

        # 3. Copies of its results.
        is_repeatable = is_known and not _is_draw(name)
        if is_repeatable and _all_small(results):
            self._keep(func, args, kwargs, results)
        return result

    def _are_known(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether all values of some tensors are known, on the meta device or not."""
        return all(self._copy(tensor) is not None for tensor in tensors if tensor.is_meta)

    def _forget(self, tensors: Iterable[Tensor]) -> None:
        """Drop the copies of tensors that were written to."""
        for tensor in tensors:
            self._known.pop(id(tensor), None)

    def _keep(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Make a call again on the CPU and keep what it returns as copies of its results.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            results: what it returned on the meta device.
        """
        # 1. A call that reads no tensor makes one on the device that it names.
        reads_tensors = bool(_tensors_in((args, kwargs)))
        try:
            kwargs = self._real(kwargs)
            if not reads_tensors:
                kwargs = {**kwargs, "device": "cpu"}

            # 2. The call on the CPU.
            with torch._C.DisableTorchFunction():
                copies = _tensors_in(func(*self._real(args), **kwargs))
        except Exception:
            return  # then nothing is known of it

        # 3. A copy of each result.
        for tensor, copy in zip(results, copies, strict=False):
            self._known[id(tensor)] = (weakref.ref(tensor), copy)

    def _copy(self, tensor: Tensor) -> Tensor | None:
        """Return the copy of a tensor, None if its values are not known."""
        entry = self._known.get(id(tensor))
        if entry is None:
            return None

        # Another tensor may have had this id before.
        reference, copy = entry
        if reference() is not tensor:
            return None
        return copy

    def _real(self, value: Any) -> Any:
        """Return nested arguments with copies in place of meta tensors, and the CPU as device."""
        # 1. Leaves.
        if isinstance(value, Tensor):
            copy = self._copy(value)
            return value if copy is None else copy
        if isinstance(value, torch.device):
            return _real_device(value)

        # 2. Containers. A device may also be named by a string.
        if type(value) in (tuple, list):
            return type(value)(map(self._real, value))
        if type(value) is dict:
            entries = {key: self._real(item) for key, item in value.items()}
            if "device" in entries:
                entries["device"] = torch.device("cpu")
            return entries

        # 3. Numbers, dtypes and so on.
        return value


def _real_device(device: torch.device) -> torch.device:
    """Return the CPU in place of the meta device, and any other device as it is."""
    if device.type == "meta":
        return torch.device("cpu")

    # A device that has values.
    return device


def _is_draw(name: str) -> bool:
    """Return whether another run would not repeat what a call of that name returns."""
    return any(piece in name for piece in NAMES_OF_DRAWS)


def _all_small(tensors: Iterable[Tensor]) -> bool:
    """Return whether all tensors are on the meta device and small enough to be computed."""
    return all(tensor.is_meta and tensor.numel() <= _LARGEST for tensor in tensors)


def _tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors among the leaves of nested tuples, lists and dicts."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _leaves(value: Any) -> Iterable[Any]:
    """Yield the leaves of nested tuples, lists and dicts."""
    # 1. A leaf.
    if isinstance(value, dict):
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        yield value
        return

    # 2. The leaves of each item.
    for item in value:
        yield from _leaves(item)
