"""Per-step figures, kept on the device until they are logged: one look at the device for `log_every` steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jacdiag.errors import UsageError
from jacdiag.watching.grouping import Groups, Member
from jacdiag.watching.norms import square_sums, widest
from jacdiag.watching.optimisers import local

LOSS, GIVEN, GIVEN_PART, INF, UPDATE, WEIGHT, FIRST = range(7)  # columns; the sub-layers' squares follow


@dataclass
class Row:
    """What is known about a step on the host at once.

    Attributes:
        made: an optimiser stepped (its gradients are in the table).
        update: the sub-layer whose update norm was taken.
        told: the loop gave its loss.
    """

    step: int = 0
    time: float = 0.0
    lr: float | None = None
    tokens: int | None = None
    made: bool = False
    update: str = ""
    told: bool = False


@dataclass
class Figures:
    """The buffer on the device, one row a step, and the rows on the host beside it.

    Args:
        groups: the sub-layers.
        capacity: steps between two looks at the device.

    Attributes:
        looks: how often the host waited for the device.
    """

    groups: Groups
    capacity: int
    rows: list[Row] = field(default_factory=list)
    looks: int = 0

    def __post_init__(self) -> None:
        members = self.groups.members
        self.device = local(members[0].parameter).device if members else torch.device("cpu")
        dtype = widest(self.device)
        width = FIRST + len(self.groups.labels)
        self.table = torch.full((self.capacity, width), torch.nan, dtype=dtype, device=self.device)
        self.index = torch.tensor([m.group for m in members], dtype=torch.long, device=self.device)
        self.shares = torch.tensor([m.share for m in members], dtype=dtype, device=self.device)
        self.now = Row()

    @property
    def slot(self) -> int:
        """The row of the table that the step at hand writes to."""
        return len(self.rows)

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.capacity

    def gradients(self, stepping: set[int] | None, scale: Tensor | None, inf: Tensor | None) -> None:
        """Takes the squares of all gradients, before a step.

        Args:
            stepping: ids of the parameters of the optimiser that steps now; None for all.
            scale: by which the gradients are still multiplied.
            inf: 1.0 where a loss scaler found inf.
        """
        found = square_sums(
            [
                None if m.parameter.grad is None or (stepping is not None and id(m.parameter) not in stepping)
                else local(m.parameter.grad)
                for m in self.groups.members
            ],
            self.device,
        )  # fmt: skip
        if scale is not None:
            found = found / scale.to(self.device, found.dtype).square()
        row = self.table[self.slot]
        if not self.now.made:
            row[FIRST:] = 0.0
        row[FIRST:].index_add_(0, self.index, found * self.shares)
        if inf is not None:
            row[INF] = inf.reshape(()).to(self.device, row.dtype)
        self.now.made = True

    def put(self, column: int, value: Any) -> None:
        """Writes a scalar, wherever it lies, without a look at it."""
        if isinstance(value, Tensor):
            value = local(value.detach())
            value = value.to(self.device, self.table.dtype, non_blocking=True)
            self.table[self.slot, column] = value.reshape(()) if value.numel() == 1 else value.mean()
        else:
            try:
                self.table[self.slot, column] = float(value)
            except (TypeError, ValueError) as error:
                got = f"type {type(value).__name__}"
                raise UsageError("a loss or a norm is one number", got=got, hint="a tensor or a float") from error

    def close_row(self, step: int, time: float, lr: float | None, tokens: int | None) -> None:
        """Ends the step at hand."""
        self.now.step, self.now.time, self.now.lr, self.now.tokens = step, time, lr, tokens
        self.rows.append(self.now)
        self.now = Row()

    def read(self) -> tuple[list[Row], Tensor]:
        """The filled rows, (rows, columns) on the host: the one look at the device; the buffer is empty then."""
        rows, found = self.rows, self.table[: len(self.rows)].to("cpu", torch.float64, copy=True)
        self.looks += self.device.type != "cpu"
        self.rows = []
        pending = self.table[len(rows)].clone() if self.now.made and len(rows) < self.capacity else None
        self.table.fill_(torch.nan)
        if pending is not None:  # a step that is being made while the buffer is read
            self.table[0] = pending
        return rows, found


class UpdateTurn:
    """The update norm of one sub-layer a step, in turn: a copy of that one's weights, for the time of the step."""

    def __init__(self, groups: Groups) -> None:
        self.groups, self.turn = groups, -1
        self.before: list[tuple[Member, Tensor]] = []
        self.label = ""

    def open(self, stepping: Iterable[Tensor], closure: bool = False) -> None:
        """Before a step: keeps the next sub-layer's weights, if the optimiser that steps holds it.

        What has no gradient does not move, and has no turn; with a closure, gradients are still to be made.
        """
        held = {id(p) for p in stepping}
        for _ in self.groups.labels:
            self.turn = (self.turn + 1) % len(self.groups.labels)
            members = [m for m in self.groups.of(self.turn) if id(m.parameter) in held]
            members = [m for m in members if closure or m.parameter.grad is not None]
            if members:
                self.label = self.groups.labels[self.turn]
                self.before = [(m, local(m.parameter.detach()).clone()) for m in members]
                return

    def close(self, figures: Figures) -> None:
        """Behind the step: puts the sums of squares of the update and of the weights into the row at hand."""
        if not self.before:
            return
        weights = [local(m.parameter.detach()) for m, _ in self.before]
        members = [m for m, _ in self.before]
        size = square_sums(weights, figures.device)
        with torch.no_grad():
            steps = [old.sub_(new) for (_, old), new in zip(self.before, weights, strict=True)]
        moved = square_sums(steps, figures.device)
        figures.put(UPDATE, _counted(moved, members))
        figures.put(WEIGHT, _counted(size, members))
        figures.now.update = self.label
        self.before = []

    def drop(self) -> None:
        self.before = []


def _counted(sums: Tensor, members: Iterable[Member]) -> Tensor:
    """The sum over tensors, each with the share that this rank counts."""
    return torch.stack([value * m.share for value, m in zip(sums.unbind(), members, strict=True)]).sum()
