"""Weights that something other than the optimizer has written between two of its steps.

A sample of every weight matrix is read when the step of its optimizer has ended, and again when the
next one begins. In between nothing that belongs to training writes to a weight. So any difference
is a write from outside: an init, a checkpoint, an average that was swapped in, an edit in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from jacdiag.monitor.parameter_groups import GroupMember, SublayerGroups
from jacdiag.monitor.step_metrics import WRITTEN, StepMetrics

SAMPLE = 128  # elements of each matrix
NOTED = (
    0.01  # relative change from which a write is logged; swaps in bf16 and back are off by 0.004
)
_MOST_OPTIMIZERS = 8  # each has its own reading; one optimizer per weight would cost too much
_MOST_NAMED = 20  # weights of one step that the log names


class WeightWrites:
    """Compare samples of the weights across the gap between two optimizer steps.

    The samples stay on the device. The weights themselves are held only while a step runs, so that
    a loop may move or free them in between. Vectors, weights of foreign tensor classes and those on
    another device are not read. Of a sharded weight the piece of the leading rank is.

    Args:
        groups: the sub-layers.
        holders: id of a parameter -> the number of the optimizer that updates it.
        count: how many optimizers there are; with more than eight nothing is read.
        device: of the figures.
        capacity: steps between two looks at the device.
    """

    def __init__(
        self,
        groups: SublayerGroups,
        holders: Mapping[int, int],
        count: int,
        device: torch.device,
        capacity: int,
    ) -> None:
        # 1. Which weights are read, and at whose steps.
        self.groups, self.device = groups, device
        self.parts: dict[int, list[int]] = {}  # optimizer -> places of its members
        if count <= _MOST_OPTIMIZERS:
            for place, member in enumerate(groups.members):
                holder = holders.get(id(member.parameter))
                if holder is not None and _is_readable(member, device):
                    self.parts.setdefault(holder, []).append(place)

        # 2. What is read of them.
        # Sums of squares before and after the gap, and of the difference: (steps, 3, parameters).
        self.sums = torch.zeros(capacity, 3, len(groups.members), device=device)
        self._read_sums = self.sums[:0]
        self.before: dict[int, Tensor] = {}  # optimizer -> the sample at the end of its last step
        self.ended: dict[int, int] = {}  # optimizer -> that step
        self.views: dict[int, list[Tensor]] = {}
        self.samplers = {
            optimizer: [Sampler(groups.members[place]) for place in places]
            for optimizer, places in self.parts.items()
        }
        self.owners: dict[int, Tensor] = {}

    def begin(self, optimizer: int, metrics: StepMetrics) -> None:
        """Compare the weights with what the last step has left; call before a step."""
        samplers = self.samplers.get(optimizer)
        if not samplers:
            return
        with torch.no_grad():
            if optimizer in self.views:  # the last step was left by an exception
                self.before.pop(optimizer, None)
            self.views[optimizer] = [sampler.view() for sampler in samplers]
            self._compare(optimizer, metrics)

    def look_again(self, metrics: StepMetrics) -> None:
        """Compare once more, inside a step with a closure.

        Call it after the closure and before the update.
        """
        with torch.no_grad():
            for optimizer in self.views:
                self._compare(optimizer, metrics)

    def end(self, optimizer: int, step: int) -> None:
        """Read the weights that a step has left.

        Args:
            optimizer: its number.
            step: the number of the step.
        """
        views = self.views.pop(optimizer, None)
        if views is None:
            return

        with torch.no_grad():
            samplers = self.samplers[optimizer]
            # The step may have put another tensor in the place of a weight.
            if not all(map(Sampler.is_of, samplers, views)):
                views = [sampler.view() for sampler in samplers]

            self.before[optimizer] = torch.cat(views)
            self.ended[optimizer] = step

    def state(self) -> dict[str, Tensor]:
        """Return the samples at the end of the last steps, by the names of the weights.

        Waits for the device.
        """
        samples: dict[str, Tensor] = {}
        for optimizer, before in self.before.items():
            samplers = self.samplers[optimizer]
            with torch.no_grad():
                counts = [len(sampler.view()) for sampler in samplers]
            for sampler, sample in zip(samplers, before.float().cpu().split(counts), strict=True):
                samples[sampler.member.name] = sample.clone()
        return samples

    def load(self, samples: Mapping[str, Tensor], step: int) -> None:
        """Go on from the samples of a checkpoint.

        Optimizers whose weights have samples of another size are left out.

        Args:
            samples: what `state` returned.
            step: the step that it was made after.
        """
        for optimizer, samplers in self.samplers.items():
            # 1. The samples of its weights.
            saved: list[Tensor] = []
            for sampler in samplers:
                if sampler.member.name in samples:
                    saved.append(samples[sampler.member.name])

            # 2. Take them if there is one for each weight, of its size.
            with torch.no_grad():
                counts = [len(sampler.view()) for sampler in samplers]
            if [len(sample) for sample in saved] == counts:
                self.before[optimizer] = torch.cat(saved).to(self.device)
                self.ended[optimizer] = step

    def forget(self) -> None:
        """Compare nothing with what was read so far: a step was made that nobody saw."""
        self.before.clear()
        self.views.clear()

    def _compare(self, optimizer: int, metrics: StepMetrics) -> None:
        """Compare with the last sample, if there is one; the new one takes its place."""
        before = self.before.pop(optimizer, None)
        if before is None:
            return
        views = self.views[optimizer]
        after = self.before[optimizer] = torch.cat(views)
        if after.shape != before.shape:
            return
        if self.device.type == "cpu" and torch.equal(before, after):
            return

        # 1. Sums of squares of each weight's sample.
        owner = self.owners.get(optimizer)
        if owner is None or len(owner) != len(after):
            counts = torch.tensor([len(view) for view in views])
            owner = torch.tensor(self.parts[optimizer]).repeat_interleave(counts).to(self.device)
            self.owners[optimizer] = owner
        before, after = before.float(), after.float()
        squares = torch.stack([before, after, after - before]).square()
        sums = torch.zeros_like(self.sums[0]).index_add_(1, owner, squares)

        # 2. Put them into the row at hand, with the largest change.
        slot = metrics.slot
        if not metrics.now.written_after:
            self.sums[slot] = 0
        self.sums[slot] += sums
        largest = _relative_change(sums).max().to(metrics.table.dtype)
        metrics.table[slot, WRITTEN] = torch.fmax(metrics.table[slot, WRITTEN], largest)
        metrics.now.written_after = self.ended[optimizer]

    def keep_read(self, rows: int) -> None:
        """Keep what belongs to the rows that are read now; call when the figures are read."""
        self._read_sums = self.sums[:rows].clone()
        if rows < len(self.sums):
            self.sums[0] = self.sums[rows]

    def describe(self, place: int) -> dict[str, Any]:
        """Return the writes of one of the rows read last, the largest first.

        Waits for the device.
        """
        # 1. Sort the changes. Equal ones stay in the order of depth.
        sums = self._read_sums[place].cpu().double()
        changes = _relative_change(sums)
        order = sorted(range(len(changes)), key=lambda k: -round(float(changes[k]), 3))

        # 2. Describe the largest of those that count.
        chosen = [k for k in order if changes[k] >= NOTED]
        weights = [
            _describe_one(self.groups.members[k].name, *sums[:, k].sqrt().tolist())
            for k in chosen[:_MOST_NAMED]
        ]

        return {"count": len(chosen), "of": sum(map(len, self.parts.values())), "weights": weights}


def _describe_one(name: str, before: float, after: float, difference: float) -> dict[str, Any]:
    """Return what is known of one write.

    `change` is the norm of the difference over the smaller of the two norms. `times` is the factor
    of the norm. Either is None if it is infinite. `scaled` is true if the new weight is a multiple
    of the old one.

    Args:
        name: of the weight.
        before: norm of its sample before the write.
        after: norm of its sample after the write.
        difference: norm of the difference.
    """
    smaller = min(before, after)
    scaled = before > 0 and abs(difference - abs(after - before)) <= 1e-3 * difference
    return {
        "weight": name,
        "change": difference / smaller if smaller else None,
        "times": after / before if before else None,
        "scaled": scaled,
    }


def _relative_change(sums: Tensor) -> Tensor:
    """Return the norm of each weight's difference over the smaller of its norms.

    It is 0 for a weight that was not read, or is not finite: another rule checks that.

    Args:
        sums: of squares before, after and of the difference, (3, parameters).
    """
    before, after, difference = sums.unbind()
    change = difference.sqrt() / torch.minimum(before, after).sqrt()
    is_known = sums.isfinite().all(dim=0) & (difference > 0)
    return torch.where(is_known, change, torch.zeros_like(change))


def _is_readable(member: GroupMember, device: torch.device) -> bool:
    """Return whether a weight is a plain matrix on the metrics' device, or a shard of one."""
    # 1. A tensor of no foreign class, with two dimensions or more.
    piece = _piece(member)
    if type(piece) not in (Tensor, torch.nn.Parameter):
        return False
    if piece.ndim < 2 or not piece.numel():
        return False

    # 2. Floats on the device.
    if not piece.is_floating_point():
        return False
    if piece.device != device:
        return False

    # 3. Without gaps in memory, where a sample is taken at equal distances.
    if piece.layout is not torch.strided:
        return False
    return torch.ops.aten.is_non_overlapping_and_dense.default(piece)


def _piece(member: GroupMember) -> Tensor:
    """Return the tensor that this rank holds; `to_local` would build a new one at each step."""
    parameter: Any = member.parameter
    if type(parameter) is torch.nn.Parameter:
        return parameter
    piece: Tensor = getattr(parameter, "_local_tensor", parameter)
    return piece


class Sampler:
    """A view of elements that lie evenly in a weight, and not in one of its columns alone."""

    def __init__(self, member: GroupMember) -> None:
        self.member = member
        self._lay_out(_piece(member))

    def view(self) -> Tensor:
        """Return the elements in the order of memory; the view holds the memory of the weight."""
        piece = _piece(self.member)
        if piece.numel() != self.elements:
            self._lay_out(piece)
        return piece.as_strided(self.size, self.stride)

    def is_of(self, view: Tensor) -> bool:
        """Return whether a view shows the weight as it is now.

        An optimizer may have put another tensor in its place.
        """
        return _piece(self.member).data_ptr() == view.data_ptr()

    def _lay_out(self, piece: Tensor) -> None:
        self.elements = piece.numel()
        count, stride = _sample_layout(self.elements, piece.shape[-1])
        self.size, self.stride = (count,), (stride,)


@cache
def _sample_layout(elements: int, columns: int) -> tuple[int, int]:
    """Return how many elements of a matrix are sampled, and how far apart they lie in memory."""
    # A stride with a factor in common with the columns would never reach some of them.
    stride = max(elements // SAMPLE, 1)
    while stride > 1 and gcd(stride, columns) > 1:
        stride -= 1
    return min(math.ceil(elements / stride), SAMPLE), stride
