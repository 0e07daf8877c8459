"""Exact references for small problems: the entire Jacobian, and its norms by a dense SVD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Jacobian of `fn` at `x` as an (m, n) matrix, in the dtype of x, row by row."""
    jacobian: Tensor = torch.func.jacrev(fn)(x)
    return jacobian.reshape(-1, x.numel())


def dense_norm(fn: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the spectral norm of the Jacobian by a dense SVD.

    Its cost grows as the cube of x.numel().

    >>> round(dense_norm(lambda x: 3 * x, torch.ones(2, 2, dtype=torch.float64)), 12)
    3.0
    """
    return float(torch.linalg.svdvals(dense_jacobian(fn, x).double())[0])
