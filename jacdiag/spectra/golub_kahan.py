"""Batched Golub-Kahan-Lanczos bidiagonalisation, reorthogonalised in full, stopped by its own interval."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jacdiag.spectra.interval import PAD, Array, ritz_values, upper_ends
from jacdiag.spectra.operator import Operator
from jacdiag.spectra.solution import Solution, Stop


def top_singular(
    operator: Operator,
    *,
    tol: float = 0.05,
    confidence: float = 0.999,
    max_products: int = 200,
    generator: torch.Generator | None = None,
    decide: Callable[[float, float], bool] | None = None,
    early: bool = True,
    pad: float | None = None,
) -> Solution:
    """Largest singular value of every problem of an operator, with an interval.

    Args:
        operator: P problems (m, n).
        tol: stop when the interval of the maximum over problems has this relative width.
        confidence: of the upper end.
        max_products: budget.
        generator: of the random start (CPU). The upper end needs it: a warm start certifies nothing.
        decide: predicate on (lower, upper) of the maximum: the question that the norm is to answer is answered.
        early: stop as soon as `decide` says so, however wide the interval is; else go on to `tol`, and beyond `tol`
            until it says so.
        pad: rounding pad; that of the operator's dtype if not given.

    Returns:
        A `Solution`; running out of budget is a value of `stop`, not an exception.
    """
    pad = PAD[str(operator.dtype).removeprefix("torch.")] if pad is None else pad
    before = operator.products
    lanczos = _Bidiagonalisation(operator, generator)
    ends = _Ends(lanczos, 1.0 - confidence, pad)
    asked = early and decide is not None  # then any product may answer
    while True:
        lanczos.advance()
        finite, products = lanczos.finite, operator.products - before
        last = bool(lanczos.exact.all()) or products >= max_products
        if finite and (asked or last or ends.due(tol)):
            ends.update()
        stop = _stop(finite, lanczos.exact, ends.low, ends.high, tol, decide, early, products, max_products)
        if stop is None:
            continue
        top, low, high = ends.final(finite)
        return Solution(
            low, high, top, confidence, products, lanczos.steps, stop, stop is Stop.EXACT or _narrow(low, high, tol),
            lanczos.right, lanczos.alphas, lanczos.betas,
        )  # fmt: skip


def inherited(operator: Operator, vectors: Tensor, upper: Array, *, confidence: float, tol: float) -> Solution:
    """Ends that one product gives: |A v| / |v| from below, and from above what is known from another operator.

    Args:
        operator: P problems (m, n).
        vectors: (P, n), such as the top right vectors of an operator that is akin.
        upper: (P,) ends that hold with probability `confidence`.
        tol: relative width that counts as converged.
    """
    pad = PAD[str(operator.dtype).removeprefix("torch.")]
    unit = vectors / _norms(vectors).clamp_min(torch.finfo(vectors.dtype).tiny).unsqueeze(1).to(vectors)
    reached = _norms(operator.push(unit)).cpu().numpy()
    low, high = reached * (1 - pad), np.maximum(upper, reached) * (1 + pad)
    nothing = np.zeros((len(reached), 0))
    return Solution(
        low, high, reached, confidence, 1, 1, Stop.INHERITED, _narrow(low, high, tol), unit.unsqueeze(1),
        reached[:, None], nothing,
    )  # fmt: skip


_PATIENCE = 3


class _Ends:
    """The ends of every problem, kept up to date where they can still matter to the maximum.

    The upper end's event depends on the start only, so that the lowest upper end of all products holds. A problem whose
    upper end has come down to the largest lower end is settled: it is left alone until the end.
    """

    def __init__(self, lanczos: _Bidiagonalisation, eps: float, pad: float) -> None:
        self.lanczos, self.eps, self.pad = lanczos, eps, pad
        problems = lanczos.operator.problems
        self.low, self.high = np.zeros(problems), np.full(problems, np.inf)
        self.waited = 0

    def due(self, tol: float) -> bool:
        """Whether the interval may have come down to `tol`: a product seldom more than halves its width.

        Ends that are not computed are only wider: a wrong guess costs at most `_PATIENCE` products too many.
        """
        wide = self.high.max() > self.low.max() * (1 + tol * 2 ** (self.waited + 1))
        self.waited += 1
        return not wide or self.waited > _PATIENCE

    def update(self) -> None:
        lanczos, self.waited = self.lanczos, 0
        open_ = (self.high > self.low.max()) | (self.high == np.inf)
        alphas, betas = lanczos.alphas[open_], lanczos.betas[open_]
        top = ritz_values(alphas, betas)[:, 0]
        known = self.high[open_] / (1 + self.pad)
        upper = upper_ends(top, alphas, betas, lanczos.exact[open_], lanczos.operator.domain, self.eps, known)
        self.low[open_] = top * (1 - self.pad)
        self.high[open_] = upper * (1 + self.pad)

    def final(self, finite: bool) -> tuple[Array, Array, Array]:
        """Returns largest Ritz values, lower and upper ends of all problems."""
        if not finite:
            nothing = np.full_like(self.low, np.nan)
            return nothing, np.zeros_like(self.low), np.full_like(self.low, np.inf)
        top = ritz_values(self.lanczos.alphas, self.lanczos.betas)[:, 0]
        return top, top * (1 - self.pad), self.high


def _stop(
    finite: bool, exact: NDArray[np.bool_], low: Array, high: Array, tol: float,
    decide: Callable[[float, float], bool] | None, early: bool, products: int, budget: int,
) -> Stop | None:  # fmt: skip
    if not finite:
        return Stop.NON_FINITE
    lower, upper = float(low.max()), float(high.max())
    if bool(exact.all()):
        return Stop.EXACT
    decided = decide is not None and decide(lower, upper)
    if _narrow(low, high, tol) and (decide is None or decided):
        return Stop.WIDTH
    if early and decided:
        return Stop.DECIDED
    return Stop.BUDGET if products >= budget else None


def _narrow(low: Array, high: Array, tol: float) -> bool:
    """Whether the interval of the maximum over problems has the width asked for."""
    return bool(low.max() > 0 and high.max() <= low.max() * (1 + tol))


class _Bidiagonalisation:
    """A v_j = beta_{j-1} u_{j-1} + alpha_j u_j, A^T u_j = alpha_j v_j + beta_j v_{j+1}, for P problems at once.

    A coefficient below 10 u sqrt(max(m, n)) of the largest one seen is a breakdown: it is set to 0 and the problem is
    frozen, because an invariant subspace has been found.
    """

    def __init__(self, operator: Operator, generator: torch.Generator | None) -> None:
        self.operator = operator
        shape = (operator.problems, operator.domain)
        start = torch.randn(shape, generator=generator).to(operator.device, operator.dtype)
        self.v = start / _norms(start).unsqueeze(1).to(start)
        self.u = torch.zeros(operator.problems, operator.codomain, dtype=operator.dtype, device=operator.device)
        self.right = _stored(self.v.new_empty(operator.problems, 0, operator.domain), 0, self.v)
        self.left = self.u.new_empty(operator.problems, 0, operator.codomain)
        self.steps = 0
        self.alphas = np.zeros((operator.problems, 0))
        self.betas = np.zeros((operator.problems, 0))
        self.exact = np.zeros(operator.problems, dtype=bool)
        self.scale = np.zeros(operator.problems)
        largest = max(operator.domain, operator.codomain)
        self.tiny = 10 * torch.finfo(operator.dtype).eps / 2 * largest**0.5

    def step(self) -> None:
        """A product with A and one with A^T."""
        self.advance()
        self.advance()

    def advance(self) -> None:
        """The next product: A v_k, or A^T u_k."""
        if self.betas.shape[1] < self.steps:
            self._pull()
        else:
            self._push()

    def _push(self) -> None:
        k, operator = self.steps, self.operator
        w = operator.push(self.v)
        if k:
            w -= self._column(self.betas[:, -1]) * self.u
        w = _reorthogonalised(w, self.left, k)
        alpha = self._coefficient(w, last=k >= operator.codomain)
        self.u = self._direction(w, alpha)
        self.left = _stored(self.left, k, self.u)
        self.alphas = np.concatenate([self.alphas, alpha[:, None]], axis=1)
        self.steps += 1

    def _pull(self) -> None:
        k, operator, alpha = self.steps, self.operator, self.alphas[:, -1]
        z = operator.pull(self.u)
        if k == 1:
            self._check_adjoint(alpha, z)
        z = z - self._column(alpha) * self.v
        z = _reorthogonalised(z, self.right, k)
        beta = self._coefficient(z, last=k >= operator.domain)
        self.v = self._direction(z, beta)
        self.right = _stored(self.right, k, self.v)
        self.betas = np.concatenate([self.betas, beta[:, None]], axis=1)

    def _check_adjoint(self, alpha: Array, pulled: Tensor) -> None:
        """<v, A^T u> = alpha = <A v, u>, for nothing; where A v = 0, one more product tells whether A^T is 0 too.

        A backward marked @once_differentiable is cut off in silence when it is differentiated, and A v comes out too
        small: without this check a wrong norm would be certified.
        """
        if not alpha.any() and np.isfinite(alpha).all():
            probe = torch.ones_like(self.u).cumsum(1).cos()
            wrong = bool(self.operator.pull(probe).abs().max() > 0)
        else:
            inner = (self.v.double() * pulled.double()).sum(1).cpu().numpy()
            size = torch.linalg.vector_norm(pulled, dim=1, dtype=torch.float64).cpu().numpy()
            wrong = bool((np.abs(inner - alpha) > 1e-3 * np.maximum(size, alpha)).any())
        if wrong:
            raise RuntimeError(
                "J u and J^T w do not belong to one matrix: a backward in it has no derivative (@once_differentiable)"
            )

    def _coefficient(self, w: Tensor, last: bool) -> Array:
        """The norm of a new direction; 0, and the problem is exact from here on, at a breakdown."""
        value = _norms(w).cpu().numpy()
        value[self.exact] = 0.0
        self.scale = np.maximum(self.scale, np.where(np.isfinite(value), value, self.scale))
        broken = (value <= self.tiny * self.scale) | last
        value[broken] = 0.0
        self.exact |= broken
        return value

    @property
    def finite(self) -> bool:
        """Whether the last coefficients are."""
        return bool(np.isfinite(self.alphas[:, -1]).all() and np.isfinite(self.betas[:, -1:]).all())

    def _direction(self, w: Tensor, norm: Array) -> Tensor:
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0)
        return w * self._column(inverse)

    def _column(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self.v).unsqueeze(1)


_CHUNK = 1024
_SMALL = 1e-12


def _norms(w: Tensor) -> Tensor:
    """Norms of the rows of (P, n) in float64.

    Chunks are summed in the dtype of w where they divide n, for speed; not where a square might leave its range.
    """
    if w.shape[1] and w.shape[1] % _CHUNK == 0:
        chunks = torch.linalg.vector_norm(w.reshape(w.shape[0], -1, _CHUNK), dim=2)
        found = torch.linalg.vector_norm(chunks, dim=1, dtype=torch.float64)
        if bool(((found > _SMALL) & (found < 1 / _SMALL)).all()):
            return found
    return torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)


def _stored(basis: Tensor, k: int, vector: Tensor) -> Tensor:
    """Writes vector k into a (P, capacity, n) basis, which doubles when full."""
    if k == basis.shape[1]:
        grown = basis.new_empty(basis.shape[0], max(8, 2 * k), basis.shape[2])
        grown[:, :k] = basis[:, :k]
        basis = grown
    basis[:, k] = vector
    return basis


def _reorthogonalised(w: Tensor, basis: Tensor, k: int) -> Tensor:
    """Classical Gram-Schmidt against the first k vectors, again where the first pass took much away.

    Rounding leaves what is u |before| / |after| of the result inside the basis, so that one pass is enough where the
    norm did not fall much, and two always are (Daniel, Gragg, Kaufman, Stewart 1976). One alone is measurably not.
    """
    if k == 0:
        return w
    span, row = basis[:, :k], w.unsqueeze(1)  # row times matrix: ten times faster on a CPU than matrix times column
    before = _norms(w)
    row = torch.baddbmm(row, torch.bmm(row, span.transpose(1, 2)), span, alpha=-1)
    if not bool((_norms(row.squeeze(1)) >= _MUCH * before).all()):
        row = torch.baddbmm(row, torch.bmm(row, span.transpose(1, 2)), span, alpha=-1)
    return row.squeeze(1)


_MUCH = 0.5**0.5
