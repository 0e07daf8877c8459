"""Run a skeleton once, number its torch calls, and keep who depends on whom.

The recorder is a TorchFunctionMode: it sees every call that Python makes into torch, whatever code
makes it. Values are known by object and by storage, so that in-place writes, writes through views
and tensors made inside a custom autograd.Function keep their history. Nothing but numbers is kept:
no tensor outlives the run because of it.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from jacdiag.trace.graph.arguments import Arguments, is_of_torch
from jacdiag.trace.graph.graph import (
    CONSTANT,
    INPUT,
    STATE,
    CallKey,
    Graph,
    Invocation,
    Node,
    Value,
)
from jacdiag.trace.graph.ops import FIRST_ONLY, METADATA_ONLY, SELECT_ROWS, VALUE_QUESTIONS

_TORCH_DIR = torch.__file__.rsplit("/", 1)[0]
_PLUMBING = (
    f"{_TORCH_DIR}/overrides.py",
    f"{_TORCH_DIR}/_tensor.py",
    f"{_TORCH_DIR}/nn/functional.py",
    __file__,
)


def signature(func: Callable[..., Any], depth: int = 2) -> CallKey:
    """Return a key of a call: its function and the source line that made it.

    Unlike the number of a call, the key is the same from run to run.

    Args:
        func: the torch function.
        depth: how many frames lie between this function and the line.
    """
    # The innermost frame outside torch's own plumbing.
    frame = sys._getframe(depth)
    while frame.f_code.co_filename in _PLUMBING:
        if frame.f_back is None:
            break
        frame = frame.f_back

    name = getattr(func, "__name__", str(func))
    return (name, frame.f_code.co_filename, frame.f_lineno)


def _name_of_call(func: Callable[..., Any], key: CallKey) -> str:
    """Return the name of a call; reading `.data` is a detach."""
    name, _, _ = key
    if name != "__get__":
        return name

    # The attribute that is read.
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if attribute == "data":
        return "detach"
    return name


def user_line(depth: int = 2) -> str:
    """Return "file.py:12" of the innermost frame outside torch.

    Args:
        depth: how many frames lie between this function and the call.
    """
    frame = sys._getframe(depth)
    while frame.f_back is not None:
        # A frame of the model's code.
        filename = frame.f_code.co_filename
        is_outside = not filename.startswith(_TORCH_DIR) and filename != __file__
        if is_outside:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class WritesParameter(BaseException):
    """Unwinds a run that is about to write to a parameter.

    It is no Exception, because the code of models catches those.
    """

    def __init__(self, name: str) -> None:
        self.name = name


@dataclass(frozen=True)
class _Inherited:
    """What the results of a call inherit from what it read.

    Attributes:
        live: they depend on the model's input.
        from_state: they depend on parameters or buffers.
        routed: those that are no floats are indices or masks computed from live floats.
    """

    live: bool
    from_state: bool
    routed: bool


class Recorder(TorchFunctionMode):
    """Numbers calls and values of one forward. Use `record`.

    Args:
        precision: runs each call.
        guests: storage -> name of the parameters that are the model's own memory.
    """

    def __init__(self, precision: Precision, guests: dict[int, str] | None = None) -> None:
        super().__init__()
        self.precision = precision
        self.guests = guests or {}
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.invocations: list[Invocation] = []
        self.stack: list[int] = []
        self.used_state: set[str] = set()
        # id of a tensor object -> a reference to it, and its value
        self._objects: dict[int, tuple[Any, int]] = {}
        # storage -> the last value that was written to it
        self._storages: dict[int, int] = {}
        # Keeps a freed storage's name from being given to another.
        self._held: dict[int, StorageWeakRef] = {}
        # storage -> the values that share it
        self._members: dict[int, list[int]] = {}
        self._state_values: dict[str, int] = {}
        self.stream_shapes: set[tuple[int, ...]] = set()
        # Tensors of a live value's shape that no recorded call made, and what may have made them.
        self.foreign: list[tuple[Tensor, str]] = []
        # Tensors that no recorded call made, and their values.
        self.unmade: list[tuple[Tensor, int]] = []

    # -- values ------------------------------------------------------------------------------------
    def new_value(
        self, tensor: Tensor, node: int, position: int = 0, name: str = "", **flags: Any
    ) -> int:
        """Add a value for a tensor; return its index.

        Args:
            tensor: the tensor, which is not kept.
            node: the call that made it, or INPUT, STATE, CONSTANT.
            position: among the call's results.
            name: of a parameter or buffer.
            **flags: `live`, `from_state` and `routed` of the value.
        """
        # 1. The value.
        index = len(self.values)
        shape = tuple(tensor.shape)
        self.values.append(Value(index, node, position, shape, tensor.dtype, name, **flags))

        # 2. How it is known again, without keeping the tensor.
        self._objects[id(tensor)] = (weakref.ref(tensor), index)

        # 3. A shape that a tensor of the stream has.
        if flags.get("live") and tensor.dim() > 1:
            self.stream_shapes.add(shape)
        return index

    def lookup(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the value of a tensor object, and the last write to its storage if it is later."""
        # 1. The value of the object itself.
        value = self._state_value(tensor)
        if value is None:
            value = self._value_of_object(tensor)

        # 2. The last write to its memory, which may have come through another object.
        storage = storage_of(tensor)
        written = None
        if value is not None or storage in self._held:
            written = self._storages.get(storage)

        # 3. A tensor that no recorded call made.
        if value is None:
            value = self._value_of_unknown(tensor, written)

        # 4. A write counts if it came after the value was made.
        if written is not None and self._is_later(written, value):
            return (value, written)
        return (value,)

    def _value_of_unknown(self, tensor: Tensor, written: int | None) -> int:
        """Return a value for a tensor object that no recorded call made.

        Args:
            tensor: the object.
            written: the last value that was written to its memory, if any.
        """
        # Made where the mode cannot see (a custom autograd.Function's wrapper): same memory, same
        # history.
        if written is not None:
            return self._adopt(tensor, written)

        # Made by code that is not recorded, or before the run.
        self._note_foreign(tensor)
        value = self.new_value(tensor, CONSTANT)
        self.unmade.append((tensor, value))
        return value

    def _note_foreign(self, tensor: Tensor) -> None:
        """Note a tensor of a live value's shape that no recorded call made."""
        if tensor.is_floating_point() and tuple(tensor.shape) in self.stream_shapes:
            self.foreign.append((tensor, unseen_code()))

    def _state_value(self, tensor: Tensor) -> int | None:
        """Return the value of a parameter or buffer; None for any other tensor."""
        name = self.precision.state.get(id(tensor))
        if name is None:
            return None

        # One value stands for all reads of it.
        self.used_state.add(name)
        if name not in self._state_values:
            self._state_values[name] = self.new_value(tensor, STATE, name=name, from_state=True)
        return self._state_values[name]

    def _value_of_object(self, tensor: Tensor) -> int | None:
        """Return the value that a recorded call gave to this object, if any."""
        entry = self._objects.get(id(tensor))
        if entry is None:
            return None

        # Another object may have had this id before.
        reference, index = entry
        if reference() is not tensor:
            return None
        return index

    def _adopt(self, tensor: Tensor, written: int) -> int:
        """Return a value for a tensor with the history of a value in the same memory."""
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

        # 1. Reading or writing an attribute of a tensor, such as `.T` or `.data`.
        if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
            result = self.precision.call(func, args, kwargs)
            if not isinstance(result, Tensor):
                return result
            return self._note(func, args, kwargs, result, [], signature(func))

        # 2. The tensors that the call reads, and how often each was written to before.
        tensors: list[Tensor] = []
        collect(args, tensors)
        collect(kwargs, tensors)
        versions = [version_of(tensor) for tensor in tensors]

        # 3. The model's own weights must not change.
        key = signature(func)
        if tensors and writes_in_place(key[0]):
            self._refuse_write(tensors[0])

        # 4. The call itself.
        result = self.precision.call(func, args, kwargs)

        # 5. What it wrote to.
        mutated: list[Tensor] = []
        for tensor, version in zip(tensors, versions, strict=True):
            if version_of(tensor) != version:
                mutated.append(tensor)
        return self._note(func, args, kwargs, result, mutated, key)

    def _refuse_write(self, tensor: Tensor) -> None:
        """Raise if a tensor is a parameter that is the model's own memory."""
        parameter = self.guests.get(storage_of(tensor))

        # The run is made again, with a copy of it.
        if parameter:
            raise WritesParameter(parameter)

    def _note(
        self, func: Any, args: Any, kwargs: Any, result: Any, mutated: list[Tensor], key: CallKey
    ) -> Any:
        """Add a call to the record, unless it made nothing new; return its result.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its keyword arguments.
            result: what it returned.
            mutated: the tensors among its arguments that it wrote to.
            key: of the call.
        """
        # 1. What the call returned and what it read.
        results: list[Tensor] = []
        collect(result, results)
        if not results and not mutated:
            if key[0] in VALUE_QUESTIONS:
                self._note_question(args)
            return result
        read = _tensors_read(key[0], args, kwargs)
        value_of = {id(tensor): self.lookup(tensor) for tensor in read}

        # An identity makes nothing new: x.to(x.dtype), contiguous(), eval-mode dropout written by
        # hand.
        is_identity = all(id(tensor) in value_of for tensor in results)
        if is_identity and not mutated:
            return result

        # 2. The call itself.
        name = _name_of_call(func, key)
        inputs = tuple(dict.fromkeys(itertools.chain.from_iterable(value_of.values())))
        inherited = self._inherited(name, inputs, value_of, args)
        node = Node(
            index=len(self.nodes),
            name=name,
            key=key,
            inputs=inputs,
            outputs=(),
            invocation=self.stack[-1] if self.stack else 0,
            operands=tuple(value_of[id(tensor)][-1] for tensor in read),
            function=custom_function(),
            added=number_added(name, args, kwargs),
            arguments=Arguments.of(args, kwargs) if is_of_torch(func) else None,
        )
        self.nodes.append(node)

        # Each value knows the calls that read it.
        for value in inputs:
            self.values[value].consumers.append(node.index)

        # 3. The values that it wrote, then those that it made.
        written: list[int] = []
        for tensor in mutated:
            position = _position(tensor, results, read)
            written.append(self._write(tensor, node.index, position, inherited))
        created = self._new_results(node.index, results, read, mutated, inherited)
        node.outputs = (*written, *created)

        # 4. What it adds, if it is an addition.
        if inherited.live:
            node.terms = terms_of(name, args, kwargs, lambda t: value_of.get(id(t), (None,))[-1])
            if node.terms:
                node.line = user_line(3)
        return result

    def _note_question(self, args: Any) -> None:
        """Note that Python reads numbers of tensors, as in `if x.max() > 1`."""
        tensors: list[Tensor] = []
        collect(args, tensors)
        for tensor in tensors:
            # The value of the object, and the last write to its memory.
            known = (self._value_of_object(tensor), self._storages.get(storage_of(tensor)))
            for index in known:
                if index is not None:
                    self.values[index].read_by_python = True

    def _inherited(
        self, name: str, inputs: tuple[int, ...], value_of: dict[int, tuple[int, ...]], args: Any
    ) -> _Inherited:
        """Return what a call's results inherit from its inputs."""
        # 1. Indices and masks that are computed from floats of the stream.
        values = [self.values[index] for index in inputs]
        is_routed = any(value.routed or value.is_differentiable for value in values)

        # 2. Only the shape of the first argument counts for a call such as zeros_like.
        if name in METADATA_ONLY:
            return _Inherited(live=False, from_state=False, routed=is_routed)

        # 3. Rows of a weight are a weight, whatever picks them.
        is_live = any(value.live for value in values)
        if is_live and self._selects_weights(name, value_of, args):
            is_live = False

        # 4. Whatever reads a parameter or a buffer depends on it.
        reads_state = any(value.from_state for value in values)
        return _Inherited(live=is_live, from_state=reads_state, routed=is_routed)

    def _new_results(
        self,
        node: int,
        results: list[Tensor],
        read: list[Tensor],
        mutated: list[Tensor],
        inherited: _Inherited,
    ) -> list[int]:
        """Give a value to every result of a call that was neither read nor written to."""
        storages_read = {storage_of(tensor) for tensor in read}
        known = {id(tensor) for tensor in (*mutated, *read)}
        values: list[int] = []
        for position, tensor in enumerate(results):
            if id(tensor) in known:
                continue

            # 1. The value.
            value = self.new_value(
                tensor,
                node,
                position,
                live=inherited.live,
                from_state=inherited.from_state,
                routed=inherited.routed and not is_float(tensor),
            )
            values.append(value)

            # 2. Its memory. If that is new, whatever had this storage before is gone.
            storage = storage_of(tensor)
            if storage not in storages_read:
                self._wrote(storage, tensor, value)
                self._members[storage] = []
            self._members.setdefault(storage, []).append(value)
        return values

    def _selects_weights(self, name: str, value_of: dict[int, tuple[int, ...]], args: Any) -> bool:
        """Return whether a call picks rows of parameters by routed indices.

        What it picks is a weight still, although the indices depend on the input.
        """
        # 1. The table that is indexed comes first.
        if name not in SELECT_ROWS or not args:
            return False
        table_id = id(args[0])
        table = value_of.get(table_id)

        # 2. It depends on no input.
        if table is None or self._are_live(table):
            return False

        # 3. Whatever else depends on the input is a routed index.
        for tensor_id, values in value_of.items():
            if tensor_id == table_id:
                continue
            if not all(self._may_be_index(value) for value in values):
                return False
        return True

    def _are_live(self, values: Iterable[int]) -> bool:
        """Return whether one of some values depends on the model's input."""
        return any(self.values[index].live for index in values)

    def _may_be_index(self, index: int) -> bool:
        """Return whether a value is constant, or an index that was computed from the stream."""
        value = self.values[index]
        if not value.live:
            return True

        # An index holds whole numbers.
        return value.routed and not value.is_float

    def _write(self, tensor: Tensor, node: int, position: int, inherited: _Inherited) -> int:
        """Note an in-place write: a new version of the object and of what shares its storage."""
        # 1. What the memory held before is no longer there.
        storage = storage_of(tensor)
        for member in self._members.get(storage, ()):
            self.values[member].mutated = True
        old = self._value_of_object(tensor)
        if old is not None:
            self.values[old].mutated = True

        # 2. The new version.
        index = self.new_value(
            tensor, node, position, live=inherited.live, from_state=inherited.from_state
        )
        self._wrote(storage, tensor, index)
        self._members.setdefault(storage, []).append(index)
        return index

    def _wrote(self, storage: int, tensor: Tensor, index: int) -> None:
        """Note the last value that was written to a storage, and hold the storage's name."""
        self._storages[storage] = index

        # A number below 0 names an object without storage.
        has_storage = storage >= 0

        # Storages are named once.
        if has_storage and storage not in self._held:
            self._held[storage] = StorageWeakRef(tensor.untyped_storage())

    def _is_later(self, written: int, value: int) -> bool:
        """Return whether a value was written after another was made."""
        return self.values[written].node > self.values[value].node

    # -- modules -----------------------------------------------------------------------------------
    def enter(self, module: str, cls: str, arguments: list[Tensor]) -> None:
        """Begin a module call.

        Args:
            module: name of the module.
            cls: name of its class.
            arguments: the tensors that it is given.
        """
        parent = self.stack[-1] if self.stack else -1
        call = Invocation(
            index=len(self.invocations),
            module=module,
            parent=parent,
            start=len(self.nodes),
            arguments=self._last_values(arguments),
            cls=cls,
            autocast=torch._C._is_any_autocast_enabled(),
        )
        self.invocations.append(call)
        self.stack.append(call.index)

    def _last_values(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """Return what tensors hold at present, by value index."""
        return tuple(self.lookup(tensor)[-1] for tensor in tensors)

    def leave(self, results: list[Tensor]) -> None:
        """End the innermost module call."""
        call = self.invocations[self.stack.pop()]
        call.end = len(self.nodes)
        call.outputs = self._last_values(results)


AnyRecorder = TypeVar("AnyRecorder", bound=Recorder)


def record(
    skeleton: Skeleton, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[Graph, Any]:
    """Run the entire skeleton and return the graph and the model's output.

    It runs again if the code writes to parameters (each is replaced by a copy first) or has rebuilt
    itself on the way.
    """
    # 1. Run, until nothing has been written to and nothing was rebuilt.
    borrows = dict(skeleton.outlines)
    for _ in range(len(borrows) + 3):
        try:
            with borrowed() as start:
                recorder, output = observe(Recorder, skeleton, args, kwargs, dtype, borrows)
                drew_numbers = not start.same_as(RandomState.now())
        except WritesParameter as write:
            skeleton.own(write.name)
            del borrows[write.name]
            continue
        if skeleton.settled():
            break

    # 2. What the model returned, and what came in without a recorded call.
    results: list[Tensor] = []
    collect_deep(output, results)
    outputs = tuple(recorder.lookup(tensor)[-1] for tensor in results)
    constants = skeleton.attribute_tensors()
    foreign = [line for tensor, line in recorder.foreign if id(tensor) not in constants]
    unmade_floats = [(tensor, value) for tensor, value in recorder.unmade if is_float(tensor)]
    unexplained = {value for tensor, value in unmade_floats if id(tensor) not in constants}

    # Other values may have been left on a module by this run.
    unchanged = skeleton.unchanged_tensors()
    constants_of_modules = {value for tensor, value in recorder.unmade if id(tensor) in unchanged}

    # 3. The graph.
    graph = Graph(
        nodes=recorder.nodes,
        values=recorder.values,
        invocations=recorder.invocations,
        outputs=outputs,
        used_state=recorder.used_state,
        foreign=list(dict.fromkeys(foreign)),
        start=start if drew_numbers else None,
        unexplained=frozenset(unexplained),
        constants_of_modules=frozenset(constants_of_modules),
        modules_written_to=skeleton.modules_written_to(),
    )
    return graph, output


def observe(
    kind: type[AnyRecorder],
    skeleton: Skeleton,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    borrows: Mapping[str, Tensor] | None = None,
) -> tuple[AnyRecorder, Any]:
    """Run the entire skeleton once under a recorder; return it and the model's output.

    Args:
        kind: the class of the recorder.
        skeleton: the model's code.
        args: the positional arguments of its forward.
        kwargs: the keyword arguments of its forward.
        dtype: precision of the run.
        borrows: the model's own parameters, which must not be written to.

    Raises:
        WritesParameter: the code writes to one of `borrows`.
    """
    # 1. A recorder that knows the names of the weights.
    skeleton.restore()
    state = skeleton.fresh_state_of("")
    names = {id(tensor): name for name, tensor in state.items()}
    guests = {storage_of(tensor): name for name, tensor in (borrows or {}).items()}
    precision = Precision(dtype, names, valueless=skeleton.valueless, stored=skeleton.stored)
    recorder = kind(precision, guests)

    # 2. The run. The inputs are values before the first call.
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
    """Notify the recorder which module runs, by hooks on the skeleton, never on the model."""

    def before(module: Any, args: Any, kwargs: Any) -> None:
        tensors: list[Tensor] = []
        with torch._C.DisableTorchFunction():
            collect_deep((args, kwargs), tensors)
            name = skeleton.names.get(id(module), "")
            recorder.enter(name, type(module).__name__, tensors)

    def after(*arguments: Any) -> None:
        tensors: list[Tensor] = []
        output = arguments[-1]
        with torch._C.DisableTorchFunction():
            collect_deep(output, tensors)
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


def _tensors_read(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors whose numbers a call reads, in order."""
    read: list[Tensor] = []
    collect(args, read)
    collect(kwargs, read)
    if name in FIRST_ONLY:
        return read[:1]
    return read


def _position(tensor: Tensor, results: list[Tensor], read: list[Tensor]) -> int:
    """Return the position of a written tensor among a call's results.

    A tensor that is not among them has a negative one, -1 - k, for the k-th that the call read.
    """
    position = _index_of(tensor, results)
    if position is not None:
        return position

    # The call wrote to an argument and did not return it.
    position_in_read = _index_of(tensor, read)
    assert position_in_read is not None
    return -1 - position_in_read


def _index_of(tensor: Tensor, tensors: list[Tensor]) -> int | None:
    """Return where a list holds a tensor itself, None if nowhere."""
    for index, other in enumerate(tensors):
        if other is tensor:
            return index
    return None
