"""The norms of one linearised sub-layer, each solved by itself or inherited from another.

With branch = core o norm and residual = a I + branch, |branch| <= |core| max gain and |residual| <=
|a| + |branch|. From below, one product with the other's top vector gives as much as several steps.

Inherited intervals are wider. If only the rules count, they are used where the intervals decide
them. If every norm is wanted to its width, the others are solved in step, so that they share the
branch's matrix products. A branch that treats tokens one by one then inherits from its core all the
same: a token has one gain (of its parallel streams, the largest counts), and the core is solved a
little further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.measure.linearization import Linearised, Local, generator_of, residual_map
from jacdiag.records.report import Interval
from jacdiag.spectra import (
    Aim,
    JacobianOperator,
    Operator,
    Question,
    Solution,
    in_step,
    inherited,
    top_singular,
)
from jacdiag.spectra.interval import Array
from jacdiag.spectra.operator import flat
from jacdiag.trace import Sublayer

Decide = Callable[[float, float], bool]
_MOST_INHERITED = 4  # products by which the lower end of an inherited norm may be raised

NORMS = frozenset({"branch_norm", "core_norm", "residual_norm"})
"""Fields of a sub-layer's record that hold the norm of a map."""


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        tol: relative width of an interval that is requested.
        confidence: probability with which an upper end holds.
        max_products: budget of products per norm.
        seed: of the random starts; each sub-layer draws its own, so that results do not depend on
            the order of work.
        decided: field name -> predicate on (lower, upper): the rules have what they need.
        early: stop as soon as the rules are decided; else go on to `tol`, and beyond it until they
            are.
        norms: fields of the norms to solve. That of the branch is always solved.
        solver: what solves, in the place of `Solver`: (linearised, effort, token ids) -> one with
            `norms()`.
    """

    tol: float = 0.05
    confidence: float = 0.999
    max_products: int = 200
    seed: int = 0
    decided: Callable[[Sublayer], Mapping[str, Decide]] | None = None
    early: bool = False
    norms: frozenset[str] = NORMS
    solver: Callable[..., Any] | None = None


@dataclass
class Norms:
    """What was found about one sub-layer.

    Attributes:
        core, branch, residual: None where there is no such map; `core` is `branch` where they are
            one map.
        why: reasons for what is None, by field.
    """

    core: Interval | None = None
    branch: Interval | None = None
    residual: Interval | None = None
    why: dict[str, str] = field(default_factory=dict)


class Solver:
    """Solver of the norms of one sub-layer.

    It works in step. Where the rules may be decided early, it takes the cheapest order first.
    """

    def __init__(self, one: Linearised, effort: Effort, token_ids: Tensor | None = None) -> None:
        self.one = one
        self.effort = effort
        self.token_ids = token_ids
        self.decided: Mapping[str, Decide] = {}  # by field
        if effort.decided is not None:
            self.decided = effort.decided(one.site)

    def norms(self) -> Norms:
        """Return core, branch and residual norm."""
        # 1. The maps whose norms are wanted.
        linearised = self.one
        operator: Operator | None = None
        owned: list[Local] = []
        why = "not requested"
        if "residual_norm" in self.effort.norms:
            operator, owned, why = residual_map(linearised.site, linearised.branch, linearised.dims)
        core_is_branch = linearised.core is linearised.branch
        maps: dict[str, Operator] = {"branch_norm": linearised.branch}
        core = linearised.core
        if core is not None and not core_is_branch and "core_norm" in self.effort.norms:
            maps["core_norm"] = core
        if operator is not None:
            maps["residual_norm"] = operator

        # 2. Solve them, and free what was built for them.
        if self.effort.early:
            solved = self._one_by_one(maps)
        else:
            solved = self.to_width(maps)
        intervals = {name: self.interval(solution) for name, solution in solved.items()}
        for inner in owned:
            inner.release()

        # 3. Name them.
        norms = Norms(
            core=intervals.get("core_norm"),
            branch=intervals["branch_norm"],
            residual=intervals.get("residual_norm"),
        )

        # 4. What another map gives, and what there is no map for.
        if core_is_branch:
            norms.core = norms.branch
        if operator is None:
            norms.why["residual_norm"] = why
        return norms

    def _one_by_one(self, maps: Mapping[str, Operator]) -> dict[str, Solution]:
        """Solve each norm, or let it inherit from the one before where that decides the rules."""
        # 1. The core.
        solved = {}
        if "core_norm" in maps:
            solved["core_norm"] = self.solve(maps["core_norm"], "core_norm")

        # 2. The branch, which may inherit from the core.
        branch = self._branch_of(solved.get("core_norm"))
        if branch is None:
            branch = self.solve(maps["branch_norm"], "branch_norm")
        solved["branch_norm"] = branch
        if "residual_norm" not in maps:
            return solved

        # 3. The residual map, which may inherit from the branch.
        operator = maps["residual_norm"]
        residual = self._residual_of(branch, operator)
        if residual is None:
            residual = self.solve(operator, "residual_norm")
        solved["residual_norm"] = residual
        return solved

    def to_width(self, maps: Mapping[str, Operator]) -> dict[str, Solution]:
        """Solve each norm to its width; that of the branch by its core's, if that is enough."""
        # 1. Problems of one token each have one gain. Then |core| times the gain is a close bound.
        gains = self._gains()
        are_of_one_token = self.one.site.splits_tokens(self.one.dims)
        if gains is None or not are_of_one_token or "core_norm" not in maps:
            return self.in_step(maps)

        # 2. Room for what the norm takes off the core's top right vector. Where weights are random
        # each of its two directions (the mean and z) holds a share 1/d of the square on average, so
        # that the length falls by 1/d. That of one token may fall by more: by 4/d once in fifty.
        width = self.effort.tol - 4 / self.one.shape[-1]
        if width < self.effort.tol / 2:
            return self.in_step(maps)

        # 3. The core, far enough for the branch too, and the residual map.
        others = {name: operator for name, operator in maps.items() if name != "branch_norm"}
        solved = self.in_step(others, Aim(gains, width))

        # 4. The branch.
        branch = self._branch_of(solved["core_norm"])
        if branch is None:
            branch = self.solve(maps["branch_norm"], "branch_norm")
        return {**solved, "branch_norm": branch}

    def solve(self, operator: Operator, name: str) -> Solution:
        """Solve one norm by Lanczos from the start that belongs to this sub-layer."""
        return self.in_step({name: operator})[name]

    def in_step(
        self, maps: Mapping[str, Operator], scaled_core: Aim | None = None
    ) -> dict[str, Solution]:
        """Solve norms by Lanczos, in step.

        They begin at the start of the sub-layer, unless a map has other sizes. Each interval holds
        with its confidence all the same, since the start is random.

        Args:
            maps: field of the norm -> operator.
            scaled_core: a maximum of the core's problems times factors, which is wanted too.
        """
        # 1. A problem for each norm.
        effort = self.effort
        site = self.one.site
        questions = []
        for name, operator in maps.items():
            generator = generator_of(effort.seed, site.name, name)
            start = self.one.start if self._begins_at_start(operator) else None
            scaled = scaled_core if name == "core_norm" else None
            questions.append(Question(operator, generator, start, self.decided.get(name), scaled))

        # 2. All of them together: products with the same Jacobian are made in one call.
        solutions = in_step(
            questions,
            tol=effort.tol,
            confidence=effort.confidence,
            max_products=effort.max_products,
            early=effort.early,
        )
        return dict(zip(maps, solutions, strict=True))

    def _begins_at_start(self, operator: Operator) -> bool:
        """Return whether the sub-layer's start is one of this operator's."""
        start = self.one.start
        return start is not None and start.shape == (operator.problems, operator.codomain)

    def interval(self, solution: Solution) -> Interval:
        """Return the interval of a solution, with its distribution over independent indices."""
        lead = tuple(n for d, n in enumerate(self.one.shape) if d in self.one.dims)
        return solution.interval(lead, token_ids=self.token_ids)

    def _branch_of(self, core: Solution | None) -> Solution | None:
        """Return the branch's norm by that of its core, if that decides the rules."""
        gains = self._gains()
        if core is None or gains is None:
            return None

        return self._taken(self.one.branch, core, core.upper * gains, "branch_norm")

    def _gains(self) -> Array | None:
        """Return the largest gain of the input norm at each independent index, (P,).

        The norm's Jacobian is no larger, if it is that of the closed form.
        """
        norm = self.one.site.input_norm
        if norm is None or self.one.norm is None:
            return None

        # The largest of each problem. NaN, or 0, bounds nothing.
        gains = flat(norm.gain.reshape(*self.one.shape[:-1], 1), self.one.dims)
        largest: Array = in_float64(gains.amax(1)).cpu().numpy()
        are_known = bool(np.isfinite(largest).all() and (largest > 0).all())
        return largest if are_known else None

    def _residual_of(self, branch: Solution, operator: Operator) -> Solution | None:
        """Return the residual norm by that of the branch, if that decides the rules."""
        gain = self.one.site.shortcut_gain
        has_post_norm = self.one.site.after is not None
        if has_post_norm or gain is None:
            return None

        # The shortcut adds at most its largest factor.
        largest = abs(gain) if isinstance(gain, float) else float(gain.abs().max())
        return self._taken(operator, branch, largest + branch.upper, "residual_norm")

    def _taken(
        self, operator: Operator, source: Solution, upper: Any, name: str
    ) -> Solution | None:
        """Return the inherited ends, if the rules are decided by them."""
        if not np.isfinite(upper).all():
            return None

        # 1. The lower end costs one product. A few more are cheaper than to solve to the width.
        effort = self.effort
        solution = inherited(
            operator,
            source.left,
            upper,
            confidence=effort.confidence,
            tol=effort.tol,
            most_products=1 if effort.early else _MOST_INHERITED,
        )

        # 2. Whether the ends decide the rules.
        decide = self.decided.get(name)
        is_decided = decide is not None and decide(
            float(solution.lower.max()), float(solution.upper.max())
        )

        # 3. If only the rules count, either is enough. Else both are wanted.
        if effort.early:
            is_enough = solution.converged or is_decided
        else:
            is_enough = solution.converged and (decide is None or is_decided)
        return solution if is_enough else None


def heads_norm(one: Linearised, effort: Effort) -> Interval | None:
    """Return |J^Z|, the norm of the concatenated heads' Jacobian (Eq. 20), to 20%.

    The heads are those after the input norm.
    """
    site = one.site
    if site.heads is None:
        return None

    operator = JacobianOperator(site.heads, site.normalized, ())
    try:
        # Sequences are independent if the heads still have them as their first dimension.
        has_sequences = 0 in one.dims and operator.value.shape[0] == one.shape[0]
        operator.set_batch_dims((0,) if has_sequences else ())
        solution = top_singular(
            operator,
            tol=max(effort.tol, 0.2),
            confidence=effort.confidence,
            max_products=effort.max_products,
            generator=generator_of(effort.seed, site.name, "heads_norm"),
        )
        return solution.interval()
    finally:
        operator.release()
