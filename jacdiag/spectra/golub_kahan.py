"""Batched Golub-Kahan-Lanczos bidiagonalisation, reorthogonalised in full and twice, stopped by its own interval."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jacdiag.report.schema import Interval, PerToken, TokenAt
from jacdiag.spectra.interval import PAD, Array, bidiagonal, ritz_values, upper_ends
from jacdiag.spectra.operator import Operator


class Stop(enum.Enum):
    """Why a solver stopped. `sentence` says it to a person."""

    WIDTH = "the interval is as narrow as asked"
    DECIDED = "the rules are decided"
    EXACT = "an invariant subspace was found: the value is exact up to rounding"
    BUDGET = "the budget of products is spent; raise max_products or tol"
    NON_FINITE = "a product was not finite"


@dataclass
class Solution:
    """Norms of P problems with their ends.

    Attributes:
        lower, upper, estimate: (P,) float64; estimate is the largest Ritz value, the ends include the rounding pad.
        confidence: probability with which all upper ends of the maximum hold.
        products, steps: what was spent.
        stop: why the solver stopped; `converged`: the width asked for, or the exact value, was reached.
    """

    lower: Array
    upper: Array
    estimate: Array
    confidence: float
    products: int
    steps: int
    stop: Stop
    converged: bool
    basis: Tensor
    alphas: Array = field(repr=False)
    betas: Array = field(repr=False)

    @property
    def right(self) -> Tensor:
        """(P, n) top right singular vectors."""
        _, _, vt = np.linalg.svd(bidiagonal(self.alphas, self.betas))
        weights = torch.from_numpy(np.ascontiguousarray(vt[:, 0])).to(self.basis)
        return torch.bmm(weights.unsqueeze(1), self.basis[:, : self.steps]).squeeze(1)

    @property
    def sentence(self) -> str:
        """Why the solver stopped, and how wide the interval of the maximum still is."""
        low, high = float(self.lower.max()), float(self.upper.max())
        if self.stop in (Stop.EXACT, Stop.NON_FINITE) or not low > 0:
            return self.stop.value
        return f"{self.stop.value} (width {high / low - 1:.2g} after {self.products} products)"

    def interval(self, lead: tuple[int, ...] = (), token_ids: Tensor | None = None) -> Interval:
        """The interval of the maximum over problems: the largest lower and the largest upper end.

        No union bound is needed: the problem that attains the maximum is fixed by J, not by the starts.

        Args:
            lead: sizes of the independent dimensions, to report sequences and tokens apart.
            token_ids: (B, T), to name the worst token.
        """
        per_sequence = per_token = None
        if lead and int(np.prod(lead)) == len(self.estimate):
            table = self.estimate.reshape(lead)
            per_sequence = [float(v) for v in table.reshape(lead[0], -1).max(1)]
            if len(lead) == 2:
                per_token = _per_token(table, token_ids)
        return Interval(
            estimate=float(self.estimate.max()),
            lower=float(self.lower.max()),
            upper=float(self.upper.max()),
            confidence=self.confidence,
            converged=self.converged,
            products=self.products,
            per_sequence=per_sequence,
            per_token=per_token,
            stop=self.sentence,
        )


def _per_token(table: Array, token_ids: Tensor | None) -> PerToken:
    row, column = (int(i) for i in np.unravel_index(int(table.argmax()), table.shape))
    token = None
    if token_ids is not None and tuple(token_ids.shape) == table.shape:
        token = int(token_ids[row, column])
    return PerToken(
        median=float(np.median(table)),
        p99=float(np.quantile(table, 0.99)),
        max=float(table.max()),
        argmax=TokenAt(row, column, token),
    )


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
        max_products: budget; a step costs two.
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
    eps = 1.0 - confidence
    while True:
        lanczos.step()
        finite = bool(np.isfinite(lanczos.alphas[:, -1]).all() and np.isfinite(lanczos.betas[:, -1]).all())
        theta = ritz_values(lanczos.alphas, lanczos.betas) if finite else np.full_like(lanczos.alphas, np.nan)
        top = theta[:, 0]
        upper = upper_ends(theta, lanczos.alphas, lanczos.betas, lanczos.exact, operator.domain, eps) if finite else top
        low, high = top * (1 - pad), upper * (1 + pad)
        products = operator.products - before
        stop = _stop(finite, lanczos.exact, low, high, tol, decide, early, products, max_products)
        if stop is None:
            continue
        if not finite:
            low, high = np.zeros_like(top), np.full_like(top, np.inf)
        return Solution(
            low, high, top, confidence, products, lanczos.steps, stop, stop is Stop.EXACT or _narrow(low, high, tol),
            lanczos.right, lanczos.alphas, lanczos.betas,
        )  # fmt: skip


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
    return Stop.BUDGET if products + 2 > budget else None


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
        start = torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.device)
        self.v = (start / start.norm(dim=1, keepdim=True)).to(operator.dtype)
        self.u = torch.zeros(operator.problems, operator.codomain, dtype=operator.dtype, device=operator.device)
        self.right = self.v.new_empty(operator.problems, 0, operator.domain)
        self.left = self.u.new_empty(operator.problems, 0, operator.codomain)
        self.steps = 0
        self.alphas = np.zeros((operator.problems, 0))
        self.betas = np.zeros((operator.problems, 0))
        self.exact = np.zeros(operator.problems, dtype=bool)
        self.scale = np.zeros(operator.problems)
        largest = max(operator.domain, operator.codomain)
        self.tiny = 10 * torch.finfo(operator.dtype).eps / 2 * largest**0.5

    def step(self) -> None:
        k, operator = self.steps, self.operator
        self.right = _stored(self.right, k, self.v)
        w = operator.push(self.v)
        if k:
            w -= self._column(self.betas[:, -1]) * self.u
        w = _reorthogonalised(w, self.left, k)
        alpha = self._coefficient(w, last=k >= operator.codomain)
        self.u = self._direction(w, alpha)
        self.left = _stored(self.left, k, self.u)
        z = operator.pull(self.u)
        if not k:
            self._check_adjoint(alpha, z)
        z = z - self._column(alpha) * self.v
        z = _reorthogonalised(z, self.right, k + 1)
        beta = self._coefficient(z, last=k + 1 >= operator.domain)
        self.v = self._direction(z, beta)
        self.alphas = np.concatenate([self.alphas, alpha[:, None]], axis=1)
        self.betas = np.concatenate([self.betas, beta[:, None]], axis=1)
        self.steps += 1

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
        value = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64).cpu().numpy()
        value[self.exact] = 0.0
        self.scale = np.maximum(self.scale, np.where(np.isfinite(value), value, self.scale))
        broken = (value <= self.tiny * self.scale) | last
        value[broken] = 0.0
        self.exact |= broken
        return value

    def _direction(self, w: Tensor, norm: Array) -> Tensor:
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0)
        return w * self._column(inverse)

    def _column(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self.v).unsqueeze(1)


def _stored(basis: Tensor, k: int, vector: Tensor) -> Tensor:
    """Writes vector k into a (P, capacity, n) basis, which doubles when full."""
    if k == basis.shape[1]:
        grown = basis.new_empty(basis.shape[0], max(8, 2 * k), basis.shape[2])
        grown[:, :k] = basis[:, :k]
        basis = grown
    basis[:, k] = vector
    return basis


def _reorthogonalised(w: Tensor, basis: Tensor, k: int) -> Tensor:
    """Two classical Gram-Schmidt passes against the first k vectors; one is measurably not enough."""
    if k == 0:
        return w
    span, row = basis[:, :k], w.unsqueeze(1)  # row times matrix: ten times faster on a CPU than matrix times column
    for _ in range(2):
        row = torch.baddbmm(row, torch.bmm(row, span.transpose(1, 2)), span, alpha=-1)
    return row.squeeze(1)
