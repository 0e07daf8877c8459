"""The ends of many problems at once, kept up to date no oftener than they can matter."""

from __future__ import annotations

import numpy as np

from jacdiag.spectra.golub_kahan import Bidiagonalisation
from jacdiag.spectra.interval import Array, ritz_values, upper_ends

_PATIENCE = 3


class Ends:
    """The ends of every problem, kept up to date where they can still matter to the maximum.

    The upper end's event depends on the start only, so that the lowest upper end of all products
    holds. A problem whose upper end has come down to the largest lower end is settled: it is left
    alone until the end.
    """

    def __init__(self, lanczos: Bidiagonalisation, eps: float, pad: float) -> None:
        self.lanczos, self.eps, self.pad = lanczos, eps, pad
        problems = lanczos.operator.problems
        self.low, self.high = np.zeros(problems), np.full(problems, np.inf)
        self.waited = 0

    def due(self, tol: float) -> bool:
        """Whether the interval may have come down to `tol`: a product seldom more than halves its
        width.

        Ends that are not computed are only wider: a wrong guess costs at most `_PATIENCE` products
        too many.
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
        upper = upper_ends(
            top, alphas, betas, lanczos.exact[open_], lanczos.operator.domain, self.eps, known
        )
        self.low[open_] = top * (1 - self.pad)
        self.high[open_] = upper * (1 + self.pad)

    def final(self, finite: bool) -> tuple[Array, Array, Array]:
        """Returns largest Ritz values, lower and upper ends of all problems."""
        if not finite:
            nothing = np.full_like(self.low, np.nan)
            return nothing, np.zeros_like(self.low), np.full_like(self.low, np.inf)
        top = ritz_values(self.lanczos.alphas, self.lanczos.betas)[:, 0]
        return top, top * (1 - self.pad), self.high
