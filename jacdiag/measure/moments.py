"""The moments of tensors: mean, std, kurtosis and ends of all their numbers, in one pass.

On an accelerator the sums of several tensors are read in one download.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download

CHUNK = 1 << 18
"""Numbers of a piece: in float64 it stays in a core's cache."""

TINY = 1e-30
"""No generator returns a number this close to zero, except zero.

Samples in float32 have steps of 2^-24 or 2^-32, and the smallest constant of a published init is
1e-6. Memory that nobody wrote to is full of such numbers: integers, read as float32.
"""

_FIGURES = 4  # tensors of each piece


@dataclass(frozen=True)
class Moments:
    """Figures of a tensor in one pass.

    Attributes:
        count, mean, std, kurtosis: of the numbers; the std is that of the population.
        largest: largest magnitude.
        zero_rows: rows of a table that are exactly zero.
        tiny: numbers closer to zero than `TINY`, and not zero.
        furthest: largest distance from the mean.
        is_orthogonal: it is a matrix whose vectors stand at right angles, and have one length.
    """

    count: int
    mean: float
    std: float
    kurtosis: float
    largest: float
    zero_rows: int
    tiny: int = 0
    furthest: float = 0.0
    is_orthogonal: bool = False


def std_of(tensor: Tensor, correction: int = 0) -> float:
    """Return the std over all elements in float64; NaN if there are too few.

    The tensor is read in pieces, without a copy of it in float64.
    """
    if tensor.numel() <= correction:
        return math.nan

    measured = moments(tensor.detach())
    return measured.std * math.sqrt(measured.count / (measured.count - correction))


def moments(tensor: Tensor, table: bool = False) -> Moments:
    """Return the figures of a tensor, in float64, piece by piece.

    Args:
        tensor: any shape.
        table: leave out the rows that are exactly zero.
    """
    return read_all([MomentSums(tensor, table)])[0]


def read_all(all_sums: Sequence[MomentSums]) -> list[Moments]:
    """Return the moments of several tensors; an accelerator is waited for once."""
    figures = download(list(chain.from_iterable(sums.figures for sums in all_sums)))

    # Each takes the figures that it has asked for.
    measured = []
    begin = 0
    for sums in all_sums:
        end = begin + len(sums.figures)
        measured.append(sums.moments(figures[begin:end]))
        begin = end
    return measured


class MomentSums:
    """The sums that the moments of a tensor follow from, on its device.

    The tensor itself is not held.

    Args:
        tensor: any shape.
        table: leave out the rows that are exactly zero.

    Attributes:
        figures: to be read from the device and passed to `moments`.
    """

    def __init__(self, tensor: Tensor, table: bool = False) -> None:
        """Launch the sums; see the class for the arguments."""
        self.count = 0
        self.zero_rows = 0
        self.figures: list[Tensor] = []
        if tensor.dim() > 1:
            flat = tensor.reshape(-1, tensor.shape[-1])
        else:
            flat = tensor.reshape(1, -1)
        rows = max(1, CHUNK // max(1, flat.shape[1]))
        # Powers are summed around a first guess of the mean, which keeps their digits.
        shift = in_float64(flat[0, : min(64, flat.shape[1])]).mean()

        # Sums of powers over the pieces, and their ends.
        for piece in flat.split(rows):
            if table:
                not_zero = piece[(piece != 0).any(dim=1)]
                self.zero_rows += piece.shape[0] - not_zero.shape[0]
                piece = not_zero
            if not piece.numel():
                continue

            # The ends are those of the stored numbers, the powers those of float64.
            ends = torch.aminmax(piece)
            centred = in_float64(piece.flatten(), copy=True).sub_(shift)
            square = centred * centred
            powers = centred.sum(), centred @ centred, square @ centred, square @ square
            self.figures += [torch.stack(powers), ends.min, ends.max, _count_tiny(piece)]
            self.count += piece.numel()

        # A table that holds zeros alone has no figures.
        if self.count:
            self.figures += [shift, _is_orthogonal(tensor)]

    def moments(self, figures: Sequence[Tensor]) -> Moments:
        """Return the moments.

        Args:
            figures: those of the attribute, on the CPU.
        """
        if not self.count:
            return Moments(0, 0.0, 0.0, 0.0, 0.0, self.zero_rows)

        # 1. Add up the pieces.
        *of_pieces, shift, is_orthogonal = figures
        sums = torch.zeros(4, dtype=torch.float64)
        tiny = 0
        low, high = math.inf, -math.inf
        for place in range(0, len(of_pieces), _FIGURES):
            powers, least, largest, tiny_of_piece = of_pieces[place : place + _FIGURES]
            sums += powers
            low, high = min(low, float(least)), max(high, float(largest))
            tiny += int(tiny_of_piece)

        # 2. Central moments from them.
        m1, m2, m3, m4 = (float(x) / self.count for x in sums)
        variance = max(m2 - m1 * m1, 0.0)
        fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
        kurtosis = fourth / variance**2 if variance > 0 else 0.0
        mean = m1 + float(shift)
        return Moments(
            self.count,
            mean,
            math.sqrt(variance),
            kurtosis,
            largest=max(abs(low), abs(high)),
            zero_rows=self.zero_rows,
            tiny=tiny,
            furthest=max(high - mean, mean - low),
            is_orthogonal=bool(is_orthogonal),
        )


def _count_tiny(piece: Tensor) -> Tensor:
    """Return how many numbers are closer to zero than `TINY`, and not zero."""
    # The smallest number of float16 is 6e-8.
    if piece.dtype == torch.float16:
        return torch.tensor(0)

    # Zeros are counted only where there is something to count, if a look costs nothing.
    close = (piece.abs() < TINY).sum()
    if close.device.type == "cpu" and not bool(close):
        return close

    return close - (piece == 0).sum()


def _is_orthogonal(matrix: Tensor) -> Tensor:
    """Return whether vectors of the shorter side stand at right angles and have one length."""
    if matrix.dim() != 2 or min(matrix.shape) < 3:
        return torch.tensor(False)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T

    # Sixteen of them are enough.
    rows = in_float64(matrix[: min(16, matrix.shape[0])])
    gram = rows @ rows.T
    scale = gram.diagonal().mean()
    expected = scale * torch.eye(len(rows), dtype=gram.dtype, device=gram.device)
    error = (gram - expected).abs().max()
    return (scale > 0) & (error < 1e-3 * scale)
