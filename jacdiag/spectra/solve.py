"""Largest singular values: Lanczos runs, alone or several in step, each stopped by its own
interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jacdiag.spectra.golub_kahan import Bidiagonalisation, norms
from jacdiag.spectra.interval import PAD, Array
from jacdiag.spectra.interval_ends import Ends
from jacdiag.spectra.joint_products import products_together
from jacdiag.spectra.operator import Operator
from jacdiag.spectra.solution import Solution, Stop

Decide = Callable[[float, float], bool]


@dataclass(frozen=True)
class Question:
    """An operator whose norm is asked for.

    Attributes:
        operator: P problems (m, n).
        generator: of the random start (CPU). The upper end needs it: a warm start certifies
            nothing.
        decide: predicate on (lower, upper) of the maximum: the question that the norm is to answer
            is answered.
    """

    operator: Operator
    generator: torch.Generator | None = None
    decide: Decide | None = None


def top_singular(
    operator: Operator,
    *,
    tol: float = 0.05,
    confidence: float = 0.999,
    max_products: int = 200,
    generator: torch.Generator | None = None,
    decide: Decide | None = None,
    early: bool = True,
    pad: float | None = None,
) -> Solution:
    """Largest singular value of every problem of an operator, with an interval.

    Args:
        operator, generator, decide: see `Question`.
        tol: stop when the interval of the maximum over problems has this relative width.
        confidence: of the upper end.
        max_products: budget.
        early: stop as soon as `decide` says so, however wide the interval is; else go on to `tol`,
            and beyond `tol` until it says so.
        pad: rounding pad; that of the operator's dtype if not given.

    Returns:
        A `Solution`; running out of budget is a value of `stop`, not an exception.
    """
    (solution,) = in_step(
        [Question(operator, generator, decide)],
        tol=tol,
        confidence=confidence,
        max_products=max_products,
        early=early,
        pad=pad,
    )
    return solution


def in_step(
    questions: Sequence[Question],
    *,
    tol: float = 0.05,
    confidence: float = 0.999,
    max_products: int = 200,
    early: bool = True,
    pad: float | None = None,
) -> list[Solution]:
    """Solves several norms in step: their products with the same Jacobian are made in one call.

    Each has a start of its own and stops for itself, as it would alone. Arguments as in
    `top_singular`.
    """
    runs = [_Run(q, tol, 1.0 - confidence, max_products, early, pad) for q in questions]
    while going := [run for run in runs if run.stop is None]:
        way, _ = going[0].lanczos.wanted  # all began at once: it is the same for all
        vectors = [run.lanczos.wanted[1] for run in going]
        made = products_together(way, [run.operator for run in going], vectors)
        for run, product in zip(going, made, strict=True):
            run.take(product)
    return [run.solution(confidence) for run in runs]


class _Run:
    """One Lanczos run, product by product."""

    def __init__(
        self,
        question: Question,
        tol: float,
        eps: float,
        max_products: int,
        early: bool,
        pad: float | None,
    ) -> None:
        self.operator, self.decide = question.operator, question.decide
        self.tol, self.max_products, self.early = tol, max_products, early
        pad = PAD[str(self.operator.dtype).removeprefix("torch.")] if pad is None else pad
        self.lanczos = Bidiagonalisation(self.operator, question.generator)
        self.ends = Ends(self.lanczos, eps, pad)
        self.stop: Stop | None = None

    def take(self, product: Tensor) -> None:
        """Goes on by one product, and says in `stop` whether it was the last."""
        lanczos, ends = self.lanczos, self.ends
        lanczos.take(product)
        asked = self.early and self.decide is not None  # then any product may answer
        last = bool(lanczos.exact.all()) or lanczos.products >= self.max_products
        if lanczos.finite and (asked or last or ends.due(self.tol)):
            ends.update()
        self.stop = _stop(
            lanczos.finite,
            lanczos.exact,
            ends.low,
            ends.high,
            self.tol,
            self.decide,
            self.early,
            lanczos.products,
            self.max_products,
        )

    def solution(self, confidence: float) -> Solution:
        assert self.stop is not None
        lanczos, ends = self.lanczos, self.ends
        top, low, high = ends.final(lanczos.finite)
        converged = self.stop is Stop.EXACT or _narrow(ends.low, ends.high, self.tol)
        return Solution(
            low,
            high,
            top,
            confidence,
            lanczos.products,
            lanczos.steps,
            self.stop,
            converged,
            lanczos.right,
            lanczos.alphas,
            lanczos.betas,
        )


def inherited(
    operator: Operator, vectors: Tensor, upper: Array, *, confidence: float, tol: float
) -> Solution:
    """Ends that one product gives: |A v| / |v| from below, and from above what is known from
    another operator.

    Args:
        operator: P problems (m, n).
        vectors: (P, n), such as the top right vectors of an operator that is akin.
        upper: (P,) ends that hold with probability `confidence`.
        tol: relative width that counts as converged.
    """
    pad = PAD[str(operator.dtype).removeprefix("torch.")]
    unit = vectors / norms(vectors).clamp_min(torch.finfo(vectors.dtype).tiny).unsqueeze(1).to(
        vectors
    )
    reached = norms(operator.push(unit)).cpu().numpy()
    low, high = reached * (1 - pad), np.maximum(upper, reached) * (1 + pad)
    nothing = np.zeros((len(reached), 0))
    return Solution(
        low,
        high,
        reached,
        confidence,
        1,
        1,
        Stop.INHERITED,
        _narrow(low, high, tol),
        unit.unsqueeze(1),
        reached[:, None],
        nothing,
    )


def _stop(
    finite: bool,
    exact: NDArray[np.bool_],
    low: Array,
    high: Array,
    tol: float,
    decide: Decide | None,
    early: bool,
    products: int,
    budget: int,
) -> Stop | None:
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
