"""Weights that something other than the optimizer has written between two of its steps.

A sample of every weight matrix is read when the step of its optimizer has ended, and again when the
next one begins. In between nothing that belongs to training writes to a weight. So any difference
is a write from outside: an init, a checkpoint, an average that was swapped in, an edit in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import send
from jacdiag.monitor.parameter_groups import SublayerGroups
from jacdiag.monitor.step_metrics import WRITTEN, StepMetrics
from jacdiag.monitor.weight_samples import (
    DeviceReader,
    HostReader,
    Sample,
    is_readable,
    make_readers,
)

NOTED = (
    0.01  # relative change from which a write is logged; swaps in bf16 and back are off by 0.004
)
_MOST_OPTIMIZERS = 8  # each has its own reading; one optimizer per weight would cost too much
_MOST_NAMED = 20  # weights of one step that the log names


@dataclass
class WriteGap:
    """The samples of some weights before and after a gap between two steps.

    Attributes:
        slot: the row of the step after the gap.
        part: place of the reader of these weights.
        before: the samples at the end of the last step.
        after: those at the beginning of the next one.
    """

    slot: int
    part: int
    before: Tensor
    after: Tensor


class WeightWrites:
    """Compare samples of the weights across the gap between two optimizer steps.

    On a CPU the samples are compared at once, and kept only if they differ. On any other device
    they stay there, and all gaps since the last look are compared when the figures are read.

    The weights themselves are held only while a step runs, so that a loop may move or free them in
    between. Vectors, weights of foreign tensor classes and those on another device are not read. Of
    a sharded weight the piece of the leading rank is.

    Args:
        groups: the sub-layers.
        holders: id of a parameter -> the number of the optimizer that updates it.
        count: how many optimizers there are; with more than eight nothing is read.
        device: of the figures.
    """

    def __init__(
        self,
        groups: SublayerGroups,
        holders: Mapping[int, int],
        count: int,
        device: torch.device,
    ) -> None:
        # 1. Which weights are read, and at whose steps.
        self.groups, self.device = groups, device
        places: dict[int, list[int]] = {}  # optimizer -> places of its members
        if count <= _MOST_OPTIMIZERS:
            for place, member in enumerate(groups.members):
                holder = holders.get(id(member.parameter))
                if holder is not None and is_readable(member, device):
                    places.setdefault(holder, []).append(place)
        self.weights_read = sum(map(len, places.values()))

        # 2. What reads them.
        self.readers: list[HostReader | DeviceReader] = []
        self.parts: dict[int, list[int]] = {}  # optimizer -> places of its readers
        for optimizer, of_optimizer in places.items():
            readers = make_readers(groups.members, of_optimizer, device)
            first = len(self.readers)
            self.parts[optimizer] = list(range(first, first + len(readers)))
            self.readers += readers

        # 3. What was read of them.
        self.before: dict[int, Sample] = {}  # part -> the sample at the end of its last step
        self.ended: dict[int, int] = {}  # optimizer -> that step
        self.stepping: set[int] = set()
        self.gaps: list[WriteGap] = []  # that are still to be compared
        self._owners: dict[int, Tensor] = {}
        # Sums of squares before and after the gap, and of the difference: (steps, 3, parameters).
        self._read_sums = torch.zeros(0)

    def begin(self, optimizer: int, metrics: StepMetrics) -> None:
        """Compare the weights with what the last step has left; call before a step."""
        parts = self.parts.get(optimizer)
        if parts is None:
            return
        if optimizer in self.stepping:  # the last step was left by an exception
            for part in parts:
                self.before.pop(part, None)
        self.stepping.add(optimizer)
        with torch.no_grad():
            for part in parts:
                self._compare(part, self.readers[part].read(), optimizer, metrics)

    def look_again(self, metrics: StepMetrics) -> None:
        """Compare once more, inside a step with a closure.

        Call it after the closure and before the update.
        """
        with torch.no_grad():
            for optimizer in self.stepping:
                for part in self.parts[optimizer]:
                    self._compare(part, self.readers[part].read_again(), optimizer, metrics)

    def end(self, optimizer: int, step: int) -> None:
        """Read the weights that a step has left.

        Args:
            optimizer: its number.
            step: the number of the step.
        """
        if optimizer not in self.stepping:
            return
        self.stepping.remove(optimizer)

        with torch.no_grad():
            for part in self.parts[optimizer]:
                reader = self.readers[part]
                self.before[part] = reader.read_again()
                reader.release()
        self.ended[optimizer] = step

    def state(self) -> dict[str, Tensor]:
        """Return the samples at the end of the last steps, by the names of the weights.

        Waits for the device.
        """
        samples: dict[str, Tensor] = {}
        for part, before in self.before.items():
            reader = self.readers[part]
            with torch.no_grad():
                counts = reader.counts
            of_weights = reader.as_tensor(before).float().cpu().split(counts)
            for member, sample in zip(reader.members, of_weights, strict=True):
                samples[member.name] = sample.clone()
        return samples

    def load(self, samples: Mapping[str, Tensor], step: int) -> None:
        """Go on from the samples of a checkpoint.

        Weights are left out if one that is read with them has no sample of its size.

        Args:
            samples: what `state` returned.
            step: the step that it was made after.
        """
        for optimizer, parts in self.parts.items():
            for part in parts:
                reader = self.readers[part]
                # 1. The samples of its weights.
                saved: list[Tensor] = []
                for member in reader.members:
                    if member.name in samples:
                        saved.append(samples[member.name])

                # 2. Take them if there is one for each weight, of its size.
                with torch.no_grad():
                    counts = reader.counts
                if [len(sample) for sample in saved] == counts:
                    self.before[part] = reader.from_tensor(torch.cat(saved))
                    self.ended[optimizer] = step

    def forget(self) -> None:
        """Compare nothing with what was read so far: a step was made that nobody saw."""
        self.before.clear()
        self.stepping.clear()
        for reader in self.readers:
            reader.release()

    def _compare(self, part: int, after: Sample, optimizer: int, metrics: StepMetrics) -> None:
        """Compare with the last sample, if there is one; the new one takes its place."""
        before = self.before.get(part)
        if before is None:
            return
        self.before[part] = after
        if after.shape != before.shape or after.dtype != before.dtype:
            return
        reader = self.readers[part]
        if reader.are_equal(before, after):
            return
        self.gaps.append(
            WriteGap(metrics.slot, part, reader.as_tensor(before), reader.as_tensor(after))
        )
        metrics.now.written_after = self.ended[optimizer]

    def settle(self, metrics: StepMetrics) -> None:
        """Compare what is left to compare; call before the figures are read.

        The largest change of each row goes into its table. What belongs to the step at hand waits.
        """
        # 1. The gaps before the steps that are read.
        rows = metrics.slot
        gaps: list[WriteGap] = []
        later: list[WriteGap] = []
        for gap in self.gaps:
            gaps_of_row = gaps if gap.slot < rows else later
            gaps_of_row.append(gap)

        # 2. What is left belongs to the first row, once these are read.
        for gap in later:
            gap.slot = 0
        self.gaps = later
        if not gaps:
            return

        # 3. Compare them.
        with torch.no_grad():
            self._read_sums = self._sum_squares(gaps, rows, metrics)
            metrics.table[:rows, WRITTEN] = _relative_change(self._read_sums).amax(dim=1)

    def _sum_squares(self, gaps: Sequence[WriteGap], rows: int, metrics: StepMetrics) -> Tensor:
        """Return the sums of squares before, after and of the difference, (rows, 3, parameters)."""
        members = len(self.groups.members)
        sums = torch.zeros(rows, 3, members, device=self.device)

        # 1. Gaps of the same weights are compared in one go.
        alike: dict[tuple[int, int], list[WriteGap]] = {}
        for gap in gaps:
            alike.setdefault((gap.part, len(gap.after)), []).append(gap)

        # 2. Add the squares to the row of the step and the column of the weight.
        for (part, _), of_part in alike.items():
            before = torch.stack([gap.before.float() for gap in of_part])
            after = torch.stack([gap.after.float() for gap in of_part])
            squares = torch.stack([before, after, after - before], dim=1).square()
            of_weights = sums.new_zeros(len(of_part), 3, members)
            of_weights.index_add_(2, self._owners_of(part, squares.shape[-1]), squares)
            _add_to_rows(sums, [gap.slot for gap in of_part], of_weights, metrics)
        return sums

    def _owners_of(self, part: int, length: int) -> Tensor:
        """Return the place of the weight that each element of a sample belongs to."""
        owners = self._owners.get(part)
        if owners is None or len(owners) != length:
            reader = self.readers[part]
            counts = torch.tensor(reader.counts)
            owners = torch.tensor(reader.places).repeat_interleave(counts)
            owners = send(owners, self.device)
            self._owners[part] = owners
        return owners

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

        return {"count": len(chosen), "of": self.weights_read, "weights": weights}


def _add_to_rows(sums: Tensor, slots: Sequence[int], added: Tensor, metrics: StepMetrics) -> None:
    """Add a tensor to each of some rows, which may come twice."""
    # 1. Mostly one row follows the other, so that no places have to be sent to the device.
    first = slots[0]
    following = list(range(first, first + len(slots)))
    if list(slots) == following:
        sums[first : first + len(slots)] += added
        return

    # 2. Any other rows.
    sums.index_add_(0, metrics.index_of(tuple(slots)), added)


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
        sums: of squares before, after and of the difference, (..., 3, parameters).
    """
    before, after, difference = sums.unbind(dim=-2)
    change = difference.sqrt() / torch.minimum(before, after).sqrt()
    is_known = sums.isfinite().all(dim=-2) & (difference > 0)
    return torch.where(is_known, change, torch.zeros_like(change))
