"""Choose the scheme that a model follows: the one that leaves the fewest mistakes to explain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.init.depth_scaling import depth_factor
from jacdiag.rules.init.scheme_fit import (
    TABLES,
    Mismatch,
    Spread,
    Yardstick,
    holds,
    is_of_unit_spread,
    judged_by_schemes,
)
from jacdiag.rules.init.schemes import INNER, MATRICES, RESIDUAL, Scheme, catalogue

# Share of a model's matrices that must agree before a scheme is called its own: a clear majority,
# or half of them if the scheme has no base std of its own to choose and several different values
# are just what it says.
_ENOUGH = 0.6
_HALF = 0.5
_SIBLINGS = (("W_Q", "W_K", "W_V"), ("W_1", "W_gate"))
_SAME_FACTOR = 0.1  # relative difference of two factors that are one mistake
_SLACK = 0.03  # of an interval, while the base std is a guess
_BASE_QUANTILE = 4.9  # of a normal distribution: the pooled base std is off by more once in 10^6


@dataclass(frozen=True)
class Followed:
    """A scheme as a model follows it.

    Attributes:
        yardstick: The scheme, with its base std.
        share: Share of the matrices inside the sub-layers that agree, of those that are not zero.
        agree: How many weights agree.
        mistakes: How many mistakes are left to explain: groups of matrices that differ. A scaling
            that went to the wrong matrix is one mistake, not two.
        tables: Of embedding, positions and head, how many agree, less those that do not.
        values: How many different values the scheme explains.
        inner_values: How many of them are those of matrices inside the sub-layers.
    """

    yardstick: Yardstick
    share: float
    agree: int
    mistakes: int
    tables: int
    values: int
    inner_values: int

    @property
    def is_enough(self) -> bool:
        """Return whether so much agrees that the scheme may be called the model's own."""
        if self.agree < 2:
            return False
        if self.share >= _ENOUGH:
            return True
        is_closed = not self.yardstick.scheme.free
        return is_closed and self.share >= _HALF and self.inner_values >= 2

    @property
    def rank(self) -> tuple[int, int, bool, int, int]:
        """Return what schemes are compared by; the largest is the best.

        Of schemes that leave equally many mistakes the tables decide. Then one without a base std
        comes first, since nothing of it was fitted to this model, then the weights that agree.
        That two roles have exactly std s / sqrt(2N) is no accident, that two have s may be one:
        the scheme that explains more different values comes next.
        """
        closed = not self.yardstick.scheme.free
        return -self.mistakes, self.tables, closed, self.agree, self.values


def followed(contract: ContractRecord) -> Yardstick | None:
    """Return the scheme that a model follows; None if none fits most of its matrices."""
    weights = judged_by_schemes(contract)
    if not any(weight.role in MATRICES for weight in weights):
        return None
    fits = []
    for scheme in catalogue()[0]:
        for yardstick in _yardsticks(contract, scheme, weights):
            fit = _fit(yardstick, weights)
            if fit is not None and fit.is_enough:
                fits.append(fit)
    if not fits:
        return None
    best = max(fits, key=lambda fit: fit.rank)
    return replace(best.yardstick, judges_tables=_tables_agree(best.yardstick, weights))


def _tables_agree(yardstick: Yardstick, weights: Iterable[WeightRecord]) -> bool:
    """Return whether one of embedding, positions and head was drawn as the scheme itself says."""
    return any(w.role in TABLES and yardstick.agrees_by_itself(w) for w in weights)


def _fit(yardstick: Yardstick, weights: Sequence[WeightRecord]) -> Followed | None:
    """Return how well a scheme fits; None if it says nothing of any matrix."""
    inside: list[bool] = []  # whether each matrix of a sub-layer agrees
    agree = tables = 0
    values: set[str] = set()
    inner_values: set[str] = set()
    mismatches_by_pattern: dict[str, list[Mismatch]] = {}
    for weight in weights:
        mismatches = yardstick.mismatches(weight)
        if mismatches is None:
            continue
        agrees = not mismatches

        # 1. Tables vote by themselves.
        if weight.role in TABLES:
            vote = _vote(yardstick, weight, agrees)
            tables += vote
            agree += int(vote > 0)

        # 2. Matrices of sub-layers. Zeros do not show how the others were drawn, nor does the
        #    default of torch.nn.init.normal_.
        is_inside = weight.role in MATRICES
        if is_inside:
            agree += int(agrees)
            is_evidence = weight.family != "zero" and not is_of_unit_spread(weight)
            if agrees or is_evidence:
                inside.append(agrees)
            if not agrees:
                mismatches_by_pattern.setdefault(weight.pattern, []).extend(mismatches)

        # 3. The values that are explained.
        if agrees:
            explained = _values_held(yardstick, weight)
            values |= explained
            if is_inside:
                inner_values |= explained
    if not any(inside):
        return None

    share = sum(inside) / len(inside)
    mistakes = _count_mistakes(mismatches_by_pattern)
    mistakes -= _swapped(yardstick, mismatches_by_pattern.values())
    return Followed(yardstick, share, agree, mistakes, tables, len(values), len(inner_values))


def _count_mistakes(groups: Mapping[str, Sequence[Mismatch]]) -> int:
    """Return how many mistakes it takes to explain the matrices that differ.

    Matrices that one loop draws, off by one factor, are one mistake.
    """
    factors_of: dict[tuple[str, str], list[float]] = {}
    for pattern, mismatches in groups.items():
        factors = [_factor_off(mismatch) for mismatch in mismatches]
        first = factors[0]
        key = (pattern, "")
        is_one_factor = all(_is_same_factor(first, other) for other in factors)
        if is_one_factor:
            key = _drawn_together(pattern, mismatches[0].piece.weight.role)
        known = factors_of.setdefault(key, [])
        if not any(_is_same_factor(first, other) for other in known):
            known.append(first)
    return sum(len(factors) for factors in factors_of.values())


def _factor_off(mismatch: Mismatch) -> float:
    return (mismatch.piece.weight.std or 0.0) / (mismatch.value or 1.0)


def _is_same_factor(first: float, other: float) -> bool:
    return math.isclose(first, other, rel_tol=_SAME_FACTOR)


def _drawn_together(pattern: str, role: str) -> tuple[str, str]:
    """Return the key of the matrices that one loop draws: the module, and the first role there."""
    for roles in _SIBLINGS:
        if role in roles:
            parent = pattern.removesuffix(".weight").rpartition(".")[0]
            return parent, roles[0]
    return pattern, ""


def _vote(yardstick: Yardstick, weight: WeightRecord, agrees: bool) -> int:
    """Return 1 for a table with the scheme's own value, 0 for one any scheme allows, else -1."""
    if not agrees:
        return -1
    return int(yardstick.agrees_by_itself(weight))


def _values_held(yardstick: Yardstick, weight: WeightRecord) -> set[str]:
    """Return the values of the scheme that a weight that agrees has."""
    values = yardstick.values(weight).values()
    return {f"{value:.4g}" for value in values if holds(weight, value, yardstick.spread)}


def _swapped(yardstick: Yardstick, groups: Iterable[Sequence[Mismatch]]) -> int:
    """Return how many scalings with depth stand on an inner matrix in place of an output matrix."""
    missing = extra = 0
    for mismatches in groups:
        role = mismatches[0].piece.weight.role
        factor = depth_factor(yardstick, mismatches[0])
        if role in RESIDUAL and factor == "missing":
            missing += 1
        if role in INNER and factor == "extra":
            extra += 1
    return min(missing, extra)


# -- the base std of schemes that leave it open ----------------------------------------------------
def _yardsticks(
    contract: ContractRecord, scheme: Scheme, weights: Sequence[WeightRecord]
) -> Iterable[Yardstick]:
    """Yield a scheme at every base std that some of the weights suggest."""
    if not scheme.free:
        yield Yardstick(contract, scheme)
        return
    for s, spread in _bases(contract, scheme, weights):
        yield Yardstick(contract, scheme, s, spread)


@dataclass(frozen=True)
class _Sample:
    """A weight and what its std is for s = 1."""

    weight: WeightRecord
    factor: float

    @property
    def base(self) -> float:
        return (self.weight.std or 0.0) / self.factor

    @property
    def size(self) -> int:
        return math.prod(self.weight.shape)

    def agrees_with(self, s: float) -> bool:
        """Return whether the std may be s times the factor.

        The interval gets some slack, since s itself is a guess yet.
        """
        low, high = self.weight.lower or 0.0, self.weight.upper or 0.0
        return low * (1 - _SLACK) <= s * self.factor <= high * (1 + _SLACK)


def _bases(
    contract: ContractRecord, scheme: Scheme, weights: Sequence[WeightRecord]
) -> Iterable[tuple[float, Spread]]:
    """Yield candidates of s: pooled over the weights that agree with that of one name pattern."""
    samples = _samples(Yardstick(contract, scheme, 1.0), weights)
    bases_of: dict[str, list[float]] = {}
    for sample in samples:
        bases_of.setdefault(sample.weight.pattern, []).append(sample.base)

    yielded: set[str] = set()
    for bases in bases_of.values():
        median = sorted(bases)[len(bases) // 2]
        s, size = _pool(samples, median)
        if size and f"{s:.5g}" not in yielded:
            yielded.add(f"{s:.5g}")
            half_width = _BASE_QUANTILE / math.sqrt(2 * size)
            yield s, (1 - half_width, 1 + half_width)


def _pool(samples: Sequence[_Sample], s: float) -> tuple[float, int]:
    """Return the base std pooled over the samples that agree with `s`, and their numbers."""
    size = 0
    # The second pass takes in samples that agree with the pooled value alone.
    for _ in range(2):
        agreeing = [sample for sample in samples if sample.agrees_with(s)]
        size = sum(sample.size for sample in agreeing)
        if not size:
            continue
        mean_square = sum(sample.size * sample.base**2 for sample in agreeing) / size
        s = math.sqrt(mean_square)
    return s, size


def _samples(unit: Yardstick, weights: Iterable[WeightRecord]) -> list[_Sample]:
    """Return the matrices whose std depends on s, each with its factor; `unit` has s = 1."""
    samples = []
    for weight in weights:
        if weight.role not in MATRICES or not weight.std:
            continue

        # The first variant of the formula with s in it.
        for formula, value in unit.values(weight).items():
            depends_on_s = "s" in formula.names
            if depends_on_s and value > 0:
                samples.append(_Sample(weight, value))
                break
    return samples
