"""Per-step figures, kept on the device until they are logged: one look at the device for
`log_every` steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from jacdiag.errors import UsageError
from jacdiag.monitor.optimizers import local
from jacdiag.monitor.parameter_groups import Groups, Member
from jacdiag.monitor.square_sums import largest_elements, read_square_sums, square_sums, widest

# Columns; sub-layers follow. Those from GIVEN_PART on are summed over ranks.
MICRO, MICRO_SUM, LOSS, WRITTEN, GIVEN, GIVEN_PART, INF, UPDATE, WEIGHT, FIRST = range(10)
_MOST_SETS = 64  # sets of parameters whose places are kept on the device
_OVERDUE = 4  # intervals that an optimizer may be late before nothing waits for it


Sums = Tensor | list[float]
"""Sums of squares of some tensors: a tensor on their device, or numbers where the device is a
CPU.
"""


@dataclass
class Row:
    """What is known about a step on the host at once.

    Attributes:
        made: an optimiser stepped (its gradients are in the table).
        update: the sub-layer whose update norm was taken.
        told: the loop gave its loss.
        rates: the learning rates that the step used, one per parameter group; None where a group
            had no step.
        optimizer_step: how the step was seen, see `usage`.
        stepped_before: a step of the optimizers was seen earlier in the run.
        late: the gradients were read after the step: zeros are gradients that were cleared.
        micro_batches: how many are summed in the column MICRO_SUM; 0 if it holds nothing.
        sequences: in each of them.
        weights_seen: before the step somebody looked whether the weights are finite.
        with_gradient: parameters that had a gradient.
        written_after: the step whose weights were compared with those before this one; 0 if none
            were.
        values: column -> a figure that was known on the host at once, as every one is on a CPU.
    """

    step: int = 0
    time: float = 0.0
    lr: float | None = None
    tokens: int | None = None
    made: bool = False
    update: str = ""
    told: bool = False
    rates: list[float | Tensor | None] = field(default_factory=list)
    optimizer_step: str = "seen"
    stepped_before: bool = False
    late: bool = False
    micro_batches: int = 0
    sequences: int = 0
    weights_seen: bool = False
    with_gradient: int = 0
    written_after: int = 0
    values: dict[int, float] = field(default_factory=dict)


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
        self.is_on_cpu = self.device.type == "cpu"
        dtype = widest(self.device)
        shape = (self.capacity, len(members))
        self.table = torch.full((self.capacity, FIRST), torch.nan, dtype=dtype, device=self.device)
        # The sum of squares of each gradient, and whether each weight is finite: (steps,
        # parameters).
        self.squares = torch.full(shape, torch.nan, dtype=dtype, device=self.device)
        # the same memory
        self._host_squares: Any = self.squares.numpy() if self.is_on_cpu else None
        self.weights = torch.zeros(shape, dtype=dtype, device=self.device)
        self.index = torch.tensor([m.group for m in members], dtype=torch.long, device=self.device)
        self.shares = torch.tensor([m.share for m in members], dtype=dtype, device=self.device)
        self.parameters = [member.parameter for member in members]
        self.now = Row()
        self._places: dict[tuple[int, ...], Tensor] = {}
        # row -> squares of its gradients before they were clipped
        self._unclipped: dict[int, Tensor] = {}
        self._read_flags = (self.squares[:0], self.weights[:0])

    @property
    def slot(self) -> int:
        """The row of the table that the step at hand writes to."""
        return len(self.rows)

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.capacity

    def gradients(
        self,
        stepping: set[int] | None,
        scale: Tensor | None,
        inf: Tensor | None,
        *,
        before: bool = True,
    ) -> None:
        """Takes the squares of all gradients, before a step.

        Args:
            stepping: ids of the parameters of the optimiser that steps now; None for all.
            scale: by which the gradients are still multiplied.
            inf: 1.0 where a loss scaler found inf.
            before: the step has not been made: the weights are those that the gradients belong to.
        """
        # 1. Sum the squares of each gradient.
        places: tuple[int, ...] | None = None
        parameters = self.parameters
        if stepping is not None:
            places = tuple(k for k, p in enumerate(parameters) if id(p) in stepping)
            parameters = [parameters[k] for k in places]
        gradients = [_local_gradient(p) for p in parameters]
        squares = self.sum_squares(gradients, scale)

        # 2. Look at the weights while they are those of the gradients.
        if before:
            self._look_at_weights(squares)

        # 3. Put the sums where they belong in the row at hand.
        if not self.now.made:
            self.now.with_gradient = 0
        self.now.with_gradient += sum(gradient is not None for gradient in gradients)
        self._put_squares(squares, places)
        if inf is not None:
            self.put(INF, inf)
        self.now.made = True

    def sum_squares(self, gradients: Sequence[Tensor | None], scale: Tensor | None = None) -> Sums:
        """The sum of squares of each gradient: numbers on a CPU, else a tensor on the device."""
        if self.is_on_cpu:
            sums = read_square_sums(gradients)
            if scale is None:
                return sums
            factor = float(scale) ** 2
            return [square / factor for square in sums]
        squares = square_sums(gradients, self.device)
        return squares if scale is None else squares / scale.to(self.device, squares.dtype).square()

    def _put_squares(self, squares: Sums, places: tuple[int, ...] | None) -> None:
        """Put the squares of all parameters, or of those at some places, into the row at hand."""
        if places is not None and not self.now.made:
            self.squares[self.slot].zero_()
        if not isinstance(squares, Tensor):
            columns = slice(None) if places is None else list(places)
            self._host_squares[self.slot, columns] = squares
        elif places is None:
            self.squares[self.slot].copy_(squares)
        else:
            self.squares[self.slot].index_copy_(0, self._index_of(places), squares)

    def _index_of(self, places: tuple[int, ...]) -> Tensor:
        """Some places on the device; sent there once for each optimizer, and not at every step."""
        index = self._places.get(places)
        if index is None:
            if len(self._places) >= _MOST_SETS:
                self._places.clear()
            index = torch.tensor(places, dtype=torch.long).to(self.device)
            self._places[places] = index
        return index

    def _look_at_weights(self, squares: Sums) -> None:
        """Note which weights are not finite, once in a row.

        The weights are read at every step on a device that may not be waited for. On a CPU, where
        the gradients are known at once, they are read only if a gradient is not finite.
        """
        if self.now.weights_seen:
            return
        if self.is_on_cpu:
            if math.isfinite(sum(squares)):
                return
        elif self.now.made:
            return
        self._read_weights()

    def _read_weights(self) -> None:
        """Put a number into the row at hand for each weight, which is finite if the weight is."""
        weights = [_local_weight(p) for p in self.parameters]
        self.weights[self.slot] = largest_elements(weights, self.device)
        self.now.weights_seen = True

    def look_before_update(self) -> None:
        """Note what is not finite, inside a step with a closure: after the backward, before
        clipping and the update.

        The squares of the gradients in the row are those after the step. On a CPU the weights are
        read only if a gradient is not finite.
        """
        self._unclipped.pop(self.slot, None)
        gradients = [_local_gradient(p) for p in self.parameters]
        squares = self.sum_squares(gradients)
        if self.is_on_cpu and math.isfinite(sum(squares)):
            return
        self._unclipped[self.slot] = torch.as_tensor(squares, dtype=self.squares.dtype)
        self._read_weights()

    def nonfinite(self) -> tuple[Tensor, Tensor]:
        """Return which gradients and which weights were not finite in the rows read last: (rows,
        parameters) each.

        Looks at the device; call it only for rows that are known not to be finite.
        """
        squares, weights = self._read_flags
        self.looks += not self.is_on_cpu
        return squares.isfinite().logical_not().cpu(), weights.isfinite().logical_not().cpu()

    def put(self, column: int, value: Any) -> None:
        """Writes a scalar, wherever it lies, without a look at it; one on a CPU is known at
        once.
        """
        if not isinstance(value, Tensor):
            try:
                self.now.values[column] = float(value)
            except (TypeError, ValueError) as error:
                got = f"type {type(value).__name__}"
                raise UsageError(
                    "a loss or a norm is one number", got=got, hint="a tensor or a float"
                ) from error
            return
        if type(value) is Tensor and value.device.type == "cpu" and value.numel() == 1:
            self.now.values[column] = value.item()
            return
        value = local(value.detach())
        scalar = value.reshape(()) if value.numel() == 1 else value.mean()
        if scalar.device.type == "cpu":
            self.now.values[column] = float(scalar)
        else:
            self.table[self.slot, column] = scalar

    def put_update(self, moved: Tensor | float, weight: Tensor | float) -> None:
        """Write the sum of squares of an update and that of the weights that it moved."""
        if isinstance(moved, Tensor) and isinstance(weight, Tensor):
            self.table[self.slot, UPDATE : WEIGHT + 1] = torch.stack([moved, weight])
        else:
            self.now.values[UPDATE] = float(moved)
            self.now.values[WEIGHT] = float(weight)

    def put_micro_batches(self, sums: Tensor, count: int, sequences: int) -> None:
        """Write the two sums of squares of a step that accumulates gradients, see `noise_scale`."""
        self.table[self.slot, MICRO : MICRO_SUM + 1] = sums.to(
            self.device, self.table.dtype, non_blocking=True
        )
        self.now.micro_batches, self.now.sequences = count, sequences

    def close_row(self, step: int, time: float, lr: float | None, tokens: int | None) -> None:
        """Ends the step at hand."""
        self.now.step, self.now.time, self.now.lr, self.now.tokens = step, time, lr, tokens
        self.rows.append(self.now)
        self.now = Row()

    def read(self) -> tuple[list[Row], Tensor]:
        """The filled rows, (rows, columns) on the host: the one look at the device; the buffer is
        empty then.
        """
        rows, labels = self.rows, len(self.groups.labels)
        count = len(rows)
        if not rows:
            self._read_flags = (self.squares[:0], self.weights[:0])
            return [], torch.zeros(0, FIRST + labels, dtype=torch.float64)

        # 1. Sum the squares of each sub-layer. Learning rates that lie on the device travel with
        # the table.
        sums = self.table.new_zeros(count, labels)
        sums.index_add_(1, self.index, self.squares[:count] * self.shares)
        where = [
            (row, k) for row in rows for k, rate in enumerate(row.rates) if isinstance(rate, Tensor)
        ]
        rates = [row.rates[k].reshape(1).to(self.table) for row, k in where]  # type: ignore[union-attr]
        flat = torch.cat([self.table[:count].flatten(), sums.flatten(), *rates])

        # 2. Look at the device.
        found = flat.to("cpu", torch.float64)
        self.looks += not self.is_on_cpu
        columns, squares, read_rates = found.split([count * FIRST, count * labels, len(rates)])
        for (row, k), rate in zip(where, read_rates.tolist(), strict=True):
            row.rates[k] = rate

        # 3. Add what was known on the host.
        known = torch.tensor([_columns(row.values) for row in rows], dtype=torch.float64)
        columns = torch.where(known.isnan(), columns.view(count, FIRST), known)
        self._empty(count)
        return rows, torch.cat([columns, squares.view(count, labels)], dim=1)

    def _empty(self, count: int) -> None:
        """Empty the buffer after its first rows were read; a step that is being made while it is
        read stays.
        """
        self.rows = []
        squares = self.squares[:count].clone()
        for place in range(count):
            if place in self._unclipped:
                squares[place] = self._unclipped.pop(place)
        self._read_flags = (squares, self.weights[:count].clone())
        pending_squares = self._unclipped.pop(count, None)
        self._unclipped = {} if pending_squares is None else {0: pending_squares}
        is_pending = self.now.made and count < self.capacity
        pending = (
            [table[count].clone() for table in (self.table, self.squares, self.weights)]
            if is_pending
            else []
        )
        self.table.fill_(torch.nan)
        self.squares.fill_(torch.nan)
        self.weights.zero_()
        for table, row in zip((self.table, self.squares, self.weights), pending, strict=False):
            table[0] = row


def _columns(values: Mapping[int, float]) -> list[float]:
    return [values.get(column, math.nan) for column in range(FIRST)]


def _local_gradient(parameter: Tensor) -> Tensor | None:
    """The part of a gradient that lies on this rank; None if there is none."""
    gradient = parameter.grad
    if gradient is None or type(gradient) is Tensor:
        return gradient
    return local(gradient)


def _local_weight(parameter: Tensor) -> Tensor:
    """The part of a weight that lies on this rank, outside of autograd; a plain one is that
    itself.
    """
    if type(parameter) is torch.nn.Parameter:
        return parameter
    return local(parameter.detach()) if hasattr(parameter, "to_local") else parameter


class Rhythm:
    """At which windows an optimizer steps: it may do so at every second one, or have stopped."""

    def __init__(self) -> None:
        self.last, self.interval = 0, 1

    def stepped(self, window: int) -> None:
        if window > self.last:
            self.interval, self.last = window - self.last, window

    def is_due(self, window: int) -> bool:
        """Whether it steps in this window, if it goes on as it has; one that is long overdue is not
        waited for.
        """
        return self.interval <= window - self.last <= _OVERDUE * self.interval


class UpdateTurn:
    """The update norm of one sub-layer a step, in turn: over all optimizers that hold a part of it.

    A window begins with the first optimizer that steps after `Watch.step` and ends with the next
    `Watch.step`. At its beginning a copy is made of the weights of the sub-layer whose turn it is.
    What an optimizer moved is summed when its outermost step ends, so that the moves of a wrapper
    around it count. The copy is then let go.

    Args:
        groups: the sub-layers.
        holders: id of a parameter -> the number of the optimizer that updates it.
        count: how many optimizers there are.
        every: windows from one measured window to the next.
    """

    def __init__(
        self, groups: Groups, holders: Mapping[int, int], count: int, every: int = 1
    ) -> None:
        self.groups, self.holders, self.every = groups, holders, every
        self.queue = deque(range(len(groups.labels)))
        self.rhythms = [Rhythm() for _ in range(count)]
        self.window = 0
        self.chosen: int | None = None
        # place in the group -> the member, its weights
        self.before: dict[int, tuple[Member, Tensor]] = {}
        self.moved: list[Tensor | float] = []
        # the weights after the step, if all of them were measured in one go
        self.weight: Tensor | float | None = None
        self.stepped: set[int] = set()
        self.opened = self.touched = False

    def open(self, stepping: int | None = None, closure: bool = False) -> None:
        """Begin a window, if none is open: choose a sub-layer and keep its weights.

        Args:
            stepping: the optimizer that steps now; None for a wrapper around several.
            closure: gradients are still to be computed.
        """
        if self.opened:
            return
        self.opened = True
        self.window += 1
        if (self.window - 1) % self.every:
            return
        for group in list(self.queue):
            members = [m for m in self.groups.of(group) if m.parameter.requires_grad]
            if any(self._may_move(member, stepping, closure) for member in members):
                self.chosen = group
                with torch.no_grad():
                    copies = [(m, _local_weight(m.parameter).clone()) for m in members]
                self.before = dict(enumerate(copies))
                return

    def _may_move(self, member: Member, stepping: int | None, closure: bool) -> bool:
        """Whether a member has a gradient, or an optimizer that may compute one before it steps in
        this window.
        """
        holder = self.holders.get(id(member.parameter))
        if holder is None:
            return False
        if stepping is None or holder == stepping:
            return closure or member.parameter.grad is not None
        return self.rhythms[holder].is_due(self.window)

    def note_step(self, optimizer: int) -> None:
        """Note that an optimizer steps in this window."""
        if optimizer not in self.stepped:
            self.stepped.add(optimizer)
            self.rhythms[optimizer].stepped(self.window)

    def measure(self, figures: Figures) -> None:
        """Sum what the optimizers that stepped have moved of the copied weights; call when a step
        has ended.
        """
        done = [
            place
            for place, (m, _) in self.before.items()
            if self.holders.get(id(m.parameter)) in self.stepped
        ]
        if not done:
            return
        is_whole = not self.moved and len(done) == len(self.before)
        pairs = [self.before.pop(place) for place in done]
        members = [member for member, _ in pairs]
        self.touched |= any(member.parameter.grad is not None for member in members)
        with torch.no_grad():
            weights = [_local_weight(member.parameter) for member in members]
            steps = [old for _, old in pairs]
            torch._foreach_sub_(steps, weights)
        if not is_whole:
            self.moved.append(_counted(figures.sum_squares(steps), members))
            return
        sums = figures.sum_squares([*steps, *weights])
        self.moved.append(_counted(sums[: len(members)], members))
        self.weight = _counted(sums[len(members) :], members)

    def close(self, figures: Figures) -> None:
        """End the window: put the sums of squares of the update and of the weights into the row at
        hand.
        """
        if not self.opened:
            return
        if self.chosen is not None and self.moved:
            self.queue.remove(self.chosen)
            self.queue.append(self.chosen)
        if self.chosen is not None and self.moved and self.touched:
            members = [m for m in self.groups.of(self.chosen) if m.parameter.requires_grad]
            weight = self.weight
            if weight is None:
                weights = [_local_weight(m.parameter) for m in members]
                weight = _counted(figures.sum_squares(weights), members)
            figures.put_update(reduce(add, self.moved), weight)
            figures.now.update = self.groups.labels[self.chosen]
        self.drop()

    def drop(self) -> None:
        """End the window without figures."""
        self.before.clear()
        self.moved.clear()
        self.weight = None
        self.stepped.clear()
        self.chosen, self.opened, self.touched = None, False, False


def _counted(sums: Sums, members: Sequence[Member]) -> Tensor | float:
    """The sum over tensors, each with the share that this rank counts."""
    if isinstance(sums, list):
        return sum(value * member.share for value, member in zip(sums, members, strict=True))
    if all(member.share == 1.0 for member in members):
        return sums.sum()
    return torch.stack(
        [value * m.share for value, m in zip(sums.unbind(), members, strict=True)]
    ).sum()
