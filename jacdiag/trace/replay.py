"""Runs part of a model again: one value replaced, stopped at another.

A *segment* is the function from one value of the record to another. It is evaluated by running the model's own code
again, of the innermost module call that holds all of it, with the value replaced right after the call that made it (or
among the module's arguments) and stopped where the other value is known. Calls are identified by function, source line
and occurrence within the module call, so that code whose number of calls changes (routing) is still met at the right
place; a mismatch raises.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from jacdiag.errors import TraceError
from jacdiag.trace.calls import Call
from jacdiag.trace.precision import Precision, Raisings, map_leaves
from jacdiag.trace.randomness import RandomState, borrowed
from jacdiag.trace.record import CallKey, Graph, collect, signature, writes_in_place
from jacdiag.trace.skeleton import Skeleton
from jacdiag.trace.sums import term_tensor


class Stop(BaseException):
    """Unwinds the model's code once the wanted value is known. Not an Exception: guests catch those."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Where(enum.Enum):
    """How a value is met: among the arguments, as a call's result, or at a call about to run."""

    ARGUMENT = "argument"
    RESULT = "result"
    TERM = "term of an addition"
    OPERAND = "operand"
    NORMALISED = "result of a fused norm, without its gain"


@dataclass(frozen=True)
class Spot:
    """A place in the run of one module call: the `occurrence`-th call with this key, and which of its tensors."""

    where: Where
    key: CallKey | None = None
    occurrence: int = 0
    position: int = 0
    shape: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.key[1]}:{self.key[2]}" if self.key else "the arguments"


Visit = Callable[[Spot, Tensor], Tensor]


class Tap(TorchFunctionMode):
    """Shows chosen values to `visit` as a run meets them; what it returns for a result takes the result's place.

    A replaced result also stands in for the original object wherever later calls name it, because in-place code
    (`x.add_(f(x))`) goes on with the object, not with what the call returned.
    """

    def __init__(self, precision: Precision, spots: Iterable[Spot], visit: Visit, grad: bool = False) -> None:
        super().__init__()
        self.precision, self.visit, self.grad = precision, visit, grad
        self.counts: Counter[CallKey] = Counter()
        self.spots: dict[CallKey, dict[int, list[Spot]]] = {}
        for spot in spots:
            if spot.key is not None:
                self.spots.setdefault(spot.key, {}).setdefault(spot.occurrence, []).append(spot)
        self.shadows: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.grad:
            return self._call(func, args, kwargs or {})
        with torch.enable_grad():
            result = self._call(func, args, kwargs or {})
        if func is torch._C._set_grad_enabled:
            torch._C._set_grad_enabled(True)  # a custom Function inside no_grad asks for the mode itself
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.shadows:
            args, kwargs = map_leaves(self._shadowed, args), map_leaves(self._shadowed, kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            result = self.precision.call(func, args, kwargs)
            return self._after(signature(func, 3), result, args, func) if isinstance(result, Tensor) else result
        key = signature(func, 3)
        for spot in self._here(key):
            if spot.where in (Where.TERM, Where.OPERAND):
                self.visit(spot, _checked(_before(spot, name, *self.precision.raised(args, kwargs)), spot))
        return self._after(key, self.precision.call(func, args, kwargs), (args, kwargs), func)

    def _here(self, key: CallKey) -> list[Spot]:
        places = self.spots.get(key)
        return places.get(self.counts[key], []) if places else []

    def _after(self, key: CallKey, result: Any, read: Any, func: Any) -> Any:
        places = self.spots.get(key)
        if places is None:
            return result
        if _is_identity(key[0], result, read):
            return result  # the record does not count these either
        here = places.get(self.counts[key], ())
        self.counts[key] += 1
        for spot in here:
            if spot.where is Where.NORMALISED:
                found = _pick(result, read, 0)
                new = self._through_norm(spot, found, func, read)
            elif spot.where is Where.RESULT:
                found = _checked(_pick(result, read, spot.position), spot)
                new = self.visit(spot, found)
            else:
                continue
            if new is not found:
                self.shadows[id(found)] = (found, new)
                result = map_leaves(self._shadowed, result)
        return result

    def _through_norm(self, spot: Spot, found: Tensor, func: Any, read: Any) -> Tensor:
        """Shows the normalised value before the learned gain; a replacement gets gain and bias again."""
        args, kwargs = read
        bound = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
        if func.__name__ == "rms_norm":
            bound = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
        weight, bias = bound.pop("weight", None), bound.pop("bias", None)
        plain = self.precision.call(func, (), bound)
        new = self.visit(spot, plain)
        if new is plain:
            return found
        weight, bias = (None if t is None else t.to(new.dtype) for t in (weight, bias))
        new = new if weight is None else new * weight
        return new if bias is None else new + bias

    def _shadowed(self, leaf: Any) -> Any:
        pair = self.shadows.get(id(leaf))
        return pair[1] if pair is not None and pair[0] is leaf else leaf


def _is_identity(name: str, result: Any, read: Any) -> bool:
    """Whether a call made nothing new: `x.to(x.dtype)`, dropout in eval mode."""
    if writes_in_place(name):
        return False
    ids = {id(t) for t in _tensors(read)}
    return all(id(t) in ids for t in _tensors(result))


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    collect(value, found)
    return found


def _before(spot: Spot, name: str, args: Any, kwargs: Any) -> Tensor:
    if spot.where is Where.TERM:
        return term_tensor(name, args, kwargs, spot.position)
    return _tensors((args, kwargs))[spot.position]


def _pick(result: Any, read: Any, position: int) -> Tensor:
    return _tensors(result)[position] if position >= 0 else _tensors(read)[-1 - position]


def _checked(tensor: Tensor, spot: Spot) -> Tensor:
    if spot.shape and tuple(tensor.shape) != spot.shape:
        raise TraceError(
            f"a re-run met another value than the record at {spot}",
            got=f"shape {tuple(tensor.shape)} instead of {spot.shape}",
            hint="the model's control flow depends on the values; try another --seed",
        )
    return tensor


@dataclass
class Replayer:
    """Makes segments of one recorded model, and whole runs with taps."""

    skeleton: Skeleton
    graph: Graph
    dtype: torch.dtype
    root: Call
    calls: dict[int, Call] = field(default_factory=dict)
    starts: dict[int, RandomState] = field(default_factory=dict)  # of calls, where the model draws random numbers
    raisings: Raisings = field(default_factory=Raisings)

    # -- places ----------------------------------------------------------------------------------------------------
    def spot_of(self, value: int, invocation: int) -> Spot:
        """Says where a value is met when the given module call is run again."""
        record = self.graph.values[value]
        if record.node < self.graph.invocations[invocation].start:
            return Spot(Where.ARGUMENT, position=value, shape=record.shape)
        return Spot(Where.RESULT, *self.occurrence(record.node, invocation), record.position, record.shape)

    def spot_at(self, where: Where, node: int, invocation: int, position: int = 0) -> Spot:
        return Spot(where, *self.occurrence(node, invocation), position)

    def occurrence(self, node: int, invocation: int) -> tuple[CallKey, int]:
        """Returns a call's key and how many calls with that key came before it in the module call."""
        nodes = self.graph.calls_by_key[self.graph.nodes[node].key]
        start = self.graph.invocations[invocation].start
        return self.graph.nodes[node].key, sum(start <= n < node for n in nodes)

    # -- runs ------------------------------------------------------------------------------------------------------
    def whole_graph(self) -> AbstractContextManager[None]:
        """To be entered where a graph through the whole model is built: it then holds no raised copy of the model."""
        low = any(t.is_floating_point() and t.dtype.itemsize < 4 for t in self.skeleton.params.values())
        return self.raisings.not_kept() if low else nullcontext()

    def segment(self, invocation: int, source: Spot, sink: Spot) -> Callable[[Tensor], Tensor]:
        """Returns the function from the source's value to the sink's, by running one module call again."""
        return lambda x: self.run(invocation, source, x, sink)

    def run(self, invocation: int, source: Spot, x: Tensor, sink: Spot) -> Tensor:
        """Runs a module call with `x` at `source`, returns the value at `sink`. Raises TraceError if it is not met."""
        y = self._run(invocation, source, x, sink)
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
            y = self._run(invocation, source, x, sink, grad=True)  # the model's code ran it under no_grad
        return y

    def _run(self, invocation: int, source: Spot, x: Tensor, sink: Spot, grad: bool = False) -> Tensor:
        call = self.calls[invocation]
        value = x.clone()  # the guest may write in place; a leaf must not be written to
        met = source.where is Where.ARGUMENT

        def visit(spot: Spot, tensor: Tensor) -> Tensor:
            nonlocal met
            if spot is sink:
                raise Stop(tensor)
            met = True
            return value

        args, kwargs = call.arguments(source.position if met else None, value)
        try:
            self._execute(call.module, args, kwargs, (source, sink), visit, grad, self.starts.get(invocation))
        except Stop as stop:
            if met:
                return stop.value
        raise TraceError(
            f"a re-run of '{call.module or 'the model'}' did not meet {sink} again",
            hint="the model's control flow depends on the values; try another --seed",
        )

    def tapped(
        self,
        spots: Iterable[Spot],
        visit: Visit,
        hook: Callable[..., None] | None = None,
        argument: tuple[int | None, Tensor | None] = (None, None),
        grad: bool = False,
    ) -> Any:
        """Runs the whole model once with taps and returns its output.

        Args:
            spots, visit: what to show to `visit` on the way.
            hook: sees (module, args, kwargs) of every module call.
            argument: (value, tensor): an input of the model to replace.
            grad: differentiate also what the model's code runs under no_grad.
        """
        root = self.calls.get(0, self.root)
        args, kwargs = root.arguments(*argument)
        handles = []
        try:
            if hook is not None:
                modules = self.skeleton.root.modules()
                handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
            return self._execute("", args, kwargs, spots, visit, grad, self.graph.start)
        finally:
            for handle in handles:
                handle.remove()

    def _execute(
        self, module: str, args: Any, kwargs: Any, spots: Iterable[Spot], visit: Visit, grad: bool = False,
        start: RandomState | None = None,
    ) -> Any:  # fmt: skip
        state = self.skeleton.fresh_state_of(module)
        names = {id(t): name for name, t in state.items()}
        precision = Precision(self.dtype, names, self.raisings, self.skeleton.valueless)
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if start is not None:
                stack.enter_context(borrowed(start))
            if grad:
                stack.enter_context(torch.enable_grad())  # also puts the mode back
            stack.enter_context(Tap(precision, spots, visit, grad))
            return torch.func.functional_call(self.skeleton.module(module), state, args, kwargs, strict=False)

    def capture(
        self, invocations: set[int], values: dict[int, Spot], terms: dict[Any, Spot]
    ) -> tuple[Any, dict[Any, Tensor]]:
        """Runs the whole model again; snapshots the wanted module calls and keeps the wanted values.

        Returns the model's output (to be compared with the first run's) and the tensors by key of `values`/`terms`.
        """
        graph = self.graph
        mutated = {v.index for v in graph.values if v.mutated}
        keys = {id(spot): key for key, spot in [*values.items(), *terms.items()]}
        kept: dict[Any, Tensor] = {}
        count = 0

        def visit(spot: Spot, tensor: Tensor) -> Tensor:
            key = keys[id(spot)]
            clone = key not in values or key in mutated
            kept[key] = tensor.clone() if clone else tensor
            return tensor

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal count
            if count in invocations:
                if graph.start is not None:
                    self.starts[count] = RandomState.now()
                record = graph.invocations[count]
                with torch._C.DisableTorchFunction():
                    self.calls[count] = Call.take(record.module, args, kwargs, record.arguments, mutated)
            count += 1

        with torch.no_grad():
            output = self.tapped([*values.values(), *terms.values()], visit, hook)
        return output, kept
