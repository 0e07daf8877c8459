"""Sharded weights, one block's at a time: gathered on every rank in step, dropped when the next one
is asked for.
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

# of the largest block: what is kept, so that a small weight which many blocks use is not asked for
# again
ROOM = 1.25
_PLACES = 10**6 + 3
_ALIGN = 16  # bytes: a weight of any dtype may begin here
Place = tuple[tuple[slice, ...], torch.Size]


class Blocks(Mapping[str, Tensor]):
    """Weights by plain name; a weight that is not whole here is gathered with all others of its
    block.

    Every rank has to ask for the same names in the same order, inside `Together.in_step`. Before a
    block is gathered the ranks agree that it is the same one and that all have the room; everything
    that can fail on one rank alone is done before that.

    Args:
        model: the guest, wrapped or not.
        together: the ranks.

    Attributes:
        outlines: id of a shard -> an empty meta tensor of the whole weight's shape, for
            `trace.wrappers.gathered`.
        largest: bytes of the largest block.
        peak: bytes that the largest block takes while it is gathered: what was sent, and what is
            made of it.
        gathered: blocks gathered so far.
    """

    def __init__(self, model: nn.Module, together: Together) -> None:
        self.together = together
        named = unwrap(model).named_parameters(remove_duplicate=False)
        self._tensors: dict[str, Tensor] = {plain_name(name): t for name, t in named}
        shards = {name: t for name, t in self._tensors.items() if is_shard(t)}
        self.blocks: dict[str, list[str]] = {}
        # one name per tie
        for name in dict.fromkeys({id(t): name for name, t in reversed(shards.items())}.values()):
            self.blocks.setdefault(block_of(name), []).append(name)
        self._first = {id(t): name for name, t in reversed(shards.items())}
        self.outlines = {
            id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in shards.values()
        }
        sizes = {
            block: sum(shards[n].numel() * shards[n].element_size() for n in names)
            for block, names in self.blocks.items()
        }
        self.sizes, self.largest = sizes, max(sizes.values(), default=0)
        self.peak, self.gathered = 2 * self.largest, 0
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        mine = {name: _place(shards[name]) for names in self.blocks.values() for name in names}
        together.check(_PLACES)
        self._places: list[dict[str, Place]] = together.everybody(mine)

    # -- the mapping -------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            tensor = self._tensors[name]
            first = self._first.get(id(tensor))
            return tensor.detach() if first is None else self._block(block_of(first))[first]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # -- gathering ---------------------------------------------------------------------------------
    def _block(self, block: str) -> dict[str, Tensor]:
        if block in self._kept:
            self._kept.move_to_end(block)
            return self._kept[block]
        held = sum(self.sizes[b] for b in self._kept)
        while self._kept and held + self.sizes[block] > ROOM * self.largest:
            held -= self.sizes[self._kept.popitem(last=False)[0]]
        error: Exception | None = None
        mine = everybody = torch.empty(0)
        try:
            mine, everybody = self._ready(block)
        except Exception as failed:
            error = failed
        self.together.check(1 + list(self.blocks).index(block), error)
        self.together.gather(mine, everybody)
        self.gathered += 1
        whole = {
            name: self._assembled(name, offset, everybody) for name, offset in self._offsets(block)
        }
        self._kept[block] = whole
        return whole

    def _ready(self, block: str) -> tuple[Tensor, Tensor]:
        """This rank's pieces, end to end as bytes, and the room for those of all ranks."""
        names = self.blocks[block]
        length = max(
            sum(_bytes(self._tensors[n], places[n]) for n in names) for places in self._places
        )
        device = local(self._tensors[names[0]]).device
        host, there = available(torch.device("cpu")), available(device)
        sent = length * (self.together.size + 1)
        if device.type == "cpu":
            sent += self.sizes[block]
        elif there is not None and self.sizes[block] > 0.9 * there:
            raise MemoryError(
                f"'{block}' needs {self.sizes[block] / 2**20:,.0f} MB, {there / 2**20:,.0f} MB "
                "are free"
            )
        if host is not None and sent > 0.9 * host:
            raise MemoryError(
                f"'{block}' needs {sent / 2**20:,.0f} MB to gather, {host / 2**20:,.0f} MB are free"
            )
        mine = torch.zeros(length, dtype=torch.uint8)
        for name, offset in self._offsets(block, self.together.rank):
            piece = local_copy(self._tensors[name]).reshape(-1)
            mine[offset : offset + piece.numel() * piece.element_size()] = piece.view(torch.uint8)
        return mine, torch.empty(self.together.size, length, dtype=torch.uint8)

    def _offsets(self, block: str, rank: int | None = None) -> Iterator[tuple[str, Any]]:
        """(name, where its piece begins): on one rank, or on each of them."""
        at = [0] * self.together.size
        for name in self.blocks[block]:
            yield name, list(at) if rank is None else at[rank]
            for k, places in enumerate(self._places):
                at[k] += _bytes(self._tensors[name], places[name])

    def _assembled(self, name: str, offsets: list[int], everybody: Tensor) -> Tensor:
        shard = self._tensors[name]
        whole = torch.empty(shard.shape, dtype=shard.dtype, device=local(shard).device)
        for places, offset, row in zip(self._places, offsets, everybody, strict=True):
            where, shape = places[name]
            piece = row[offset : offset + shape.numel() * shard.element_size()].view(shard.dtype)
            whole[where] = piece.view(shape).to(whole.device)
        return whole


def block_of(name: str) -> str:
    """The block that a parameter belongs to: down to the first number of its name, else the module
    that holds it.

    >>> block_of("transformer.h.3.attn.c_attn.weight")
    'transformer.h.3'
    >>> block_of("transformer.wte.weight"), block_of("bias")
    ('transformer.wte', '')
    """
    parts = name.split(".")
    number = next((k for k, part in enumerate(parts[:-1]) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def is_shard(tensor: Any) -> bool:
    """Whether a rank holds it as a DTensor, in pieces or in copies."""
    return hasattr(tensor, "placements")


def local_copy(shard: Tensor) -> Tensor:
    """This rank's piece, on the CPU."""
    return local(shard.detach()).to("cpu", copy=True).contiguous()


def _place(shard: Any) -> Place:
    """Where this rank's piece belongs in the whole, and its shape."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        shard.shape, shard.device_mesh, shard.placements
    )
    return tuple(
        slice(start, start + n) for start, n in zip(offset, shape, strict=True)
    ), torch.Size(shape)


def _bytes(tensor: Tensor, place: Place) -> int:
    size = place[1].numel() * tensor.element_size()
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN
