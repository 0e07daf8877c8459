"""The state of the pretended device: switches, counts, memory and copies under way."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from types import FrameType
from typing import Any

import torch
from torch import Tensor

NAME = "pretended"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What the device can do.

    Attributes:
        devices: how many there are.
        float64: False raises for tensors of float64, as MPS does.
        generator: False leaves the device without a `torch.Generator` and without a readable state
            of its random numbers. It still draws.
        memory: bytes of each device. An allocation beyond it raises `torch.OutOfMemoryError`.
        threads: True runs backward passes on a thread of their own, as on CUDA. It needs one
            device.
        lag: how many operations the host launches before an event counts as reached.
    """

    devices: int = 1
    float64: bool = True
    generator: bool = True
    memory: int = 2**34
    threads: bool = False
    lag: int = 8


@dataclass(kw_only=True)
class Counts:
    """What the host asked of the device.

    Attributes:
        operations: kernels launched, copies among them. Views and allocations launch none.
        reads: values that the host waited for, such as `item()` or the size of `nonzero()`.
        uploads: blocking copies to the device.
        downloads: blocking copies from it.
        synchronizations: explicit waits for a device, a stream or an event not yet reached.
        staged_uploads: non-blocking copies from memory that is not pinned. CUDA copies such memory
            to a pinned buffer first, and may wait for the stream to do so.
        free_uploads: non-blocking copies from pinned memory, for which nobody waits.
        free_downloads: non-blocking copies to pinned memory, for which nobody waits.
        mixed: operations refused because their tensors lie on several devices.
        races: pinned memory that was overwritten before its upload was done.
        places: for each kind of wait, the innermost line of jacdiag that made the host wait.
    """

    operations: int = 0
    reads: int = 0
    uploads: int = 0
    downloads: int = 0
    synchronizations: int = 0
    staged_uploads: int = 0
    free_uploads: int = 0
    free_downloads: int = 0
    mixed: int = 0
    races: int = 0
    places: Counter[str] = field(default_factory=Counter)

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return self.reads + self.uploads + self.downloads + self.synchronizations

    def clear(self) -> None:
        """Set every count to zero."""
        for one_field in fields(self):
            empty = Counter() if one_field.name == "places" else 0
            setattr(self, one_field.name, empty)

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name, the sum of the waits among them."""
        numbers = {name: getattr(self, name) for name in self.__dict__ if name != "places"}
        return {"waits": self.waits, **numbers}


@dataclass
class Copy:
    """A copy that the device has not made yet.

    Attributes:
        launched: how many operations had been launched before it.
        stream: the number of its stream.
        value: what is copied, as it was when the copy was launched.
        target: pinned memory that gets the value; None for an upload.
        source: pinned memory that is read; None for a download.
    """

    launched: int
    stream: int
    value: Tensor
    target: Tensor | None = None
    source: Tensor | None = None

    def finish(self) -> bool:
        """Write the value, or return whether the host overwrote it too early."""
        if self.target is not None:
            self.target.copy_(self.value)
            return False
        assert self.source is not None
        return not torch.equal(_bytes_of(self.source), _bytes_of(self.value))


class Charge:
    """The memory of one storage; it is given back when the storage dies."""

    def __init__(self, machine: Machine, index: int, size: int) -> None:
        self.machine, self.index, self.size = machine, index, size
        machine.live[index] += size
        machine.peak[index] = max(machine.peak[index], machine.live[index])

    def __del__(self) -> None:
        self.machine.live[self.index] -= self.size


class Machine:
    """One life of the device, from the start of a `with` block to its end."""

    def __init__(self, switches: Switches) -> None:
        self.switches = switches
        self.counts = Counts()
        self.launched = 0
        self.current = 0
        self.stream = 0
        self.is_capturing = False
        self.live = [0] * switches.devices
        self.peak = [0] * switches.devices
        self.generators = [torch._C.Generator() for _ in range(switches.devices)]
        # torch hands a generator to a kernel as another object, of the same address
        self.owned = {generator._cdata: generator for generator in self.generators}
        self.pending: list[Copy] = []
        # storages of pinned memory by their address; to hold them keeps the addresses unique
        self.pinned: dict[int, torch.UntypedStorage] = {}

    def own(self, generator: torch.Generator) -> torch.Generator:
        """Note that a generator belongs to the device."""
        self.owned[generator._cdata] = generator
        return generator

    def owns(self, generator: torch.Generator) -> bool:
        """Return whether a generator belongs to the device."""
        return generator._cdata in self.owned

    def launch(self) -> None:
        """Count one kernel."""
        self.counts.operations += 1
        self.launched += 1

    def charge(self, index: int, tensor: Tensor) -> None:
        """Count the memory of a new tensor of the device.

        Raises:
            torch.OutOfMemoryError: the device has less memory than that.
        """
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        limit = self.switches.memory
        if self.live[index] + size > limit:
            raise torch.OutOfMemoryError(
                f"{NAME} out of memory. Tried to allocate {size} bytes. Device {index} has a total "
                f"of {limit} bytes, of which {self.live[index]} are in use."
            )
        # The object of a storage lives as long as the storage, so this dies with it.
        storage._charge = Charge(self, index, size)  # type: ignore[attr-defined]

    def wait(self, kind: str, *, stream: int | None = None, until: int | None = None) -> None:
        """Count a wait of the host, and finish the copies that it waits for.

        Args:
            kind: the count: "reads", "uploads", "downloads" or "synchronizations".
            stream: waits for this stream only.
            until: waits only for what was launched before this number of operations.

        Raises:
            RuntimeError: pinned memory was overwritten before its upload was done, or a graph is
                being captured.
        """
        if self.is_capturing:
            raise RuntimeError(f"{NAME} error: operation not permitted when stream is capturing")
        setattr(self.counts, kind, getattr(self.counts, kind) + 1)
        self.counts.places[f"{kind} {_line_of_jacdiag(sys._getframe(1))}"] += 1
        self.finish_copies(stream=stream, until=until)

    def finish_copies(self, *, stream: int | None = None, until: int | None = None) -> None:
        """Finish copies in their order, without a count."""
        # 1. Those that this wait covers.
        ready: list[Copy] = []
        remaining: list[Copy] = []
        for copy in self.pending:
            is_on_stream = stream is None or copy.stream == stream
            is_early = until is None or copy.launched < until
            ready_or_not = ready if is_on_stream and is_early else remaining
            ready_or_not.append(copy)
        self.pending = remaining

        # 2. A value that changed under way is a fault of the program.
        changed = [copy for copy in ready if copy.finish()]
        if changed:
            self.counts.races += len(changed)
            raise RuntimeError("pinned memory was overwritten before its upload was done")

    def pin(self, tensor: Tensor) -> Tensor:
        """Note that a tensor of the CPU lies in pinned memory."""
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor of the CPU lies in pinned memory."""
        return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in self.pinned


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: NaN equals NaN in them."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _line_of_jacdiag(frame: FrameType | None) -> str:
    """Return file and line of the innermost frame of jacdiag that wanted a value."""
    while frame is not None:
        path = frame.f_code.co_filename
        is_of_jacdiag = "/jacdiag/" in path and "/tests/" not in path
        # The helper that packs downloads wants nothing for itself.
        if is_of_jacdiag and not path.endswith("/devices/packed_download.py"):
            return f"{path.rpartition('/jacdiag/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class _Room:
    """Where the present machine is kept."""

    machine = Machine(Switches())
    is_on = False


def machine() -> Machine:
    """Return the present machine. Outside of every `with` block it is one that nobody reads."""
    return _Room.machine


def is_on() -> bool:
    """Return whether a `with` block is active, so that the device is there."""
    return _Room.is_on


def install(new: Machine, *, on: bool) -> None:
    """Make a machine the present one."""
    _Room.machine, _Room.is_on = new, on


def index_of(device: Any) -> int:
    """Return the index that a device means: an index, a name, a `torch.device`, or None.

    Raises:
        RuntimeError: there is no device of that index.
    """
    # 1. An index, or the current one.
    if device is None:
        return machine().current
    if isinstance(device, int):
        index = device
    else:
        found = torch.device(device).index
        index = machine().current if found is None else found

    # 2. There are only so many.
    count = machine().switches.devices
    if not 0 <= index < count:
        raise RuntimeError(f"{NAME} error: invalid device ordinal {index}, there are {count}")
    return index
