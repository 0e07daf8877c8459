"""Find biases that were drawn as the matrices are, or around another number than zero."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jacdiag.records import WeightRecord
from jacdiag.rules.finding_numbers import plain
from jacdiag.rules.layer_groups import CONSTANT, MAJORITY
from jacdiag.rules.odd_parameter import Difference
from jacdiag.rules.schemes import INNER

_DRAWN = ("normal", "truncated", "uniform")
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
        return all(bias.family in _DRAWN for bias in self.members)

    @property
    def is_off_zero(self) -> bool:
        """Whether the mean of the distribution cannot be zero."""
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
    groups = [group for group in all_groups if group.is_drawn]

    # 1. Drawn as the matrices.
    inner = _middle_std(weights)
    large = [group for group in groups if group.count >= _LEAST_SIZE]
    alike = [group for group in large if not group.is_off_zero and _drawn_as_matrices(group, inner)]
    are_most = bool(alike) and len(alike) >= MAJORITY * len(large)
    if are_most and sum(group.count for group in alike) >= _LEAST_IN_ALL:
        for group in alike:
            yield from _differences_of(group, _AS_MATRICES)
        yield from _norm_biases(weights, inner)
        return

    # 2. Drawn around another number. The error of a mean is known for any size.
    off_zero = [group for group in groups if group.is_off_zero]
    are_most = len(off_zero) >= 2 and len(off_zero) >= MAJORITY * len(all_groups)
    if not are_most:
        return
    for group in off_zero:
        others = (
            f"drawn around {plain(group.mean)}; the bias of a linear layer usually starts at 0, "
            "or is drawn around 0"
        )
        yield from _differences_of(group, others)


def bias_groups(weights: Sequence[WeightRecord]) -> list[BiasGroup]:
    """Return the biases next to a matrix that was drawn, by their name over the layers.

    Routers are left out.
    """
    by_name = {weight.parameter: weight for weight in weights}
    pairs: dict[str, list[tuple[WeightRecord, WeightRecord]]] = {}
    for bias in weights:
        if bias.role != "bias" or bias.mean is None:
            continue
        matrix = by_name.get(_name_of_matrix(bias.parameter))
        if matrix is not None and _is_drawn_matrix(matrix):
            pairs.setdefault(bias.pattern, []).append((bias, matrix))
    return [_pool(group) for group in pairs.values()]


def _is_drawn_matrix(weight: WeightRecord) -> bool:
    """Return whether a weight is a matrix with random numbers, and no router."""
    is_drawn = weight.family not in CONSTANT and bool(weight.std)
    return weight.role != "router" and len(weight.shape) >= 2 and is_drawn


def _name_of_matrix(bias: str) -> str:
    """Return the name of the matrix that a bias stands next to.

    The names are those of nn.Linear and nn.MultiheadAttention.
    """
    module, _, name = bias.rpartition(".")
    matrix = name.replace("bias", "weight") if "bias" in name else ""
    return f"{module}.{matrix}" if module else matrix


def _pool(pairs: Sequence[tuple[WeightRecord, WeightRecord]]) -> BiasGroup:
    """Return the biases of one name with the figures of all their numbers."""
    biases = tuple(bias for bias, _ in pairs)
    matrices = tuple(matrix for _, matrix in pairs)
    sizes = [math.prod(bias.shape) for bias in biases]
    means = [bias.mean or 0.0 for bias in biases]
    squares = [(bias.std or 0.0) ** 2 + (bias.mean or 0.0) ** 2 for bias in biases]
    count = sum(sizes)
    return BiasGroup(
        biases,
        matrices,
        count,
        mean=sum(map(operator.mul, sizes, means)) / count,
        std=math.sqrt(sum(map(operator.mul, sizes, squares)) / count),
        largest=max(bias.largest or 0.0 for bias in biases),
    )


def _middle_std(weights: Sequence[WeightRecord]) -> float:
    """Return the middle std of the matrices that read the stream; 0 if none was drawn."""
    stds = sorted(weight.std for weight in weights if weight.role in INNER and weight.std)
    return stds[len(stds) // 2] if stds else 0.0


def _drawn_as_matrices(group: BiasGroup, inner: float) -> bool:
    """Return whether biases have the std of matrices, and are not uniform.

    The matrices are their own, or those that read the stream.
    """
    squares = sum((matrix.std or 0.0) ** 2 for matrix in group.matrices)
    own = math.sqrt(squares / len(group.matrices))
    return _has_std(group, own) or _has_std(group, inner)


def _has_std(group: BiasGroup, std: float) -> bool:
    """Return whether a group has this std, and no uniform distribution with it."""
    if std <= 0:
        return False
    error = _ERRORS / math.sqrt(2 * group.count)
    is_close = abs(group.std / std - 1) <= error
    return is_close and group.largest > _BEYOND_UNIFORM * std


def _norm_biases(weights: Sequence[WeightRecord], inner: float) -> Iterator[Difference]:
    """Yield the biases of norms that have the std of the matrices.

    They went through the same code.
    """
    norms = {_module_of(weight) for weight in weights if weight.role == "norm_gain"}
    by_pattern: dict[str, list[WeightRecord]] = {}
    for bias in weights:
        is_of_norm = bias.role == "bias" and _module_of(bias) in norms
        if is_of_norm and bias.family in _DRAWN:
            by_pattern.setdefault(bias.pattern, []).append(bias)
    for members in by_pattern.values():
        group = _pool([(bias, bias) for bias in members])
        if not group.is_off_zero and _has_std(group, inner):
            yield from _differences_of(group, _AS_MATRICES)


def _module_of(weight: WeightRecord) -> str:
    return weight.parameter.rpartition(".")[0]


def _differences_of(group: BiasGroup, others: str) -> Iterator[Difference]:
    for bias in group.members:
        yield Difference(bias, bias.pattern, len(group.members), others, 0.0)
