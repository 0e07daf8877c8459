"""Find the distribution from which a weight was drawn, with an interval for its std.

The std s of n numbers from a normal distribution obeys n s^2 / sigma^2 ~ chi^2 with n - 1 degrees
of freedom, so that the interval for sigma is exact. For the other families the variance of s^2
follows from their known kurtosis k,

Var(s^2) = sigma^4 ((k - 1) / n + 2 / (n (n - 1))),

and chi^2 with the degrees of freedom that give this variance takes its place. An orthogonal matrix
has no spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, product

import torch
from scipy.special import gammainccinv, gammaincinv
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download
from jacdiag.measure.moments import CHUNK, Moments, MomentSums, moments, read_all

ALPHA = 1e-6
_MOST_FIGURES = 1024  # tensors of sums that wait on an accelerator before they are read
_ROUNDING = 1e-4  # what generators and low precisions may move a std by, relative
UNIFORM_KURTOSIS = 1.8
_MOST_SEARCHED = 16
# An outlier is so many times the spread of the others away. Of 10^12 normal numbers the furthest
# lies at 7 standard deviations, of 10^8 Laplace numbers at 18.
_OUTLIER = 20.0
_MOST_OUTLIERS = 0.01  # of all numbers; where more are far away, the draw is a mixture
_DENSE = 0.25  # of a row or column: then all of it was drawn larger
_SAMPLE = 1 << 16  # numbers from which the spread of the others is measured
_SHARDS = (2, 3, 4, 8)  # equal blocks that a matrix is searched for


@dataclass(frozen=True)
class FittedDraw:
    """A family, and the interval for the std that a weight was drawn with.

    Attributes:
        family: normal, truncated, uniform, orthogonal, zero, constant or other.
        std: as measured; `lower` and `upper` bound the std of the distribution, each at alpha / 2.
        mean: as measured.
        truncation: std of the truncated normal over that of the normal before the cut; 1 for other
            families.
        zero_rows: rows left out, because they are exactly zero.
        largest: largest magnitude.
        tiny: numbers closer to zero than `TINY`, and not zero.
        outliers: numbers further from the others than any draw reaches.
        core_std: std of the others; None without outliers.
    """

    family: str
    std: float
    lower: float
    upper: float
    mean: float
    truncation: float = 1.0
    zero_rows: int = 0
    largest: float = 0.0
    tiny: int = 0
    outliers: int = 0
    core_std: float | None = None


def draw_of(tensor: Tensor, *, table: bool = False, alpha: float = ALPHA) -> FittedDraw | None:
    """Return the family of a weight, with an exact sampling interval for its std.

    Args:
        tensor: any shape; read in pieces, so that it may be larger than half of the memory.
        table: an embedding, whose rows of zeros (padding) are no draws.
        alpha: chance that the true std lies outside.

    Returns:
        None for a tensor without floating values, or with NaN or Inf in it.

    Example:
        >>> draw = draw_of(0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        >>> draw.family, draw.lower < 0.02 < draw.upper
        ('normal', True)
    """
    if not _has_values(tensor):
        return None

    draw = _draw_from(moments(tensor.detach(), table), alpha)
    if draw is None:
        return None
    return _with_outliers(draw, tensor)


def _has_values(tensor: Tensor) -> bool:
    """Return whether there are floating values to measure."""
    return tensor.is_floating_point() and tensor.numel() > 0 and not tensor.is_meta


def _draw_from(measured: Moments, alpha: float) -> FittedDraw | None:
    """Return the draw that explains figures, without a look at outliers; None if not finite."""
    figures = (measured.mean, measured.std, measured.largest)
    if not all(map(math.isfinite, figures)):
        return None

    # 1. No spread at all.
    std, mean = measured.std, measured.mean
    if measured.largest == 0.0:
        return FittedDraw("zero", 0.0, 0.0, 0.0, 0.0)
    if std <= 1e-7 * abs(mean):
        return FittedDraw(
            "constant", 0.0, 0.0, 0.0, mean, largest=measured.largest, tiny=measured.tiny
        )

    # 2. Orthogonal: no sampling error either.
    if measured.is_orthogonal and not measured.zero_rows:
        return FittedDraw(
            "orthogonal",
            std,
            std * (1 - 1e-3),
            std * (1 + 1e-3),
            mean,
            largest=measured.largest,
            tiny=measured.tiny,
        )

    # 3. A family with a known kurtosis, or "other".
    family = _family_of(measured)
    lower, upper = interval(std, measured.count, family.kurtosis, alpha)
    return FittedDraw(
        family.name,
        std,
        lower,
        upper,
        mean,
        truncation=family.truncation,
        zero_rows=measured.zero_rows,
        largest=measured.largest,
        tiny=measured.tiny,
    )


def _with_outliers(draw: FittedDraw, tensor: Tensor) -> FittedDraw:
    """Return a draw with its outliers, which only a tensor of no known family is searched for."""
    if draw.family != "other":
        return draw
    outliers, core_std = find_outliers(tensor.detach(), draw.largest)
    return replace(draw, outliers=outliers, core_std=core_std)


def find_outliers(tensor: Tensor, largest: float) -> tuple[int, float | None]:
    """Return the count of numbers that are too far from the others, and the std of the others.

    Too far means further than any draw reaches.

    Args:
        tensor: a matrix or table of any shape. Vectors have no outliers here.
        largest: its largest magnitude.

    Returns:
        (0, None) if there are none, if more than one number in a hundred is far away, if they fill
        a row or column, or if there is just one in each, as in an identity matrix with noise.

    Example:
        >>> weight = 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> weight[3, 5] = -2.0
        >>> count, std = find_outliers(weight, 2.0)
        >>> count, round(std, 2)
        (1, 0.02)
    """
    if tensor.dim() < 2:
        return 0, None

    # 1. The spread of most numbers, from a sample.
    flat = tensor.reshape(-1)
    sample = in_float64(flat[:: max(1, flat.numel() // _SAMPLE)])
    centre = sample.median()
    spread = float((sample - centre).abs().median()) / 0.6745  # that of a normal draw of std 1
    limit = _OUTLIER * spread
    if spread == 0.0 or largest <= limit:
        return 0, None

    # 2. Numbers beyond the limit, and where they stand.
    rows = tensor.reshape(tensor.shape[0], -1)
    per_column = torch.zeros(rows.shape[1], dtype=torch.long)
    per_row = []
    total = 0.0
    squares = 0.0
    for piece in rows.split(max(1, CHUNK // rows.shape[1])):
        distances = in_float64(piece) - centre
        is_far = distances.abs() > limit
        per_row.append(is_far.sum(1).cpu())
        per_column += is_far.sum(0).cpu()
        near = distances[~is_far]
        total += float(near.sum())
        squares += float(near @ near)

    # 3. Leave out patterns that are there on purpose.
    count = int(per_column.sum())
    if not count or _is_pattern(torch.cat(per_row), per_column, count):
        return 0, None

    others = flat.numel() - count
    return count, math.sqrt(max(squares / others - (total / others) ** 2, 0.0))


def _is_pattern(per_row: Tensor, per_column: Tensor, count: int) -> bool:
    """Return whether far numbers form a mixture, a diagonal, or a larger row or column.

    Args:
        per_row: how many there are in each row.
        per_column: how many there are in each column.
        count: how many there are.
    """
    # 1. A mixture has many anywhere.
    rows, columns = len(per_row), len(per_column)
    if count > _MOST_OUTLIERS * rows * columns:
        return True

    # 2. An identity with noise has one in each row and column.
    most_in_row, most_in_column = int(per_row.max()), int(per_column.max())
    if count == min(rows, columns) and most_in_row == 1 == most_in_column:
        return True

    # 3. A row or column was drawn larger.
    fills_row = most_in_row > max(1, _DENSE * columns)
    fills_column = most_in_column > max(1, _DENSE * rows)
    return fills_row or fills_column


class Draws:
    """Draws of weights by name, each measured once.

    To read a weight may cost as much as to judge it.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self._draws: dict[tuple[str, bool], FittedDraw | None] = {}

    def of(self, name: str, *, table: bool = False) -> FittedDraw | None:
        """Return the draw of one weight; `table` as in `draw_of`."""
        return self.of_all({name: table})[name]

    def of_all(self, weights: Mapping[str, bool]) -> dict[str, FittedDraw | None]:
        """Return the draws of several weights, by one download for those on an accelerator.

        Args:
            weights: name -> `table` as in `draw_of`.
        """
        # 1. What is not known yet. On a CPU every figure is there at once. On an accelerator sums
        # wait until there are enough of them, since each takes memory there.
        waiting: dict[tuple[str, bool], MomentSums] = {}
        for key in weights.items():
            if key in self._draws:
                continue
            look = _look_at(self.params[key[0]], table=key[1])
            if not isinstance(look, MomentSums):
                self._draws[key] = look
                continue
            waiting[key] = look
            if sum(len(sums.figures) for sums in waiting.values()) >= _MOST_FIGURES:
                self._read(waiting)
        self._read(waiting)

        # 2. All of them, in order.
        return {name: self._draws[name, table] for name, table in weights.items()}

    def _read(self, waiting: dict[tuple[str, bool], MomentSums]) -> None:
        """Read the sums of weights that wait on an accelerator, in one download."""
        all_measured = read_all(list(waiting.values()))
        for key, measured in zip(waiting, all_measured, strict=True):
            draw = _draw_from(measured, ALPHA)

            # Only a tensor of no known family is looked at again.
            name, _ = key
            if draw is not None and draw.family == "other":
                draw = _with_outliers(draw, self.params[name])
            self._draws[key] = draw
        waiting.clear()


def _look_at(tensor: Tensor, *, table: bool) -> FittedDraw | MomentSums | None:
    """Return the draw of a weight on a CPU, else its sums, which are still to be read."""
    # 1. What is known at once.
    is_on_cpu = tensor.device.type == "cpu"
    if is_on_cpu or not _has_values(tensor):
        return draw_of(tensor, table=table)

    # 2. What an accelerator has to sum first.
    return MomentSums(tensor.detach(), table)


def copies_of(
    draws: Mapping[str, FittedDraw | None], params: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return which weights hold the very numbers of another: name -> first of that content.

    Only weights whose figures agree to the last digit are compared number by number, so that
    nothing is read twice in a model without copies. Weights that are constant, and names of one and
    the same memory, are no copies. A stack of matrices (experts) of which one repeats another is a
    copy of itself, and so is a matrix of equal blocks (shards).

    Args:
        draws: the draws of the weights by name.
        params: the weights themselves.

    Example:
        >>> weight = torch.randn(4, 4)
        >>> params = {"a": weight, "b": weight.clone(), "tied": weight}
        >>> params |= {"c": torch.ones(4), "d": torch.ones(4)}
        >>> copies_of({name: draw_of(tensor) for name, tensor in params.items()}, params)
        {'b': 'a'}
    """
    # 1. The weights that may repeat a part of themselves, by one look at all of them.
    varying = {name: draw for name, draw in draws.items() if draw is not None and draw.std > 0}
    flags = download([_may_repeat_a_part(params[name]) for name in varying])
    may_repeat = dict(zip(varying, flags, strict=True))

    firsts: dict[tuple[float, ...], list[str]] = {}
    copies: dict[str, str] = {}
    for name, draw in varying.items():
        # 2. The first weight with the same numbers. Only those of the same figures are read.
        candidates = firsts.setdefault((draw.mean, draw.std, draw.largest), [])
        first = _first_with_numbers(params[name], candidates, params)
        if first is not None:
            if not _same_memory(params[name], params[first]):
                copies[name] = first
            continue

        # 3. There is none, but the weight may repeat a part of itself.
        candidates.append(name)
        if may_repeat[name] and _repeats_a_part(params[name]):
            copies[name] = name

    return copies


def _first_with_numbers(
    tensor: Tensor, names: Iterable[str], params: Mapping[str, Tensor]
) -> str | None:
    """Return the first of several weights that holds the numbers of a tensor."""
    for name in names:
        if _same_numbers(tensor, params[name]):
            return name

    return None


def _same_numbers(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have one shape and the same numbers."""
    if tensor.shape != other.shape:
        return False

    return torch.equal(tensor.to(other.device), other)


def _may_repeat_a_part(tensor: Tensor) -> Tensor:
    """Return whether a tensor may be made of repetitions, as a flag on its device.

    One row is enough to rule most matrices out. A stack of matrices is never ruled out.
    """
    if tensor.dim() != 2:
        return torch.tensor(tensor.dim() == 3)

    flags = [(matrix[0] == matrix[length]).all() for matrix, length in _blocks_of(tensor)]
    if not flags:
        return torch.tensor(False)
    return torch.stack(flags).any()


def _repeats_a_part(tensor: Tensor) -> bool:
    """Return whether a tensor is made of repetitions.

    A stack of matrices holds one of them twice, or a matrix is one block of rows or columns
    repeated.
    """
    if tensor.dim() == 3:
        return _repeats_a_matrix(tensor)
    if tensor.dim() != 2:
        return False

    return any(_repeats_a_block(matrix, length) for matrix, length in _blocks_of(tensor))


def _blocks_of(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield a matrix, and the length of the block that all its rows may be; then its transpose.

    Blocks of a single row, or of single numbers, repeat by chance.
    """
    for matrix, count in product((tensor, tensor.T), _SHARDS):
        rows, columns = matrix.shape
        length, remainder = divmod(rows, count)
        if not remainder and length > 1 and columns > 1:
            yield matrix, length


def _repeats_a_matrix(stack: Tensor) -> bool:
    """Return whether a stack of matrices holds one of them twice."""
    # Matrices are compared in full only if their first numbers agree.
    beginnings: dict[tuple[float, ...], int] = {}
    for index, numbers in enumerate(stack[:, 0, :8].tolist()):
        earlier = beginnings.setdefault(tuple(numbers), index)
        is_first = earlier == index
        # Equal beginnings may be zeros alone.
        if not is_first and torch.equal(stack[earlier], stack[index]):
            return True

    return False


def _repeats_a_block(matrix: Tensor, length: int) -> bool:
    """Return whether a matrix is the same block of so many rows, repeated."""
    blocks = matrix.split(length)
    return all(torch.equal(blocks[0], block) for block in blocks[1:])


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape are one.

    Both are held, so that neither can take a freed one's place.
    """
    return tensor.data_ptr() == other.data_ptr()


def pieces_of(names: Iterable[str], params: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which vectors hold the numbers of a piece of a matrix: name -> the matrix.

    Memory that is handed out again often holds a piece of a tensor that lay there before. Every
    matrix is read for each vector, so that only those that no init explains should be passed. Of
    many, the first 16 are searched.

    Args:
        names: the vectors. Those of less than 8 numbers, and constant ones, are left out.
        params: all parameters by name.

    Example:
        >>> matrix = torch.randn(8, 8)
        >>> pieces_of(["gain"], {"weight": matrix, "gain": matrix.flatten()[5:21].clone()})
        {'gain': 'weight'}
    """
    # 1. The vectors that are worth a search.
    candidates = ((name, params[name].detach().flatten()) for name in names)
    worth_it = ((name, vector) for name, vector in candidates if _varies(vector))
    vectors = dict(islice(worth_it, _MOST_SEARCHED))
    if not vectors:
        return {}

    # 2. The first matrix that holds each. Every matrix may be read from a file, so each once.
    pieces: dict[str, str] = {}
    for other in params:
        tensor = params[other]
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue

        for name in _pieces_in(tensor.detach(), vectors):
            pieces[name] = other
            del vectors[name]

    return pieces


def _varies(vector: Tensor) -> bool:
    """Return whether a vector is long enough for a search, and not constant."""
    if vector.numel() < 8:
        return False

    return bool((vector != vector[0]).any())


def _pieces_in(matrix: Tensor, vectors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the vectors whose numbers a matrix holds."""
    return [name for name, vector in vectors.items() if _holds_piece(matrix, vector)]


def _holds_piece(tensor: Tensor, vector: Tensor) -> bool:
    """Return whether a tensor, row by row, holds the numbers of a vector in their order.

    A vector in the tensor's own memory does not count.
    """
    flat, length = tensor.reshape(-1), vector.numel()
    places = flat.numel() - length + 1
    if places < 1 or flat.dtype != vector.dtype:
        return False
    if _storage(tensor) == _storage(vector):
        return False

    # 1. Where its first number stands.
    is_start = flat[:places] == vector[0].to(flat.device)
    if not bool(is_start.any()):
        return False

    # 2. Of these places, the ones that the other numbers follow.
    starts = is_start.nonzero().flatten()
    for offset in range(1, length):
        starts = starts[flat[starts + offset] == vector[offset].to(flat.device)]
        if not starts.numel():
            return False

    return True


def _storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def interval(std: float, count: int, kurtosis: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Return the bounds of a distribution's std, from the std of a sample.

    Args:
        std: of the sample, as that of a population.
        count: numbers in the sample.
        kurtosis: of the distribution.
        alpha: chance that the distribution's std lies outside.

    Example:
        >>> [round(end, 3) for end in interval(1.0, 10_000, 3.0)]
        [0.966, 1.036]
    """
    if count < 2:
        return 0.0, math.inf

    # 1. Degrees of freedom that give the variance of s^2.
    freedom = 2.0 / (max(kurtosis - 1, 1e-9) / count + 2.0 / (count * (count - 1)))

    # 2. The quantiles of chi-squared.
    square = std * std * count / (count - 1)
    low = 2 * gammainccinv(freedom / 2, alpha / 2) / freedom
    high = 2 * gammaincinv(freedom / 2, alpha / 2) / freedom
    upper = math.sqrt(square / high) if high > 0 else math.inf
    return math.sqrt(square / low) * (1 - _ROUNDING), upper * (1 + _ROUNDING)


def truncated(cut: float) -> tuple[float, float]:
    """Return the std and kurtosis of a standard normal that is cut off at +-cut.

    >>> std, kurtosis = truncated(2.0)
    >>> round(std, 4), round(kurtosis, 3)
    (0.8796, 2.366)
    """
    mass = math.erf(cut / math.sqrt(2))
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    second = 1 - 2 * cut * density / mass
    fourth = 3 * second - 2 * cut**3 * density / mass
    return math.sqrt(second), fourth / second**2


@dataclass(frozen=True)
class _Family:
    """A family of distributions with its figures.

    Attributes:
        name: as `FittedDraw.family`.
        kurtosis: of the family; of the sample for "other".
        truncation: as `FittedDraw.truncation`.
    """

    name: str
    kurtosis: float
    truncation: float = 1.0


def _family_of(measured: Moments) -> _Family:
    """Return the family that explains the figures of a sample.

    A normal sample of that size reaches a largest distance from its mean that hardly varies: one
    that stays far below is bounded, one far above is a mixture. Each of the tests errs with a
    chance below 1e-6.
    """
    n, reach = measured.count, measured.furthest / measured.std
    error = 6 * math.sqrt(24 / n)  # six standard errors of the kurtosis
    other = _Family("other", max(measured.kurtosis, 1.0))

    # 1. Too short for a normal: uniform or truncated.
    log_chance = n * math.log(max(math.erf(reach / math.sqrt(2)), 1e-300))
    if log_chance < math.log(1e-7):
        bounded = _bounded_family_of(measured, reach, error)
        return bounded or other

    # 2. Normal, unless a number lies too far away.
    is_too_far = n * math.erfc(reach / math.sqrt(2)) < 1e-7
    has_normal_kurtosis = abs(measured.kurtosis - 3) < max(error, 100 / n)
    if is_too_far or not has_normal_kurtosis:
        return other

    return _Family("normal", 3.0)


def _bounded_family_of(measured: Moments, reach: float, error: float) -> _Family | None:
    """Return the family of a sample that is too short for a normal; None if it is another one.

    Args:
        measured: the figures of the sample.
        reach: its largest distance from the mean, in standard deviations.
        error: that its kurtosis may have.
    """
    if _is_uniform(measured, reach):
        return _Family("uniform", UNIFORM_KURTOSIS)

    # A normal that was cut off has the kurtosis that follows from its reach.
    cut = _cut_of(reach)
    if cut is None:
        return None

    std, kurtosis = truncated(cut)
    if abs(measured.kurtosis - kurtosis) >= error:
        return None

    return _Family("truncated", kurtosis, truncation=std)


def _is_uniform(measured: Moments, reach: float) -> bool:
    """Return whether kurtosis and largest distance are those of a uniform distribution."""
    n = measured.count
    error = 6 * 0.8 / math.sqrt(n) + 0.01
    if abs(measured.kurtosis - UNIFORM_KURTOSIS) >= error:
        return False

    return reach < math.sqrt(3) * (1 + 6 / math.sqrt(n))


def _cut_of(reach: float) -> float | None:
    """Return where a normal was cut off.

    Args:
        reach: its largest magnitude, in units of its own std after the cut.
    """
    if not 1.8 < reach < 6:
        return None

    from scipy.optimize import brentq  # its import takes a third of a second, and is rarely needed

    return float(brentq(lambda cut: cut / truncated(cut)[0] - reach, 0.5, 8))
