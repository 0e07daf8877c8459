"""Per-step figures, kept on the device until they are logged: one look at the device for `log_every` steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jacdiag.errors import UsageError
from jacdiag.watching.grouping import Groups, Member
from jacdiag.watching.norms import find_nonfinite, square_sums, widest
from jacdiag.watching.optimisers import local

# Columns; sub-layers follow. Those from GIVEN_PART on are summed over ranks.
MICRO, MICRO_SUM, LOSS, WRITTEN, GIVEN, GIVEN_PART, INF, UPDATE, WEIGHT, FIRST = range(10)
_OVERDUE = 4  # intervals that an optimizer may be late before nothing waits for it


@dataclass
class Row:
    """What is known about a step on the host at once.

    Attributes:
        made: an optimiser stepped (its gradients are in the table).
        update: the sub-layer whose update norm was taken.
        told: the loop gave its loss.
        rates: the learning rates that the step used, one per parameter group; None where a group had no step.
        optimizer_step: how the step was seen, see `usage`.
        stepped_before: a step of the optimizers was seen earlier in the run.
        late: the gradients were read after the step: zeros are gradients that were cleared.
        micro_batches: how many are summed in the column MICRO_SUM; 0 if it holds nothing.
        sequences: in each of them.
        weights_seen: before the step somebody looked whether the weights are finite.
        with_gradient: parameters that had a gradient.
        written_after: the step whose weights were compared with those before this one; 0 if none were.
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
        # Which parameters have a gradient, and which are a weight, that is not finite: (steps, parameters).
        self.bad_gradients = torch.zeros(self.capacity, len(members), dtype=torch.bool, device=self.device)
        self.bad_weights = torch.zeros_like(self.bad_gradients)
        self._read_flags = (self.bad_gradients[:0], self.bad_weights[:0])

    @property
    def slot(self) -> int:
        """The row of the table that the step at hand writes to."""
        return len(self.rows)

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.capacity

    def gradients(
        self, stepping: set[int] | None, scale: Tensor | None, inf: Tensor | None, *, before: bool = True
    ) -> None:
        """Takes the squares of all gradients, before a step.

        Args:
            stepping: ids of the parameters of the optimiser that steps now; None for all.
            scale: by which the gradients are still multiplied.
            inf: 1.0 where a loss scaler found inf.
            before: the step has not been made: the weights are those that the gradients belong to.
        """
        gradients: list[Tensor | None] = []
        for member in self.groups.members:
            steps = stepping is None or id(member.parameter) in stepping
            gradient = member.parameter.grad
            gradients.append(local(gradient) if steps and gradient is not None else None)
        found = square_sums(gradients, self.device)
        self._note_nonfinite(found, before)
        self.now.with_gradient += sum(gradient is not None for gradient in gradients)
        if scale is not None:
            found = found / scale.to(self.device, found.dtype).square()
        row = self.table[self.slot]
        if not self.now.made:
            row[FIRST:] = 0.0
        row[FIRST:].index_add_(0, self.index, found * self.shares)
        if inf is not None:
            row[INF] = inf.reshape(()).to(self.device, row.dtype)
        self.now.made = True

    def _note_nonfinite(self, squares: Tensor, before: bool) -> None:
        """Note which gradients are not finite and, before the first step of a row, which weights.

        The weights are read at every step on a device that may not be waited for. On a CPU, where the gradients are
        known at once, they are read only if a gradient is not finite.
        """
        if self.now.weights_seen and not before:
            return  # they were looked at before the update, and before clipping
        bad = squares.isfinite().logical_not()
        if not self.now.made:
            self.bad_gradients[self.slot] = False
            self.bad_weights[self.slot] = False
            self.now.with_gradient = 0
        self.bad_gradients[self.slot] |= bad
        if not before or self.now.weights_seen:
            return
        on_cpu = self.device.type == "cpu"
        if (on_cpu and not bool(bad.any())) or (not on_cpu and self.now.made):
            return
        self._look_at_weights()

    def _look_at_weights(self) -> None:
        weights = [local(member.parameter.detach()) for member in self.groups.members]
        self.bad_weights[self.slot] = find_nonfinite(weights, self.device)
        self.now.weights_seen = True

    def look_before_update(self) -> None:
        """Note what is not finite, inside a step with a closure: after the backward, before clipping and the update.

        The squares of the gradients are those after the step. On a CPU the weights are read as `_note_nonfinite` does.
        """
        gradients = [member.parameter.grad for member in self.groups.members]
        present = [local(g) if g is not None else None for g in gradients]
        bad = square_sums(present, self.device).isfinite().logical_not()
        if self.device.type == "cpu" and not bool(bad.any()):
            return
        self.bad_gradients[self.slot] = bad
        self._look_at_weights()

    def nonfinite(self) -> tuple[Tensor, Tensor]:
        """Return which gradients and which weights were not finite in the rows read last: (rows, parameters) each.

        Looks at the device; call it only for rows that are known not to be finite.
        """
        gradients, weights = self._read_flags
        self.looks += self.device.type != "cpu"
        return gradients.cpu(), weights.cpu()

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

    def put_micro_batches(self, sums: Tensor, count: int, sequences: int) -> None:
        """Write the two sums of squares of a step that accumulates gradients, see `noise_scale`."""
        self.table[self.slot, MICRO : MICRO_SUM + 1] = sums.to(self.device, self.table.dtype, non_blocking=True)
        self.now.micro_batches, self.now.sequences = count, sequences

    def close_row(self, step: int, time: float, lr: float | None, tokens: int | None) -> None:
        """Ends the step at hand."""
        self.now.step, self.now.time, self.now.lr, self.now.tokens = step, time, lr, tokens
        self.rows.append(self.now)
        self.now = Row()

    def read(self) -> tuple[list[Row], Tensor]:
        """The filled rows, (rows, columns) on the host: the one look at the device; the buffer is empty then."""
        rows, width = self.rows, self.table.shape[1]
        # 1. Learning rates that lie on the device travel with the table.
        where = [(row, k) for row in rows for k, rate in enumerate(row.rates) if isinstance(rate, Tensor)]
        rates = [row.rates[k].reshape(()).to(self.table) for row, k in where]  # type: ignore[union-attr]
        flat = self.table[: len(rows)].flatten()
        flat = torch.cat([flat, torch.stack(rates)]) if rates else flat
        # 2. Look at the device.
        found = flat.to("cpu", torch.float64, copy=True)
        self.looks += self.device.type != "cpu"
        split = len(rows) * width
        for (row, k), rate in zip(where, found[split:].tolist(), strict=True):
            row.rates[k] = rate
        # 3. Empty the buffer; a step that is being made while it is read stays.
        self.rows = []
        self._read_flags = (self.bad_gradients[: len(rows)].clone(), self.bad_weights[: len(rows)].clone())
        is_pending = self.now.made and len(rows) < self.capacity
        pending = self.table[len(rows)].clone() if is_pending else None
        self.table.fill_(torch.nan)
        if pending is not None:
            self.table[0] = pending
            self.bad_gradients[0] = self.bad_gradients[len(rows)].clone()
            self.bad_weights[0] = self.bad_weights[len(rows)].clone()
        return rows, found[:split].view(len(rows), width)


class Rhythm:
    """At which windows an optimizer steps: it may do so at every second one, or have stopped."""

    def __init__(self) -> None:
        self.last, self.interval = 0, 1

    def stepped(self, window: int) -> None:
        if window > self.last:
            self.interval, self.last = window - self.last, window

    def is_due(self, window: int) -> bool:
        """Whether it steps in this window, if it goes on as it has; one that is long overdue is not waited for."""
        return self.interval <= window - self.last <= _OVERDUE * self.interval


class UpdateTurn:
    """The update norm of one sub-layer a step, in turn: over all optimizers that hold a part of it.

    A window begins with the first optimizer that steps after `Watch.step` and ends with the next `Watch.step`. At its
    beginning a copy is made of the weights of the sub-layer whose turn it is. What an optimizer moved is summed when
    its outermost step ends, so that the moves of a wrapper around it count. The copy is then let go.

    Args:
        groups: the sub-layers.
        holders: id of a parameter -> the number of the optimizer that updates it.
        count: how many optimizers there are.
    """

    def __init__(self, groups: Groups, holders: Mapping[int, int], count: int) -> None:
        self.groups, self.holders = groups, holders
        self.queue = deque(range(len(groups.labels)))
        self.rhythms = [Rhythm() for _ in range(count)]
        self.window = 0
        self.chosen: int | None = None
        self.before: dict[int, tuple[Member, Tensor]] = {}  # place in the group -> the member, its weights
        self.moved: list[Tensor] = []
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
        for group in list(self.queue):
            members = [m for m in self.groups.of(group) if m.parameter.requires_grad]
            if any(self._may_move(member, stepping, closure) for member in members):
                self.chosen = group
                copies = [(m, local(m.parameter.detach()).clone()) for m in members]
                self.before = dict(enumerate(copies))
                return

    def _may_move(self, member: Member, stepping: int | None, closure: bool) -> bool:
        """Whether a member has a gradient, or an optimizer that may compute one before it steps in this window."""
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
        """Sum what the optimizers that stepped have moved of the copied weights; call when a step has ended."""
        done = [place for place, (m, _) in self.before.items() if self.holders.get(id(m.parameter)) in self.stepped]
        if not done:
            return
        pairs = [self.before.pop(place) for place in done]
        members = [member for member, _ in pairs]
        self.touched |= any(member.parameter.grad is not None for member in members)
        with torch.no_grad():
            steps = [old.sub_(local(member.parameter.detach())) for member, old in pairs]
        self.moved.append(_counted(square_sums(steps, figures.device), members))

    def close(self, figures: Figures) -> None:
        """End the window: put the sums of squares of the update and of the weights into the row at hand."""
        if not self.opened:
            return
        if self.chosen is not None and self.moved:
            self.queue.remove(self.chosen)
            self.queue.append(self.chosen)
        if self.chosen is not None and self.moved and self.touched:
            members = [m for m in self.groups.of(self.chosen) if m.parameter.requires_grad]
            weights = [local(m.parameter.detach()) for m in members]
            figures.put(UPDATE, torch.stack(self.moved).sum())
            figures.put(WEIGHT, _counted(square_sums(weights, figures.device), members))
            figures.now.update = self.groups.labels[self.chosen]
        self.drop()

    def drop(self) -> None:
        """End the window without figures."""
        self.before.clear()
        self.moved.clear()
        self.stepped.clear()
        self.chosen, self.opened, self.touched = None, False, False


def _counted(sums: Tensor, members: Iterable[Member]) -> Tensor:
    """The sum over tensors, each with the share that this rank counts."""
    return torch.stack([value * m.share for value, m in zip(sums.unbind(), members, strict=True)]).sum()
