"""The values that a model's code may still read on the meta device, where tensors have shapes only.

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
        """
        name = getattr(func, "__name__", "")
        tensors = [t for t in _leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = all(self._copy(t) is not None for t in tensors if t.is_meta)
        if name in VALUE_QUESTIONS and known:
            return func(*self._real(args), **self._real(kwargs))
        result = func(*args, **kwargs)
        results = [t for t in _leaves(result) if isinstance(t, Tensor)]
        if writes_in_place(name):
            for t in (*tensors[:1], *results):
                self._known.pop(id(t), None)
            return result
        is_small = all(t.is_meta and t.numel() <= _LARGEST for t in results)
        is_draw = any(piece in name for piece in NAMES_OF_DRAWS)
        if known and is_small and not is_draw:
            self._keep(func, args, kwargs, results)
        return result

    def _keep(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        """Make a call again on the CPU and keep what it returns as copies of its results."""
        tensorless = not any(isinstance(t, Tensor) for t in _leaves((args, kwargs)))
        try:
            kwargs = self._real(kwargs)
            if tensorless:
                kwargs = {**kwargs, "device": "cpu"}
            with torch._C.DisableTorchFunction():
                result = func(*self._real(args), **kwargs)
                copies = [t for t in _leaves(result) if isinstance(t, Tensor)]
        except Exception:
            return  # then nothing is known of it
        for t, copy in zip(results, copies, strict=False):
            self._known[id(t)] = (weakref.ref(t), copy)

    def _copy(self, tensor: Tensor) -> Tensor | None:
        reference, copy = self._known.get(id(tensor), (None, None))
        return copy if reference is not None and reference() is tensor else None

    def _real(self, value: Any) -> Any:
        """Return nested arguments with copies in place of meta tensors, and the CPU as device."""
        if isinstance(value, Tensor):
            copy = self._copy(value)
            return value if copy is None else copy
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "meta" else value
        if type(value) in (tuple, list):
            return type(value)(self._real(item) for item in value)
        if type(value) is dict:
            return {
                key: torch.device("cpu") if key == "device" else self._real(item)
                for key, item in value.items()
            }
        return value


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value
