"""Weights that are read when a call needs them: a run sees outlines, empty meta tensors, in their
places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from jacdiag.trace.execution.tensors import is_finite

# Calls that ask for a tensor's outline and not for its numbers.
_OUTLINE_ONLY = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "is_floating_point",
    "is_complex",
    "element_size",
    "__len__",
    "stride",
    "is_contiguous",
    "storage_offset",
    "data_ptr",
    "__hash__",
    "is_pinned",
    "is_shared",
    "is_inference",
}
_PLACE = {"is_meta": False, "is_sparse": False, "is_quantized": False}


class Stored(Mapping[str, Tensor]):
    """Parameters by name, read from somewhere whenever one is asked for.

    Args:
        weights: name -> tensor; every access may read a file.
        outlines: name -> meta tensor of the parameter's shape and dtype, an object of its own each.
        device: where they are brought to.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], outlines: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self.outlines, self.device = dict(outlines), device
        self._weights = weights
        self._names = {id(t): name for name, t in self.outlines.items()}
        self._finite: dict[str, bool] = {}

    def __getitem__(self, name: str) -> Tensor:
        # a transform of torch.func would wrap what is made in it
        with temporarily_clear_interpreter_stack():
            tensor = self._weights[name].to(self.device)
            if name not in self._finite:
                self._finite[name] = is_finite(tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    def non_finite(self) -> list[str]:
        """Names of the parameters with NaN or Inf in them; those that no run has asked for are read
        now.
        """
        for name in self:
            if name not in self._finite:
                self[name]
        return [name for name, finite in self._finite.items() if not finite]

    def holds(self, value: Any) -> bool:
        """Whether a value is one of the outlines."""
        return id(value) in self._names

    def read(self, outline: Any) -> Tensor:
        """The tensor that an outline stands for."""
        return self[self._names[id(outline)]]

    def filled(self, value: Any) -> Any:
        return self.read(value) if self.holds(value) else value

    def asks(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether a call is about an outline's shape, dtype or place, and not about its numbers."""
        name = getattr(func, "__name__", "")
        return bool(args) and self.holds(args[0]) and (name in _OUTLINE_ONLY or name == "__get__")

    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Answers such a call; an attribute that is a tensor itself (`weight.T`, `weight.data`)
        needs the numbers.
        """
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "device":
            return self.device
        if attribute in ("is_cuda", "is_cpu"):
            return self.device.type == attribute.removeprefix("is_")
        if attribute in _PLACE:
            return _PLACE[attribute]
        result = func(*args, **kwargs)
        return (
            func(self.read(args[0]), *args[1:], **kwargs) if isinstance(result, Tensor) else result
        )
