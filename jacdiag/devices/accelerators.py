"""Accelerators that torch knows: which are here, and what each of them can do.

An accelerator has a module of functions: `torch.cuda`, `torch.xpu`, `torch.mps`, or that of another
vendor's backend. No two modules have the same functions, and `torch.accelerator` has most of them
only in recent versions of torch. So the modules are called, and from this file alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Those that torch has a module for in every build. A build for another one names it itself.
_IN_EVERY_BUILD = ("cuda", "xpu", "mps")
_WITH_FLOAT64 = ("cpu", "cuda")
_WITHOUT_FLOAT64 = ("mps",)

RandomStates = dict[str, tuple[Tensor, ...]]  # by kind, one for each device of it


# -- what is here ----------------------------------------------------------------------------------
def module_of(kind: str) -> Any | None:
    """Return torch's module for a kind of device; None if it has none.

    Args:
        kind: such as "cuda" or "mps".

    Example:
        >>> module_of("cpu").__name__
        'torch.cpu'
    """
    # `torch.get_device_module` does the same, and keeps what it found first.
    try:
        torch.device(kind)
    except RuntimeError:
        return None
    return getattr(torch, kind, None)


def count_of(kind: str) -> int:
    """Return how many devices of a kind this machine has.

    Args:
        kind: such as "cuda" or "mps".
    """
    module = module_of(kind)
    is_available = getattr(module, "is_available", None)
    # Torch may have code for the kind, and the machine no such device.
    if module is None or is_available is None or not is_available():
        return 0
    return int(module.device_count())


def present_kinds() -> list[str]:
    """Return the kinds of accelerators that this machine has."""
    return [kind for kind in _known_kinds() if count_of(kind)]


def present_names() -> list[str]:
    """Return the name of every device of this machine, the CPU first."""
    names = ["cpu"]
    for kind in present_kinds():
        names += [f"{kind}:{index}" for index in range(count_of(kind))]
    return names


def kinds_in_use() -> list[str]:
    """Return the kinds of accelerators that this process has started; none is started by this.

    A watch asks this at every step.
    """
    return [kind for kind in _known_kinds() if _has_started(kind)]


def _has_started(kind: str) -> bool:
    """Return whether this process has started an accelerator of a kind that torch knows."""
    # What torch was built without was never started, and need not be asked.
    if not _is_built(kind):
        return False

    # MPS cannot tell whether it was started.
    module = getattr(torch, kind, None)
    is_initialized = getattr(module, "is_initialized", None)
    if is_initialized is None:
        is_initialized = getattr(module, "is_available", None)

    # A kind of another vendor may have neither function.
    return is_initialized is not None and bool(is_initialized())


@cache
def _is_built(kind: str) -> bool:
    """Return whether this build of torch has a kind; True where it cannot tell."""
    backend = getattr(torch.backends, kind, None)
    is_built = getattr(backend, "is_built", None)
    return is_built is None or bool(is_built())


def _known_kinds() -> list[str]:
    """Return the kinds that torch may have code for, without a look at the machine."""
    kinds = list(_IN_EVERY_BUILD)
    own = _kind_of_build()
    if own is not None and own not in kinds:
        kinds.append(own)

    # A backend of another vendor, which may be imported at any time.
    further = torch._C._get_privateuse1_backend_name()
    if further not in kinds and hasattr(torch, further):
        kinds.append(further)
    return kinds


@cache
def _kind_of_build() -> str | None:
    """Return the kind of accelerator that torch was built for; None if none can be told."""
    # torch 2.6 raises where the machine has none.
    try:
        own = torch.accelerator.current_accelerator()
    except RuntimeError:
        return None
    return None if own is None else own.type


# -- the current device, and when its work is done -------------------------------------------------
def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one of its kind for a while.

    Code that names the kind alone then means this device.

    Args:
        device: any device. The CPU, and a kind with one device, have no current one.
    """
    select = getattr(module_of(device.type), "device", None)
    if device.type == "cpu" or select is None:
        return nullcontext()
    context: AbstractContextManager[object] = select(device)
    return context


def wait_for(device: torch.device) -> None:
    """Wait until a device has done everything that it was given, so that a clock may be read.

    Args:
        device: any device. On the CPU there is nothing to wait for.
    """
    synchronize = getattr(module_of(device.type), "synchronize", None)
    if device.type == "cpu" or synchronize is None:
        return
    # That of MPS takes no device.
    with made_current(device):
        synchronize()


def wait_for_stream(device: torch.device) -> None:
    """Wait until a device has done what its current stream was given.

    Other streams, which may hold copies of the next batches, are not waited for.

    Args:
        device: any device. On the CPU there is nothing to wait for.
    """
    current_stream = getattr(module_of(device.type), "current_stream", None)
    # MPS has one stream, and no function that names it.
    if device.type == "cpu" or current_stream is None:
        wait_for(device)
        return
    current_stream(device).synchronize()


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device; the host waits for the copy only if that device is the CPU.

    A copy to the CPU that does not block returns memory that the accelerator fills later. Whoever
    reads it before a wait reads what happens to be there.

    Args:
        tensor: on any device.
        device: where it is needed.
        dtype: of the result; that of the tensor if not given.

    Example:
        >>> send(torch.ones(2), torch.device("cpu"), torch.float64)
        tensor([1., 1.], dtype=torch.float64)
    """
    is_host = device.type == "cpu"
    return tensor.to(device, dtype or tensor.dtype, non_blocking=not is_host)


def is_capturing() -> bool:
    """Return whether operations are recorded into a graph of a device, and not run."""
    for kind in kinds_in_use():
        is_recording = getattr(module_of(kind), "is_current_stream_capturing", None)
        if is_recording is not None and is_recording():
            return True
    return False


# -- random numbers --------------------------------------------------------------------------------
def read_random_states(kinds: Iterable[str] | None = None) -> RandomStates:
    """Return the state of every generator of accelerators.

    A kind whose states cannot be read is left out.

    Args:
        kinds: whose generators; of those in use if not given. Another kind is started by this.

    Returns:
        The states by kind, one for each device of it.
    """
    if kinds is None:
        kinds = kinds_in_use()

    states = {}
    for kind in kinds:
        # A backend may not implement the call.
        try:
            of_kind = _states_of(kind)
        except (NotImplementedError, RuntimeError):
            continue

        if of_kind:
            states[kind] = of_kind
    return states


def restore_random_states(states: RandomStates) -> None:
    """Put generators back.

    Args:
        states: that `read_random_states` returned.
    """
    for kind, of_kind in states.items():
        module: Any = module_of(kind)
        if hasattr(module, "set_rng_state_all"):
            module.set_rng_state_all(list(of_kind))
        elif len(of_kind) == 1:
            module.set_rng_state(of_kind[0])
        else:
            for index, state in enumerate(of_kind):
                module.set_rng_state(state, index)


def seed_generators(seed: int) -> None:
    """Seed the generators of the CPU and of the accelerators in use whose states can be read.

    `torch.manual_seed` does more, and nothing can put that back: it leaves its seed for an
    accelerator that is started later, and seeds one whose state cannot be read.

    Args:
        seed: for each of them.
    """
    torch.default_generator.manual_seed(seed)
    for kind in read_random_states():
        module: Any = module_of(kind)
        # That of MPS has one device and one function.
        seed_all = getattr(module, "manual_seed_all", module.manual_seed)
        seed_all(seed)


@contextmanager
def borrowed_generators(kinds: Iterable[str] | None = None) -> Iterator[None]:
    """Put torch's generators back afterwards: that of the CPU, and those of accelerators.

    Args:
        kinds: of accelerators; those in use if not given. Another kind is started by this.
    """
    of_cpu = torch.get_rng_state()
    of_accelerators = read_random_states(kinds)
    try:
        yield
    finally:
        torch.set_rng_state(of_cpu)
        restore_random_states(of_accelerators)


def _states_of(kind: str) -> tuple[Tensor, ...]:
    module: Any = module_of(kind)
    if hasattr(module, "get_rng_state_all"):
        return tuple(module.get_rng_state_all())
    if not hasattr(module, "get_rng_state"):
        return ()

    # That of MPS takes no device.
    devices = count_of(kind)
    if devices == 1:
        return (module.get_rng_state(),)
    return tuple(module.get_rng_state(index) for index in range(devices))


# -- memory ----------------------------------------------------------------------------------------
def free_device_memory(device: torch.device) -> int | None:
    """Return the bytes of an accelerator that this process can still take; None if unknown.

    Args:
        device: any accelerator.
    """
    module: Any = module_of(device.type)

    # 1. MPS shares the memory of the host, and says how much of it is meant for it.
    if hasattr(module, "recommended_max_memory"):
        return int(module.recommended_max_memory() - module.current_allocated_memory())

    # 2. What is free, with what torch's allocator holds and does not use.
    if not hasattr(module, "mem_get_info"):
        return None
    try:
        free, _ = module.mem_get_info(device)
    except RuntimeError:  # drivers of some devices do not say it
        return None
    if not hasattr(module, "memory_reserved"):
        return int(free)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def peak_device_memory(device: torch.device) -> int | None:
    """Return the most bytes that torch's allocator has given out on a device; None if unknown.

    Args:
        device: any device.
    """
    module: Any = module_of(device.type)
    if device.type == "cpu" or not hasattr(module, "max_memory_allocated"):
        return None
    return int(module.max_memory_allocated(device))


# -- precision -------------------------------------------------------------------------------------
@cache
def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64.

    Args:
        device: any device. One of another vendor's backend is tried, once in a process.

    Example:
        >>> has_float64(torch.device("cpu")), has_float64(torch.device("mps"))
        (True, False)
    """
    # 1. Those for which it is known.
    if device.type in _WITH_FLOAT64:
        return True
    if device.type in _WITHOUT_FLOAT64:
        return False
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)

    # 2. Another one.
    try:
        torch.ones(2, dtype=torch.float64, device=device).mul(2).sum()
    except (TypeError, NotImplementedError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64.

    Args:
        device: any device.
    """
    return torch.float64 if has_float64(device) else torch.float32


def in_float64(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return a tensor in float64; one of a device without float64 comes to the CPU.

    Args:
        tensor: of real numbers.
        copy: return a new tensor, also if nothing is to be changed.

    Example:
        >>> in_float64(torch.ones(1)).dtype
        torch.float64
    """
    if not has_float64(tensor.device):
        tensor = tensor.cpu()
    return tensor.to(torch.float64, copy=copy)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the types of the tensors, on the CPU and on every accelerator in use."""
    # To switch it off takes longer than to see that it is off.
    if not torch._C._is_any_autocast_enabled():
        yield
        return

    with ExitStack() as stack:
        for kind in ("cpu", *kinds_in_use()):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
