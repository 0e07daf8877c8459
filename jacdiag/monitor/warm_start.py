"""Norms of a model that has moved only a little, from the top vectors of the last probe.

The last top vectors give the lower bound, and a random start gives the upper one. A warm start
certifies nothing from above, since its event is not random. So every norm still has one random
start. From below, |J^T u| and |J v| of any unit vectors are rigorous, and the last probe's top
vectors are close. Two steps of power iteration from there give more than eight Lanczos steps from
a random vector.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacdiag.devices.accelerators import widest
from jacdiag.measure.branch_norms import Solver
from jacdiag.spectra import Operator, Solution
from jacdiag.spectra.interval import rounding_pad

_PRODUCTS = 4


class TopVectors:
    """Top left vectors by sub-layer and norm, (P, m) each, from the last probe."""

    def __init__(self) -> None:
        """Begin without vectors."""
        self.vectors: dict[str, Tensor] = {}

    def recall(self, key: str, operator: Operator) -> Tensor | None:
        """Return the vectors of a norm; None if there are none of the operator's shape."""
        vectors = self.vectors.get(key)
        if vectors is None:
            return None

        # A batch of another size has a codomain of its own.
        if vectors.shape != (operator.problems, operator.codomain):
            return None
        return vectors

    @property
    def bytes(self) -> int:
        """The bytes of all vectors."""
        return sum(v.numel() * v.element_size() for v in self.vectors.values())


class WarmSolver(Solver):
    """A solver that starts from the vectors of the last probe.

    Its budget is the same with and without them, so that its price is known before it runs.

    Args:
        memory: read before, and written after every norm.
    """

    def __init__(self, *args: Any, memory: TopVectors) -> None:
        """Take the arguments of `Solver`, and the memory."""
        super().__init__(*args)
        self.memory = memory

    def solve(self, operator: Operator, name: str) -> Solution:
        """Solve a norm, and raise its lower bound from the vectors of the last probe.

        Args:
            operator: whose norm it is.
            name: of the norm.
        """
        key = f"{self.one.site.name}/{name}"
        vectors = self.memory.recall(key, operator)
        # 1. Without vectors the entire budget goes to the random start.
        if vectors is None:
            solution = super().solve(operator, name)

        # 2. With them a part of it is kept for the warm start.
        else:
            effort = self.effort
            self.effort = replace(effort, max_products=max(effort.max_products - _PRODUCTS, 2))
            try:
                solution = super().solve(operator, name)
            finally:
                self.effort = effort
            solution = self._warmed(operator, solution, vectors, _PRODUCTS // 2)
        self.memory.vectors[key] = solution.left
        return solution

    def _taken(self, operator: Operator, akin: Solution, upper: Any, name: str) -> Solution | None:
        solution = super()._taken(operator, akin, upper, name)
        if solution is None:
            return None
        key = f"{self.one.site.name}/{name}"
        vectors = self.memory.recall(key, operator)
        if vectors is None:
            vectors = solution.left
        solution = self._warmed(operator, solution, vectors, 1)
        self.memory.vectors[key] = solution.left
        return solution

    def _warmed(
        self, operator: Operator, solution: Solution, vectors: Tensor, rounds: int
    ) -> Solution:
        """Return the solution with its lower bounds raised by power iteration from `vectors`."""
        # 1. Power iteration; every iterate gives a lower bound.
        best = np.zeros(operator.problems)
        u = vectors
        for _ in range(rounds):
            v = operator.pull(u)
            pushed = operator.push(_unit(v))
            best = np.fmax(best, _sizes(pushed))  # |J v| with v = J^T u / |J^T u|, at least |J^T u|
            u = _unit(pushed)

        # 2. Raise the bounds, and keep the better vectors.
        pad = rounding_pad(operator.dtype, operator.device)
        estimate = np.fmax(solution.estimate, best)
        lower = np.fmax(solution.lower, best * (1 - pad))
        upper = np.fmax(solution.upper, estimate)
        ahead = torch.from_numpy(best > solution.estimate).to(u.device).unsqueeze(1)
        basis = torch.where(ahead, u, solution.left).unsqueeze(1)
        nothing = np.zeros((operator.problems, 0))
        return replace(
            solution,
            lower=lower,
            upper=upper,
            estimate=estimate,
            products=solution.products + 2 * rounds,
            steps=1,
            basis=basis,
            alphas=estimate[:, None],
            betas=nothing,
        )


def _sizes(rows: Tensor) -> Any:
    sizes = torch.linalg.vector_norm(rows, dim=1, dtype=widest(rows.device))
    return sizes.cpu().double().numpy()


def _unit(rows: Tensor) -> Tensor:
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=widest(rows.device))
    return rows / sizes.clamp_min(torch.finfo(rows.dtype).tiny).to(rows.dtype)
