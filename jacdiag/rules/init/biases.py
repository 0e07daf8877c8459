"""Find biases that were drawn as the matrices are, or around another number than zero."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jacdiag.records import WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.layer_groups import MAJORITY
from jacdiag.rules.init.odd_parameter import Difference
from jacdiag.rules.init.schemes import INNER
from jacdiag.rules.init.weight_facts import (
    INDEPENDENT,
    is_constant,
    is_vector,
    largest_of,
    mean_of,
    module_of,
    pattern_of,
    size_of,
    std_of,
    with_role,
)

_LEAST_SIZE = 100  # biases of one name, over all layers
_LEAST_IN_ALL = 256  # biases of a model: with fewer, a std is known to a fifth at best
_ERRORS = 4.9  # standard errors, a chance of 1e-6
# A uniform draw ends at √3 std. Of 100 normal numbers at least one lies beyond 1.9 std, but for a
# chance of 0.3 %. nn.Linear draws weight and bias from one uniform distribution, which is published
# and is not named.
_BEYOND_UNIFORM = 1.9
_AS_MATRICES = (
    "that is the std of the matrices, and the numbers are not uniform as nn.Linear draws a bias"
)


@dataclass(frozen=True)
class BiasGroup:
    """The biases of one name over the layers, with the matrices that they stand next to.

    Attributes:
        members: the biases.
        matrices: the matrix of each.
        count: how many numbers the biases are.
        mean, std: over all of them; the std is taken around 0.
        largest: their largest magnitude.
    """

    members: tuple[WeightRecord, ...]
    matrices: tuple[WeightRecord, ...]
    count: int
    mean: float
    std: float
    largest: float

    @property
    def is_drawn(self) -> bool:
        """Whether each of them was drawn."""
        return all(bias.family in INDEPENDENT for bias in self.members)

    @property
    def is_off_zero(self) -> bool:
        """Whether the mean of the distribution cannot be zero."""
        # `std` is around 0: what is left of it without the mean is the spread around the mean.
        spread = math.sqrt(max(self.std**2 - self.mean**2, 0.0))
        return abs(self.mean) > _ERRORS * spread / math.sqrt(self.count)


def wrong_biases(weights: Sequence[WeightRecord]) -> Iterator[Difference]:
    """Yield biases of linear layers that were drawn as their matrices are, or not around zero.

    Nothing is said of single layers whose bias has a meaning of its own (time steps, gates,
    routers): two thirds of the names must agree.

    Args:
        weights: all parameters of a model.
    """
    all_groups = bias_groups(weights)
    drawn_groups = [group for group in all_groups if group.is_drawn]

    # 1. Drawn as the matrices.
    inner_std = _middle_std(weights)
    as_matrices = _groups_drawn_as_matrices(drawn_groups, inner_std)
    if as_matrices:
        # The biases of norms went through the same code.
        for group in as_matrices:
            yield from _differences_of(group, _AS_MATRICES)
        yield from _norm_biases(weights, inner_std)
        return

    # 2. Drawn around another number.
    for group in _groups_off_zero(drawn_groups, len(all_groups)):
        others = (
            f"drawn around {plain(group.mean)}; the bias of a linear layer usually starts at 0, "
            "or is drawn around 0"
        )
        yield from _differences_of(group, others)


def _groups_off_zero(groups: Sequence[BiasGroup], count: int) -> list[BiasGroup]:
    """Return the groups that were drawn around another number than zero, if most were.

    Args:
        groups: biases that were drawn.
        count: how many groups the model has, constant ones included.
    """
    # The error of a mean is known for any size.
    off_zero = [group for group in groups if group.is_off_zero]
    if len(off_zero) < 2:
        return []
    if len(off_zero) < MAJORITY * count:
        return []

    return off_zero


def _groups_drawn_as_matrices(groups: Sequence[BiasGroup], inner_std: float) -> list[BiasGroup]:
    """Return the groups with the std of the matrices, if most of the large groups have it.

    Args:
        groups: biases that were drawn.
        inner_std: the middle std of the matrices that read the stream.
    """
    # 1. The std of few numbers says nothing.
    count_large = 0
    alike: list[BiasGroup] = []
    for group in groups:
        is_large = group.count >= _LEAST_SIZE
        count_large += int(is_large)
        if is_large and _drawn_as_matrices(group, inner_std):
            alike.append(group)

    # 2. Most groups must agree.
    if not alike or len(alike) < MAJORITY * count_large:
        return []

    # 3. So must enough numbers.
    numbers = sum(group.count for group in alike)
    if numbers < _LEAST_IN_ALL:
        return []
    return alike


def bias_groups(weights: Sequence[WeightRecord]) -> list[BiasGroup]:
    """Return the biases next to a matrix that was drawn, by their name over the layers.

    Routers are left out.

    Args:
        weights: all parameters of a model.
    """
    # 1. Each bias with the matrix of the same module.
    pairs: list[_Pair] = []
    by_name = {weight.parameter: weight for weight in weights}
    for bias in with_role(weights, "bias"):
        matrix = by_name.get(_name_of_matrix(bias.parameter))
        if matrix is None or bias.mean is None:
            continue
        if _is_drawn_matrix(matrix):
            pairs.append(_Pair(bias, matrix))

    # 2. Those of one name over the layers.
    groups = group_by(pairs, lambda pair: pair.bias.pattern)
    return [_pool(group) for group in groups.values()]


@dataclass(frozen=True)
class _Pair:
    """A bias and the matrix that it stands next to."""

    bias: WeightRecord
    matrix: WeightRecord


def _is_drawn_matrix(weight: WeightRecord) -> bool:
    """Return whether a weight is a matrix with random numbers, and no router."""
    # The bias of a router balances its experts.
    is_matrix = not is_vector(weight)
    if weight.role == "router" or not is_matrix:
        return False

    # A constant has no spread.
    has_std = std_of(weight) != 0
    return has_std and not is_constant(weight)


def _name_of_matrix(bias: str) -> str:
    """Return the name of the matrix that a bias stands next to.

    The names are those of nn.Linear and nn.MultiheadAttention.
    """
    module, _, name = bias.rpartition(".")
    matrix = ""
    if "bias" in name:
        matrix = name.replace("bias", "weight")

    # A parameter of the model itself has no module.
    if not module:
        return matrix

    return f"{module}.{matrix}"


def _pool(pairs: Sequence[_Pair]) -> BiasGroup:
    """Return the biases of one name with the figures of all their numbers.

    Args:
        pairs: each bias with its matrix.
    """
    # 1. Size, mean and mean square of each bias.
    biases = [pair.bias for pair in pairs]
    sizes = list(map(size_of, biases))
    means = list(map(mean_of, biases))
    squares = list(map(_mean_square, biases))

    # 2. Those over all of them.
    count = sum(sizes)
    return BiasGroup(
        members=tuple(biases),
        matrices=tuple(pair.matrix for pair in pairs),
        count=count,
        mean=sum(map(operator.mul, sizes, means)) / count,
        std=math.sqrt(sum(map(operator.mul, sizes, squares)) / count),
        largest=max(map(largest_of, biases)),
    )


def _mean_square(weight: WeightRecord) -> float:
    return std_of(weight) ** 2 + mean_of(weight) ** 2


def _middle_std(weights: Sequence[WeightRecord]) -> float:
    """Return the middle std of the matrices that read the stream; 0 if none was drawn."""
    stds = map(std_of, with_role(weights, *INNER))

    # Zeros were not drawn.
    known = sorted(filter(None, stds))
    if not known:
        return 0.0
    return known[len(known) // 2]


def _drawn_as_matrices(group: BiasGroup, inner_std: float) -> bool:
    """Return whether biases lie around zero with the std of matrices, and are not uniform.

    The matrices are their own, or those that read the stream.
    """
    if group.is_off_zero:
        return False

    # The root mean square over their own matrices.
    stds = map(std_of, group.matrices)
    squares = sum(std**2 for std in stds)
    own_std = math.sqrt(squares / len(group.matrices))
    return _has_std(group, own_std) or _has_std(group, inner_std)


def _has_std(group: BiasGroup, std: float) -> bool:
    """Return whether a group has this std, and no uniform distribution with it."""
    if std <= 0:
        return False

    # 1. The std, within its sampling error.
    error = _ERRORS / math.sqrt(2 * group.count)
    if abs(group.std / std - 1) > error:
        return False

    # 2. The largest number lies where a uniform distribution has none.
    return group.largest > _BEYOND_UNIFORM * std


def _norm_biases(weights: Sequence[WeightRecord], inner_std: float) -> Iterator[Difference]:
    """Yield the biases of norms that have the std of the matrices.

    They went through the same code.
    """
    for biases in _drawn_biases_of_norms(weights):
        group = _pool([_Pair(bias, bias) for bias in biases])
        if group.is_off_zero:
            continue

        # Around zero, with the std of the matrices that read the stream.
        if _has_std(group, inner_std):
            yield from _differences_of(group, _AS_MATRICES)


def _drawn_biases_of_norms(weights: Sequence[WeightRecord]) -> list[list[WeightRecord]]:
    """Return the drawn biases of norms, those of one name over the layers in one list."""
    # 1. A norm is a module with a gain.
    gains = with_role(weights, "norm_gain")
    norms = set(map(module_of, gains))

    # 2. Its bias, if that was drawn.
    biases = with_role(weights, "bias")
    of_norms = [bias for bias in biases if module_of(bias) in norms]
    drawn = [bias for bias in of_norms if bias.family in INDEPENDENT]
    return list(group_by(drawn, pattern_of).values())


def _differences_of(group: BiasGroup, others: str) -> Iterator[Difference]:
    for bias in group.members:
        yield Difference(bias, bias.pattern, len(group.members), others, 0.0)
