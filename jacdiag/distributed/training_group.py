"""The ranks of a training run: which one writes, and how they agree without waiting forever.

All messages between the watches of different ranks go through a separate process group on the CPU.
It has a time limit. A missing rank costs that time once, and the watch continues without the
figures that need the rank. The process groups of the training are never used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jacdiag.errors import SourceError, one_line


class _Status(IntEnum):
    """What a rank reports at an agreement. The highest status of all ranks counts."""

    FINE = 0
    FULL = 1  # no room in memory
    FAILED = 2


# Places of agreements that are no blocks; those of blocks are small numbers.
_END = 10**6
_ROOM = 10**6 + 1


class ElsewhereError(SourceError):
    """The reason why work in step has ended on all ranks."""


def is_sharded(model: nn.Module) -> bool:
    """Return whether a rank holds pieces of the weights (FSDP2, tensor parallel)."""
    return any(_is_in_pieces(parameter) for parameter in model.parameters())


def _is_in_pieces(parameter: Tensor) -> bool:
    """Return whether this rank holds a piece of a weight only."""
    # Only a DTensor has placements, one for each dimension of its mesh.
    placements = getattr(parameter, "placements", None)
    if not placements:
        return False
    return not all(placement.is_replicate() for placement in placements)


class Together:
    """One rank of a training run.

    Args:
        sharded: whether figures must be summed over ranks. Otherwise every rank has all of them,
            and no rank sends anything.
        seconds: how long to wait for a rank.

    Attributes:
        lead: whether this rank writes and prints.
        broken: why a rank did not answer; nothing is sent after that. "" if all have answered.
    """

    def __init__(self, sharded: bool, seconds: float = 60.0) -> None:
        # 1. Which rank this is, if the training is on several.
        self.rank = 0
        self.size = 1
        if dist.is_available() and dist.is_initialized():
            self.rank = dist.get_rank()
            self.size = dist.get_world_size()
        self.lead = self.rank == 0
        self.sharded = sharded and self.size > 1

        # 2. What has gone wrong so far.
        self.broken = ""
        self._end_reason = ""  # why the work in step has ended, if it has failed

        # 3. A process group of its own.
        self.group: Any = None
        if self.sharded:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def agree(self, flag: bool) -> bool:
        """Return whether the flag is true on every rank. Every rank must call this.

        Raises:
            RuntimeError: a rank did not answer in time, now or before.
        """
        refusal = 0.0 if flag else 1.0
        refusals = self.total(torch.tensor([refusal]))
        return bool(refusals.sum() == 0)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over ranks of a CPU tensor. Every rank must call this.

        Args:
            values: of the same shape on every rank.

        Raises:
            RuntimeError: a rank did not answer in time, now or before.
        """
        if not self.sharded:
            return values
        if self.broken:
            raise RuntimeError(self.broken)
        summed = values.clone()
        with self._notice_silence():
            dist.all_reduce(summed, group=self.group)
        return summed

    def share(self, value: Any) -> Any:
        """Return the value of the leading rank. Every rank must call this.

        Args:
            value: of this rank; only that of the leading one counts.

        Raises:
            RuntimeError: a rank did not answer in time, now or before.
        """
        if not self.sharded:
            return value
        if self.broken:
            raise RuntimeError(self.broken)
        box = [value]
        with self._notice_silence():
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    # -- in step -----------------------------------------------------------------------------------
    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Run work with agreements in it, which either all ranks finish or none.

        A rank that fails reports it in place of its next agreement, and the others end at theirs.
        At the end all agree once more, so that no rank goes on if another could not finish.

        Raises:
            ElsewhereError: another rank has failed.
            RuntimeError: a rank did not answer in time, now or before.
        """
        if not self.sharded:
            yield
            return
        self._end_reason = ""
        try:
            yield
        except Exception:
            others_know = self._end_reason or self.broken
            if not others_know:
                with suppress(RuntimeError):
                    self._exchange(_END, _Status.FAILED)
            raise
        self.check(_END)

    def check(self, place: int, error: Exception | None = None) -> None:
        """Return only if every rank is at the same place and none has an error.

        Args:
            place: a positive number, the same on every rank.
            error: of this rank; it is reported to the others.

        Raises:
            ElsewhereError: otherwise, on every rank.
            RuntimeError: a rank did not answer in time, now or before.
        """
        status = _Status.FINE if error is None else _Status.FAILED
        self._agree_at(place, status, error)

    def fits(self, has_room: bool) -> bool:
        """Return whether all ranks have room in memory.

        Args:
            has_room: whether this rank has.

        Raises:
            ElsewhereError: as for `check`.
            RuntimeError: a rank did not answer in time, now or before.
        """
        if not self.sharded:
            return has_room
        status = _Status.FINE if has_room else _Status.FULL
        return self._agree_at(_ROOM, status) == _Status.FINE

    def _agree_at(self, place: int, status: int, error: Exception | None = None) -> int:
        """Return the highest status of all ranks, if all are at the same place and none failed."""
        # 1. The work has ended already, and an `except` in it has caught the error.
        if self._end_reason:
            raise ElsewhereError(self._end_reason)

        # 2. Exchange places and statuses.
        highest, same_place = self._exchange(place, status)

        # 3. An error of this rank says more than that of another.
        if error is not None:
            self._end_reason = one_line(error)
        elif highest == _Status.FAILED:
            self._end_reason = "it could not be made on another rank"
        elif not same_place:
            self._end_reason = (
                "the ranks do not do the same: the model, or its probe, differs between them"
            )

        # 4. The work ends here on every rank.
        if self._end_reason:
            raise ElsewhereError(self._end_reason) from error
        return highest

    def _exchange(self, place: int, status: int) -> tuple[int, bool]:
        """Return the highest status of all ranks, and whether all are at the same place."""
        if self.broken:
            raise RuntimeError(self.broken)

        # The maximum of -place is minus the minimum of place: one collective gives both.
        message = torch.tensor([status, place, -place])
        with self._notice_silence():
            dist.all_reduce(message, dist.ReduceOp.MAX, group=self.group)
        highest_status, last_place, minus_first_place = message.tolist()
        return highest_status, last_place == -minus_first_place

    def gather(self, own: Tensor, rows: Tensor) -> None:
        """Fill each row with the tensor of one rank; call it directly after `check`.

        Any failure here counts as a rank that did not answer. The others are in this collective
        and in no other, so that they cannot be informed.

        Args:
            own: the tensor of this rank.
            rows: one row per rank, each of the shape of `own`.

        Raises:
            RuntimeError: the collective failed.
        """
        with self._notice_silence():
            _all_gather(own, rows, self.group)

    def everybody(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank; call it after all have agreed to.

        Args:
            value: of this rank, plain data.

        Raises:
            RuntimeError: the collective failed.
        """
        if not self.sharded:
            return [value]
        values: list[Any] = [None] * self.size
        with self._notice_silence():
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def _notice_silence(self) -> Iterator[None]:
        """Run one collective. If it fails, a rank did not answer, and no other one follows."""
        try:
            yield
        except Exception as error:
            self.broken = f"another rank did not answer ({one_line(error)[:120]})"
            raise RuntimeError(self.broken) from error

    def close(self) -> None:
        """End the process group, unless a rank did not answer: that would wait for it."""
        must_end = self.group is not None and not self.broken
        if must_end and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


def _all_gather(own: Tensor, rows: Tensor, group: Any) -> None:
    """Fill the rows with the tensors of all ranks."""
    dist.all_gather(list(rows.unbind()), own, group=group)
