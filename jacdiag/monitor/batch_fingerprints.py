"""Numbers that tell batches apart: sums of their elements weighted by place, mod 2^61.

They are made many in a row when the log is written: ten in a row take a third of the time of one
within each of ten steps, and on a device one operation takes all that have one shape. A batch that
is not kept until then is summed at once, and its sums stay on their device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import has_float64
from jacdiag.devices.pinned_download import Download
from jacdiag.trace.execution.precision import map_leaves

_MOST_SIZES = 16  # sizes of a batch whose weights are kept
_MASK = 0x1FFFFFFFFFFFFFFF
_PRIME = 2654435761  # the weight of the first place, as of a multiplicative hash


class PlaceWeights:
    """The weight of each place in a fingerprint.

    Sizes that come again at every step are remembered.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.device], Tensor] = {}

    def of(self, count: int, device: torch.device) -> Tensor:
        """Return the weights of some places, on a device."""
        weights = self._known.get((count, device))
        if weights is not None:
            return weights

        # Begin again once there are too many: sizes may be other ones at every step.
        if len(self._known) >= _MOST_SIZES:
            self._known.clear()
        weights = torch.arange(1, count + 1, device=device) * _PRIME
        self._known[count, device] = weights
        return weights


@dataclass
class Print:
    """The fingerprint of a batch, as far as it is made.

    Attributes:
        tensors: of the batch that are still to be summed.
        places: the weights of their places.
        known: the sum of what the host knows.
        sums: of other tensors, on their devices.
    """

    tensors: list[Tensor]
    places: PlaceWeights
    known: int = 0
    sums: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, value: Any, places: PlaceWeights) -> Print:
        """Begin the fingerprint of a batch; nothing is summed yet.

        Args:
            value: nested containers of tensors.
            places: remembers weights from one batch to the next.
        """
        return cls(tensors_in(value), places)

    def sum_now(self) -> None:
        """Sum the tensors, which may change or go after this call. No device is waited for."""
        for tensor in self.tensors:
            self._add_offset(tensor)
            if _is_plain_ids(tensor):
                self.known += _sum_of_ids(tensor, self.places)
            else:
                self.sums.append(_weighted_sums([tensor], self.places)[0])
        self.tensors = []

    def leave_to(self, alike: dict[Any, list[tuple[Print, Tensor]]]) -> None:
        """Sum token ids on a CPU, and sort all other tensors by their shape, dtype and device."""
        for tensor in self.tensors:
            self._add_offset(tensor)
            if _is_plain_ids(tensor):
                self.known += _sum_of_ids(tensor, self.places)
                continue
            kind = (tensor.numel(), tensor.dtype, tensor.device)
            alike.setdefault(kind, []).append((self, tensor))
        self.tensors = []

    def _add_offset(self, tensor: Tensor) -> None:
        # One is added to each element, so that zeros count by their number.
        count = tensor.numel()
        self.known += _PRIME * count * (count + 1) // 2


class PrintsUnderWay:
    """Fingerprints of several batches, on their way to the host.

    Args:
        prints: of the batches.
    """

    def __init__(self, prints: Sequence[Print]) -> None:
        """Launch what is left to sum, and the downloads; no device is waited for."""
        self._prints = prints
        # device -> whose sums are read from there, and the sums
        owners: dict[torch.device, list[Print]] = {}
        sums: dict[torch.device, list[Tensor]] = {}

        # 1. What was summed at once.
        for entry in prints:
            for total in entry.sums:
                owners.setdefault(total.device, []).append(entry)
                sums.setdefault(total.device, []).append(total.reshape(1))
            entry.sums = []

        # 2. What is summed now: one operation for all tensors that are alike.
        alike: dict[Any, list[tuple[Print, Tensor]]] = {}
        for entry in prints:
            entry.leave_to(alike)
        for pairs in alike.values():
            tensors = [tensor for _, tensor in pairs]
            device = tensors[0].device
            owners.setdefault(device, []).extend(entry for entry, _ in pairs)
            sums.setdefault(device, []).append(_weighted_sums(tensors, pairs[0][0].places))

        # 3. One download for each device.
        self._owners = list(owners.values())
        self._downloads = [Download(torch.cat(of_device)) for of_device in sums.values()]

    def texts(self) -> list[str]:
        """Return the fingerprints as the log has them; waits for their devices."""
        for owners, download in zip(self._owners, self._downloads, strict=True):
            for entry, total in zip(owners, download.read().tolist(), strict=True):
                entry.known += total
        return [f"{entry.known & _MASK:016x}" for entry in self._prints]


def fingerprint(value: Any) -> int:
    """Return a number that distinguishes batches; waits for their device.

    Args:
        value: nested containers of tensors.

    Example:
        >>> fingerprint((torch.tensor([1, 2]), "a name")) == 2 * 2654435761 + 3 * 2 * 2654435761
        True
    """
    (text,) = PrintsUnderWay([Print.of(value, PlaceWeights())]).texts()
    return int(text, 16)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested containers that a fingerprint is made of."""
    # 1. Mostly a dict of tensors, or of what is none.
    if type(value) is dict:
        values = list(value.values())
        if not any(isinstance(entry, (tuple, list, dict)) for entry in values):
            return [entry for entry in values if _can_be_summed(entry)]

    # 2. Any other containers.
    tensors: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if _can_be_summed(leaf):
            tensors.append(leaf)
        return leaf

    map_leaves(note, value)
    return tensors


def _can_be_summed(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 0 and not leaf.is_complex()


def _is_plain_ids(tensor: Tensor) -> bool:
    """Whether numpy can read a tensor where it lies: token ids on a CPU."""
    return type(tensor) is Tensor and tensor.dtype is torch.int64 and tensor.is_cpu


def _sum_of_ids(tensor: Tensor, places: PlaceWeights) -> int:
    """Return the sum of element times weight, up to a multiple of 2^64.

    numpy takes a third of the time that torch takes.
    """
    weights = places.of(tensor.numel(), tensor.device).numpy()
    return int(tensor.numpy().reshape(-1) @ weights)


def _weighted_sums(tensors: Sequence[Tensor], places: PlaceWeights) -> Tensor:
    """Return the same sums for any tensors of one size and dtype, on their device: (tensors,).

    A float counts as the integer that its bits make in float64.
    """
    # 1. One row for each tensor.
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    rows = flat[0][None] if len(flat) == 1 else torch.stack(flat)
    if not rows.is_floating_point():
        rows = rows.long()
    elif has_float64(rows.device):
        rows = rows.double().view(torch.int64)
    else:
        rows = _bits_of_float64(_as_float32(rows))

    # 2. The sum of each row.
    return (rows * places.of(rows.shape[1], rows.device)).sum(dim=1)


def _as_float32(values: Tensor) -> Tensor:
    """Return floats of a shorter type in float32, with the usual bits for NaN.

    torch gives NaN other bits on the way from float16, which depend on the number of elements.
    """
    longer = values.float()
    if values.dtype != torch.float16:
        return longer
    return torch.where(longer.isnan(), torch.nan, longer)


def _bits_of_float64(values: Tensor) -> Tensor:
    """Return the bits that float32 values have in float64, on a device without that type.

    They are put together from sign, exponent and fraction (IEEE 754), so that a batch has one
    fingerprint on every device. The device is not waited for.
    """
    # 1. Take the bits of float32 apart: 1 for the sign, 8 for the exponent, 23 for the fraction.
    bits = values.view(torch.int32).long()
    sign = bits < 0
    exponent = (bits >> 23) & 0xFF
    fraction = bits & 0x7FFFFF

    # 2. The smallest numbers, fraction * 2^-149, have an exponent of their own in float64. That of
    # the fraction as a float says by how much.
    is_small = (exponent == 0) & (fraction > 0)
    bits_of_small = fraction.float().view(torch.int32).long()
    exponent = torch.where(is_small, (bits_of_small >> 23) - 149, exponent)
    fraction = torch.where(is_small, bits_of_small & 0x7FFFFF, fraction)

    # 3. Shift the exponent from the middle of float32 to that of float64. Zero stays zero. What is
    # not finite has the largest one, and NaN the bit that says that it raises no signal.
    is_zero = values == 0
    is_nan = values.isnan()
    wide_exponent = torch.where(is_zero, 0, exponent + (1023 - 127))
    wide_exponent = torch.where(values.isinf() | is_nan, 0x7FF, wide_exponent)
    fraction = torch.where(is_nan, fraction | 0x400000, fraction)

    # 4. Put them together.
    size = (wide_exponent << 52) | (fraction << 29)
    return torch.where(sign, size | torch.iinfo(torch.int64).min, size)
