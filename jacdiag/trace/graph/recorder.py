"""Runs a skeleton once, numbers its torch calls, and keeps who depends on whom.

The recorder is a TorchFunctionMode: it sees every call that Python makes into torch, whatever code
makes it. Values are known by object and by storage, so that in-place writes, writes through views
and tensors made inside a custom autograd.Function keep their history. Nothing but numbers is kept:
no tensor outlives the run because of it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from jacdiag.trace.execution.plain_mode import custom_function, plain_run, unseen_code
from jacdiag.trace.execution.precision import Precision
from jacdiag.trace.execution.rng_state import RandomState, borrowed
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.execution.tensors import (
    collect,
    collect_deep,
    is_float,
    storage_of,
    version_of,
    writes_in_place,
)
from jacdiag.trace.graph.additions import number_added, terms_of
from jacdiag.trace.graph.graph import (
    CONSTANT,
    CUTS,
    INPUT,
    STATE,
    CallKey,
    Graph,
    Invocation,
    Node,
    Value,
)

_TORCH_DIR = torch.__file__.rsplit("/", 1)[0]
_PLUMBING = (
    f"{_TORCH_DIR}/overrides.py",
    f"{_TORCH_DIR}/_tensor.py",
    f"{_TORCH_DIR}/nn/functional.py",
    __file__,
)


_METADATA_ONLY = {name for name in CUTS if name.endswith("_like") or name.startswith("new_")}
# of the others they read the shape or dtype
_FIRST_ONLY = {"expand_as", "view_as", "reshape_as", "type_as", "to"}


_SELECTS = {"__getitem__", "index_select", "gather", "take", "take_along_dim"}


def signature(func: Callable[..., Any], depth: int = 2) -> CallKey:
    """Names a call by its function and the source line that made it: stable from run to run, unlike
    its number.
    """
    frame = sys._getframe(depth)
    while frame.f_back is not None and frame.f_code.co_filename in _PLUMBING:
        frame = frame.f_back
    return (getattr(func, "__name__", str(func)), frame.f_code.co_filename, frame.f_lineno)


def _name_of_call(func: Callable[..., Any], key: CallKey) -> str:
    """Return the name of a call; reading `.data` is a detach."""
    reads_data = (
        key[0] == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data"
    )
    return "detach" if reads_data else key[0]


def user_line(depth: int = 2) -> str:
    """Returns 'file.py:12' of the innermost frame outside torch."""
    frame = sys._getframe(depth)
    while frame.f_back is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_TORCH_DIR) and filename != __file__:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class WritesParameter(BaseException):
    """Unwinds a run that is about to write to a parameter. Not an Exception: guests catch those."""

    def __init__(self, name: str) -> None:
        self.name = name


class Recorder(TorchFunctionMode):
    """Numbers calls and values of one forward. Use `record`."""

    def __init__(self, precision: Precision, guests: dict[int, str] | None = None) -> None:
        super().__init__()
        self.precision = precision
        # storage -> name of the parameters that are the guest's own memory
        self.guests = guests or {}
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.invocations: list[Invocation] = []
        self.stack: list[int] = []
        self.used_state: set[str] = set()
        self._objects: dict[int, tuple[Any, int]] = {}
        self._storages: dict[int, int] = {}  # storage -> the last value that was written to it
        # keeps a freed storage's name from being given to another
        self._held: dict[int, StorageWeakRef] = {}
        self._members: dict[int, list[int]] = {}
        self._state_values: dict[str, int] = {}
        self.stream_shapes: set[tuple[int, ...]] = set()
        # met for the first time, though of a live value's shape
        self.foreign: list[tuple[Tensor, str]] = []

    # -- values ------------------------------------------------------------------------------------
    def new_value(
        self, tensor: Tensor, node: int, position: int = 0, name: str = "", **flags: Any
    ) -> int:
        index = len(self.values)
        self.values.append(
            Value(index, node, position, tuple(tensor.shape), tensor.dtype, name, **flags)
        )
        self._objects[id(tensor)] = (weakref.ref(tensor), index)
        if flags.get("live") and tensor.dim() > 1:
            self.stream_shapes.add(tuple(tensor.shape))
        return index

    def lookup(self, tensor: Tensor) -> tuple[int, ...]:
        """Returns the value of a tensor object, and the last write to its storage if that came
        later.
        """
        name = self.precision.state.get(id(tensor))
        if name is not None:
            self.used_state.add(name)
            if name not in self._state_values:
                self._state_values[name] = self.new_value(tensor, STATE, name=name, from_state=True)
            found = [self._state_values[name]]
        else:
            reference, index = self._objects.get(id(tensor), (None, -1))
            found = [index] if reference is not None and reference() is tensor else []
        storage = storage_of(tensor)
        written = self._storages.get(storage) if found or storage in self._held else None
        if written is not None and written not in found:
            if not found:
                # Made where the mode cannot see (a custom autograd.Function's wrapper): same
                # memory, same history.
                found = [self._adopt(tensor, written)]
            if self.values[written].node > self.values[found[0]].node:
                found.append(written)
        if not found and tensor.is_floating_point() and tuple(tensor.shape) in self.stream_shapes:
            self.foreign.append((tensor, unseen_code()))
        return tuple(found) or (self.new_value(tensor, CONSTANT),)

    def _adopt(self, tensor: Tensor, written: int) -> int:
        writer = self.values[written]
        if tuple(tensor.shape) == writer.shape:
            self._objects[id(tensor)] = (weakref.ref(tensor), written)
            return written
        return self.new_value(
            tensor, writer.node, writer.position, live=writer.live, from_state=writer.from_state
        )

    # -- calls -------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
            result = self.precision.call(func, args, kwargs)
            if not isinstance(result, Tensor):
                return result
            return self._note(func, args, kwargs, result, [], signature(func))
        tensors: list[Tensor] = []
        collect(args, tensors)
        collect(kwargs, tensors)
        before = [version_of(t) for t in tensors]
        key = signature(func)
        if (
            tensors
            and writes_in_place(key[0])
            and (name := self.guests.get(storage_of(tensors[0])))
        ):
            raise WritesParameter(name)
        result = self.precision.call(func, args, kwargs)
        mutated = [
            t for t, version in zip(tensors, before, strict=True) if version_of(t) != version
        ]
        return self._note(func, args, kwargs, result, mutated, key)

    def _note(
        self, func: Any, args: Any, kwargs: Any, result: Any, mutated: list[Tensor], key: CallKey
    ) -> Any:
        made: list[Tensor] = []
        collect(result, made)
        if not made and not mutated:
            return result
        read: list[Tensor] = []
        collect(args, read)
        collect(kwargs, read)
        if key[0] in _FIRST_ONLY:
            del read[1:]
        by_id = {id(t): self.lookup(t) for t in read}
        if not mutated and all(id(t) in by_id for t in made):
            # an identity: x.to(x.dtype), contiguous(), eval-mode dropout written by hand
            return result
        name, index = _name_of_call(func, key), len(self.nodes)
        inputs = tuple(dict.fromkeys(v for found in by_id.values() for v in found))
        metadata = name in _METADATA_ONLY
        live = not metadata and any(self.values[v].live for v in inputs)
        state = not metadata and any(self.values[v].from_state for v in inputs)
        routed = any(
            self.values[v].routed or (self.values[v].live and self.values[v].is_float)
            for v in inputs
        )
        if live and self._selects_weights(name, by_id, args):
            live = False
        node = Node(index, name, key, inputs, (), self.stack[-1] if self.stack else 0)
        node.operands = tuple(by_id[id(t)][-1] for t in read)
        node.function = custom_function()
        node.added = number_added(name, args, kwargs)
        self.nodes.append(node)
        for v in inputs:
            self.values[v].consumers.append(index)
        read_storages = {storage_of(t) for t in read}
        outputs = [self._write(t, index, _position(t, made, read), live, state) for t in mutated]
        changed = {id(t) for t in mutated}
        for position, tensor in enumerate(made):
            if id(tensor) in changed or id(tensor) in by_id:
                continue
            flags: dict[str, Any] = {
                "live": live,
                "from_state": state,
                "routed": routed and not is_float(tensor),
            }
            outputs.append(self.new_value(tensor, index, position, **flags))
            storage = storage_of(tensor)
            if storage not in read_storages:
                self._wrote(storage, tensor, outputs[-1])
                self._members[storage] = []
            self._members.setdefault(storage, []).append(outputs[-1])
        node.outputs = tuple(outputs)
        if live:
            node.terms = terms_of(name, args, kwargs, lambda t: by_id.get(id(t), (None,))[-1])
            if node.terms:
                node.line = user_line(3)
        return result

    def _selects_weights(self, name: str, by_id: dict[int, tuple[int, ...]], args: Any) -> bool:
        """Whether a call picks rows of parameters by routed indices: what it picks is a weight
        still.
        """
        if name not in _SELECTS or not args or id(args[0]) not in by_id:
            return False
        base = [self.values[v] for v in by_id[id(args[0])]]
        rest = [self.values[v] for t, found in by_id.items() if t != id(args[0]) for v in found]
        return not any(v.live for v in base) and not any(
            v.live and (v.is_float or not v.routed) for v in rest
        )

    def _write(self, tensor: Tensor, node: int, position: int, live: bool, state: bool) -> int:
        """Notes an in-place write: a new version of the object, and of whatever shares its
        storage.
        """
        storage = storage_of(tensor)
        for member in self._members.get(storage, ()):
            self.values[member].mutated = True
        reference, old = self._objects.get(id(tensor), (None, -1))
        if reference is not None and reference() is tensor:
            self.values[old].mutated = True
        index = self.new_value(tensor, node, position, live=live, from_state=state)
        self._wrote(storage, tensor, index)
        self._members.setdefault(storage, []).append(index)
        return index

    def _wrote(self, storage: int, tensor: Tensor, index: int) -> None:
        self._storages[storage] = index
        if storage >= 0 and storage not in self._held:
            self._held[storage] = StorageWeakRef(tensor.untyped_storage())

    # -- modules -----------------------------------------------------------------------------------
    def enter(self, module: str, cls: str, arguments: list[Tensor]) -> None:
        found = tuple(self.lookup(t)[-1] for t in arguments)
        index = len(self.invocations)
        parent = self.stack[-1] if self.stack else -1
        self.invocations.append(Invocation(index, module, parent, len(self.nodes), -1, found, cls))
        self.stack.append(index)

    def leave(self, results: list[Tensor]) -> None:
        call = self.invocations[self.stack.pop()]
        call.end, call.outputs = len(self.nodes), tuple(self.lookup(t)[-1] for t in results)


AnyRecorder = TypeVar("AnyRecorder", bound=Recorder)


def record(
    skeleton: Skeleton, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[Graph, Any]:
    """Runs the whole skeleton and returns the graph and the model's output.

    It runs again if the code writes to parameters (each is replaced by a copy first) or has rebuilt
    itself on the way.
    """
    borrows = dict(skeleton.outlines)
    for _ in range(len(borrows) + 3):
        try:
            with borrowed() as start:
                recorder, output = observe(Recorder, skeleton, args, kwargs, dtype, borrows)
                drew = not start.same_as(RandomState.now())
        except WritesParameter as write:
            skeleton.own(write.name)
            del borrows[write.name]
            continue
        if skeleton.settled():
            break
    made: list[Tensor] = []
    collect_deep(output, made)
    outputs = tuple(recorder.lookup(t)[-1] for t in made)
    own = skeleton.attribute_tensors()
    foreign = list(
        dict.fromkeys(line for tensor, line in recorder.foreign if id(tensor) not in own)
    )
    calls, started = recorder.invocations, start if drew else None
    return Graph(
        recorder.nodes, recorder.values, calls, outputs, recorder.used_state, foreign, started
    ), output


def observe(
    kind: type[AnyRecorder],
    skeleton: Skeleton,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    borrows: Mapping[str, Tensor] | None = None,
) -> tuple[AnyRecorder, Any]:
    """Runs the whole skeleton once under a recorder; returns it and the model's output.

    Args:
        borrows: the guest's own parameters, which must not be written to.

    Raises:
        WritesParameter: the code writes to one of `borrows`.
    """
    skeleton.restore()
    state = skeleton.fresh_state_of("")
    names = {id(t): name for name, t in state.items()}
    guests = {storage_of(t): name for name, t in (borrows or {}).items()}
    recorder = kind(
        Precision(dtype, names, valueless=skeleton.valueless, stored=skeleton.stored), guests
    )
    with ExitStack() as stack:
        stack.enter_context(_module_hooks(skeleton, recorder))
        stack.enter_context(torch.no_grad())
        tensors: list[Tensor] = []
        collect_deep((args, kwargs), tensors)
        for tensor in tensors:
            recorder.new_value(tensor, INPUT, live=True)
        stack.enter_context(plain_run())
        stack.enter_context(recorder)
        output = torch.func.functional_call(skeleton.root, state, args, kwargs, strict=False)
    return recorder, output


@contextmanager
def _module_hooks(skeleton: Skeleton, recorder: Recorder) -> Iterator[None]:
    """Tells the recorder which module runs. The hooks sit on the skeleton, never on the guest."""

    def before(module: Any, args: Any, kwargs: Any) -> None:
        tensors: list[Tensor] = []
        with torch._C.DisableTorchFunction():
            collect_deep((args, kwargs), tensors)
            recorder.enter(skeleton.names.get(id(module), ""), type(module).__name__, tensors)

    def after(*seen: Any) -> None:
        tensors: list[Tensor] = []
        with torch._C.DisableTorchFunction():
            collect_deep(seen[-1], tensors)
            recorder.leave(tensors)

    handles = []
    try:
        for module in skeleton.root.modules():
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _position(tensor: Tensor, made: list[Tensor], read: list[Tensor]) -> int:
    """Where a written tensor stands: among the call's results, or (negative, -1 - k) among what it
    read.
    """
    for position, other in enumerate(made):
        if other is tensor:
            return position
    return -1 - next(k for k, other in enumerate(read) if other is tensor)
