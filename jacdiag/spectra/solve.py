"""Largest singular values: Lanczos runs, alone or in step, each stopped by its own interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jacdiag.spectra.golub_kahan import Bidiagonalisation, draw_start, norms, read_together
from jacdiag.spectra.interval import (
    Array,
    are_upper_ends,
    largest_ritz_values,
    rounding_pad,
    upper_ends,
)
from jacdiag.spectra.operator import Operator, making_products, products_together
from jacdiag.spectra.solution import Solution, Stop

Decide = Callable[[float, float], bool]
# Of more than so many problems, those with the largest ends are looked at first: so many by each
# end.
_MANY, _LEADERS = 32, 5
_NEARLY = 1.25  # times the width that is wanted
_PATIENCE = 4  # products for which the ends may be left as they are
_SPEED_UP = 1.5  # the width may fall this many times as fast as it last did


@dataclass(frozen=True)
class Aim:
    """A maximum over problems whose interval is wanted.

    Attributes:
        factors: (P,) what the norm of each problem is multiplied by before the maximum is taken.
        tol: relative width that is wanted.
    """

    factors: Array
    tol: float


@dataclass(frozen=True)
class Question:
    """An operator whose norm is to be found.

    Attributes:
        operator: P problems (m, n).
        generator: of the random start (CPU).
        start: (P, m) random numbers of a normal distribution, in the place of a start that is drawn
            here. The upper end needs a random start: a warm one certifies nothing. The first
            product is made with this very object.
        decide: predicate on (lower, upper) of the maximum: whether these ends decide what the norm
            is needed for.
        scaled: another maximum that is wanted, of the same problems times factors.
    """

    operator: Operator
    generator: torch.Generator | None = None
    start: Tensor | None = None
    decide: Decide | None = None
    scaled: Aim | None = None


def top_singular(
    operator: Operator,
    *,
    tol: float = 0.05,
    confidence: float = 0.999,
    max_products: int = 200,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    decide: Decide | None = None,
    early: bool = True,
    pad: float | None = None,
) -> Solution:
    """Return the largest singular value of every problem of an operator, with an interval.

    Args:
        operator: P problems (m, n).
        tol: stop when the interval of the maximum over problems has this relative width.
        confidence: of the upper end.
        max_products: budget.
        generator: of the random start (CPU).
        start: (P, m) random numbers of a normal distribution, in the place of a start that is drawn
            here.
        decide: whether ends (lower, upper) of the maximum decide what the norm is needed for.
        early: stop as soon as `decide` is true, however wide the interval is; else go on to `tol`,
            and beyond `tol` until it is true.
        pad: rounding pad; that of the operator's dtype if not given.

    Returns:
        A `Solution`; running out of budget is a value of `stop`, not an exception.
    """
    (solution,) = in_step(
        [Question(operator, generator, start, decide)],
        tol=tol,
        confidence=confidence,
        max_products=max_products,
        early=early,
        pad=pad,
    )
    return solution


@making_products()
def in_step(
    questions: Sequence[Question],
    *,
    tol: float = 0.05,
    confidence: float = 0.999,
    max_products: int = 200,
    early: bool = True,
    pad: float | None = None,
) -> list[Solution]:
    """Solve several norms in step: their products with the same Jacobian are made in one call.

    Each stops for itself, as it would alone. They may begin at one start. Arguments as in
    `top_singular`.
    """
    runs = [
        _Run(question, tol, 1.0 - confidence, max_products, early, pad) for question in questions
    ]
    active = runs
    while active:
        # 1. The next product of every run. All began at once, so that it goes the same way for all.
        operators: list[Operator] = []
        vectors: list[Tensor] = []
        for run in active:
            way, vector = run.lanczos.wanted
            operators.append(run.operator)
            vectors.append(vector)

        # 2. Make them together. A run that stops leaves the others.
        products = products_together(way, operators, vectors)
        for run, product in zip(active, products, strict=True):
            run.lanczos.take(product)

        # 3. Look at those that may end here, in one download.
        ending = [run for run in active if run.may_end_here()]
        read_together([run.lanczos for run in ending])
        for run in ending:
            run.judge()
        active = [run for run in active if run.stop is None]
    return [run.solution(confidence) for run in runs]


class Ends:
    """The ends of every problem, kept up to date only if they can still matter to a maximum.

    The upper end's event depends on the start only, so that the lowest upper end of all products
    holds. A problem whose upper end has come down to the largest lower end is settled: it is left
    alone until the end.

    Of many problems a few *leaders* are looked at first, those with the largest ends at the last
    look at all. If the interval of the maximum over them is still wide, that over all seldom is
    narrow. All are looked at once more shortly before, since others may lead by then.

    Args:
        lanczos: the run.
        eps: probability with which an upper end may fail.
        pad: relative rounding, by which the ends are moved outwards.
        aims: the maxima whose intervals are wanted.
        may_follow_leaders: False if ends decide something before they are narrow: the largest lower
            end may be that of any problem.
    """

    def __init__(
        self,
        lanczos: Bidiagonalisation,
        eps: float,
        pad: float,
        aims: Sequence[Aim],
        *,
        may_follow_leaders: bool,
    ) -> None:
        self.lanczos, self.eps, self.pad, self.aims = lanczos, eps, pad, aims
        self.may_follow_leaders = may_follow_leaders
        problems = lanczos.operator.problems
        self.low, self.high = np.zeros(problems), np.full(problems, np.inf)
        self.top = np.zeros(problems)  # largest Ritz values
        self.seen_at = np.zeros(problems, dtype=int)  # after how many products
        self.leaders: NDArray[np.bool_] | None = None
        self.widths = [math.inf for _ in aims]  # of each maximum, at the last look
        self.widths_of_all: list[float] = []  # the same, at the last look at all
        self.waited = 0
        self.factor = 2.0  # by which a product may narrow the interval

    def _measure_widths(self) -> None:
        """Set the relative width of each maximum's interval, as far as the leaders show it."""
        self.widths = []
        for aim in self.aims:
            low = float((aim.factors * self.low).max())
            high = float(self._of_leaders(aim.factors * self.high).max())
            self.widths.append(high / low - 1 if low > 0 else math.inf)

    def are_narrow(self) -> bool:
        """Return whether every maximum has the interval that is wanted."""
        return all(
            _narrow(aim.factors * self.low, aim.factors * self.high, aim.tol) for aim in self.aims
        )

    def due(self) -> bool:
        """Return whether the intervals may have come down to the widths that are wanted.

        A product seldom more than halves a width, nor does it fall much faster than before. Ends
        that are not computed are only wider: a wrong guess costs at most `_PATIENCE` products too
        many.
        """
        self.waited += 1
        reach = self.factor**self.waited
        return self._are_within(reach) or self.waited > _PATIENCE

    def _are_within(self, times: float) -> bool:
        """Return whether no width was above so many times the one that is wanted."""
        pairs = zip(self.widths, self.aims, strict=True)
        return all(width <= aim.tol * times for width, aim in pairs)

    def update(self, is_last: bool) -> None:
        """Look at the leaders; then at all that may still matter, if the run may end here.

        Args:
            is_last: the run ends here in any case.
        """
        width = self.widths[0]

        # 1. The leaders, or all at the first look.
        if self.leaders is None:
            self._look_at_all()
        else:
            self._compute(self.leaders)
        self._estimate_factor(width)

        # 2. All that may still matter. The leaders may be others then, with a wider interval.
        if self.leaders is not None and (is_last or self._leaders_may_be_others()):
            self._look_at_all()

    def _estimate_factor(self, before: float) -> None:
        """Estimate how fast the width may fall from now on.

        Args:
            before: width of the same problems' interval at the last look.
        """
        after = self.widths[0]
        products, self.waited = self.waited, 0
        is_narrower = products > 0 and 0 < after < before < math.inf
        if is_narrower:
            self.factor = min(2.0, (before / after) ** (_SPEED_UP / products))

    def _leaders_may_be_others(self) -> bool:
        """Return whether all problems are to be looked at, for what the leaders show."""
        are_narrow = self._are_within(1.0)
        are_nearly_narrow = self._are_within(_NEARLY)
        were_wide = any(
            2 * width < before
            for width, before in zip(self.widths, self.widths_of_all, strict=True)
        )
        return are_narrow or (are_nearly_narrow and were_wide)

    def _look_at_all(self) -> None:
        """Compute the ends of the problems that are not settled, and choose the leaders."""
        # 1. The problems that may still matter.
        open_ = self.high == np.inf
        for aim in self.aims:
            open_ |= aim.factors * self.high > (aim.factors * self.low).max()
        open_ &= self.seen_at < self.lanczos.products
        if self.leaders is not None:
            open_ &= ~self._is_below_leaders(open_)
        if open_.any():
            self._compute(open_)

        # 2. The leaders among them.
        has_leaders = self.may_follow_leaders and len(self.high) > _MANY
        if has_leaders:
            self._choose_leaders()

    def _choose_leaders(self) -> None:
        """Choose the leaders of each maximum, of the problems whose ends were computed now."""
        seen_now = self.seen_at == self.lanczos.products
        self.leaders = np.zeros_like(seen_now)
        for aim in self.aims:
            for ends in (self.low, self.high):
                values = np.where(seen_now, aim.factors * ends, 0.0)
                order = np.argpartition(values, -_LEADERS)
                self.leaders[order[-_LEADERS:]] = True

        self._measure_widths()
        self.widths_of_all = self.widths

    def _is_below_leaders(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which problems' upper ends lie no higher than the largest one of the leaders.

        Their upper ends are lowered to that. The leaders have just been looked at.

        Args:
            chosen: (P,) the problems in question.

        Returns:
            (P,) flags, False where a run has broken down.
        """
        # 1. What each problem may reach without a larger maximum.
        lanczos = self.lanczos
        chosen = chosen & ~lanczos.exact
        cap = np.full_like(self.high, np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            for aim in self.aims:
                largest = self._of_leaders(aim.factors * self.high).max()
                cap = np.fmin(cap, largest / aim.factors)

        # 2. The problems that do not reach it.
        is_below = np.zeros_like(chosen)
        is_below[chosen] = are_upper_ends(
            cap[chosen] / (1 + self.pad),
            lanczos.alphas[chosen],
            lanczos.betas[chosen],
            lanczos.operator.codomain,
            self.eps,
        )
        self.high[is_below] = np.minimum(self.high, cap)[is_below]
        return is_below

    def _compute(self, chosen: NDArray[np.bool_]) -> None:
        """Compute the ends of some problems."""
        lanczos = self.lanczos
        alphas, betas = lanczos.alphas[chosen], lanczos.betas[chosen]
        top = largest_ritz_values(alphas, betas)
        known = self.high[chosen] / (1 + self.pad)
        upper = upper_ends(
            top, alphas, betas, lanczos.exact[chosen], lanczos.operator.codomain, self.eps, known
        )
        self.top[chosen], self.seen_at[chosen] = top, lanczos.products
        self.low[chosen] = top * (1 - self.pad)
        self.high[chosen] = upper * (1 + self.pad)
        self._measure_widths()

    def _of_leaders(self, values: Array) -> Array:
        """Return the values of the leaders, or of all if there are none."""
        return values if self.leaders is None else values[self.leaders]

    def final(self, finite: bool) -> tuple[Array, Array, Array]:
        """Return largest Ritz values, lower and upper ends of all problems."""
        if not finite:
            nothing = np.full_like(self.low, np.nan)
            return nothing, np.zeros_like(self.low), np.full_like(self.low, np.inf)
        lanczos, top = self.lanczos, self.top
        unseen = self.seen_at < lanczos.products
        top[unseen] = largest_ritz_values(lanczos.alphas[unseen], lanczos.betas[unseen])

        # A problem that was left alone may have passed its upper end, which was false then.
        passed = top > self.high / (1 + self.pad)
        if passed.any():
            alphas, betas = lanczos.alphas[passed], lanczos.betas[passed]
            upper = upper_ends(
                top[passed],
                alphas,
                betas,
                lanczos.exact[passed],
                lanczos.operator.codomain,
                self.eps,
            )
            self.high[passed] = upper * (1 + self.pad)
        self.low = top * (1 - self.pad)
        return top, self.low, self.high


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
        if pad is None:
            pad = rounding_pad(self.operator.dtype, self.operator.device)
        start = question.start
        if start is None:
            start = draw_start(self.operator, question.generator)
        self.lanczos = Bidiagonalisation(self.operator, start)
        aims = [Aim(np.ones(self.operator.problems), tol)]
        if question.scaled is not None:
            aims.append(question.scaled)
        self.ends = Ends(
            self.lanczos, eps, pad, aims, may_follow_leaders=not self._may_be_decided_early
        )
        self.stop: Stop | None = None
        self._may_be_narrow = False

    @property
    def _may_be_decided_early(self) -> bool:
        """Whether ends that decide something end the run, however wide they are."""
        return self.early and self.decide is not None

    def may_end_here(self) -> bool:
        """Return whether the last product may end the run, for all that is known without a look.

        The host has to wait for the coefficients of an accelerator, and looks at them only here.
        """
        # 1. The ends may be narrow enough, or the budget is spent.
        lanczos = self.lanczos
        is_spent = lanczos.products >= self.max_products
        self._may_be_narrow = self._may_be_decided_early or is_spent or self.ends.due()

        # 2. The first product shows whether the map is 0, the last whether an invariant subspace
        # was found.
        is_first = lanczos.products == 1
        has_all_steps = lanczos.steps >= min(self.operator.domain, self.operator.codomain)
        return self._may_be_narrow or is_first or has_all_steps or lanczos.reads_are_free

    def judge(self) -> None:
        """Look at the coefficients, and set `stop` if the last product ends the run."""
        # The ends are computed only where they may end the run.
        lanczos = self.lanczos
        is_last = bool(lanczos.exact.all()) or lanczos.products >= self.max_products
        if lanczos.finite and (self._may_be_narrow or is_last):
            self.ends.update(is_last)
        self.stop = self._reason_to_stop()

    def _reason_to_stop(self) -> Stop | None:
        """Return why the run ends here, None if it goes on."""
        # 1. Nothing more can be learned.
        lanczos, ends = self.lanczos, self.ends
        if not lanczos.finite:
            return Stop.NON_FINITE
        if bool(lanczos.exact.all()):
            return Stop.EXACT

        # 2. The ends are narrow enough, or decide what the norm is needed for.
        lower, upper = float(ends.low.max()), float(ends.high.max())
        is_decided = self.decide is not None and self.decide(lower, upper)
        needs_decision = self.decide is not None and not is_decided
        if ends.are_narrow() and not needs_decision:
            return Stop.WIDTH
        if self.early and is_decided:
            return Stop.DECIDED

        # 3. The budget.
        if lanczos.products >= self.max_products:
            return Stop.BUDGET
        return None

    def solution(self, confidence: float) -> Solution:
        """Return the result of a run that has ended."""
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
            lanczos.left,
            lanczos.alphas,
            lanczos.betas,
        )


@making_products()
def inherited(
    operator: Operator,
    vectors: Tensor,
    upper: Array,
    *,
    confidence: float,
    tol: float,
    most_products: int = 1,
) -> Solution:
    """Return the ends that a few products give, with an upper end known from another operator.

    The lower end is |A^T u| / |u|. A second product, with A, makes it |A v| / |v| of v = A^T u,
    which is no smaller, and so on: these are steps of power iteration.

    Args:
        operator: P problems (m, n).
        vectors: (P, m), such as the top left vectors of a similar operator.
        upper: (P,) ends.
        confidence: probability with which they hold.
        tol: relative width that counts as converged.
        most_products: how many may be made, if fewer do not give this width. One always is.
    """
    pad = rounding_pad(operator.dtype, operator.device)
    left = vector = _unit(vectors)
    reached = np.zeros(operator.problems)
    products = 0
    while True:
        # 1. Products with A^T and A take turns. Those with A end on the left.
        products += 1
        ends_on_left = products % 2 == 0
        if ends_on_left:
            image = operator.push(vector)
            left = _unit(image)
            vector = left
        else:
            image = operator.pull(vector)
            vector = _unit(image)

        # 2. The ends.
        reached = np.maximum(reached, _on_host(norms(image)))
        low, high = reached * (1 - pad), np.maximum(upper, reached) * (1 + pad)
        is_narrow = _narrow(low, high, tol)
        if is_narrow or products >= most_products:
            break

    nothing = np.zeros((len(reached), 0))
    return Solution(
        low,
        high,
        reached,
        confidence,
        products,
        1,
        Stop.INHERITED,
        is_narrow,
        left.unsqueeze(1),
        reached[:, None],
        nothing,
    )


def _unit(vectors: Tensor) -> Tensor:
    """Return rows (P, n) divided by their norms; one of zeros stays as it is."""
    sizes = norms(vectors).clamp_min(torch.finfo(vectors.dtype).tiny)
    return vectors / sizes.unsqueeze(1).to(vectors)


def _on_host(values: Tensor) -> Array:
    """Return numbers as float64 on the CPU."""
    return values.cpu().double().numpy()


def _narrow(low: Array, high: Array, tol: float) -> bool:
    """Return whether the interval of the maximum over problems has the relative width `tol`."""
    return bool(low.max() > 0 and high.max() <= low.max() * (1 + tol))
