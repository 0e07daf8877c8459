"""Metrics of single steps, kept on the device until they are logged.

The host looks at the device once in `log_every` steps.
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
from jacdiag.monitor.parameter_groups import GroupMember, SublayerGroups
from jacdiag.monitor.square_sums import largest_elements, read_square_sums, square_sums
from jacdiag.sources.accelerators import widest

# Columns; sub-layers follow. Those from GIVEN_PART on are summed over ranks.
MICRO, MICRO_SUM, LOSS, WRITTEN, GIVEN, GIVEN_PART, INF, UPDATE, WEIGHT, FIRST = range(10)
_MOST_SETS = 64  # sets of parameters whose places are kept on the device
YOUNG_UPDATES = 10
"""Update norms of each sub-layer at the begin of a run, one a step.

The rules on updates need eight of each. Two more make up for a first one without a gradient.
"""
_USUAL_EVERY = 4  # steps between two update norms after that
_ALERT_WINDOWS = 16  # steps with an update norm each, once something has moved the updates
_OVERDUE = 4  # intervals that an optimizer may be late before nothing waits for it


# Sums of squares of some tensors: a tensor on their device, or numbers if the device is a CPU.
Sums = Tensor | list[float]


@dataclass
class StepRow:
    """What the host knows about a step without a look at the device.

    Attributes:
        step: the number of the step.
        time: its seconds; NaN if they are not known.
        lr: the learning rate that is logged.
        tokens: what the loop passed.
        has_gradients: whether an optimizer stepped, so that its gradients are in the table.
        update: label of the sub-layer whose update norm was measured; empty if none was.
        has_loss: whether the loop passed the loss.
        rates: the learning rates that the step used, one per parameter group; None for a group that
            had no step.
        optimizer_step: how the step was seen, a `StepOutcome`.
        stepped_before: whether a step of the optimizers was seen earlier in the run.
        late: whether the gradients were read after the step. Zeros are cleared gradients then.
        micro_batches: how many are summed in the column MICRO_SUM; 0 if it holds nothing.
        sequences: how many are in each micro-batch.
        weights_seen: whether the weights before the step were checked for values that are not
            finite.
        with_gradient: how many parameters had a gradient.
        written_after: the step whose weights were compared with those before this one; 0 if none
            were.
        values: column -> a number that was known on the host at once, as every one is on a CPU.
    """

    step: int = 0
    time: float = 0.0
    lr: float | None = None
    tokens: int | None = None
    has_gradients: bool = False
    update: str = ""
    has_loss: bool = False
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
class StepMetrics:
    """The metrics of the last steps: a table on the device, and the rows of the host.

    Args:
        groups: the sub-layers.
        capacity: steps between two looks at the device.

    Attributes:
        rows: what the host knows of each step that has ended.
        now: the same of the step at hand.
        table: the numbers of each step, (capacity, FIRST).
        squares: the sum of squares of each gradient, (capacity, parameters).
        weights: a number for each weight that is finite if the weight is, (capacity, parameters).
        looks: how often the host waited for the device.
    """

    groups: SublayerGroups
    capacity: int
    rows: list[StepRow] = field(default_factory=list)
    looks: int = 0

    def __post_init__(self) -> None:
        # 1. Where the parameters are, and what they belong to.
        members = self.groups.members
        self.device = local(members[0].parameter).device if members else torch.device("cpu")
        self.is_on_cpu = self.device.type == "cpu"
        dtype = widest(self.device)
        self.index = torch.tensor([m.group for m in members], dtype=torch.long, device=self.device)
        self.shares = torch.tensor([m.share for m in members], dtype=dtype, device=self.device)
        self.parameters = [member.parameter for member in members]

        # 2. The buffer, with one row per step.
        shape = (self.capacity, len(members))
        self.table = torch.full((self.capacity, FIRST), torch.nan, dtype=dtype, device=self.device)
        self.squares = torch.full(shape, torch.nan, dtype=dtype, device=self.device)
        # NumPy writes numbers faster, to the same memory.
        self._host_squares: Any = self.squares.numpy() if self.is_on_cpu else None
        self.weights = torch.zeros(shape, dtype=dtype, device=self.device)

        # 3. The row at hand, and what is kept between steps.
        self.now = StepRow()
        self._indices: dict[tuple[int, ...], Tensor] = {}  # places of some parameters -> on device
        # row -> squares of its gradients before they were clipped
        self._unclipped: dict[int, Tensor] = {}
        self._read_flags = (self.squares[:0], self.weights[:0])

    @property
    def slot(self) -> int:
        """The row of the table that the step at hand writes to."""
        return len(self.rows)

    @property
    def full(self) -> bool:
        """Whether the host has to look at the device before the next step."""
        return len(self.rows) >= self.capacity

    def gradients(
        self,
        stepping: set[int] | None,
        scale: Tensor | None,
        inf: Tensor | None,
        *,
        before: bool = True,
    ) -> None:
        """Put the sums of squares of the gradients into the row at hand.

        Args:
            stepping: ids of the parameters of the optimizer that steps now; None for all.
            scale: by which the gradients are still multiplied.
            inf: 1.0 if a loss scaler found inf.
            before: whether the step has not been made, so that the weights are those that the
                gradients belong to.
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
        if not self.now.has_gradients:
            self.now.with_gradient = 0
        self.now.with_gradient += sum(gradient is not None for gradient in gradients)
        self._put_squares(squares, places)
        if inf is not None:
            self.put(INF, inf)
        self.now.has_gradients = True

    def sum_squares(self, gradients: Sequence[Tensor | None], scale: Tensor | None = None) -> Sums:
        """Return the sum of squares of each gradient, undoing a scale.

        Returns:
            Numbers on a CPU, else a tensor on the device, (gradients,).
        """
        # 1. Numbers on a CPU.
        if self.is_on_cpu:
            sums = read_square_sums(gradients)
            if scale is None:
                return sums
            factor = float(scale) ** 2
            return [square / factor for square in sums]

        # 2. A tensor on any other device.
        squares = square_sums(gradients, self.device)
        if scale is None:
            return squares
        return squares / scale.to(self.device, squares.dtype).square()

    def _put_squares(self, squares: Sums, places: tuple[int, ...] | None) -> None:
        """Put the squares of all parameters, or of those at some places, into the row at hand."""
        # 1. Parameters of other optimizers count as zero, until these step too.
        if places is not None and not self.now.has_gradients:
            self.squares[self.slot].zero_()

        # 2. Numbers on a CPU, or a tensor on any other device.
        if not isinstance(squares, Tensor):
            columns: slice | list[int] = slice(None)
            if places is not None:
                columns = list(places)
            self._host_squares[self.slot, columns] = squares
        elif places is None:
            self.squares[self.slot].copy_(squares)
        else:
            self.squares[self.slot].index_copy_(0, self.index_of(places), squares)

    def index_of(self, places: tuple[int, ...]) -> Tensor:
        """Return places as a tensor on the device, which each optimizer sends only once."""
        index = self._indices.get(places)
        if index is not None:
            return index

        # Begin again once there are too many: sets may be other ones at every step.
        if len(self._indices) >= _MOST_SETS:
            self._indices.clear()
        index = torch.tensor(places, dtype=torch.long).to(self.device)
        self._indices[places] = index
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
        elif self.now.has_gradients:
            return
        self._read_weights()

    def _read_weights(self) -> None:
        """Put a number into the row at hand for each weight, which is finite if the weight is."""
        weights = [_local_weight(p) for p in self.parameters]
        self.weights[self.slot] = largest_elements(weights, self.device)
        self.now.weights_seen = True

    def look_before_update(self) -> None:
        """Note what is not finite before clipping and the update, inside a step with a closure.

        The row itself gets the squares of the gradients after the step. On a CPU the weights are
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
        """Return which gradients and which weights were not finite in the rows read last.

        Waits for the device; call it only for rows that are known not to be finite.

        Returns:
            Flags of the gradients and flags of the weights, (rows, parameters) each.
        """
        squares, weights = self._read_flags
        self._count_look()
        return squares.isfinite().logical_not().cpu(), weights.isfinite().logical_not().cpu()

    def put(self, column: int, value: Any) -> None:
        """Put a scalar into the row at hand, without waiting for its device.

        Args:
            column: such as LOSS.
            value: a number, or a tensor on any device. Of a tensor with several elements, which is
                a loss that was not reduced, the mean is put.

        Raises:
            UsageError: it is neither.
        """
        # 1. A number, or a scalar on a CPU, which mostly is all there is.
        if not isinstance(value, Tensor):
            self.now.values[column] = _to_number(value)
            return
        if type(value) is Tensor and value.device.type == "cpu" and value.numel() == 1:
            self.now.values[column] = value.item()
            return

        # 2. Any other tensor. What lies on a device stays there until the buffer is read.
        value = local(value.detach())
        if value.numel() == 1:
            scalar = value.reshape(())
        else:
            scalar = value.mean()
        if scalar.device.type == "cpu":
            self.now.values[column] = float(scalar)
        else:
            self.table[self.slot, column] = scalar

    def put_update(self, moved: Tensor | float, weight: Tensor | float) -> None:
        """Put the sum of squares of an update, and that of the weights that it moved."""
        if isinstance(moved, Tensor) and isinstance(weight, Tensor):
            self.table[self.slot, UPDATE : WEIGHT + 1] = torch.stack([moved, weight])
        else:
            self.now.values[UPDATE] = float(moved)
            self.now.values[WEIGHT] = float(weight)

    def put_micro_batches(self, sums: Tensor, count: int, sequences: int) -> None:
        """Put the two sums of squares of a step that accumulates gradients, see `noise_scale`."""
        self.table[self.slot, MICRO : MICRO_SUM + 1] = sums.to(
            self.device, self.table.dtype, non_blocking=True
        )
        self.now.micro_batches = count
        self.now.sequences = sequences

    def close_row(self, step: int, time: float, lr: float | None, tokens: int | None) -> None:
        """End the step at hand."""
        self.now.step = step
        self.now.time = time
        self.now.lr = lr
        self.now.tokens = tokens
        self.rows.append(self.now)
        self.now = StepRow()

    def read(self) -> tuple[list[StepRow], Tensor]:
        """Read the rows that are full and empty the buffer: the one look at the device.

        Returns:
            The rows of the host, and the numbers of each, (rows, FIRST + groups) in float64 on the
            CPU: the columns of the table, then the sum of squares of each group.
        """
        rows = self.rows
        count, groups = len(rows), len(self.groups.labels)
        if not rows:
            self._read_flags = (self.squares[:0], self.weights[:0])
            return [], torch.zeros(0, FIRST + groups, dtype=torch.float64)

        # 1. Sum the squares of each sub-layer.
        sums = self.table.new_zeros(count, groups)
        sums.index_add_(1, self.index, self.squares[:count] * self.shares)

        # 2. Look at the device. Learning rates that lie on it travel with the table.
        places = [
            (row, group)
            for row in rows
            for group, rate in enumerate(row.rates)
            if isinstance(rate, Tensor)
        ]
        rates = [
            row.rates[group].reshape(1).to(self.table)  # type: ignore[union-attr]
            for row, group in places
        ]
        flat = torch.cat([self.table[:count].flatten(), sums.flatten(), *rates])
        numbers = flat.to("cpu", torch.float64)
        self._count_look()
        columns, squares, read_rates = numbers.split([count * FIRST, count * groups, len(rates)])
        for (row, group), rate in zip(places, read_rates.tolist(), strict=True):
            row.rates[group] = rate

        # 3. Add what was known on the host.
        known = torch.tensor([_columns(row.values) for row in rows], dtype=torch.float64)
        columns = torch.where(known.isnan(), columns.view(count, FIRST), known)
        self._empty(count)
        return rows, torch.cat([columns, squares.view(count, groups)], dim=1)

    def _count_look(self) -> None:
        if not self.is_on_cpu:
            self.looks += 1

    def _empty(self, count: int) -> None:
        """Empty the buffer after its first rows were read.

        A step that is being made meanwhile stays, in the first row.
        """
        # 1. Keep what `nonfinite` looks at.
        self.rows = []
        squares = self.squares[:count].clone()
        for place in range(count):
            if place in self._unclipped:
                squares[place] = self._unclipped.pop(place)
        self._read_flags = (squares, self.weights[:count].clone())

        # 2. Keep the row of the step at hand.
        pending_squares = self._unclipped.pop(count, None)
        self._unclipped = {}
        if pending_squares is not None:
            self._unclipped[0] = pending_squares
        tables = (self.table, self.squares, self.weights)
        pending_rows: list[Tensor] = []
        if self.now.has_gradients and count < self.capacity:
            pending_rows = [table[count].clone() for table in tables]

        # 3. Empty the buffer, and put that row first.
        self.table.fill_(torch.nan)
        self.squares.fill_(torch.nan)
        self.weights.zero_()
        for table, pending_row in zip(tables, pending_rows, strict=False):
            table[0] = pending_row


def _to_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            "a loss or a norm is one number",
            got=f"type {type(value).__name__}",
            hint="a tensor or a float",
        ) from error


def _columns(values: Mapping[int, float]) -> list[float]:
    return [values.get(column, math.nan) for column in range(FIRST)]


def _local_gradient(parameter: Tensor) -> Tensor | None:
    """Return what this rank holds of a gradient; None if there is none."""
    gradient = parameter.grad
    if gradient is None or type(gradient) is Tensor:
        return gradient
    return local(gradient)


def _local_weight(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a weight, outside of autograd if it is sharded."""
    if type(parameter) is torch.nn.Parameter:
        return parameter
    if hasattr(parameter, "to_local"):
        return local(parameter.detach())
    return parameter


class Rhythm:
    """The windows in which an optimizer steps: perhaps every second one, or none any more."""

    def __init__(self) -> None:
        self.last = 0
        self.interval = 1

    def stepped(self, window: int) -> None:
        """Note a step in a window."""
        if window > self.last:
            self.interval = window - self.last
            self.last = window

    def is_due(self, window: int) -> bool:
        """Return whether the optimizer steps in this window, if it goes on as it has.

        One that is long overdue is not waited for.
        """
        return self.interval <= window - self.last <= _OVERDUE * self.interval


class UpdateTurn:
    """The update norm of one sub-layer per step, in turn.

    Several optimizers may hold a part of the sub-layer. A window begins with the first optimizer
    that steps after `Watch.step` and ends with the next `Watch.step`. At its beginning a copy is
    made of the weights of the sub-layer whose turn it is. What an optimizer moved is summed when
    its outermost step ends, so that the moves of a wrapper around it count. The copy is then let
    go.

    Args:
        groups: the sub-layers.
        holders: id of a parameter -> the place of the optimizer that updates it.
        count: how many optimizers there are.
        every: windows from one measured window to the next. None measures every window until each
            sub-layer has `YOUNG_UPDATES` update norms, and every fourth one from then on. After
            `look_closely` it measures every window for a while.

    Attributes:
        opened: whether a window is open.
        touched: whether a weight of the chosen sub-layer had a gradient.
    """

    def __init__(
        self,
        groups: SublayerGroups,
        holders: Mapping[int, int],
        count: int,
        every: int | None = None,
    ) -> None:
        self.groups = groups
        self.holders = holders
        self.every = every
        # update norms that are still to be measured one a step
        self._young_left = YOUNG_UPDATES * len(groups.labels)
        self._since_measured: float = math.inf  # windows since the last one that was measured
        self._close_looks_left = 0  # windows that are measured because of `look_closely`
        self.queue = deque(range(len(groups.labels)))  # groups, the next one first
        self.rhythms = [Rhythm() for _ in range(count)]
        self.window = 0
        self.chosen: int | None = None
        # place in the group -> the member, and a copy of its weights
        self.before: dict[int, tuple[GroupMember, Tensor]] = {}
        self.moved: list[Tensor | float] = []  # sums of squares, one for each outermost step
        # sum of squares of the weights, if all of them were measured in one go
        self.weight: Tensor | float | None = None
        self.stepped: set[int] = set()
        self.opened = False
        self.touched = False

    def open(self, stepping: int | None = None, has_closure: bool = False) -> None:
        """Begin a window, if none is open: choose a sub-layer and keep its weights.

        Args:
            stepping: place of the optimizer that steps now; None for a wrapper around several.
            has_closure: whether gradients are still to be computed.
        """
        # 1. Begin the window.
        if self.opened:
            return
        self.opened = True
        self.window += 1
        if not self._is_turn():
            return

        # 2. Choose the first sub-layer in the queue that may move.
        for group in list(self.queue):
            members = self._trained_members(group)
            if any(self._may_move(member, stepping, has_closure) for member in members):
                self.chosen = group
                with torch.no_grad():
                    copies = [(m, _local_weight(m.parameter).clone()) for m in members]
                self.before = dict(enumerate(copies))
                return

    def _is_turn(self) -> bool:
        """Return whether the window that begins now is measured."""
        every = self.every
        # Left to this class: young runs, and those that have leapt, are looked at closely.
        if every is None:
            is_dense = self._young_left > 0 or self._close_looks_left > 0
            every = 1 if is_dense else _USUAL_EVERY
        return self._since_measured + 1 >= every

    def look_closely(self) -> None:
        """Measure each of the next windows: the updates may have changed their size."""
        self._close_looks_left = _ALERT_WINDOWS

    def _trained_members(self, group: int) -> list[GroupMember]:
        return [member for member in self.groups.of(group) if member.parameter.requires_grad]

    def _may_move(self, member: GroupMember, stepping: int | None, has_closure: bool) -> bool:
        """Return whether an optimizer may move a member in this window.

        It does if the member has a gradient, or may get one before its optimizer steps.
        """
        holder = self.holders.get(id(member.parameter))
        if holder is None:
            return False

        # 1. Its optimizer steps now.
        if stepping is None or holder == stepping:
            return has_closure or member.parameter.grad is not None

        # 2. Its optimizer may step later in this window.
        return self.rhythms[holder].is_due(self.window)

    def note_step(self, optimizer: int) -> None:
        """Note that an optimizer steps in this window."""
        if optimizer not in self.stepped:
            self.stepped.add(optimizer)
            self.rhythms[optimizer].stepped(self.window)

    def measure(self, metrics: StepMetrics) -> None:
        """Sum what the optimizers that stepped have moved; call when an outermost step has ended.

        Args:
            metrics: sums the squares, on the device of the weights.
        """
        # 1. The copies of what has moved.
        done = [
            place
            for place, (member, _) in self.before.items()
            if self.holders.get(id(member.parameter)) in self.stepped
        ]
        if not done:
            return
        has_all = not self.moved and len(done) == len(self.before)
        copies = [self.before.pop(place) for place in done]
        members = [member for member, _ in copies]
        if any(member.parameter.grad is not None for member in members):
            self.touched = True

        # 2. Subtract the weights from their copies.
        with torch.no_grad():
            weights = [_local_weight(member.parameter) for member in members]
            differences = [old for _, old in copies]
            torch._foreach_sub_(differences, weights)

        # 3. Sum the squares; those of the weights in the same call, if nothing else is to move.
        if not has_all:
            self.moved.append(_sum_shares(metrics.sum_squares(differences), members))
            return
        sums = metrics.sum_squares([*differences, *weights])
        self.moved.append(_sum_shares(sums[: len(members)], members))
        self.weight = _sum_shares(sums[len(members) :], members)

    def close(self, metrics: StepMetrics) -> None:
        """End the window: put the update into the row at hand."""
        if not self.opened:
            return

        # 1. A window in which nothing could be measured leaves its turn to the next one.
        self._since_measured += 1
        self._close_looks_left -= 1
        if self.chosen is not None and self.moved:
            self._since_measured = 0

            # 2. The sub-layer goes to the end of the queue.
            self.queue.remove(self.chosen)
            self.queue.append(self.chosen)
            if self.touched:
                self._young_left -= 1
                self._put_update(metrics, self.chosen)
        self.drop()

    def _put_update(self, metrics: StepMetrics, group: int) -> None:
        weight = self.weight
        # It is there already if it was summed together with the update.
        if weight is None:
            members = self._trained_members(group)
            weights = [_local_weight(member.parameter) for member in members]
            weight = _sum_shares(metrics.sum_squares(weights), members)
        metrics.put_update(reduce(add, self.moved), weight)
        metrics.now.update = self.groups.labels[group]

    def drop(self) -> None:
        """End the window without an update."""
        self.before.clear()
        self.moved.clear()
        self.weight = None
        self.stepped.clear()
        self.chosen = None
        self.opened = False
        self.touched = False


def _sum_shares(sums: Sums, members: Sequence[GroupMember]) -> Tensor | float:
    """Return the sum over tensors, each with the share that this rank counts."""
    # 1. Numbers on a CPU.
    if isinstance(sums, list):
        return sum(value * member.share for value, member in zip(sums, members, strict=True))

    # 2. A tensor on any other device. Without shards every tensor counts in full.
    if all(member.share == 1.0 for member in members):
        return sums.sum()

    # 3. Else each by its share.
    shares = [value * m.share for value, m in zip(sums.unbind(), members, strict=True)]
    return torch.stack(shares).sum()
