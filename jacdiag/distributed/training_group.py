"""The ranks of a run: who speaks, and how they agree without anybody waiting for ever.

Everything that the watch says to other ranks goes through a process group of its own, on the CPU,
with a time limit: a rank that is missing costs that time once, and the watch goes on without the
figures that need it. The training's own groups are never used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jacdiag.errors import SourceError, one_line

_FINE, _FULL, _FAILED = range(3)
_END, _ROOM = 10**6, 10**6 + 1  # places; those of blocks are small numbers


class ElsewhereError(SourceError):
    """Work in step has ended on all ranks: each of them was told why."""


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
        sharded: figures have to be summed over ranks; else every rank knows them all and nobody
            asks anybody.
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
        self.broken = self._over = ""
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
        summed = values.clone()
        with self._answered():
            dist.all_reduce(summed, group=self.group)
        return summed

    def share(self, value: Any) -> Any:
        """The leading rank's value, on every rank. Every rank has to ask."""
        if not self.sharded:
            return value
        if self.broken:
            raise RuntimeError(self.broken)
        box = [value]
        with self._answered():
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    # -- in step -----------------------------------------------------------------------------------
    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Work with agreements in it, which all ranks finish or none.

        A rank that fails says so in the place of its next agreement; the others leave theirs there.
        At the end all agree once more, so that nobody takes for done what another could not do.
        """
        if not self.sharded:
            yield
            return
        self._over = ""
        try:
            yield
        except Exception:
            if not (self._over or self.broken):  # else everybody knows
                with suppress(RuntimeError):
                    self._asked(_END, _FAILED)
            raise
        self.check(_END)

    def check(self, place: int, error: Exception | None = None) -> None:
        """Go on only if every rank is at the same place and none has an error.

        A place is a positive number.

        Raises:
            ElsewhereError: otherwise, on every rank.
        """
        self._same(place, _FAILED if error is not None else _FINE, error)

    def fits(self, here: bool) -> bool:
        """Whether all ranks have the room. Raises ElsewhereError as `check` does."""
        if not self.sharded:
            return here
        return self._same(_ROOM, _FINE if here else _FULL) == _FINE

    def _same(self, place: int, level: int, error: Exception | None = None) -> int:
        if self._over:  # somebody caught the error and went on
            raise ElsewhereError(self._over)
        highest, same = self._asked(place, level)
        if error is not None:
            self._over = one_line(error)
        elif highest == _FAILED:
            self._over = "it could not be made on another rank"
        elif not same:
            self._over = (
                "the ranks do not do the same: the model, or its probe, differs between them"
            )
        if self._over:
            raise ElsewhereError(self._over) from error
        return highest

    def _asked(self, place: int, level: int) -> tuple[int, bool]:
        if self.broken:
            raise RuntimeError(self.broken)
        asked = torch.tensor([level, place, -place])
        with self._answered():
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        highest, last, first = asked.tolist()
        return highest, last == -first

    def gather(self, mine: Tensor, everybody: Tensor) -> None:
        """Fills the rows of `everybody` with the ranks' `mine`, right behind a `check`.

        A failure here is a rank that did not answer, whatever it was: the others are in this
        collective and in no other, so that nothing can be told to them.
        """
        with self._answered():
            _all_gather(mine, everybody, self.group)

    def everybody(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; plain values, once all have agreed to do this."""
        if not self.sharded:
            return [value]
        box: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(box, value, group=self.group)
        return box

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.broken = f"another rank did not answer ({one_line(error)[:120]})"
            raise RuntimeError(self.broken) from error

    def close(self) -> None:
        if self.group is not None and not self.broken and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


def _all_gather(mine: Tensor, everybody: Tensor, group: Any) -> None:
    dist.all_gather(list(everybody.unbind()), mine, group=group)
