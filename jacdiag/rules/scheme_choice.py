"""Which scheme a model follows: the one with which the fewest mistakes explain its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.rules.scheme_fit import (
    TABLES,
    Mismatch,
    Spread,
    Yardstick,
    holds,
    is_of_unit_spread,
    judged_by_schemes,
)
from jacdiag.rules.schemes import INNER, MATRICES, RESIDUAL, Scheme, catalogue

# Share of a model's matrices that must agree before a scheme is called its own: a clear majority,
# or half of them if the scheme has no base std of its own to choose and several different values
# are just what it says.
_ENOUGH = 0.6
_HALF = 0.5
_SIBLINGS = (("W_Q", "W_K", "W_V"), ("W_1", "W_gate"))
_SAME_FACTOR = 0.1


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
    """Return the scheme that a model follows, None if none fits the greater part of its
    matrices.
    """
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
    """Return how well a scheme fits, None if it speaks of no matrix."""
    inside: list[bool] = []
    agree = tables = 0
    values: set[str] = set()
    inner_values: set[str] = set()
    groups: dict[str, list[Mismatch]] = {}
    for weight in weights:
        mismatches = yardstick.mismatches(weight)
        if mismatches is None:
            continue
        agrees = not mismatches
        if weight.role in MATRICES:
            agree += agrees
            # Zeros do not tell how the others were drawn, nor does the default of
            # torch.nn.init.normal_.
            tells = weight.family != "zero" and not is_of_unit_spread(weight)
            if agrees or tells:
                inside.append(agrees)
        elif weight.role in TABLES:
            vote = _vote(yardstick, weight, agrees)
            tables += vote
            agree += vote > 0
        if agrees:
            held = _values_held(yardstick, weight)
            values |= held
            if weight.role in MATRICES:
                inner_values |= held
        elif weight.role in MATRICES:
            groups.setdefault(weight.pattern, []).extend(mismatches)
    if not any(inside):
        return None
    share = sum(inside) / len(inside)
    mistakes = _count_mistakes(groups) - _swapped(yardstick, groups.values())
    return Followed(yardstick, share, agree, mistakes, tables, len(values), len(inner_values))


def _count_mistakes(groups: Mapping[str, Sequence[Mismatch]]) -> int:
    """Return how many mistakes it takes: matrices that one loop draws, off by one factor, are
    one.
    """
    mistakes: dict[tuple[str, str], list[float]] = {}
    for pattern, mismatches in groups.items():
        first = mismatches[0]
        siblings = next((roles for roles in _SIBLINGS if first.piece.weight.role in roles), None)
        parent = pattern.removesuffix(".weight").rpartition(".")[0]
        key = (parent, siblings[0]) if siblings else (pattern, "")
        factors = [(one.piece.weight.std or 0.0) / (one.value or 1.0) for one in mismatches]
        ratio = factors[0]
        if not all(math.isclose(ratio, other, rel_tol=_SAME_FACTOR) for other in factors):
            key = (pattern, "")  # another factor in each layer
        ratios = mistakes.setdefault(key, [])
        if not any(math.isclose(ratio, other, rel_tol=_SAME_FACTOR) for other in ratios):
            ratios.append(ratio)
    return sum(map(len, mistakes.values()))


def _vote(yardstick: Yardstick, weight: WeightRecord, agrees: bool) -> int:
    """Return 1 for a table with the scheme's own value, 0 for one that any scheme allows, else
    -1.
    """
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
        weight = mismatches[0].piece.weight
        factor = depth_factor(yardstick, mismatches[0])
        missing += weight.role in RESIDUAL and factor == "missing"
        extra += weight.role in INNER and factor == "extra"
    return min(missing, extra)


def depth_factor(yardstick: Yardstick, mismatch: Mismatch) -> str:
    """Return "missing" or "extra" if a weight is off by just the scaling with depth, else ""."""
    weight, value = mismatch.piece.weight, mismatch.value
    if weight.family in ("zero", "constant") or value <= 0:
        return ""
    layers = yardstick.contract.sizes.get("N", 0.0)
    factors = {math.sqrt(2 * layers)}
    if weight.layer is not None:
        factors.add(math.sqrt(2 * (weight.layer + 1)))
    for factor in sorted(factors):
        if factor <= 1:
            continue
        if holds(weight, value * factor, yardstick.spread):
            return "missing"
        if holds(weight, value / factor, yardstick.spread):
            return "extra"
    return ""


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
        """Return whether the std may be s times the factor, with some slack: s itself is a guess
        yet.
        """
        low, high = self.weight.lower or 0.0, self.weight.upper or 0.0
        return low * 0.97 <= s * self.factor <= high * 1.03


def _bases(
    contract: ContractRecord, scheme: Scheme, weights: Sequence[WeightRecord]
) -> Iterable[tuple[float, Spread]]:
    """Yield candidates of s: pooled over the weights that agree with that of one name pattern."""
    samples = _samples(Yardstick(contract, scheme, 1.0), weights)
    seen: set[str] = set()
    for pattern in dict.fromkeys(sample.weight.pattern for sample in samples):
        group = sorted(sample.base for sample in samples if sample.weight.pattern == pattern)
        s = group[len(group) // 2]
        size = 0
        for _ in range(2):
            inside = [sample for sample in samples if sample.agrees_with(s)]
            size = sum(sample.size for sample in inside)
            if size:
                s = math.sqrt(sum(sample.size * sample.base**2 for sample in inside) / size)
        if size and f"{s:.5g}" not in seen:
            seen.add(f"{s:.5g}")
            half = 4.9 / math.sqrt(2 * size)
            yield s, (1 - half, 1 + half)


def _samples(unit: Yardstick, weights: Iterable[WeightRecord]) -> list[_Sample]:
    """Return the matrices whose std depends on s, each with its factor; `unit` has s = 1."""
    samples = []
    for weight in weights:
        if weight.role not in MATRICES or not weight.std:
            continue
        factor = next((v for f, v in unit.values(weight).items() if "s" in f.names and v > 0), None)
        if factor is not None:
            samples.append(_Sample(weight, factor))
    return samples
