"""Weights that are read when a call needs them; a run sees empty meta tensors (outlines)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from jacdiag.devices.accelerators import module_of
from jacdiag.trace.execution.tensors import is_finite
from jacdiag.trace.graph.ops import OUTLINE_QUESTIONS

_PLACE = {"is_meta": False, "is_sparse": False, "is_quantized": False}


class Stored(Mapping[str, Tensor]):
    """Parameters by name, read whenever one is needed.

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
        """Return the names of the parameters with NaN or Inf in them.

        Parameters that no run has needed yet are read now.
        """
        # 1. A read notes whether the parameter is finite.
        not_read = [name for name in self if name not in self._finite]
        for name in not_read:
            self[name]

        # 2. Those that are not, in the order in which they were read.
        names: list[str] = []
        for name, finite in self._finite.items():
            if not finite:
                names.append(name)
        return names

    def holds(self, value: Any) -> bool:
        """Return whether a value is one of the outlines."""
        return id(value) in self._names

    def read(self, outline: Any) -> Tensor:
        """Return the tensor that an outline stands for."""
        return self[self._names[id(outline)]]

    def filled(self, value: Any) -> Any:
        """Return the tensor of an outline, and any other value as it is."""
        if self.holds(value):
            return self.read(value)

        # A buffer, a number and so on.
        return value

    def asks(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Return whether a call reads an outline's shape, dtype or place, and not its numbers.

        Args:
            func: the torch function.
            args: its positional arguments.
        """
        # 1. The call is about an outline.
        if not args or not self.holds(args[0]):
            return False

        # 2. It reads an attribute, or asks for the shape in another way.
        name = getattr(func, "__name__", "")
        return name == "__get__" or name in OUTLINE_QUESTIONS

    def answer(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the answer to such a call.

        An attribute that is a tensor itself (`weight.T`, `weight.data`) needs the numbers.

        Args:
            func: the torch function.
            args: its positional arguments, the outline first.
            kwargs: its keyword arguments.
        """
        # 1. Where the weight is: on the device that it is brought to, not on the meta device.
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "device":
            return self.device

        # 2. Whether that device is of a kind, as in `is_cuda`.
        kind = attribute.removeprefix("is_")
        asks_for_kind = attribute.startswith("is_") and module_of(kind) is not None
        if asks_for_kind:
            return self.device.type == kind

        # 3. What the outline alone is: a tensor without numbers.
        if attribute in _PLACE:
            return _PLACE[attribute]

        # 4. Its shape and dtype are those of the outline.
        result = func(*args, **kwargs)
        needs_numbers = isinstance(result, Tensor)
        if needs_numbers:
            return func(self.read(args[0]), *args[1:], **kwargs)
        return result
