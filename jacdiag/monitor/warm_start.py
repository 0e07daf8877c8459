"""Norms of a model that has moved only a little: the last top vectors give the lower end, a random
start the upper.

A warm start certifies nothing from above (its event is not random), so that every norm still has
one random start. From below |J v| and |J^T u| of any unit vectors are rigorous, and the last
probe's top vectors are close: two steps of power iteration from there say more than eight Lanczos
steps from anywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jacdiag.measure.branch_norms import Solver
from jacdiag.spectra import Operator, Solution
from jacdiag.spectra.interval import PAD

_PRODUCTS = 4


class Memory:
    """Top right vectors by sub-layer and norm, (P, n) each, from the last probe."""

    def __init__(self) -> None:
        self.vectors: dict[str, Tensor] = {}

    def recall(self, key: str, operator: Operator) -> Tensor | None:
        found = self.vectors.get(key)
        fits = found is not None and found.shape == (operator.problems, operator.domain)
        return found if fits else None

    @property
    def bytes(self) -> int:
        return sum(v.numel() * v.element_size() for v in self.vectors.values())


class WarmSolver(Solver):
    """A solver whose budget is the same with and without a memory, so that its price is known
    beforehand.

    Args:
        memory: read before, and written after every norm.
    """

    def __init__(self, *args: Any, memory: Memory) -> None:
        super().__init__(*args)
        self.memory = memory

    def solve(self, operator: Operator, name: str) -> Solution:
        key = f"{self.one.site.name}/{name}"
        known = self.memory.recall(key, operator)
        if known is None:
            solution = super().solve(operator, name)
        else:
            effort = self.effort
            self.effort = replace(effort, max_products=max(effort.max_products - _PRODUCTS, 2))
            try:
                solution = super().solve(operator, name)
            finally:
                self.effort = effort
            solution = self._warmed(operator, solution, known, _PRODUCTS // 2)
        self.memory.vectors[key] = solution.right
        return solution

    def _taken(self, operator: Operator, akin: Solution, upper: Any, name: str) -> Solution | None:
        solution = super()._taken(operator, akin, upper, name)
        if solution is None:
            return None
        key = f"{self.one.site.name}/{name}"
        known = self.memory.recall(key, operator)
        solution = self._warmed(operator, solution, solution.right if known is None else known, 1)
        self.memory.vectors[key] = solution.right
        return solution

    def _warmed(
        self, operator: Operator, solution: Solution, vectors: Tensor, rounds: int
    ) -> Solution:
        """The solution with its lower ends raised to what power iteration from `vectors`
        reaches.
        """
        best, v = np.zeros(operator.problems), vectors
        for _ in range(rounds):
            u = operator.push(v)
            pulled = operator.pull(_unit(u))
            best = np.fmax(best, _sizes(pulled))  # |J^T u| with u = J v / |J v| is at least |J v|
            v = _unit(pulled)
        self.products += 2 * rounds
        pad = PAD[str(operator.dtype).removeprefix("torch.")]
        estimate = np.fmax(solution.estimate, best)
        lower = np.fmax(solution.lower, best * (1 - pad))
        upper = np.fmax(solution.upper, estimate)
        ahead = torch.from_numpy(best > solution.estimate).to(v.device).unsqueeze(1)
        basis = torch.where(ahead, v, solution.right).unsqueeze(1)
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
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()


def _unit(rows: Tensor) -> Tensor:
    sizes = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    return rows / sizes.clamp_min(torch.finfo(rows.dtype).tiny).to(rows.dtype)
