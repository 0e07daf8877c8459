"""The result of a solve of spectral norms: ends of every problem, top singular vectors."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from jacdiag.records.report import Interval, PerToken, TokenAt
from jacdiag.spectra.interval import Array, bidiagonal


class Stop(enum.Enum):
    """Why a solver stopped, as `Solution.sentence` prints it."""

    WIDTH = "the interval is as narrow as asked"
    DECIDED = "the rules are decided"
    EXACT = "an invariant subspace was found: the value is exact up to rounding"
    BUDGET = "the budget of products is spent; raise max_products or tol"
    NON_FINITE = (
        "a product was not finite: it left the range of the dtype (try float64), or a "
        "derivative is NaN or Inf"
    )
    INHERITED = "it follows from another norm of the sub-layer and a few products"


@dataclass
class Solution:
    """Norms of P problems with their ends.

    Attributes:
        lower, upper, estimate: (P,) float64; estimate is the largest Ritz value, the ends include
            the rounding pad.
        confidence: probability with which all upper ends of the maximum hold.
        products, steps: what was spent; a step is a product with J and one with J^T, the last may
            be half.
        stop: why the solver stopped; `converged`: the requested width, or the exact value, was
            reached.
        basis: (P, capacity, m) directions on the left, which `left` is made of.
        alphas, betas: coefficients of the bidiagonal matrix that says how.
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
    def left(self) -> Tensor:
        """(P, m) top left singular vectors. They are zeros if a product was not finite."""
        if self.stop is Stop.NON_FINITE:
            return torch.zeros_like(self.basis[:, 0])

        _, _, rows = np.linalg.svd(bidiagonal(self.alphas, self.betas), full_matrices=False)
        weights = torch.from_numpy(np.ascontiguousarray(rows[:, 0])).to(self.basis)
        return torch.bmm(weights.unsqueeze(1), self.basis[:, : weights.shape[1]]).squeeze(1)

    @property
    def sentence(self) -> str:
        """Why the solver stopped, and how wide the interval of the maximum still is."""
        low, high = float(self.lower.max()), float(self.upper.max())
        if self.stop in (Stop.EXACT, Stop.NON_FINITE) or not low > 0:
            return self.stop.value
        width = f"width {high / low - 1:.2g}"
        if self.stop is not Stop.INHERITED:
            width += f" after {self.products} products"
        return f"{self.stop.value} ({width})"

    def interval(self, lead: tuple[int, ...] = (), token_ids: Tensor | None = None) -> Interval:
        """Return the interval of the maximum over problems: the largest lower and upper end.

        No union bound is needed: the problem that attains the maximum is fixed by J, not by the
        starts.

        Args:
            lead: sizes of the independent dimensions, to report sequences and tokens apart.
            token_ids: (B, T), to name the worst token.
        """
        # 1. Sequences and tokens apart, if problems are independent over them.
        per_sequence = per_token = None
        if lead and int(np.prod(lead)) == len(self.estimate):
            table = self.estimate.reshape(lead)
            per_sequence = [float(v) for v in table.reshape(lead[0], -1).max(1)]
            if len(lead) == 2:
                per_token = _per_token(table, token_ids)

        # 2. The maximum over all problems.
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
    """Return the spread of the norms (B, T) of tokens, and the token with the largest."""
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
