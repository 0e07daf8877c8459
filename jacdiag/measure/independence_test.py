"""Test whether a matrix can be a draw of an init: whether its entries can be independent.

An init draws the entries of a matrix one by one, so that no direction of a matrix stands out.
Training adds matrices of low rank, so that some do. Both statistics look at the singular values,
after means and scales of rows and columns were taken off. They ask nothing about the distribution
that the entries came from, and a design that scales entire rows or columns (a fused matrix, a
padding row, a shared offset) changes neither.

1. The largest eigenvalue of the Gram matrix, against the Tracy-Widom law at the edge of the
   Marchenko-Pastur spectrum (I. M. Johnstone, Ann. Statist. 29, 2001), in the approximation of M.
   Chiani (J. Multivariate Anal. 129, 2014) by a shifted gamma distribution.
2. The sum of squared eigenvalues, which is the sum of squared correlations of rows, against a
   chi-squared distribution (J. R. Schott, Biometrika 92, 2005).

Orthogonal matrices and constant ones pass: nothing stands out in them. A table of sines fails, and
is no draw indeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.special import gammaincc
from torch import Tensor

from jacdiag.devices.packed_download import download

LEAST_SIDE = 8  # below, both laws are too far from the truth
MOST_SIDE = 256  # of the part that is looked at: its spectrum takes 5 ms
_HELD = 1 << 16  # numbers that wait on an accelerator before they are read
_ROUNDS = 3  # of scaling rows and columns in turn
_SHAPE, _SCALE, _SHIFT = 46.446, 0.186054, 9.84801  # gamma distribution for Tracy-Widom, beta = 1


@dataclass(frozen=True, kw_only=True)
class DrawTest:
    """How a matrix came out.

    Attributes:
        probability: upper bound of the chance that a draw of an init looks at least as ordered.
        largest: the largest eigenvalue; two matrices that share it are the same matrix.
    """

    probability: float
    largest: float


def can_be_tested(shape: torch.Size | tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape is a matrix that is wide enough.

    >>> can_be_tested((64, 64)), can_be_tested((64, 3))
    (True, False)
    >>> can_be_tested((64,)), can_be_tested((64, 1, 4))
    (False, False)
    """
    rows, columns = _sides(tuple(shape))
    return min(rows, columns) >= LEAST_SIDE


def examine_draw(tensor: Tensor) -> DrawTest | None:
    """Test whether the entries of a matrix can be independent.

    Args:
        tensor: a matrix, the kernel of a convolution, or a stack of matrices, of which the first is
            looked at.

    Returns:
        None if there is nothing to test: it is too small, not finite, or has no more than a value
        for each row and one for each column.

    Example:
        >>> drawn = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        >>> examine_draw(drawn).probability > 0.01
        True
        >>> examine_draw(drawn + torch.linspace(0, 1, 64)[:, None]) is None
        False
        >>> wave = torch.sin(torch.arange(64.0)[:, None] / 10 ** torch.linspace(0, 2, 32))
        >>> examine_draw(wave).probability < 1e-9
        True
    """
    return examine_draws([tensor])[0]


def examine_draws(tensors: Iterable[Tensor]) -> list[DrawTest | None]:
    """Test several matrices as `examine_draw` does; small ones share a download.

    Args:
        tensors: each is let go of before the next is taken, since it may come from a file.
    """
    # `map` holds no tensor while the next one is read: both may not fit into memory.
    results: list[DrawTest | None] = []
    waiting: list[tuple[int, Tensor]] = []  # place of a tensor, and the part that is looked at
    for look in map(_look_at, tensors):
        # 1. On a CPU there is nothing to wait for.
        if not isinstance(look, Tensor):
            results.append(look)
            continue

        # 2. On an accelerator a copy waits, which does not hold the tensor, until there is enough.
        waiting.append((len(results), look))
        results.append(None)
        if sum(part.numel() for _, part in waiting) >= _HELD:
            _test_waiting(waiting, results)
    _test_waiting(waiting, results)
    return results


def _look_at(tensor: Tensor) -> DrawTest | Tensor | None:
    """Return the result for a matrix on a CPU, else a copy of the part to look at; None if none."""
    # 1. Nothing to test.
    is_wide_enough = can_be_tested(tensor.shape)
    if not tensor.is_floating_point() or not is_wide_enough:
        return None

    # 2. On a CPU the part is tested at once.
    part = _part_of(tensor.detach())
    if part.device.type == "cpu":
        return _test(part)

    # 3. On an accelerator a copy of it waits, which does not hold the tensor.
    return part.clone()


def _test_waiting(waiting: list[tuple[int, Tensor]], results: list[DrawTest | None]) -> None:
    """Read the parts that wait in one download, and put the result of each into its place."""
    # 1. One download.
    places = [place for place, _ in waiting]
    parts = download([part for _, part in waiting])

    # 2. Test each part.
    for place, part in zip(places, parts, strict=True):
        results[place] = _test(part)
    waiting.clear()


def _test(part: Tensor) -> DrawTest | None:
    """Test the part of a matrix that is looked at, on the CPU."""
    matrix = _balanced(part.to(torch.float64))
    if matrix is None:
        return None

    # 1. The spectrum of independent entries, where centring has taken one row and one column.
    short, long = sorted(matrix.shape)
    rank, freedom = short - 1, long - 1
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = matrix @ matrix.T * (rank * freedom / (short * long))
    eigenvalues = torch.linalg.eigvalsh(gram)
    largest = float(eigenvalues[-1])

    # 2. The largest eigenvalue.
    first, second = math.sqrt(rank), math.sqrt(freedom)
    edge = (first + second) ** 2
    width = (first + second) * (1 / first + 1 / second) ** (1 / 3)
    beyond = max((largest - edge) / width + _SHIFT, 0.0)
    of_largest = float(gammaincc(_SHAPE, beyond / _SCALE))

    # 3. The sum of their squares.
    excess = max(float(eigenvalues.square().sum()) - rank * freedom**2, 0.0)
    of_squares = float(gammaincc(rank * (rank - 1) / 4, excess / (4 * freedom)))

    return DrawTest(probability=min(1.0, 2 * min(of_largest, of_squares)), largest=largest)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the sides of the matrix in a tensor."""
    if len(shape) < 2:
        return 0, 0

    if _is_stack(shape):
        return shape[1], shape[2]

    # A kernel has one row for each output.
    return shape[0], math.prod(shape[1:])


def _is_stack(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a stack of matrices, which has three wide sides."""
    if len(shape) != 3:
        return False

    return min(shape[1:]) >= LEAST_SIDE


def _part_of(tensor: Tensor) -> Tensor:
    """Return at most MOST_SIDE rows and columns of the matrix, on its device."""
    # 1. The first matrix of a stack, or the matrix that a kernel is.
    if _is_stack(tuple(tensor.shape)):
        matrix = tensor[0]
    else:
        matrix = tensor.flatten(1)

    # 2. Rows and columns at random, the same in each run.
    generator = torch.Generator().manual_seed(0)
    for side in (0, 1):
        size = matrix.shape[side]
        if size > MOST_SIDE:
            chosen = torch.randperm(size, generator=generator)[:MOST_SIDE].sort().values
            matrix = matrix.index_select(side, chosen.to(matrix.device))

    return matrix


def _balanced(matrix: Tensor) -> Tensor | None:
    """Take means and scales of rows and columns off; None if that leaves too little."""
    # 1. Leave padding out.
    if not bool(matrix.isfinite().all()):
        return None

    matrix = matrix[(matrix != 0).any(dim=1)]
    matrix = matrix[:, (matrix != 0).any(dim=0)]
    if min(matrix.shape) < LEAST_SIDE:
        return None
    if _is_sum_of_two_vectors(matrix):
        return None

    # 2. Scale first: the mean of a column would carry large rows into small ones.
    scaled = _scaled_repeatedly(matrix, centre=False)
    if scaled is None:
        return None
    return _scaled_repeatedly(scaled, centre=True)


def _scaled_repeatedly(matrix: Tensor, *, centre: bool) -> Tensor | None:
    """Return a matrix after all rounds of scaling; None if one of them leaves too little.

    Args:
        matrix: of one weight.
        centre: take the means off as well.
    """
    for _ in range(_ROUNDS):
        scaled = _scaled(matrix, centre)
        if scaled is None:
            return None

        matrix = scaled

    return matrix


def _is_sum_of_two_vectors(matrix: Tensor) -> bool:
    """Return whether a value for each row and one for each column make up a matrix."""
    centred = matrix - matrix.mean(dim=1, keepdim=True)
    centred = centred - centred.mean(dim=0, keepdim=True)
    # What is left of equal rows or equal columns is rounding.
    is_anything_left = bool(centred.abs().max() > 1e-5 * matrix.abs().max())
    return not is_anything_left


def _scaled(matrix: Tensor, centre: bool) -> Tensor | None:
    """Return a matrix with rows, and then columns, of std 1; None if one hardly varies.

    Args:
        matrix: to be scaled.
        centre: take the means off, too.
    """
    for side in (1, 0):
        mean = matrix.mean(dim=side, keepdim=True)
        scale = (matrix - mean).square().mean(dim=side, keepdim=True).sqrt()
        # A row or column that hardly varies would be scaled noise.
        if bool((scale < 1e-6 * scale.max()).any()):
            return None

        if centre:
            matrix = matrix - mean
        matrix = matrix / scale

    return matrix
