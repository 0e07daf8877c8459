"""The ranks of a run: who speaks, and how they agree without anybody waiting for ever.

Everything that the watch says to other ranks goes through a process group of its own, on the CPU, with a time limit: a
rank that is missing costs that time once, and the watch goes on without the figures that need it. The training's own
groups are never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jacdiag.watching.optimisers import local


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds pieces of the weights (FSDP2, tensor parallel)."""
    for p in model.parameters():
        placements = getattr(p, "placements", None)
        if placements is not None and any(not placement.is_replicate() for placement in placements):
            return True
    return False


class Together:
    """One rank among others.

    Args:
        sharded: figures have to be summed over ranks; else every rank knows them all and nobody asks anybody.
        seconds: how long to wait for a rank.

    Attributes:
        lead: this rank writes and speaks.
        broken: a rank did not answer; nobody is asked any more.
    """

    def __init__(self, sharded: bool, seconds: float = 60.0) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if there else 0
        self.size = dist.get_world_size() if there else 1
        self.lead = self.rank == 0
        self.sharded = sharded and self.size > 1
        self.broken = ""
        self.group: Any = None
        if self.sharded:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def agree(self, flag: bool) -> bool:
        """Whether every rank says yes. Every rank has to ask."""
        return bool(self.total(torch.tensor([0.0 if flag else 1.0])).sum() == 0)

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of a CPU tensor. Every rank has to ask.

        Raises:
            RuntimeError: a rank did not answer in time, now or before.
        """
        if not self.sharded:
            return values
        if self.broken:
            raise RuntimeError(self.broken)
        try:
            summed = values.clone()
            dist.all_reduce(summed, group=self.group)
            return summed
        except RuntimeError as error:
            self.broken = f"another rank did not answer ({str(error).splitlines()[0][:120]})"
            raise RuntimeError(self.broken) from error

    def share(self, value: Any) -> Any:
        """The leading rank's value, on every rank. Every rank has to ask."""
        if not self.sharded:
            return value
        if self.broken:
            raise RuntimeError(self.broken)
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0, group=self.group)
        except RuntimeError as error:
            self.broken = f"another rank did not answer ({str(error).splitlines()[0][:120]})"
            raise RuntimeError(self.broken) from error
        return box[0]

    def whole(self, shards: Sequence[Tensor], pieces: Sequence[Tensor]) -> list[Tensor] | None:
        """Gathers sharded tensors on the leading rank, on the CPU; None on the others. Every rank has to ask.

        Args:
            shards: DTensors, in the same order on every rank.
            pieces: their local parts on the CPU, made before anybody agreed.
        """
        found: list[Tensor] = []
        for shard, piece in zip(shards, pieces, strict=True):
            mine = _described(shard, piece)
            everybody: list[Any] | None = [None] * self.size if self.lead else None
            try:
                dist.gather_object(mine, everybody, dst=0, group=self.group)
            except RuntimeError as error:
                self.broken = f"another rank did not answer ({str(error).splitlines()[0][:120]})"
                raise RuntimeError(self.broken) from error
            if everybody is not None:
                found.append(_assembled(shard, everybody))
        return found if self.lead else None

    def close(self) -> None:
        if self.group is not None and not self.broken and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


def local_copy(shard: Tensor) -> Tensor:
    """This rank's piece, on the CPU."""
    return local(shard.detach()).to("cpu", copy=True).contiguous()


def _described(shard: Any, piece: Tensor) -> tuple[tuple[slice, ...], Tensor]:
    """A piece with the place where it belongs in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    return tuple(slice(start, start + n) for start, n in zip(offset, shape, strict=True)), piece


def _assembled(shard: Tensor, everybody: Sequence[tuple[tuple[slice, ...], Tensor]]) -> Tensor:
    whole = torch.empty(shard.shape, dtype=shard.dtype)
    for place, piece in everybody:
        whole[place] = piece.view(whole[place].shape)
    return whole.to(local(shard).device)
