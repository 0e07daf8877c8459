"""Sharded weights, gathered on every rank one block at a time.

A block is dropped when the next one is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.distributed.training_group import Together
from jacdiag.monitor.optimizers import local
from jacdiag.monitor.probe_memory import available
from jacdiag.sources.module_wrappers import plain_name, unwrap

# Bytes that are kept, as a multiple of the largest block: a small weight that many blocks use is
# not gathered again.
ROOM = 1.25
_PLACES = 10**6 + 3
_ALIGN = 16  # bytes: a weight of any dtype may begin here
Place = tuple[tuple[slice, ...], torch.Size]


class GatheredWeights(Mapping[str, Tensor]):
    """Weights by plain name; a sharded weight is gathered with all others of its block.

    Every rank has to read the same names in the same order, inside `Together.in_step`. Before a
    block is gathered the ranks agree that it is the same one and that all have the memory.
    Everything that can fail on one rank alone is done before that.

    Args:
        model: the model, wrapped or not.
        together: the ranks.

    Attributes:
        outlines: id of a shard -> an empty meta tensor of the entire weight's shape, for
            `trace.wrappers.gathered`.
        largest: bytes of the largest block.
        peak: bytes that the largest block takes while it is gathered: what was sent, and the
            weights that are assembled from it.
        gathered: blocks gathered so far.
    """

    def __init__(self, model: nn.Module, together: Together) -> None:
        """Agree with the other ranks who holds which pieces; see the class for the arguments."""
        self.together = together

        # 1. The sharded weights. Of tied names the first stands for the weight.
        named = unwrap(model).named_parameters(remove_duplicate=False)
        self._tensors: dict[str, Tensor] = {plain_name(name): t for name, t in named}
        shards = {name: t for name, t in self._tensors.items() if is_shard(t)}
        self._first_name = {id(t): name for name, t in reversed(shards.items())}
        self.outlines = {
            id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in shards.values()
        }

        # 2. Their blocks, with the bytes of each.
        self.blocks: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}
        for name in self._first_name.values():
            block = block_of(name)
            self.blocks.setdefault(block, []).append(name)
            size = shards[name].numel() * shards[name].element_size()
            self.sizes[block] = self.sizes.get(block, 0) + size
        self.largest = max(self.sizes.values(), default=0)
        self.peak = 2 * self.largest

        # 3. The blocks that are gathered, the one that was read last at the end.
        self._cache: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.gathered = 0

        # 4. Which pieces the ranks hold.
        own_places = {
            name: _place(shards[name]) for names in self.blocks.values() for name in names
        }
        together.check(_PLACES)
        self._places: list[dict[str, Place]] = together.everybody(own_places)

    # -- the mapping -------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            tensor = self._tensors[name]
            first_name = self._first_name.get(id(tensor))
            if first_name is None:
                return tensor.detach()
            return self._block(block_of(first_name))[first_name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # -- gathering ---------------------------------------------------------------------------------
    def _block(self, block: str) -> dict[str, Tensor]:
        """Return the weights of a block; gather them if they are not in the cache."""
        if block in self._cache:
            self._cache.move_to_end(block)
            return self._cache[block]
        self._make_room(self.sizes[block])

        # 1. Prepare what this rank sends. If a rank fails in that, all raise.
        error: Exception | None = None
        own_bytes = torch.empty(0)
        bytes_of_all = own_bytes
        try:
            own_bytes, bytes_of_all = self._ready(block)
        except Exception as failure:
            error = failure
        self.together.check(1 + list(self.blocks).index(block), error)

        # 2. Gather, and assemble the weights.
        self.together.gather(own_bytes, bytes_of_all)
        self.gathered += 1
        weights = {
            name: self._assembled(name, offsets, bytes_of_all)
            for name, offsets in self._offsets(block)
        }
        self._cache[block] = weights
        return weights

    def _make_room(self, size: int) -> None:
        """Drop the blocks that were read longest ago, until a block of this size fits."""
        cached = sum(self.sizes[block] for block in self._cache)
        room = ROOM * self.largest
        while self._cache and cached + size > room:
            # The cache is in the order of reading.
            oldest, _ = self._cache.popitem(last=False)
            cached -= self.sizes[oldest]

    def _ready(self, block: str) -> tuple[Tensor, Tensor]:
        """Return this rank's pieces, and the room for those of all ranks.

        Returns:
            The pieces end to end as bytes on the CPU, (length,), and an empty tensor (ranks,
            length).
        """
        length = self._longest(block)
        self._check_memory(block, length * (self.together.size + 1))
        own_bytes = torch.zeros(length, dtype=torch.uint8)
        for name, offsets in self._offsets(block):
            piece = local_copy(self._tensors[name]).reshape(-1)
            start = offsets[self.together.rank]
            end = start + piece.numel() * piece.element_size()
            own_bytes[start:end] = piece.view(torch.uint8)
        return own_bytes, torch.empty(self.together.size, length, dtype=torch.uint8)

    def _longest(self, block: str) -> int:
        """Return the bytes of a block's pieces on the rank that holds most of it."""
        lengths: list[int] = []
        for places in self._places:
            sizes = [_bytes(self._tensors[name], places[name]) for name in self.blocks[block]]
            lengths.append(sum(sizes))
        return max(lengths)

    def _check_memory(self, block: str, sent: int) -> None:
        """Raise MemoryError if a block cannot be gathered.

        Args:
            block: its name.
            sent: bytes that the gathering takes on the host.
        """
        size = self.sizes[block]
        device = local(self._tensors[self.blocks[block][0]]).device
        host_free = available(torch.device("cpu"))
        device_free = available(device)
        # 1. The assembled weights lie where the shards do.
        if device.type == "cpu":
            sent += size
        elif device_free is not None and size > 0.9 * device_free:
            raise MemoryError(
                f"'{block}' needs {size / 2**20:,.0f} MB, {device_free / 2**20:,.0f} MB are free"
            )

        # 2. What is sent lies on the host.
        if host_free is not None and sent > 0.9 * host_free:
            raise MemoryError(
                f"'{block}' needs {sent / 2**20:,.0f} MB to gather, "
                f"{host_free / 2**20:,.0f} MB are free"
            )

    def _offsets(self, block: str) -> Iterator[tuple[str, list[int]]]:
        """Yield the names of a block, each with the byte at which its piece begins on each rank."""
        offsets = [0] * self.together.size
        for name in self.blocks[block]:
            yield name, list(offsets)
            for rank, places in enumerate(self._places):
                offsets[rank] += _bytes(self._tensors[name], places[name])

    def _assembled(self, name: str, offsets: list[int], bytes_of_all: Tensor) -> Tensor:
        """Return a weight that is put together from the pieces of all ranks."""
        shard = self._tensors[name]
        weight = torch.empty(shard.shape, dtype=shard.dtype, device=local(shard).device)
        for places, start, row in zip(self._places, offsets, bytes_of_all, strict=True):
            slices, shape = places[name]
            end = start + shape.numel() * shard.element_size()
            piece = row[start:end].view(shard.dtype)
            weight[slices] = piece.view(shape).to(weight.device)
        return weight


def block_of(name: str) -> str:
    """Return the block that a parameter belongs to.

    It is the name down to the first number, or the module that holds the parameter.

    >>> block_of("transformer.h.3.attn.c_attn.weight")
    'transformer.h.3'
    >>> block_of("transformer.wte.weight"), block_of("bias")
    ('transformer.wte', '')
    """
    *modules, _ = name.split(".")
    for place, module in enumerate(modules):
        if module.isdigit():
            return ".".join(modules[: place + 1])
    return ".".join(modules)


def is_shard(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor, in pieces or in copies."""
    return hasattr(tensor, "placements")


def local_copy(shard: Tensor) -> Tensor:
    """Return this rank's piece on the CPU."""
    return local(shard.detach()).to("cpu", copy=True).contiguous()


def _place(shard: Any) -> Place:
    """Return where this rank's piece belongs in the weight, and its shape."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        shard.shape, shard.device_mesh, shard.placements
    )
    slices = [slice(start, start + size) for start, size in zip(offset, shape, strict=True)]
    return tuple(slices), torch.Size(shape)


def _bytes(tensor: Tensor, place: Place) -> int:
    """Return the bytes that a piece takes among others, aligned."""
    size = place[1].numel() * tensor.element_size()
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN
