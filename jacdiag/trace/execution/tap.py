"""Show chosen values of a run as the model's code meets them, and put others in their place."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from jacdiag.errors import TraceError
from jacdiag.trace.execution.gradient_strides import with_regular_gradient
from jacdiag.trace.execution.precision import Precision, map_leaves
from jacdiag.trace.execution.tensors import is_identity, operand_at, pick
from jacdiag.trace.graph.additions import term_tensor
from jacdiag.trace.graph.graph import CallKey
from jacdiag.trace.graph.recorder import signature


class SinkReached(BaseException):
    """Unwinds the model's code once the value at the end of a segment is known.

    It is no Exception, because the code of models catches those.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Where(enum.Enum):
    """How a value is met: among the arguments, as a call's result, or at a call about to run."""

    ARGUMENT = "argument"
    RESULT = "result"
    TERM = "term of an addition"
    OPERAND = "operand"
    READ = "operand, where it may be replaced"
    NORMALISED = "result of a fused norm, without its gain"


@dataclass(frozen=True)
class Spot:
    """A place in the run of one module call.

    Attributes:
        where: how the value is met.
        key: of the call, None for an argument.
        occurrence: how many calls with this key come before it.
        position: which of the call's tensors.
        shape: the value's shape, () if it need not be checked.
    """

    where: Where
    key: CallKey | None = None
    occurrence: int = 0
    position: int = 0
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.key is None:
            return "the arguments"
        _, file, line = self.key
        return f"{file}:{line}"


Visit = Callable[[Spot, Tensor], Tensor]
# Positional arguments of torch's fused norms.
_NORM_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


class Tap(TorchFunctionMode):
    """Shows chosen values to `visit` as a run meets them.

    What `visit` returns for a result takes the result's place.

    A replaced result also stands in for the original object wherever later calls name it, because
    in-place code (`x.add_(f(x))`) goes on with the object, not with what the call returned.
    """

    def __init__(
        self, precision: Precision, spots: Iterable[Spot], visit: Visit, grad: bool = False
    ) -> None:
        super().__init__()
        self.precision, self.visit, self.grad = precision, visit, grad
        self.counts: Counter[CallKey] = Counter()
        self.spots: dict[CallKey, dict[int, list[Spot]]] = {}
        for spot in spots:
            if spot.key is not None:
                self.spots.setdefault(spot.key, {}).setdefault(spot.occurrence, []).append(spot)
        # Tensor -> what stands in for it. The tensor is not kept alive: it would keep its graph.
        self.shadows: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.grad:
            return self._call(func, args, kwargs or {})

        # Differentiate what the model's code runs under no_grad.
        with torch.enable_grad():
            result = self._call(func, args, kwargs or {})

        # A custom Function inside no_grad asks for the mode itself.
        if func is torch._C._set_grad_enabled:
            torch._C._set_grad_enabled(True)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Make a call of the model's code, and show what there is to be seen at it."""
        # 1. What stands in for replaced tensors.
        if self.shadows:
            args = map_leaves(self._shadowed, args)
            kwargs = map_leaves(self._shadowed, kwargs)

        # 2. Reading or writing an attribute of a tensor.
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            result = self.precision.call(func, args, kwargs)
            if not isinstance(result, Tensor):
                return result
            return self._after(signature(func, 3), result, args, func)

        # 3. What the call reads.
        key = signature(func, 3)
        args, kwargs = self._replaced(key, args, kwargs)
        for spot in self._spots_at(key):
            if spot.where is Where.TERM:
                read = self.precision.raised(args, kwargs)
                self.visit(spot, _checked(term_tensor(name, *read, spot.position), spot))
            elif spot.where is Where.OPERAND:
                read = self.precision.raised(args, kwargs)
                self.visit(spot, _checked(operand_at(*read, spot.position), spot))

        # 4. The call itself, and what it returns.
        result = with_regular_gradient(name, self.precision.call(func, args, kwargs))
        return self._after(key, result, (args, kwargs), func)

    def _replaced(self, key: CallKey, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Show operands that are met here for the first time.

        What `visit` returns takes their place from now on.
        """
        for spot in self._spots_at(key):
            if spot.where is not Where.READ:
                continue

            # 1. Show the operand.
            tensor = _checked(operand_at(args, kwargs, spot.position), spot)
            new = self.visit(spot, tensor)

            # 2. Put another in its place.
            if new is not tensor:
                self.shadows[tensor] = new
                args = map_leaves(self._shadowed, args)
                kwargs = map_leaves(self._shadowed, kwargs)
        return args, kwargs

    def _spots_at(self, key: CallKey) -> list[Spot]:
        """Return the spots at the call that runs now."""
        places = self.spots.get(key)
        if not places:
            return []
        return places.get(self.counts[key], [])

    def _after(self, key: CallKey, result: Any, read: Any, func: Any) -> Any:
        """Count a call, show its results, and return what takes their place.

        Args:
            key: of the call.
            result: what it returned.
            read: its arguments.
            func: the torch function.
        """
        # 1. Count the call, unless the record does not count it either.
        if key not in self.spots or is_identity(key[0], result, read):
            return result
        spots = self._spots_at(key)
        self.counts[key] += 1

        # 2. Show its results.
        for spot in spots:
            if spot.where is Where.NORMALISED:
                tensor = pick(result, read, 0)
                new = self._through_norm(spot, tensor, func, read)
            elif spot.where is Where.RESULT:
                tensor = _checked(pick(result, read, spot.position), spot)
                new = self.visit(spot, tensor)
            else:
                continue

            # 3. What takes a result's place does so from now on.
            if new is not tensor:
                self.shadows[tensor] = new
                result = map_leaves(self._shadowed, result)
        return result

    def _through_norm(self, spot: Spot, result: Tensor, func: Any, read: Any) -> Tensor:
        """Show the normalised value before the learned gain.

        Gain and bias are applied again to a value that takes its place.
        """
        # 1. The norm without gain and bias.
        args, kwargs = read
        bound = dict(zip(_NORM_ARGUMENTS[func.__name__], args, strict=False)) | kwargs
        weight = bound.pop("weight", None)
        bias = bound.pop("bias", None)
        plain = self.precision.call(func, (), bound)

        # 2. What takes its place, with both.
        new = self.visit(spot, plain)
        if new is plain:
            return result
        (weight, bias), _ = self.precision.raised((weight, bias), {})
        if weight is not None:
            new = new * weight
        if bias is not None:
            new = new + bias
        return new

    def _shadowed(self, leaf: Any) -> Any:
        """Return what stands in for a tensor, and any other leaf as it is.

        What stands in for a tensor that is added to in place is replaced in its turn.
        """
        if not isinstance(leaf, Tensor):
            return leaf

        shadow = self.shadows.get(leaf)
        while shadow is not None:
            leaf = shadow
            shadow = self.shadows.get(leaf)
        return leaf


def _checked(tensor: Tensor, spot: Spot) -> Tensor:
    """Return a tensor; raise if its shape is not the recorded one."""
    is_as_recorded = not spot.shape or tuple(tensor.shape) == spot.shape
    if is_as_recorded:
        return tensor

    # Another branch of the code ran.
    raise TraceError(
        f"a re-run met another value than the record at {spot}",
        got=f"shape {tuple(tensor.shape)} instead of {spot.shape}",
        hint="the model's control flow depends on the values; try another --seed",
    )
