"""From the coefficients of a bidiagonalisation to an interval that holds the spectral norm.

The lower end is the largest singular value of the bidiagonal matrix. The upper end is
probabilistic, in the manner of van Dorsselaer, Hochstenbach and van der Vorst (2000): a start drawn
uniformly from the sphere has, but for an event of probability eps, a component of at least delta
along the top singular vector, and the coefficients limit how far out such a component can have
stayed unseen. It needs no further product.

They use the last orthonormal polynomial alone, delta^2 p_k(x)^2 <= 1. All of them together say more
at the same price: the spectral measure mu of the start has an atom of at least delta^2 at x =
norm^2, and no measure with these coefficients has a larger atom at x than the Christoffel function
1 / sum_{j<=k} p_j(x)^2.

The start u_1 lies on the left, so that mu is its spectral measure with A A^T. Every product moves
both ends. After A v_k the moments 0..2k of mu are known, which are those of p_0..p_k. After A^T u_k
only 0..2k-1 are, which is one more than p_0..p_{k-1} can use; but mu lies on t >= 0, so that d nu =
t d mu / alpha_1^2 is a probability measure as well, its moments 0..2k-2 are known, its Jacobi
matrix is B B^T (it is the measure of v_1 = A^T u_1 / alpha_1), and its atom at x is at least
delta^2 x / alpha_1^2. Hence delta^2 x / alpha_1^2 <= 1 / sum_{j<k} q_j(x)^2 with the q_j of nu.
From below, A^T U_k = V_k B_k (k x k) after A^T u_k, and after A v_k also A V_k = U_{k+1} [B_k,
beta_k e_k]^T, whose norm is the larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jacdiag.devices.accelerators import has_float64

Array = NDArray[np.float64]
Real = Any  # a number, or an array of one number for each problem

# Relative rounding of an entire solve; the ends are moved outwards by it.
PAD = {"float32": 1e-4, "float64": 64 * 2.0**-53}
# The same on a device without float64, where norms and inner products of vectors are rounded in
# float32, too. A sum of a million terms in pairs is off by 20 eps, 2e-6. The order of sums of such
# a device is not documented, so the pad is five times as wide.
PAD_WITHOUT_FLOAT64 = 5e-4


def rounding_pad(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative rounding of an entire solve, by which the ends are moved outwards.

    Args:
        dtype: of the products, float32 or float64.
        device: where they run.

    Example:
        >>> rounding_pad(torch.float32, torch.device("cpu"))
        0.0001
        >>> rounding_pad(torch.float32, torch.device("mps"))
        0.0005
    """
    if not has_float64(device):
        return PAD_WITHOUT_FLOAT64
    return PAD[str(dtype).removeprefix("torch.")]


def bidiagonal(alphas: Array, betas: Array) -> Array:
    """Stack coefficients into upper bidiagonal matrices; betas[:, j] stands right of alphas[:, j].

    Args:
        alphas: (P, k) diagonals.
        betas: (P, k - 1) after A^T u_k, or (P, k) after A v_k.

    Returns:
        (P, k, k), or (P, k, k + 1).
    """
    k, last = alphas.shape[1], betas.shape[1]
    matrix = np.zeros((*alphas.shape, last + 1))
    matrix[:, np.arange(k), np.arange(k)] = alphas
    matrix[:, np.arange(last), np.arange(1, last + 1)] = betas
    return matrix


def ritz_values(alphas: Array, betas: Array) -> Array:
    """Return the singular values of the bidiagonal matrices, (P, k), largest first."""
    return np.asarray(np.linalg.svd(bidiagonal(alphas, betas), compute_uv=False), dtype=np.float64)


def largest_ritz_values(alphas: Array, betas: Array) -> Array:
    """Return the largest singular values of the bidiagonal matrices, (P,).

    They are the roots of the largest eigenvalues of B B^T. Of many problems these take half the
    time of all singular values. They are as precise: what squaring loses, it loses of the small
    ones.

    Args:
        alphas: (P, k) diagonals.
        betas: (P, k - 1) after A^T u_k, or (P, k) after A v_k.
    """
    # 1. In units of the largest coefficient, so that no square overflows.
    matrix = bidiagonal(alphas, betas)
    scale = matrix.max(axis=(1, 2), initial=0.0)
    matrix /= np.where(scale > 0, scale, 1.0)[:, None, None]

    # 2. The largest eigenvalue.
    squares = np.linalg.eigvalsh(matrix @ matrix.transpose(0, 2, 1))
    return np.asarray(scale * np.sqrt(squares[:, -1].clip(0.0)), dtype=np.float64)


def upper_ends(
    top: Array,
    alphas: Array,
    betas: Array,
    exact: NDArray[np.bool_],
    codomain: int,
    eps: float,
    known: Array | None = None,
) -> Array:
    """Return the upper end per problem: the root x of sum_j p_j(x)^2 = delta^-2, as sqrt(x).

    p_j are the orthonormal polynomials of the start's spectral measure, whose Jacobi matrix is B^T
    B; delta = eps sqrt(pi / (2 m)). Where the last product was A^T u_k, q_j and B B^T stand in
    their places, and x / alpha_1^2 before the sum (see above).

    Args:
        top: (P,) largest Ritz values.
        alphas: (P, k) coefficients.
        betas: (P, k - 1) or (P, k) coefficients.
        exact: (P,) problems whose factorisation broke down: an invariant subspace, `top` is the
            norm.
        codomain: m, the size of the start of one problem.
        eps: probability of failure.
        known: (P,) upper ends of fewer products, or inf. They hold as well, since the event is the
            start's alone: the lower of the two is returned, and found in less time. One that `top`
            has passed is known to be false.
    """
    # 1. The problems whose norm is not known exactly.
    top = top.copy()
    open_ = ~exact & (top > 0)
    if not open_.any():
        return top

    # 2. Their coefficients in units of `top`: x = 1 + s, and nothing overflows.
    scale = top[open_, None]
    measure = _measure_of(alphas[open_] / scale, betas[open_] / scale, codomain, eps)
    diagonal, off, right, weight = measure

    # 3. The function whose root is looked for: half the log of the sum of squares, and of x before
    # it.
    def half_log_excess(t: Array) -> tuple[Array, Array]:
        s = np.exp(t)
        value, slope = _half_log_sum(1.0 + s, diagonal, off)
        return value + weight * np.log1p(s) - right, (slope + weight / (1.0 + s)) * s

    # 4. Where to begin. The function is convex in t = log s, and rises. No zero of a polynomial is
    # above `top`, so that the last polynomial is at least s^degree / prod off. There, or at a known
    # end, Newton's method begins at or above the root, comes down to it and never passes it. From a
    # known end it does not move where that is the lower one.
    if known is None:
        known = np.full_like(top, np.inf)
    else:
        known = np.where(known > top, known, np.inf)
    t = (right + np.log(off).sum(1)) / (off.shape[1] + weight)
    with np.errstate(divide="ignore"):
        t = np.minimum(t, np.log((known[open_] / scale[:, 0]) ** 2 - 1.0))

    # 5. The root, back in the units of the norm.
    t = _newton(half_log_excess, t)
    top[open_] *= np.sqrt(1.0 + np.exp(t))
    return np.minimum(top, known)


def are_upper_ends(
    x: Array, alphas: Array, betas: Array, codomain: int, eps: float
) -> NDArray[np.bool_]:
    """Return which numbers are no lower than the upper ends that `upper_ends` would find.

    That takes one look at the polynomials, where the ends themselves take several.

    Args:
        x: (P,) numbers above 0.
        alphas: (P, k) coefficients.
        betas: (P, k - 1) or (P, k) coefficients, none of them 0.
        codomain: m, the size of the start of one problem.
        eps: probability of failure.

    Example:
        >>> alphas, betas = np.array([[1.0, 1.0]]), np.array([[0.5]])
        >>> top, exact = largest_ritz_values(alphas, betas), np.array([False])
        >>> end = upper_ends(top, alphas, betas, exact, 9, 1e-3)
        >>> [are_upper_ends(x * end, alphas, betas, 9, 1e-3).item() for x in (0.99, 1.01)]
        [False, True]
    """
    # 1. The polynomials in units of x, at 1. The quotient of two that follow each other is a pivot
    # of I less the Jacobi matrix. All are above 0 where x lies above the zeros of all polynomials.
    diagonal, off, right, _ = _measure_of(alphas / x[:, None], betas / x[:, None], codomain, eps)
    polynomial = total = np.ones_like(x)
    pivot, off_before = np.ones_like(x), np.zeros_like(x)
    is_above = np.ones_like(x, dtype=bool)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        for diagonal_j, off_j in zip(diagonal.T, off.T, strict=True):
            pivot = 1.0 - diagonal_j - off_before**2 / pivot
            is_above &= pivot > 0
            polynomial = polynomial * pivot / off_j
            total = total + polynomial**2
            off_before = off_j

        # 2. Their squares add up to enough at the upper end and above it.
        return np.asarray(is_above & (np.log(total) / 2 >= right))


def _measure_of(
    alphas: Array, betas: Array, codomain: int, eps: float
) -> tuple[Array, Array, Array | float, float]:
    """Return what an upper end is computed from, in the units of the coefficients.

    Returns:
        The diagonal of the Jacobi matrix and the numbers right of it: of B B^T after A^T u_k, of
        B^T B after A v_k. Then half the log of what the squares of the polynomials have to add up
        to, and how many times the log of x is added to half of their own.
    """
    right: Array | float = -math.log(eps * math.sqrt(math.pi / (2 * codomain)))
    is_half_step = betas.shape[1] < alphas.shape[1]
    if is_half_step:
        diagonal, off = alphas[:, :-1] ** 2 + betas**2, betas * alphas[:, 1:]
        return diagonal, off, right + np.log(alphas[:, 0]), 0.5

    diagonal, off = alphas**2, alphas * betas
    diagonal[:, 1:] += betas[:, :-1] ** 2
    return diagonal, off, right, 0.0


def _newton(function: Callable[[Array], tuple[Array, Array]], t: Array) -> Array:
    """Come down to the roots of convex functions from above; without a root, to `_LOWEST`."""
    t = np.clip(t, _LOWEST, _HIGHEST)
    for _ in range(60):
        value, slope = function(t)
        change = np.where(value > 0, value, 0.0) / np.maximum(slope, 1e-30)
        t = np.maximum(t - change, _LOWEST)
        if float((change * (t > _LOWEST)).max()) < _CLOSE:
            break
    return t


_CLOSE = 1e-7  # a change: each is about the square of the one before, so that the next rounds to 0
_LOWEST, _HIGHEST = (
    -80.0,
    700.0,
)  # logs of an s that is nothing next to 1, and of the largest number


def _half_log_sum(x: Array, diagonal: Array, off: Array) -> tuple[Array, Array]:
    """Return log(sum_j p_j(x)^2) / 2 and its derivative.

    Args:
        x: (P,) points.
        diagonal: (P, k) diagonal of the Jacobi matrix.
        off: (P, k) of the Jacobi matrix, off[:, j] right of diagonal[:, j].
    """
    # 1. Many problems are solved at once, and those that divide by zero: a float cannot.
    if len(x) > _FEW or not off.all():
        total, d_total, logs = _sum_of_squares(x, list(diagonal.T), list(off.T))
        return np.log(total) / 2 + logs, d_total / total

    # 2. Few are solved one by one: numbers are added ten times faster than arrays of one number.
    sums = np.array(
        [
            _sum_of_squares(*problem)
            for problem in zip(x.tolist(), diagonal.tolist(), off.tolist(), strict=True)
        ]
    )
    total, d_total, logs = sums.T
    return np.log(total) / 2 + logs, d_total / total


def _sum_of_squares(x: Real, diagonal: list[Real], off: list[Real]) -> tuple[Real, Real, Real]:
    """Return sum_j p_j(x)^2 / c^2, half of its derivative, and log c.

    The three-term recurrence that gives the polynomials is stable outside the spectrum.

    Args:
        x: a point, or (P,) points.
        diagonal: the k numbers on the diagonal, each as x is.
        off: the k numbers right of them.
    """
    # p is p_j(x), d its derivative; `before` are those of j - 1.
    unit = x * 0.0 + 1.0
    p, p_before = unit, 0.0 * unit
    d, d_before = p_before, p_before
    total, d_total, log_scale = unit, p_before, p_before
    off_before = p_before
    for diagonal_j, off_j in zip(diagonal, off, strict=True):
        # 1. The next polynomial.
        shifted = x - diagonal_j
        p_next = (shifted * p - off_before * p_before) / off_j
        d_next = (p + shifted * d - off_before * d_before) / off_j
        p_before, p = p, p_next
        d_before, d = d, d_next
        off_before = off_j

        # 2. All are scaled down where they grow beyond what can be squared.
        scale = _scale_of(p, d)
        if scale is not None:
            p, p_before = p / scale, p_before / scale
            d, d_before = d / scale, d_before / scale
            total = total / scale / scale
            d_total = d_total / scale / scale
            log_scale = log_scale + np.log(scale)

        # 3. The sums.
        total = total + p * p
        d_total = d_total + p * d
    return total, d_total, log_scale


def _scale_of(p: Real, d: Real) -> Real | None:
    """Return what a polynomial and its derivative are to be divided by, None where they are small.

    Of many, those that are small are divided by 1.
    """
    # 1. One problem.
    if isinstance(p, float):
        size = max(abs(p), abs(d))
        return size if size > _LARGE else None

    # 2. Many.
    sizes = np.maximum(np.abs(p), np.abs(d))
    return np.where(sizes > _LARGE, sizes, 1.0) if sizes.max() > _LARGE else None


_LARGE = 1e100
_FEW = 16
