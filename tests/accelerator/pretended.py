"""An accelerator for machines without one: the device "pretended", in pure Python.

    from accelerator.pretended import pretended_device

    with pretended_device() as counts:
        model.to("pretended")
        counts.clear()
        jacdiag.audit(model, ids.to("pretended"))
        print(counts.waits, counts.operations, counts.places.most_common(5))

In the block torch knows the device as it knows CUDA: `torch.accelerator`, `torch.Event`, autocast,
`torch.get_device_module` and `torch.manual_seed` answer for it, and an operation whose tensors lie
on two devices raises. Its numbers are those of the CPU, bit for bit; attention uses the plain
formula in the block, on the CPU as well. Switches take abilities away, such as
`float64=False`, `generator=False`, `memory=2**20` and `devices=2`: see `machine.Switches`. A
non-blocking download gives NaN until the host waits for it, with `synchronize` or with an event.

In a block of `device_module.capturing` a wait raises, as it does while CUDA captures a graph.

What it does not show: time; a missing wait of one stream for another; `torch.compile`; the replay
of a graph.
A bare "pretended" means index 0 in `Tensor.to`, whichever device is the current one. An error that
a Python hook raises inside a backward pass ends the process: torch asks this backend for a stream
while the error is on its way. An error of a kernel is raised as usual.

Needs torch 2.10 or newer. After the first block of a process `torch.accelerator` names this device,
and says outside of a block that it is not available.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

# They take functions and classes of torch when they are imported, before a block replaces these.
import torch._decomp.decompositions_for_jvp
import torch._dynamo
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration

from accelerator import autocast, device_module, kernels
from accelerator.machine import NAME, Counts, Machine, Switches, install, is_on, machine
from jacdiag.devices.accelerators import has_float64

__all__ = ["NAME", "Counts", "Switches", "memory_in_use", "pretended_device"]


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[name-defined,misc]
    """What torch's own code asks of the device."""

    def is_available(self) -> bool:
        return is_on()

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return is_on() and index < machine().switches.devices


# Once in a process: torch lets nobody take a backend away again.
backend_registration._setup_privateuseone_for_python_backend(
    NAME, backend_module=device_module, hook=_Hooks()
)
_LIBRARIES = [*kernels.register(), *autocast.register()]


class _DeviceGenerator(torch._C.Generator):
    """A generator that says that it belongs to the device."""

    index = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(NAME, self.index)


class _GeneratorType(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        wanted = torch.device(device)
        if wanted.type != NAME:
            return torch._C.Generator(wanted)
        if not machine().switches.generator:
            raise NotImplementedError(f"{NAME} has no generator of its own")
        generator = _DeviceGenerator()
        generator.index = 0 if wanted.index is None else wanted.index
        return machine().own(generator)


class _Generator(metaclass=_GeneratorType):
    """Stands for `torch.Generator`, which makes none for a backend in Python."""


@contextmanager
def pretended_device(**switches: Any) -> Iterator[Counts]:
    """Let this machine have the device "pretended".

    Args:
        **switches: the fields of `Switches`.

    Yields:
        The counts, which go on while the block runs.

    Raises:
        RuntimeError: at the end of the block, if pinned memory was overwritten before its upload
            was done.
    """
    # 1. A machine of its own, so that blocks do not see each other's memory and random numbers.
    before, was_on = machine(), is_on()
    present = Machine(Switches(**switches))
    install(present, on=True)
    has_float64.cache_clear()

    # 2. What torch answers for no backend in Python.
    with ExitStack() as stack:
        for owner, name, replacement in _replacements():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        # Parameters are kept when a module moves, and so are ties among them, as on CUDA.
        stack.callback(_keep_parameters, _keep_parameters(True))
        # The device has torch's plain formula of attention; the CPU uses it too, for equal bits.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            yield present.counts
            present.finish_copies()
        finally:
            present.pending.clear()
            install(before, on=was_on)
            has_float64.cache_clear()


def _keep_parameters(on: bool) -> bool:
    """Set whether `Module.to` keeps the object of a parameter; return how it was."""
    before: bool = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(on)
    return before


def memory_in_use(index: int = 0) -> int:
    """Return the bytes of a device that live tensors hold."""
    return machine().live[index]


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Yield what is replaced in a block: the owner, the name and the new value."""
    # 1. torch.accelerator, where this version of torch has the function.
    names = {
        "current_device_idx": "current_device",
        "current_device_index": "current_device",
        "device_index": "device",
        "get_memory_info": "mem_get_info",
        "set_device_idx": "set_device",
        "set_device_index": "set_device",
        **{name: name for name in ("current_stream", "set_stream", "synchronize", "empty_cache")},
        **{name: name for name in ("memory_allocated", "max_memory_allocated", "memory_stats")},
        **{name: name for name in ("memory_reserved", "max_memory_reserved")},
        **{name: name for name in ("reset_peak_memory_stats", "get_device_capability")},
    }
    for name, ours in names.items():
        if hasattr(torch.accelerator, name):
            yield torch.accelerator, name, getattr(device_module, ours)

    # 2. Streams, events and generators.
    yield torch, "Stream", device_module.Stream
    yield torch, "Event", device_module.Event
    yield torch, "Generator", _Generator

    # 3. Storages: torch has no allocator for a backend in Python.
    yield torch.UntypedStorage, "clone", kernels.clone_storage

    # 4. Backward passes.
    for owner in (torch.autograd, torch.autograd.graph):
        yield owner, "_engine_run_backward", _backward_of(owner._engine_run_backward)

    # 5. Pinned memory.
    yield Tensor, "pin_memory", _pin_memory
    yield Tensor, "is_pinned", _is_pinned
    for name in ("empty", "empty_like", "zeros", "zeros_like", "ones", "full", "tensor"):
        yield torch, name, _with_pinned_memory(getattr(torch, name))


def _backward_of(run_backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward pass, on the calling thread unless the switch says otherwise.

    Torch has one thread for a backend in Python, and looks for one of each device. The switch is
    set for each pass, because torch forgets it at every `inference_mode`.
    """

    def run(*args: Any, **options: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(machine().switches.threads):
            return run_backward(*args, **options)

    return run


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    """Return a copy in pinned memory, or the tensor if it lies there already."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{tensor.device}', only dense CPU tensors can be pinned")
    if machine().is_pinned(tensor):
        return tensor
    return machine().pin(tensor.clone())


def _is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return machine().is_pinned(tensor)


def _with_pinned_memory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of torch that makes a tensor, with its option `pin_memory`."""

    def make_tensor(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        tensor = make(*args, **options)
        return machine().pin(tensor) if pin_memory else tensor

    make_tensor.__name__ = make.__name__
    return make_tensor
