"""Metrics of single steps, kept on the device until they are logged.

The host looks at the device once in `log_every` steps.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import send, wait_for_stream, widest
from jacdiag.devices.pinned_download import Download
from jacdiag.errors import UsageError
from jacdiag.monitor.optimizers import local
from jacdiag.monitor.parameter_groups import GroupMember, SublayerGroups
from jacdiag.monitor.square_sums import (
    largest_elements,
    read_square_sums,
    square_sums,
    stack_norms,
)

# Columns; sub-layers follow. Those from GIVEN_PART on are summed over ranks.
MICRO, MICRO_SUM, LOSS, WRITTEN, GIVEN, GIVEN_PART, INF, UPDATE, WEIGHT, FIRST = range(10)
_MOST_SETS = 64  # sets of parameters whose places are kept on the device
YOUNG_UPDATES = 10
"""Update norms of each sub-layer at the begin of a run, one a step.

The rules on updates need eight of each. Two more make up for a first one without a gradient.
"""
_USUAL_EVERY = 4  # steps between two update norms after that
_ALERT_WINDOWS = 16  # steps with an update norm each, once something has moved the updates
_GRADIENT, _IS_CPU = attrgetter("grad"), attrgetter("is_cpu")
_PLAIN_OR_NONE = {Tensor, NoneType}
_OVERDUE = 4  # intervals that an optimizer may be late before nothing waits for it


# Sums of squares of some tensors: a tensor on their device, or numbers if the device is a CPU.
Sums = Tensor | list[float]
# The sum of squares of an update and that of the weights that it moved, in the same two forms.
UpdateSquares = Tensor | tuple[float, float]


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
        has_norm: whether the loop passed the norm of the gradient. It may be NaN.
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
    has_norm: bool = False
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


@dataclass(frozen=True)
class GradientsOnDevice:
    """Norms of the gradients of one optimizer, on their device.

    Attributes:
        places: of their parameters; None for all.
        norms: one for each.
    """

    places: tuple[int, ...] | None
    norms: Tensor


@dataclass(frozen=True, kw_only=True)
class DeviceWait:
    """A wait of the host for what the device had still to do of some steps.

    Attributes:
        seconds: that it took.
        steps: among whose times it was shared.
    """

    seconds: float = 0.0
    steps: int = 0


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
        looks: how often the host waited for the device.
        last_wait: the wait for the rows read last.
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
        # row -> the norms of its gradients, which lie on a device until the buffer is read
        self._norms: dict[int, list[GradientsOnDevice]] = {}

        # 3. The row at hand, and what is kept between steps.
        self.now = StepRow()
        self.last_wait = DeviceWait()
        self._indices: dict[tuple[int, ...], Tensor] = {}  # places of some parameters -> on device
        # row -> a number for each weight that is finite if the weight is
        self._weights: dict[int, Tensor] = {}
        # row -> squares of its gradients before they were clipped
        self._unclipped: dict[int, Tensor] = {}
        self._read_squares = self.squares[:0]
        self._read_weights: dict[int, Tensor] = {}

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
        # 1. The gradients of these parameters.
        places: tuple[int, ...] | None = None
        parameters = self.parameters
        if stepping is not None:
            places = tuple(k for k, p in enumerate(parameters) if id(p) in stepping)
            parameters = [parameters[k] for k in places]
        gradients = _local_gradients(parameters)
        if not self.now.has_gradients:
            self._begin_gradients(places)

        # 2. Their squares, and a look at the weights while they are those of the gradients.
        if self.is_on_cpu:
            squares = self._host_sums(gradients, scale)
            if before:
                self._look_at_host_weights(squares)
            columns: slice | list[int] = slice(None)
            if places is not None:
                columns = list(places)
            self._host_squares[self.slot, columns] = squares
        else:
            norms = self._norms_on_device(gradients, scale)
            self._norms.setdefault(self.slot, []).append(GradientsOnDevice(places, norms))
            if before:
                self._look_at_device_weights()

        # 3. What the host knows of them.
        self.now.with_gradient += len(gradients) - list(map(type, gradients)).count(NoneType)
        if inf is not None:
            self.put(INF, inf)
        self.now.has_gradients = True

    def _begin_gradients(self, places: tuple[int, ...] | None) -> None:
        """Begin the row at hand: forget the gradients of a step that was dropped."""
        self.now.with_gradient = 0
        self._norms.pop(self.slot, None)
        # Parameters of other optimizers count as zero, until these step too.
        if self.is_on_cpu and places is not None:
            self._host_squares[self.slot] = 0.0

    def _host_sums(
        self, gradients: Sequence[Tensor | None], scale: Tensor | None = None
    ) -> list[float]:
        """Return the sum of squares of each gradient as a number, undoing a scale."""
        sums = read_square_sums(gradients)
        if scale is None:
            return sums
        factor = float(scale) ** 2
        return [square / factor for square in sums]

    def _norms_on_device(
        self, gradients: Sequence[Tensor | None], scale: Tensor | None = None
    ) -> Tensor:
        """Return the norm of each gradient on the device, undoing a scale."""
        stacked = stack_norms(gradients, self.device)
        if scale is None:
            return stacked
        dtype = self.squares.dtype
        return stacked.to(dtype) / send(scale, self.device, dtype)

    def sum_squares(self, tensors: Sequence[Tensor | None]) -> Sums:
        """Return the sum of squares of each tensor.

        Returns:
            Numbers on a CPU, else a tensor on the device, (tensors,).
        """
        if self.is_on_cpu:
            return read_square_sums(tensors)
        return square_sums(tensors, self.device)

    def index_of(self, places: tuple[int, ...]) -> Tensor:
        """Return places as a tensor on the device, which each optimizer sends only once."""
        index = self._indices.get(places)
        if index is not None:
            return index

        # Begin again once there are too many: sets may be other ones at every step.
        if len(self._indices) >= _MOST_SETS:
            self._indices.clear()
        index = send(torch.tensor(places, dtype=torch.long), self.device)
        self._indices[places] = index
        return index

    def _look_at_host_weights(self, squares: Sequence[float]) -> None:
        """Note which weights are not finite, once in a row, if a gradient is not finite.

        On a CPU the gradients are known at once.
        """
        if self.now.weights_seen or math.isfinite(sum(squares)):
            return
        self._look_at_all_weights()

    def _look_at_device_weights(self) -> None:
        """Note which weights are not finite, once in a row.

        It is done at every step on a device that may not be waited for.
        """
        if self.now.weights_seen or self.now.has_gradients:
            return
        self._look_at_all_weights()

    def _look_at_all_weights(self) -> None:
        """Keep a number for each weight, which is finite if the weight is."""
        weights = [_local_weight(p) for p in self.parameters]
        self._weights[self.slot] = largest_elements(weights, self.device)
        self.now.weights_seen = True

    def look_before_update(self) -> None:
        """Note what is not finite before clipping and the update, inside a step with a closure.

        The row itself gets the squares of the gradients after the step. On a CPU the weights are
        read only if a gradient is not finite.
        """
        self._unclipped.pop(self.slot, None)
        squares = self.sum_squares(_local_gradients(self.parameters))
        if isinstance(squares, list) and math.isfinite(sum(squares)):
            return
        self._unclipped[self.slot] = torch.as_tensor(squares, dtype=self.squares.dtype)
        self._look_at_all_weights()

    def nonfinite(self) -> tuple[Tensor, Tensor]:
        """Return which gradients and which weights were not finite in the rows read last.

        Waits for the device; call it only for rows that are known not to be finite.

        Returns:
            Flags of the gradients and flags of the weights, (rows, parameters) each.
        """
        # 1. The gradients.
        self._count_look()
        is_bad_gradient = self._read_squares.isfinite().logical_not().cpu()

        # 2. The weights. Those of a row that nobody looked at count as finite.
        is_bad_weight = torch.zeros_like(is_bad_gradient)
        for place, weights in self._read_weights.items():
            is_bad_weight[place] = weights.isfinite().logical_not().cpu()
        return is_bad_gradient, is_bad_weight

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

    def put_update(self, label: str, update: UpdateSquares) -> None:
        """Put the squares of an update into the row at hand.

        Args:
            label: of the sub-layer.
            update: what was measured of it.
        """
        self.now.update = label
        if isinstance(update, Tensor):
            self.table[self.slot, UPDATE : WEIGHT + 1] = update
        else:
            self.now.values[UPDATE], self.now.values[WEIGHT] = update

    def put_micro_batches(self, sums: Tensor, count: int, sequences: int) -> None:
        """Put the two sums of squares of a step that accumulates gradients, see `noise_scale`."""
        on_device = send(sums, self.device, self.table.dtype)
        self.table[self.slot, MICRO : MICRO_SUM + 1] = on_device
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
        self.last_wait = DeviceWait()
        count, groups = len(rows), len(self.groups.labels)
        if not rows:
            self._read_squares, self._read_weights = self.squares[:0], {}
            return [], torch.zeros(0, FIRST + groups, dtype=torch.float64)

        # 1. Sum the squares of each sub-layer.
        self._collect_norms(count)
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
        self._count_look()
        started = time.perf_counter()
        numbers = Download(flat).read().double()
        self.last_wait = self._share_wait(started)
        columns, squares, read_rates = numbers.split([count * FIRST, count * groups, len(rates)])
        for (row, group), rate in zip(places, read_rates.tolist(), strict=True):
            row.rates[group] = rate

        # 3. Add what was known on the host.
        known = torch.tensor([_columns(row.values) for row in rows], dtype=torch.float64)
        columns = torch.where(known.isnan(), columns.view(count, FIRST), known)
        self._empty(count)
        return rows, torch.cat([columns, squares.view(count, groups)], dim=1)

    def wait(self) -> DeviceWait:
        """Wait until the device has done the steps so far, so that a clock may be read."""
        started = time.perf_counter()
        wait_for_stream(self.device)
        return self._share_wait(started)

    def _share_wait(self, started: float) -> DeviceWait:
        """Share the seconds since `started` among the steps in the buffer.

        The host was ahead of the device in these steps: their times lack what it waited for now.
        """
        if self.is_on_cpu:
            return DeviceWait()
        seconds = time.perf_counter() - started
        timed = [row for row in self.rows if math.isfinite(row.time)]
        for row in timed:
            row.time += seconds / len(timed)
        return DeviceWait(seconds=seconds, steps=len(timed))

    def _collect_norms(self, count: int) -> None:
        """Square the norms of the first rows that lie on the device, and put them in place."""
        # 1. Norms of the same parameters are taken together.
        rows_of: dict[tuple[int, ...] | None, list[int]] = {}
        norms_of: dict[tuple[int, ...] | None, list[Tensor]] = {}
        for row in sorted(self._norms):
            if row >= count:
                continue
            of_row = self._norms.pop(row)
            # What another optimizer holds counts as zero, until that one steps too.
            if of_row[0].places is not None:
                self.squares[row].zero_()
            for gradients in of_row:
                rows_of.setdefault(gradients.places, []).append(row)
                norms_of.setdefault(gradients.places, []).append(gradients.norms)

        # 2. Put their squares into the rows, one after the other if some were left out.
        for places, rows in rows_of.items():
            dtype = self.squares.dtype
            squares = torch.stack([norms.to(dtype) for norms in norms_of[places]]).square()
            columns = None if places is None else self.index_of(places)
            for start, stop in _runs_of(rows):
                target = self.squares[rows[start] : rows[stop - 1] + 1]
                values = squares[start:stop]
                if columns is None:
                    target.copy_(values)
                else:
                    target.index_copy_(1, columns, values)

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
        self._read_squares = squares
        self._read_weights = {row: w for row, w in self._weights.items() if row < count}

        # 2. Keep the row of the step at hand.
        for by_row in (self._norms, self._weights, self._unclipped):
            _keep_as_first(by_row, count)
        pending_rows: list[Tensor] = []
        if self.now.has_gradients and count < self.capacity:
            pending_rows = [table[count].clone() for table in (self.table, self.squares)]

        # 3. Empty the buffer, and put that row first.
        self.table.fill_(torch.nan)
        self.squares.fill_(torch.nan)
        for table, pending_row in zip((self.table, self.squares), pending_rows, strict=False):
            table[0] = pending_row


def _keep_as_first(by_row: dict[int, Any], row: int) -> None:
    """Keep what belongs to one row alone, which becomes the first."""
    pending = by_row.pop(row, None)
    by_row.clear()
    if pending is not None:
        by_row[0] = pending


def _runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each run of rows that follow each other begins and ends among them."""
    starts = [0]
    for place in range(1, len(rows)):
        if rows[place] != rows[place - 1] + 1:
            starts.append(place)
    return list(pairwise([*starts, len(rows)]))


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


def _local_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what this rank holds of each gradient; None where there is none."""
    gradients: list[Tensor | None] = list(map(_GRADIENT, parameters))
    # Mostly they are plain tensors, which are what this rank holds.
    if set(map(type, gradients)) <= _PLAIN_OR_NONE:
        return gradients
    return [None if gradient is None else local(gradient) for gradient in gradients]


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
    made of the weights of the sub-layer whose turn it is. What an optimizer moved is taken when its
    outermost step ends, so that the moves of a wrapper around it count. The squares are summed when
    all of the sub-layer has moved, or when the window ends. The copy is then let go.

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
        # the members that have moved, and how far
        self.moved: list[tuple[GroupMember, Tensor]] = []
        self.update: UpdateSquares | None = None  # once all members have moved
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
                copies = _copy_all([_local_weight(m.parameter) for m in members])
                self.before = dict(enumerate(zip(members, copies, strict=True)))
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
        """Take what the optimizers that stepped have moved; call when an outermost step has ended.

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
        copies = [self.before.pop(place) for place in done]
        members = [member for member, _ in copies]
        if any(member.parameter.grad is not None for member in members):
            self.touched = True

        # 2. Subtract the weights from their copies.
        with torch.no_grad():
            weights = [_local_weight(member.parameter) for member in members]
            differences = [old for _, old in copies]
            torch._foreach_sub_(differences, weights)
        self.moved += zip(members, differences, strict=True)

        # 3. Sum the squares once all members have moved, while the weights are those of the step.
        if not self.before:
            self._sum_moves(metrics)

    def _sum_moves(self, metrics: StepMetrics) -> None:
        """Sum the squares of the moves, and those of all weights of the sub-layer."""
        assert self.chosen is not None
        members = self._trained_members(self.chosen)
        weights = [_local_weight(member.parameter) for member in members]
        moved = [member for member, _ in self.moved]
        differences = [difference for _, difference in self.moved]
        with torch.no_grad():
            sums = metrics.sum_squares([*differences, *weights])
            self.update = _sum_both(sums, moved, members)
        self.moved.clear()

    def close(self, metrics: StepMetrics) -> None:
        """End the window: put the update into the row at hand."""
        if not self.opened:
            return

        # 1. A window in which nothing could be measured leaves its turn to the next one.
        self._since_measured += 1
        self._close_looks_left -= 1
        if self.moved:
            self._sum_moves(metrics)
        if self.chosen is not None and self.update is not None:
            self._since_measured = 0

            # 2. The sub-layer goes to the end of the queue.
            self.queue.remove(self.chosen)
            self.queue.append(self.chosen)
            if self.touched:
                self._young_left -= 1
                metrics.put_update(self.groups.labels[self.chosen], self.update)
        self.drop()

    def drop(self) -> None:
        """End the window without an update."""
        self.before.clear()
        self.moved.clear()
        self.update = None
        self.stepped.clear()
        self.chosen = None
        self.opened = False
        self.touched = False


def _copy_all(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of some weights, made by one operation on a device."""
    with torch.no_grad():
        # On a CPU that would be an operation for each, and one more to allocate it.
        if any(map(_IS_CPU, weights)):
            return [weight.clone() for weight in weights]
        copies = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(copies, list(weights), non_blocking=True)
        return copies


def _sum_both(
    sums: Sums, moved: Sequence[GroupMember], members: Sequence[GroupMember]
) -> UpdateSquares:
    """Return the sum of squares of an update, and that of the weights.

    Args:
        sums: of squares of each move, then of each weight.
        moved: whose moves these are.
        members: whose weights these are.
    """
    # 1. Numbers on a CPU, each with the share that this rank counts.
    shares = [member.share for member in [*moved, *members]]
    count = len(moved)
    if isinstance(sums, list):
        weighted = [share * square for share, square in zip(shares, sums, strict=True)]
        return sum(weighted[:count]), sum(weighted[count:])

    # 2. A tensor on any other device. Without shards every tensor counts in full.
    if set(shares) != {1.0}:
        sums = torch.stack([s * share for s, share in zip(sums.unbind(), shares, strict=True)])
    if count == len(members):
        return sums.view(2, count).sum(dim=1)
    return torch.stack([sums[:count].sum(), sums[count:].sum()])
