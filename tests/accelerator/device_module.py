"""What stands as `torch.pretended`: the functions that `torch.cuda` has, for the pretended device.

`torch.get_device_module` returns this module. The functions of `torch.accelerator` are replaced by
these in a `with` block, because torch lets a backend in Python answer for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from accelerator import machine as state
from accelerator.machine import NAME, index_of, machine

_streams_made = 0


def is_available() -> bool:
    """Return whether a `with` block is active."""
    return state.is_on()


def is_initialized() -> bool:
    """Return whether the device has been used."""
    return state.is_on()


def device_count() -> int:
    """Return how many devices there are."""
    return machine().switches.devices if state.is_on() else 0


def current_device() -> int:
    """Return the index of the device that is meant where none is named."""
    return machine().current


def set_device(device: Any) -> None:
    """Make a device the current one."""
    machine().current = index_of(device)


class device:
    """Make a device the current one for a while; None or a negative index changes nothing."""

    def __init__(self, device: Any) -> None:
        is_none = device is None or (isinstance(device, int) and device < 0)
        self.index = None if is_none else index_of(device)
        self.before = 0

    def __enter__(self) -> device:
        self.before = machine().current
        if self.index is not None:
            machine().current = self.index
        return self

    def __exit__(self, *error: object) -> None:
        machine().current = self.before


class Stream:
    """A queue of operations. Every operation is done at once; copies of the host are not."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        global _streams_made
        _streams_made += 1
        self.stream_id = _streams_made
        self.device = torch.device(NAME, index_of(device))
        self.priority = priority
        self._before = 0

    def synchronize(self) -> None:
        """Wait for everything on this stream."""
        machine().wait("synchronizations", stream=self.stream_id)

    def query(self) -> bool:
        """Return whether every copy on this stream is done."""
        return all(copy.stream != self.stream_id for copy in machine().pending)

    def wait_stream(self, stream: Any) -> None:
        """Let later operations run after those of another stream; the host does not wait."""

    def wait_event(self, event: Any) -> None:
        """Let later operations run after an event; the host does not wait."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event on this stream."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self._before = machine().stream
        machine().stream = self.stream_id
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        machine().stream = self._before


class Event:
    """A mark on a stream. The device reaches it some operations after the host set it."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = torch.device(NAME, index_of(device))
        self._launched: int | None = None
        self._stream = 0

    def record(self, stream: Any = None) -> None:
        """Set the mark behind everything that was launched so far."""
        self._launched = machine().launched
        self._stream = machine().stream if stream is None else stream.stream_id

    def wait(self, stream: Any = None) -> None:
        """Let later operations of a stream run after this; the host does not wait."""

    def query(self) -> bool:
        """Return whether the device has reached the mark; then the copies before it are done."""
        if self._launched is None:
            return True
        has_passed = machine().launched - self._launched >= machine().switches.lag
        if has_passed:
            machine().finish_copies(stream=self._stream, until=self._launched)
        return has_passed

    def synchronize(self) -> None:
        """Wait until the device has reached the mark."""
        if not self.query():
            machine().wait("synchronizations", stream=self._stream, until=self._launched)

    def elapsed_time(self, end: Event) -> float:
        """Return a time in milliseconds: one for each thousand operations."""
        return ((end._launched or 0) - (self._launched or 0)) / 1000


def _default_stream(device: Any) -> Stream:
    stream = Stream(device)
    stream.stream_id = 0
    return stream


def default_stream(device: Any = None) -> Stream:
    """Return the stream that is used where none is named."""
    return _default_stream(device)


def current_stream(device: Any = None) -> Stream:
    """Return the stream that operations go to."""
    stream = _default_stream(device)
    stream.stream_id = machine().stream
    return stream


def set_stream(stream: Any) -> None:
    """Send operations to a stream from here on."""
    machine().stream = stream.stream_id


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Send operations to a stream for a while."""
    if stream is None:
        yield
        return
    with stream:
        yield


def synchronize(device: Any = None) -> None:
    """Wait for everything on a device."""
    index_of(device)
    machine().wait("synchronizations")


def memory_allocated(device: Any = None) -> int:
    """Return the bytes of a device that are in use."""
    return machine().live[index_of(device)]


def max_memory_allocated(device: Any = None) -> int:
    """Return the most bytes that were in use since the count was reset."""
    return machine().peak[index_of(device)]


def reset_peak_memory_stats(device: Any = None) -> None:
    """Let the count of the most bytes begin with those in use."""
    index = index_of(device)
    machine().peak[index] = machine().live[index]


def memory_reserved(device: Any = None) -> int:
    """Return the bytes that the allocator holds: those in use, as this one holds no others."""
    return memory_allocated(device)


def max_memory_reserved(device: Any = None) -> int:
    """Return the most bytes that the allocator held."""
    return max_memory_allocated(device)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Return the free and all the bytes of a device."""
    total = machine().switches.memory
    return total - memory_allocated(device), total


def memory_stats(device: Any = None) -> dict[str, int]:
    """Return the counts of the allocator by torch's names."""
    return {
        "allocated_bytes.all.current": memory_allocated(device),
        "allocated_bytes.all.peak": max_memory_allocated(device),
        "reserved_bytes.all.current": memory_reserved(device),
        "reserved_bytes.all.peak": max_memory_reserved(device),
    }


def empty_cache() -> None:
    """Do nothing: this allocator keeps no memory that is free."""


def _generator(device: Any) -> torch.Generator:
    if not machine().switches.generator:
        raise NotImplementedError(f"{NAME} has no generator of its own")
    return machine().generators[index_of(device)]


def get_rng_state(device: Any = None) -> Tensor:
    """Return the state of a device's random numbers, as bytes on the CPU."""
    return _generator(device).get_state()


def set_rng_state(new_state: Tensor, device: Any = None) -> None:
    """Set the state of a device's random numbers."""
    _generator(device).set_state(new_state)


def get_rng_state_all() -> list[Tensor]:
    """Return the states of all devices."""
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: list[Tensor]) -> None:
    """Set the states of all devices."""
    for index, new_state in enumerate(new_states):
        set_rng_state(new_state, index)


def manual_seed(seed: int) -> None:
    """Set the seed of the current device."""
    machine().generators[machine().current].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Set the seed of all devices; `torch.manual_seed` calls this."""
    for generator in machine().generators:
        generator.manual_seed(seed)


def initial_seed() -> int:
    """Return the seed of the current device."""
    return _generator(None).initial_seed()


def _is_in_bad_fork() -> bool:
    return False


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the types that autocast may use."""
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    """Return whether the device has bfloat16."""
    return True


def is_current_stream_capturing() -> bool:
    """Return whether a block of `capturing` is active."""
    return machine().is_capturing


@contextmanager
def capturing() -> Iterator[None]:
    """Let a graph be captured for a while: the host may not wait for the device in the block.

    Operations are computed all the same, and nothing can be replayed.
    """
    machine().is_capturing = True
    try:
        yield
    finally:
        machine().is_capturing = False


def get_device_name(device: Any = None) -> str:
    """Return the name of a device."""
    return f"Pretended {index_of(device)}"


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """Return a version of the hardware."""
    index_of(device)
    return (1, 0)
