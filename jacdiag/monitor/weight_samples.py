"""Samples of the elements of several weights, read in one go without holding the weights."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from math import gcd
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacdiag.monitor.parameter_groups import GroupMember

SAMPLE = 128  # elements of each matrix

Sample = Any
"""What a reader has read: an array of bit patterns on a CPU, a tensor on any other device."""

# Integers of the size of an element, which NumPy copies without a look at their meaning. Two kinds
# of 16 bits have an integer each, so that bits of one are never compared with those of the other.
_BITS = {1: np.uint8, 2: np.int16, 4: np.uint32, 8: np.uint64}
_BITS_OF_BFLOAT16 = np.uint16

_DTYPE = attrgetter("dtype")


def is_readable(member: GroupMember, device: torch.device) -> bool:
    """Return whether a weight is a plain matrix on the metrics' device, or a shard of one."""
    # 1. A tensor of no foreign class, with two dimensions or more.
    piece = _piece(member)
    if type(piece) not in (Tensor, torch.nn.Parameter):
        return False
    if piece.ndim < 2 or not piece.numel():
        return False

    # 2. Floats on the device, without gaps in memory.
    if not piece.is_floating_point():
        return False
    return piece.device == device and _is_dense(piece)


def make_readers(
    members: Sequence[GroupMember], places: Sequence[int], device: torch.device
) -> list[HostReader | DeviceReader]:
    """Return the readers of some weights.

    Args:
        members: of all groups.
        places: of the weights among them; each is readable.
        device: of the weights.
    """
    # 1. One reader takes all weights of a device.
    if device.type != "cpu":
        return [DeviceReader(members, places)]

    # 2. On a CPU one reader takes those of one dtype, whose bits can be compared.
    by_dtype: dict[torch.dtype, list[int]] = {}
    for place in places:
        by_dtype.setdefault(_piece(members[place]).dtype, []).append(place)
    return [HostReader(members, places_of_dtype) for places_of_dtype in by_dtype.values()]


class HostReader:
    """Samples of weights on the CPU, as arrays of bit patterns.

    NumPy copies the elements from where they lie. The arrays that it copies from are made once and
    hold no memory. So each reading first checks that every weight still lies there.

    Args:
        members: of all groups.
        places: of the weights among them, which have one dtype.

    Attributes:
        places: as given.
        counts: how many elements of each weight are read.
    """

    def __init__(self, members: Sequence[GroupMember], places: Sequence[int]) -> None:
        self.places = list(places)
        self.members = [members[place] for place in places]
        # Plain parameters stay the objects that they are. A shard is looked up at each reading.
        self._parameters = [member.parameter for member in self.members]
        self._are_plain = set(map(type, self._parameters)) == {torch.nn.Parameter}
        self._lay_out()

    def read(self) -> np.ndarray[Any, Any]:
        """Return the samples of all weights, one after the other."""
        if self._layout_now() != self._layout:
            self._lay_out()
        return np.concatenate(self._slices)

    def read_again(self) -> np.ndarray[Any, Any]:
        """Return the samples after the step that began with `read`."""
        return self.read()

    def release(self) -> None:
        """Let go of the weights; nothing of them is held."""

    def are_equal(self, before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> bool:
        """Return whether two readings are equal, bit by bit."""
        return before.tobytes() == after.tobytes()

    def as_tensor(self, sample: np.ndarray[Any, Any]) -> Tensor:
        """Return one of the last two readings as a tensor of the weights' dtype."""
        return torch.from_numpy(sample.view(np.uint8)).view(self._dtype)

    def from_tensor(self, sample: Tensor) -> np.ndarray[Any, Any]:
        """Return what `as_tensor` was made from."""
        values = sample.to("cpu", self._dtype)
        bits: np.ndarray[Any, Any] = values.view(torch.uint8).numpy().view(_bits_of(values))
        return bits

    def _lay_out(self) -> None:
        """Find where the weights lie.

        Raises:
            RuntimeError: one of them is no dense tensor on the CPU any more, or has no memory now.
        """
        # If one cannot be read, the next reading looks again, also at the same addresses.
        self._layout: tuple[list[Any], ...] = ()
        self._slices: list[np.ndarray[Any, Any]] = []
        for member in self.members:
            piece = _piece(member)
            if piece.device.type != "cpu" or not _is_dense(piece):
                raise RuntimeError(f"{member.name} is no dense tensor on the CPU any more")
            if not _has_memory(piece):
                raise RuntimeError(f"{member.name} has no memory: its storage was freed")
            self._slices.append(_slice_of_memory(piece))
        self.counts = [len(part) for part in self._slices]
        self._dtype = _piece(self.members[0]).dtype
        self._layout = self._layout_now()

    def _layout_now(self) -> tuple[list[Any], ...]:
        """Return where the weights lie and how.

        The addresses tell the device too: no two devices share one.
        """
        pieces = self._parameters
        if not self._are_plain:
            pieces = list(map(_piece, self.members))
        return (
            list(map(Tensor.data_ptr, pieces)),
            list(map(Tensor.numel, pieces)),
            list(map(Tensor.stride, pieces)),
            list(map(_DTYPE, pieces)),
        )


class DeviceReader:
    """Samples of weights on any device, as one tensor; the device is not waited for.

    The views of the weights are held from `read` to `read_again`, while a step runs, so that a loop
    may move or free the weights in between.

    Args:
        members: of all groups.
        places: of the weights among them.

    Attributes:
        places: as given.
    """

    def __init__(self, members: Sequence[GroupMember], places: Sequence[int]) -> None:
        self.places = list(places)
        self.samplers = [Sampler(members[place]) for place in places]
        self._views: list[Tensor] = []

    @property
    def members(self) -> list[GroupMember]:
        """The weights."""
        return [sampler.member for sampler in self.samplers]

    @property
    def counts(self) -> list[int]:
        """How many elements of each weight are read."""
        return [len(sampler.view()) for sampler in self.samplers]

    def read(self) -> Tensor:
        """Return the samples of all weights, one after the other."""
        self._views = [sampler.view() for sampler in self.samplers]
        return torch.cat(self._views)

    def read_again(self) -> Tensor:
        """Return the samples after the step that began with `read`."""
        # The step may have put another tensor in the place of a weight.
        is_in_place = bool(self._views) and all(map(Sampler.is_of, self.samplers, self._views))
        if not is_in_place:
            return self.read()
        return torch.cat(self._views)

    def release(self) -> None:
        """Let go of the weights."""
        self._views = []

    def are_equal(self, _before: Tensor, _after: Tensor) -> bool:
        """Return False: only a wait for the device could tell."""
        return False

    def as_tensor(self, sample: Tensor) -> Tensor:
        """Return a reading, which is a tensor already."""
        return sample

    def from_tensor(self, sample: Tensor) -> Tensor:
        """Return what `as_tensor` was made from."""
        return sample.to(_piece(self.members[0]).device)


class Sampler:
    """A view of elements that lie evenly in a weight, and not in one of its columns alone."""

    def __init__(self, member: GroupMember) -> None:
        self.member = member
        self._lay_out(_piece(member))

    def view(self) -> Tensor:
        """Return the elements in the order of memory; the view holds the memory of the weight."""
        piece = _piece(self.member)
        if piece.numel() != self.elements:
            self._lay_out(piece)
        return piece.as_strided(self.size, self.stride)

    def is_of(self, view: Tensor) -> bool:
        """Return whether a view shows the weight as it is now.

        An optimizer may have put another tensor in its place.
        """
        return _piece(self.member).data_ptr() == view.data_ptr()

    def _lay_out(self, piece: Tensor) -> None:
        self.elements = piece.numel()
        count, stride = sample_layout(self.elements, piece.shape[-1])
        self.size, self.stride = (count,), (stride,)


@cache
def sample_layout(elements: int, columns: int) -> tuple[int, int]:
    """Return how many elements of a matrix are sampled, and how far apart they lie in memory."""
    # A stride with a factor in common with the columns would never reach some of them.
    stride = max(elements // SAMPLE, 1)
    while stride > 1 and gcd(stride, columns) > 1:
        stride -= 1
    return min(math.ceil(elements / stride), SAMPLE), stride


def _piece(member: GroupMember) -> Tensor:
    """Return the tensor that this rank holds; `to_local` would build a new one at each step."""
    parameter: Any = member.parameter
    if type(parameter) is torch.nn.Parameter:
        return parameter
    piece: Tensor = getattr(parameter, "_local_tensor", parameter)
    return piece


def _is_dense(piece: Tensor) -> bool:
    """Return whether the elements lie in memory without gaps."""
    if piece.layout is not torch.strided:
        return False
    return torch.ops.aten.is_non_overlapping_and_dense.default(piece)


def _has_memory(piece: Tensor) -> bool:
    """Return whether the storage holds all elements; a trainer may free it between two steps."""
    storage = piece.untyped_storage()
    needed = (piece.storage_offset() + piece.numel()) * piece.element_size()
    return storage.data_ptr() != 0 and storage.nbytes() >= needed


def _slice_of_memory(piece: Tensor) -> np.ndarray[Any, Any]:
    """Return the sampled elements of a dense tensor on the CPU, as a view that holds nothing."""
    count, stride = sample_layout(piece.numel(), piece.shape[-1])
    width = piece.element_size()
    memory: Any = (ctypes.c_uint8 * (piece.numel() * width)).from_address(piece.data_ptr())
    return np.frombuffer(memory, dtype=_bits_of(piece))[::stride][:count]


def _bits_of(tensor: Tensor) -> Any:
    """Return the NumPy type that stands for the bits of an element."""
    if tensor.dtype is torch.bfloat16:
        return _BITS_OF_BFLOAT16
    return _BITS[tensor.element_size()]
