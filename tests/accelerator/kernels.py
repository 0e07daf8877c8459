"""The operations of the pretended device: each one runs on the CPU, on the same memory.

A tensor of the device is a plain `torch.Tensor` whose storage lies in the memory of the CPU. DLPack
makes it: a capsule holds a pointer and the name of a device, and the name is changed on the way. So
views, `.data`, `Parameter`, pickles, autograd and `torch.func` are torch's own, as on a real
device, and only kernels come here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelerator.machine import NAME, Copy, index_of, machine

# Kinds of device in DLPack (dlpack.h): the CPU, and one for backends outside of torch.
_CPU, _EXTENSION = 1, 12
_OFFSET_OF_KIND, _OFFSET_OF_INDEX = 8, 12

# The host waits for a value of these: a number, or a size that depends on values.
READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
# Tensors of the CPU may be among the arguments of these: indices are copied to the device first.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Not even a tensor of the CPU without dimensions may be among the arguments of these.
STRICT = {"cat", "_stack", "stack", "dot", "vdot", "embedding", "gather", "scatter_"}
# Memory only: nothing is launched.
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
# Keys of code that makes an operation of smaller ones.
_COMPOSITES = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
)

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def is_ours(value: object) -> bool:
    """Return whether a value is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


def on_cpu(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor of the device as a tensor of the CPU."""
    return _renamed(tensor, _CPU, 0)


def on_device(raw: Tensor, index: int) -> Tensor:
    """Return the memory of a tensor of the CPU as a new tensor of the device.

    Raises:
        TypeError: the device has no float64, and the tensor has that type.
        torch.OutOfMemoryError: the device has not that much memory.
    """
    _check_type(raw.dtype)
    tensor = _renamed(raw, _EXTENSION, index)
    machine().charge(index, tensor)
    return tensor


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one operation on the device. Torch calls it for every kernel that the device lacks."""
    plan = _plan_of(op)

    # 1. A view shares its storage: the code of the CPU makes it without a look at the memory.
    if plan.is_view:
        return op._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)

    # 2. Which device, and whether every argument lies on it.
    tensors = _tensors_in((args, kwargs))
    index = _device_of(plan.name, tensors, kwargs)
    _count(plan.name, tensors)

    # 3. The values, on the CPU.
    written = [plan.argument(number, args, kwargs) for number in plan.written]
    raw_args = [_values(x, written) for x in args]
    raw_kwargs = {key: _values(x, written) for key, x in kwargs.items()}
    if kwargs.get("device") is not None:
        raw_kwargs["device"] = "cpu"
        raw_kwargs.pop("pin_memory", None)
    # Torch gives a number for a tensor that it made of a number; only the packet takes it.
    has_number = any(isinstance(args[k], (int, float, complex)) for k in plan.tensors_of(args))
    call = op.overloadpacket if has_number else op
    result = _drawn(plan, index, call, raw_args, raw_kwargs)

    # 4. Arguments that were written are given back, and results are new tensors of the device.
    if not plan.returned:
        return _results(result, index)
    _take_new_sizes(plan, written, raw_args, raw_kwargs)
    returned = [plan.argument(number, args, kwargs) for number in plan.returned]
    return returned[0] if len(returned) == 1 else tuple(returned)


@dataclass(frozen=True)
class _Plan:
    """What the schema of an operation says.

    Attributes:
        name: without namespace and overload.
        arguments: the names of the arguments.
        tensors: the numbers of the arguments that are one tensor.
        written: the numbers of the arguments that the operation writes.
        returned: the numbers of those that it returns; none if its results are new.
        is_view: the result shares memory with an argument, or nothing but shapes is written.
        draws: it draws random numbers.
        takes_generator: it has an argument for where they come from.
    """

    name: str
    arguments: tuple[str, ...]
    tensors: tuple[int, ...]
    written: tuple[int, ...]
    returned: tuple[int, ...]
    is_view: bool
    draws: bool
    takes_generator: bool

    def tensors_of(self, args: Sequence[Any]) -> Iterator[int]:
        """Yield the numbers of the positional arguments that should be a tensor."""
        for number in self.tensors:
            if number < len(args):
                yield number

    def argument(self, number: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return an argument by its number."""
        if number < len(args):
            return args[number]
        return kwargs[self.arguments[number]]


_PLANS: dict[Any, _Plan] = {}


def _plan_of(op: Any) -> _Plan:
    """Return the plan of an operation; it is read once."""
    plan = _PLANS.get(op)
    if plan is not None:
        return plan

    # 1. What is written.
    schema = op._schema
    name = schema.name.partition("::")[2]
    written: dict[frozenset[str], int] = {}
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written[frozenset(argument.alias_info.before_set)] = number

    # 2. What of it is returned. A result that shares memory and was not written is a view.
    aliases = [result.alias_info for result in schema.returns if result.alias_info is not None]
    is_view = name == "set_" or any(not alias.is_write for alias in aliases)
    returned = () if is_view else tuple(written[frozenset(x.before_set)] for x in aliases)

    arguments = tuple(argument.name for argument in schema.arguments)
    types = [str(argument.type) for argument in schema.arguments]
    tensors = tuple(k for k, type_ in enumerate(types) if type_ in ("Tensor", "Optional[Tensor]"))
    plan = _Plan(
        name=name,
        arguments=arguments,
        tensors=tensors,
        written=tuple(written.values()),
        returned=returned,
        is_view=is_view,
        draws=torch.Tag.nondeterministic_seeded in op.tags,
        takes_generator="generator" in arguments,
    )
    _PLANS[op] = plan
    return plan


def _renamed(tensor: Tensor, kind: int, index: int) -> Tensor:
    """Return the memory of a tensor under the name of another device."""
    capsule = torch._C._to_dlpack(tensor)  # type: ignore[attr-defined]
    address = _pointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(address + _OFFSET_OF_KIND).value = kind
    ctypes.c_int32.from_address(address + _OFFSET_OF_INDEX).value = index
    renamed: Tensor = torch._C._from_dlpack(capsule)  # type: ignore[attr-defined]
    return renamed


def _check_type(dtype: torch.dtype | None) -> None:
    """Raise if the device has no such numbers."""
    if dtype in (torch.float64, torch.complex128) and not machine().switches.float64:
        raise TypeError(
            f"Cannot convert a {NAME} Tensor to {dtype} dtype as the framework doesn't support it. "
            "Please use float32 instead."
        )


def _tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in nested lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    tensors: list[Tensor] = []
    for part in value:
        tensors += _tensors_in(part)
    return tensors


def _device_of(name: str, tensors: list[Tensor], kwargs: dict[str, Any]) -> int:
    """Return the index of the device that runs an operation.

    Raises:
        RuntimeError: its tensors lie on several devices, or its generator on another.
    """
    # 1. The tensors.
    first = next((x for x in tensors if is_ours(x)), None)
    if first is not None:
        for other in tensors:
            if other.device != first.device:
                _check_mixed(name, first, other)

    # 2. The generator.
    generator = kwargs.get("generator")
    if generator is not None and not machine().owns(generator):
        machine().counts.mixed += 1
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found '{generator.device}'"
        )

    # 3. A device that is named goes before that of the arguments.
    _check_type(kwargs.get("dtype"))
    device = kwargs.get("device")
    if device is not None or first is None:
        return index_of(device)
    return first.device.index


def _check_mixed(name: str, first: Tensor, other: Tensor) -> None:
    """Raise if an operation cannot take tensors of two devices."""
    is_cpu = other.device.type == "cpu"
    if is_cpu and name in INDEXING:
        return
    if is_cpu and other.dim() == 0 and name not in STRICT:
        return
    machine().counts.mixed += 1
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{first.device} and {other.device}! ({name})"
    )


def _count(name: str, tensors: list[Tensor]) -> None:
    """Count the kernel, and the waits that it makes."""
    if name in ALLOCATIONS:
        return
    machine().launch()
    if name in READS:
        machine().wait("reads")
    if name not in INDEXING:
        return

    # Indices of the CPU are copied to the device, and a mask becomes indices.
    for tensor in tensors:
        if not is_ours(tensor) and tensor.dim() > 0:
            machine().wait("uploads")
        elif tensor.dtype == torch.bool and tensor is not tensors[0]:
            machine().wait("reads")


def _values(value: Any, written: list[Any]) -> Any:
    """Return an argument with the memory of the CPU in place of each tensor of the device."""
    if isinstance(value, Tensor):
        if not is_ours(value):
            return value
        # Torch gives an empty tensor where a result will be: the CPU makes it as large as it is.
        is_empty = value.numel() == 0 and any(value is x for x in written)
        return torch.empty(0, dtype=value.dtype) if is_empty else on_cpu(value)
    if isinstance(value, (list, tuple)):
        return [_values(x, written) for x in value]
    return value


def _drawn(plan: _Plan, index: int, op: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on values; random numbers come from the device's own generator."""
    # 1. Nothing is drawn, or the caller brought a generator.
    if not plan.draws or kwargs.get("generator") is not None:
        return op(*args, **kwargs)
    generator = machine().generators[index]
    if plan.takes_generator:
        return op(*args, **{**kwargs, "generator": generator})

    # 2. The state of the CPU is lent to operations that ask for none.
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(generator.get_state())
    try:
        return op(*args, **kwargs)
    finally:
        generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


def _take_new_sizes(
    plan: _Plan, written: list[Any], args: list[Any], kwargs: dict[str, Any]
) -> None:
    """Give results their sizes where the caller gave an empty tensor for them."""
    for number, tensor in zip(plan.written, written, strict=True):
        raw = plan.argument(number, args, kwargs)
        if isinstance(tensor, Tensor) and tensor.shape != raw.shape:
            _take(tensor, on_device(raw, tensor.device.index))


def _take(tensor: Tensor, other: Tensor) -> None:
    """Let a tensor of the device have the memory and the shape of another."""
    tensor.set_(other.untyped_storage(), other.storage_offset(), other.size(), other.stride())  # type: ignore[call-overload]


def _results(value: Any, index: int) -> Any:
    """Return results as tensors of the device."""
    if isinstance(value, Tensor):
        return on_device(value, index)
    if isinstance(value, (list, tuple)):
        return type(value)(_results(x, index) for x in value)
    return value


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices; this is what `copy_` and `to` come down to."""
    machine().launch()

    # 1. On the device, or from one to another: the host waits for neither.
    if is_ours(source) and is_ours(target):
        on_cpu(target).copy_(on_cpu(source))
        return target

    # 2. To the device. Memory that is pinned is read when the device comes to it.
    if is_ours(target):
        on_cpu(target).copy_(source)
        if not non_blocking:
            machine().wait("uploads")
        elif not machine().is_pinned(source):
            machine().counts.staged_uploads += 1
        else:
            machine().counts.free_uploads += 1
            _postpone(source.clone(), source=source)
        return target

    # 3. From the device. Only memory that is pinned is written later.
    if not non_blocking or not machine().is_pinned(target):
        machine().wait("downloads")
        target.copy_(on_cpu(source))
        return target
    machine().counts.free_downloads += 1
    value = on_cpu(source).to(target.dtype, copy=True).expand_as(target)
    _fill_with_garbage(target)
    _postpone(value, target=target)
    return target


def _postpone(value: Tensor, *, source: Tensor | None = None, target: Tensor | None = None) -> None:
    """Note a copy that is made when the host waits."""
    present = machine()
    copy = Copy(present.launched - 1, present.stream, value, target=target, source=source)
    present.pending.append(copy)


def _fill_with_garbage(target: Tensor) -> None:
    """Write what nobody can take for a result: NaN, -1 or True."""
    if target.is_floating_point() or target.is_complex():
        target.fill_(float("nan"))
    elif target.dtype == torch.bool:
        target.fill_(True)
    else:
        target.fill_(-1 if target.dtype.is_signed else 255)


def _to_copy(
    tensor: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Copy a tensor of the device to a new tensor of any device and type."""
    # 1. A copy that nobody waits for needs pinned memory; torch takes it for downloads.
    device = tensor.device if device is None else device
    format_ = torch.preserve_format if memory_format is None else memory_format
    empty = torch.empty_like(tensor, dtype=dtype, device=device, memory_format=format_)
    if non_blocking and device.type == "cpu":
        machine().pin(empty)

    # 2. The copy.
    return _copy_from(tensor, empty, non_blocking)


def _resize(
    tensor: Tensor, size: Sequence[int], *, memory_format: torch.memory_format | None = None
) -> Tensor:
    """Resize a tensor of the device in place, on new memory."""
    raw = on_cpu(tensor).clone() if tensor.numel() else torch.empty(0, dtype=tensor.dtype)
    raw.resize_(size, memory_format=memory_format or torch.contiguous_format)
    _take(tensor, on_device(raw, tensor.device.index))
    return tensor


def _convolution(*args: Any) -> Any:
    return run(torch.ops.aten.convolution.default, *args)


def _convolution_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, *args: Any, **kwargs: Any
) -> Any:
    # The CPU asks for the shape of the bias besides. It reads it only to see whether there is one.
    *geometry, mask = (*args, *kwargs.values())
    bias = [weight.shape[0]]
    op = torch.ops.aten.convolution_backward.default
    return run(op, grad, inputs, weight, bias, *geometry, mask)


def _record_stream(tensor: Tensor, stream: Any) -> None:
    """Do nothing: memory of this device is never used again too early."""


def register() -> list[torch.library.Library]:
    """Register the kernels with torch; return what keeps them registered."""
    # 1. Everything that torch does not make of smaller operations.
    anything = torch.library.Library("_", "IMPL")
    anything.fallback(run, "PrivateUse1")

    # 2. What it would make of smaller ones, with other digits and more launches than on CUDA.
    ours = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in sorted(_whole_operations()):
        packet_name, _, overload = name.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, packet_name), overload or "default")
        ours.impl(name, _kernel_of(op))

    # 3. Copies, and what torch asks each backend to bring.
    special: dict[str, Callable[..., Any]] = {
        "_copy_from": _copy_from,
        "_to_copy": _to_copy,
        "convolution_backward_overrideable": _convolution_backward,
        "convolution_overrideable": _convolution,
        "record_stream": _record_stream,
        "resize_": _resize,
    }
    for name, kernel in special.items():
        ours.impl(name, kernel)

    # 4. Files. The number says that it is asked before torch's own code for such devices.
    torch.serialization.register_package(1, location_of, load_storage)
    return [anything, ours]


def _whole_operations() -> set[str]:
    """Return the operations for which the CPU has a kernel, and CUDA one for a list of tensors."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    of_cpu = set(registered("CPU"))
    whole: set[str] = set()
    for key in _COMPOSITES:
        for name in registered(key):
            is_for_lists = name.startswith("aten::_foreach_")
            if is_for_lists or (name.startswith("aten::") and name in of_cpu):
                whole.add(name)
    return whole


def load_storage(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """Return the storage of a file on the device, if it is told to lie there."""
    if not location.startswith(NAME):
        return None
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
    machine().launch()
    machine().wait("uploads")
    return on_device(raw.clone(), index_of(location)).untyped_storage()


def clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a copy of a storage of any device, as `UntypedStorage.clone` does."""
    raw = torch.empty(0, dtype=torch.uint8, device=storage.device)
    raw.set_(storage)  # type: ignore[call-overload]
    return raw.clone().untyped_storage()


def location_of(storage: torch.UntypedStorage) -> str | None:
    """Return the name of the device in a file, for storages that lie on it."""
    device = storage.device
    return str(device) if device.type == NAME else None


def _kernel_of(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return run(op, *args, **kwargs)

    return kernel
