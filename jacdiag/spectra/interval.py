"""From the coefficients of a bidiagonalisation to an interval that holds the spectral norm.

The lower end is the largest singular value of the bidiagonal matrix. The upper end is probabilistic, in the manner of
van Dorsselaer, Hochstenbach and van der Vorst (2000): a start drawn uniformly from the sphere has, but for an event of
probability eps, a component of at least delta along the top singular vector, and the coefficients limit how far out
such a component can have stayed unseen. It needs no further product.

They use the last orthonormal polynomial alone, delta^2 p_k(x)^2 <= 1. All of them together say more at the same price:
the spectral measure of the start has an atom of at least delta^2 at x = norm^2, and no measure with these coefficients
has a larger atom at x than the Christoffel function 1 / sum_{j<=k} p_j(x)^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Relative rounding of a whole solve; the ends are moved outwards by it.
PAD = {"float32": 1e-4, "float64": 64 * 2.0**-53}


def bidiagonal(alphas: Array, betas: Array) -> Array:
    """Stacks (P, k) coefficients into (P, k, k) upper bidiagonal matrices; betas[:, j] stands right of alphas[:, j]."""
    k = alphas.shape[1]
    matrix = np.zeros((*alphas.shape, k))
    matrix[:, np.arange(k), np.arange(k)] = alphas
    matrix[:, np.arange(k - 1), np.arange(1, k)] = betas[:, : k - 1]
    return matrix


def ritz_values(alphas: Array, betas: Array) -> Array:
    """Singular values of the bidiagonal matrices, (P, k), largest first."""
    return np.asarray(np.linalg.svd(bidiagonal(alphas, betas), compute_uv=False), dtype=np.float64)


def upper_ends(
    theta: Array,
    alphas: Array,
    betas: Array,
    exact: NDArray[np.bool_],
    domain: int,
    eps: float,
    known: Array | None = None,
) -> Array:
    """Returns the upper end per problem: the root x of sum_{j<=k} p_j(x)^2 = delta^-2, as sqrt(x).

    p_j are the orthonormal polynomials of the start's spectral measure, whose Jacobi matrix is B^T B; delta = eps
    sqrt(pi / (2 n)).

    Args:
        theta: (P, k) Ritz values; alphas, betas: (P, k) coefficients.
        exact: (P,) problems whose factorisation broke down: an invariant subspace, theta_1 is the norm.
        domain: n, the size of the domain of one problem.
        eps: probability of failure.
        known: (P,) upper ends of fewer steps, or inf. They hold as well, since the event is the start's alone: the
            lower of the two is returned, and found in less time. One that theta_1 has passed is known to be false.
    """
    top = theta[:, 0].copy()
    open_ = ~exact & (top > 0)
    if not open_.any():
        return top
    scale = top[open_, None]
    gap = np.maximum(1.0 - (theta[open_, 1:] / scale) ** 2, 0.0)
    a, b = alphas[open_] / scale, betas[open_] / scale  # in units of theta_1: x = 1 + s, and nothing overflows
    diagonal, off = a**2, a * b
    diagonal[:, 1:] += b[:, :-1] ** 2
    right = -math.log(eps * math.sqrt(math.pi / (2 * domain)))
    logs = np.log(off).sum(1)

    def last(t: Array) -> tuple[Array, Array]:  # log p_k, from the Ritz values
        s = np.exp(t)[:, None]
        return t + np.log(s + gap).sum(1) - logs - right, 1.0 + (s / (s + gap)).sum(1)

    def every(t: Array) -> tuple[Array, Array]:  # half the log of the sum of squares
        s = np.exp(t)
        value, slope = _half_log_sum(1.0 + s, diagonal, off)
        return value - right, slope * s

    # Both are convex in t = log s and rise; log p_k is at least k t - logs, and the sum at least its last term. So each
    # begins at or above its root, and Newton's method comes down to it and never passes it. From a known end it does
    # not move where that is the lower one.
    known = np.full_like(top, np.inf) if known is None else np.where(known > top, known, np.inf)
    if np.isfinite(known[open_]).all():
        t = np.log((known[open_] / scale[:, 0]) ** 2 - 1.0)
    else:
        t = _newton(last, (right + logs) / theta.shape[1])
    t = _newton(every, t)
    top[open_] *= np.sqrt(1.0 + np.exp(t))
    return np.minimum(top, known)


def _newton(function: Callable[[Array], tuple[Array, Array]], t: Array) -> Array:
    """Comes down to the roots of convex functions from above; where there is no root, to `_LOWEST`."""
    t = np.clip(t, _LOWEST, _HIGHEST)
    for _ in range(60):
        value, slope = function(t)
        change = np.where(value > 0, value, 0.0) / np.maximum(slope, 1e-30)
        t = np.maximum(t - change, _LOWEST)
        if float((change * (t > _LOWEST)).max()) < 1e-12:
            break
    return t


_LOWEST, _HIGHEST = -80.0, 700.0  # logs of an s that is nothing beside 1, and of the largest number


def _half_log_sum(x: Array, diagonal: Array, off: Array) -> tuple[Array, Array]:
    """log(sum_j p_j(x)^2) / 2 and its derivative, by the three-term recurrence, which is stable outside the spectrum.

    Args:
        x: (P,) points; diagonal, off: (P, k) of the Jacobi matrix, off[:, j] right of diagonal[:, j].
    """
    before, p = np.zeros_like(x), np.ones_like(x)
    d_before, d = np.zeros_like(x), np.zeros_like(x)
    total, d_total, logs = np.ones_like(x), np.zeros_like(x), np.zeros_like(x)
    back: Array | float = 0.0
    for j in range(off.shape[1]):
        shifted, here = x - diagonal[:, j], off[:, j]
        before, p, d_before, d = (
            p, (shifted * p - back * before) / here, d, (p + shifted * d - back * d_before) / here,
        )  # fmt: skip
        back = here
        size = np.maximum(np.abs(p), np.abs(d))
        if size.max() > _LARGE:  # a problem is scaled down where it grows beyond what squares bear
            scale = np.where(size > _LARGE, size, 1.0)
            before, p, d_before, d = before / scale, p / scale, d_before / scale, d / scale
            total, d_total, logs = total / scale / scale, d_total / scale / scale, logs + np.log(scale)
        total += p * p
        d_total += p * d
    return np.log(total) / 2 + logs, d_total / total


_LARGE = 1e100
