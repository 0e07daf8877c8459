"""Choose the scheme that a model follows: the one that leaves the fewest mistakes to explain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.grouping import group_by
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
from jacdiag.rules.init.weight_facts import is_zero, sampling_interval, size_of, std_of, with_role

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
        # One weight that agrees may be an accident.
        if self.agree < 2:
            return False

        # A clear majority agrees.
        if self.share >= _ENOUGH:
            return True

        # Nothing of a closed scheme was fitted to the model.
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
    matrices = with_role(weights, *MATRICES)
    if not matrices:
        return None

    # The best of those that fit well enough.
    fits = _fits(contract, weights)
    best = max(fits, key=lambda fit: fit.rank, default=None)
    if best is None:
        return None
    return replace(best.yardstick, judges_tables=_tables_agree(best.yardstick, weights))


def _fits(contract: ContractRecord, weights: Sequence[WeightRecord]) -> Iterable[Followed]:
    """Yield the schemes that fit well enough, at every base std that does."""
    schemes, _ = catalogue()
    for scheme in schemes:
        for yardstick in _yardsticks(contract, scheme, weights):
            fit = _fit(yardstick, weights)

            # A scheme that says nothing of most of the matrices has no fit.
            if fit is None:
                continue
            if fit.is_enough:
                yield fit


def _tables_agree(yardstick: Yardstick, weights: Iterable[WeightRecord]) -> bool:
    """Return whether one of embedding, positions and head was drawn as the scheme itself says."""
    tables = with_role(weights, *TABLES)
    return any(map(yardstick.agrees_by_itself, tables))


def _fit(yardstick: Yardstick, weights: Sequence[WeightRecord]) -> Followed | None:
    """Return how well a scheme fits; None if it fits too few matrices, or says nothing of any."""
    inside: list[bool] = []  # whether each matrix of a sub-layer agrees
    most_different = _most_that_may_differ(yardstick.scheme, weights)
    different = 0
    agree = 0
    tables = 0
    inner_values: set[str] = set()
    outer_values: set[str] = set()
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

        # 2. Matrices of sub-layers.
        is_inside = weight.role in MATRICES
        if is_inside:
            agree += int(agrees)
            if agrees or _is_evidence(weight):
                inside.append(agrees)
                different += int(not agrees)

            # Whatever the others are, too few can agree. Most schemes end here.
            if different > most_different:
                return None
            if not agrees:
                mismatches_by_pattern.setdefault(weight.pattern, []).extend(mismatches)

        # 3. The values that are explained.
        if agrees:
            explained = inner_values if is_inside else outer_values
            explained |= _values_held(yardstick, weight)

    # 4. A scheme that no matrix follows does not fit.
    if not any(inside):
        return None
    share = sum(inside) / len(inside)
    mistakes = _count_mistakes(mismatches_by_pattern)
    mistakes -= _swapped(yardstick, mismatches_by_pattern.values())
    values = inner_values | outer_values
    return Followed(yardstick, share, agree, mistakes, tables, len(values), len(inner_values))


def _most_that_may_differ(scheme: Scheme, weights: Iterable[WeightRecord]) -> float:
    """Return how many matrices may differ from a scheme that is called the model's own."""
    least_share = _ENOUGH
    if not scheme.free:
        least_share = _HALF
    return (1 - least_share) * len(with_role(weights, *MATRICES))


def _is_evidence(weight: WeightRecord) -> bool:
    """Return whether a matrix that differs shows that the model follows another scheme."""
    # Zeros do not show how the others were drawn, nor does the default of torch.nn.init.normal_.
    return not is_zero(weight) and not is_of_unit_spread(weight)


def _count_mistakes(groups: Mapping[str, Sequence[Mismatch]]) -> int:
    """Return how many mistakes it takes to explain the matrices that differ.

    Matrices that one loop draws, off by one factor, are one mistake.
    """
    factors_of: dict[tuple[str, str], list[float]] = {}
    for pattern, mismatches in groups.items():
        # 1. The loop that drew them.
        factors = list(map(_factor_off, mismatches))
        loop = _loop_of(pattern, mismatches[0].piece.weight.role, factors)

        # 2. Count each factor once for each loop.
        known = factors_of.setdefault(loop, [])
        if not any(_is_same_factor(factors[0], other) for other in known):
            known.append(factors[0])

    return sum(map(len, factors_of.values()))


def _loop_of(pattern: str, role: str, factors: Sequence[float]) -> tuple[str, str]:
    """Return the key of the loop that drew the matrices of one name.

    Matrices that are off by several factors stand for themselves.
    """
    is_one_factor = all(_is_same_factor(factors[0], other) for other in factors)
    if not is_one_factor:
        return pattern, ""
    return _drawn_together(pattern, role)


def _factor_off(mismatch: Mismatch) -> float:
    """Return the measured std over the expected one."""
    return std_of(mismatch.piece.weight) / (mismatch.value or 1.0)


def _is_same_factor(factor: float, other: float) -> bool:
    return math.isclose(factor, other, rel_tol=_SAME_FACTOR)


def _drawn_together(pattern: str, role: str) -> tuple[str, str]:
    """Return the key of the matrices that one loop draws: the module, and the first role there."""
    for roles in _SIBLINGS:
        if role in roles:
            # One loop draws the siblings of one module.
            parent = pattern.removesuffix(".weight").rpartition(".")[0]
            return parent, roles[0]

    # A matrix that stands for itself.
    return pattern, ""


def _vote(yardstick: Yardstick, weight: WeightRecord, agrees: bool) -> int:
    """Return 1 for a table with the scheme's own value, 0 for one any scheme allows, else -1."""
    if not agrees:
        return -1

    # A value that any scheme allows says nothing.
    return int(yardstick.agrees_by_itself(weight))


def _values_held(yardstick: Yardstick, weight: WeightRecord) -> set[str]:
    """Return the values of the scheme that a weight that agrees has."""
    held: set[str] = set()
    for value in yardstick.values(weight).values():
        if holds(weight, value, yardstick.spread):
            held.add(f"{value:.4g}")
    return held


def _swapped(yardstick: Yardstick, groups: Iterable[Sequence[Mismatch]]) -> int:
    """Return how many scalings with depth stand on an inner matrix in place of an output matrix."""
    missing = 0
    extra = 0
    for mismatches in groups:
        role = mismatches[0].piece.weight.role
        factor = depth_factor(yardstick, mismatches[0])

        # An output matrix has lost its scaling, or an inner one has got it.
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

    # Each base std is a scheme of its own.
    for s, spread in _bases(contract, scheme, weights):
        yield Yardstick(contract, scheme, s, spread)


@dataclass(frozen=True)
class _Sample:
    """A weight and what its std is for s = 1."""

    weight: WeightRecord
    factor: float

    @property
    def base(self) -> float:
        return std_of(self.weight) / self.factor

    @property
    def size(self) -> int:
        return size_of(self.weight)

    def agrees_with(self, s: float) -> bool:
        """Return whether the std may be s times the factor.

        The interval gets some slack, since s itself is a guess yet.
        """
        interval = sampling_interval(self.weight)
        if interval is None:
            return False

        # Wider at both ends.
        low = interval.lower * (1 - _SLACK)
        high = interval.upper * (1 + _SLACK)
        return low <= s * self.factor <= high


def _bases(
    contract: ContractRecord, scheme: Scheme, weights: Sequence[WeightRecord]
) -> Iterable[tuple[float, Spread]]:
    """Yield candidates of s: pooled over the weights that agree with that of one name pattern."""
    samples = _samples(Yardstick(contract, scheme, 1.0), weights)
    yielded: set[str] = set()
    for group in group_by(samples, lambda sample: sample.weight.pattern).values():
        # 1. The base std of one name, pooled over all that agree with it.
        bases = sorted(sample.base for sample in group)
        s, size = _pool(samples, bases[len(bases) // 2])

        # 2. Several names may suggest the same one.
        shown = f"{s:.5g}"
        if size and shown not in yielded:
            yielded.add(shown)
            half_width = _BASE_QUANTILE / math.sqrt(2 * size)
            yield s, (1 - half_width, 1 + half_width)


def _pool(samples: Sequence[_Sample], s: float) -> tuple[float, int]:
    """Return the base std pooled over the samples that agree with `s`, and their numbers."""
    # 1. Those that agree with the guess.
    agreeing = _agreeing(samples, s)
    if agreeing:
        s = _root_mean_square(agreeing)

    # 2. Those that agree with the pooled value alone are taken in as well.
    agreeing = _agreeing(samples, s)
    if agreeing:
        s = _root_mean_square(agreeing)
    return s, _size_of_all(agreeing)


def _agreeing(samples: Iterable[_Sample], s: float) -> list[_Sample]:
    return [sample for sample in samples if sample.agrees_with(s)]


def _size_of_all(samples: Iterable[_Sample]) -> int:
    return sum(sample.size for sample in samples)


def _root_mean_square(samples: Sequence[_Sample]) -> float:
    """Return the root mean square of the base std over all numbers of some samples."""
    squares = sum(sample.size * sample.base**2 for sample in samples)
    size = _size_of_all(samples)
    return math.sqrt(squares / size)


def _samples(unit: Yardstick, weights: Iterable[WeightRecord]) -> list[_Sample]:
    """Return the matrices whose std depends on s, each with its factor; `unit` has s = 1."""
    samples = []
    for weight in with_role(weights, *MATRICES):
        # Zeros are no sample of a draw.
        if not weight.std:
            continue

        # A formula without s says nothing of it.
        factor = _factor_of_base(unit, weight)
        if factor is not None:
            samples.append(_Sample(weight, factor))

    return samples


def _factor_of_base(unit: Yardstick, weight: WeightRecord) -> float | None:
    """Return what s is multiplied by for a weight; None if no formula for it has s in it."""
    for formula, value in unit.values(weight).items():
        # The first variant counts.
        depends_on_s = "s" in formula.names
        if depends_on_s and value > 0:
            return value

    return None
