"""From the coefficients of a bidiagonalisation to an interval that holds the spectral norm.

The lower end is the largest singular value of the bidiagonal matrix. The upper end is the probabilistic bound of van
Dorsselaer, Hochstenbach and van der Vorst (2000): with a start drawn uniformly from the sphere, the Lanczos polynomial
would be larger than it is, but for an event of probability eps, if the norm were above the bound. It needs the same
coefficients and no further product.
"""

from __future__ import annotations

import math

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


def upper_ends(theta: Array, alphas: Array, betas: Array, exact: NDArray[np.bool_], domain: int, eps: float) -> Array:
    """Returns the upper end per problem: theta_1 sqrt(1 + s).

    s is the root of log s + sum_{j>=2} log(s + 1 - theta_j^2 / theta_1^2) = sum_j log(alpha_j beta_j / theta_1^2)
    - log delta, with delta = eps sqrt(pi / (2 n)).

    Args:
        theta: (P, k) Ritz values; alphas, betas: (P, k) coefficients.
        exact: (P,) problems whose factorisation broke down: an invariant subspace, theta_1 is the norm.
        domain: n, the size of the domain of one problem.
        eps: probability of failure.
    """
    top = theta[:, 0].copy()
    open_ = ~exact & (top > 0)
    if not open_.any():
        return top
    ratio = (theta[open_] / top[open_, None]) ** 2
    gap = np.maximum(1.0 - ratio[:, 1:], 0.0)
    delta = eps * math.sqrt(math.pi / (2 * domain))
    logs = np.log(alphas[open_]) + np.log(betas[open_]) - 2 * np.log(top[open_, None])
    right = logs.sum(1) - math.log(delta)
    k = theta.shape[1]
    # In t = log s the left side is convex, rises with slope 1 to k and is at least k t: from t = right / k, which is
    # therefore not below the root, Newton's method comes down to it and never passes it.
    t = right / k
    for _ in range(60):
        s = np.exp(np.minimum(t, 700.0))[:, None]
        change = (t + np.log(s + gap).sum(1) - right) / (1.0 + (s / (s + gap)).sum(1))
        t -= change
        if float(np.abs(change).max()) < 1e-12:
            break
    top[open_] *= np.sqrt(1.0 + np.exp(np.minimum(t, 700.0)))
    return top
