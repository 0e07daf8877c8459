"""From which distribution a weight was drawn, and between which bounds its std must have lain.

The std s of n numbers from a normal distribution obeys n s^2 / sigma^2 ~ chi^2 with n - 1 degrees
of freedom, so that the interval for sigma is exact. For the other families the variance of s^2
follows from their known kurtosis k,

    Var(s^2) = sigma^4 ((k - 1) / n + 2 / (n (n - 1))),

and chi^2 with the degrees of freedom that give this variance takes its place. An orthogonal matrix
has no spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from scipy.special import gammainccinv, gammaincinv
from torch import Tensor

ALPHA = 1e-6
_CHUNK = 1 << 18  # in float64 it stays in a core's cache
_ROUNDING = 1e-4  # what generators and low precisions may move a std by, relative
UNIFORM_KURTOSIS = 1.8
_MOST_SEARCHED = 16
# An outlier is so many times the spread of the rest away. Of 10^12 normal numbers the furthest lies
# at
# 7 standard deviations, of 10^8 Laplace numbers at 18.
_OUTLIER = 20.0
_MOST_OUTLIERS = 0.01  # of all numbers; where more are far away, the draw is a mixture
_DENSE = 0.25  # of a row or column: then it was drawn larger as a whole
_SAMPLE = 1 << 16  # numbers that tell the spread of the rest
_SHARDS = (2, 3, 4, 8)  # equal blocks that a matrix is searched for
# No generator returns a number this close to zero: float32 samples have steps of 2^-24 or 2^-32,
# and the smallest
# constant of a published init is 1e-6. Memory that nobody wrote to is full of them: integers, read
# as float32.
TINY = 1e-30


@dataclass(frozen=True)
class Moments:
    """Figures of a tensor in one pass.

    Attributes:
        count, mean, std, kurtosis: of the numbers; the std is that of the population.
        largest: largest magnitude.
        zero_rows: rows of a table that are exactly zero.
        tiny: numbers closer to zero than `TINY`, and not zero.
        furthest: largest distance from the mean.
    """

    count: int
    mean: float
    std: float
    kurtosis: float
    largest: float
    zero_rows: int
    tiny: int = 0
    furthest: float = 0.0


@dataclass(frozen=True)
class Draw:
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
        outliers: numbers further from the rest than any draw reaches.
        core_std: std of the rest; None without outliers.
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


def draw_of(tensor: Tensor, *, table: bool = False, alpha: float = ALPHA) -> Draw | None:
    """Tells the family of a weight, with an exact sampling interval for its std.

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
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return None
    found = moments(tensor.detach(), table)
    if not all(map(math.isfinite, (found.mean, found.std, found.largest))):
        return None
    if found.largest == 0.0:
        return Draw("zero", 0.0, 0.0, 0.0, 0.0)
    if found.std <= 1e-7 * abs(found.mean):
        return Draw("constant", 0.0, 0.0, 0.0, found.mean, largest=found.largest, tiny=found.tiny)
    rows = found.zero_rows
    if tensor.dim() == 2 and not rows and _orthogonal(tensor.detach()):
        low, high = found.std * (1 - 1e-3), found.std * (1 + 1e-3)
        return Draw(
            "orthogonal", found.std, low, high, found.mean, largest=found.largest, tiny=found.tiny
        )
    family, kurtosis, cut = _family(found)
    lower, upper = interval(found.std, found.count, kurtosis, alpha)
    outliers, core_std = 0, None
    if family == "other":
        outliers, core_std = find_outliers(tensor.detach(), found.largest)
    return Draw(
        family,
        found.std,
        lower,
        upper,
        found.mean,
        cut,
        rows,
        found.largest,
        found.tiny,
        outliers,
        core_std,
    )


def find_outliers(tensor: Tensor, largest: float) -> tuple[int, float | None]:
    """Return how many numbers lie further from the rest than any draw reaches, and the std of the
    rest.

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
    sample = flat[:: max(1, flat.numel() // _SAMPLE)].double()
    centre = sample.median()
    spread = float((sample - centre).abs().median()) / 0.6745  # that of a normal draw of std 1
    limit = _OUTLIER * spread
    if spread == 0.0 or largest <= limit:
        return 0, None
    # 2. Numbers beyond the limit, and where they stand.
    rows = tensor.reshape(tensor.shape[0], -1)
    per_column = torch.zeros(rows.shape[1], dtype=torch.long)
    per_row = []
    total, squares = 0.0, 0.0
    for piece in rows.split(max(1, _CHUNK // rows.shape[1])):
        distances = piece.double() - centre
        is_far = distances.abs() > limit
        per_row.append(is_far.sum(1).cpu())
        per_column += is_far.sum(0).cpu()
        rest = distances[~is_far]
        total += float(rest.sum())
        squares += float(rest @ rest)
    count = int(per_column.sum())
    # 3. Patterns that somebody meant.
    is_mixture = count > _MOST_OUTLIERS * flat.numel()
    in_rows = torch.cat(per_row)
    most_in_row, most_in_column = int(in_rows.max()), int(per_column.max())
    fills_row = most_in_row > max(1, _DENSE * rows.shape[1])
    fills_column = most_in_column > max(1, _DENSE * rows.shape[0])
    is_diagonal = count == min(rows.shape) and most_in_row == 1 == most_in_column
    if not count or is_mixture or is_diagonal or fills_row or fills_column:
        return 0, None
    left = flat.numel() - count
    return count, math.sqrt(max(squares / left - (total / left) ** 2, 0.0))


class Draws:
    """Draws of weights by name, each found once: to read a weight may cost as much as to judge
    it.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self._found: dict[tuple[str, bool], Draw | None] = {}

    def of(self, name: str, *, table: bool = False) -> Draw | None:
        key = name, table
        if key not in self._found:
            self._found[key] = draw_of(self.params[name], table=table)
        return self._found[key]


def copies_of(found: Mapping[str, Draw | None], params: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which weights hold the very numbers of another one: name -> the first of that content.

    Only weights whose figures agree to the last digit are compared number by number, so that
    nothing is read twice in a model without copies. Weights that are constant, and names of one and
    the same memory, are no copies. A stack of matrices (experts) of which one repeats another is a
    copy of itself, and so is a matrix of equal blocks (shards).

    Args:
        found: the draws of the weights by name.
        params: the weights themselves.

    Example:
        >>> weight = torch.randn(4, 4)
        >>> params = {"a": weight, "b": weight.clone(), "tied": weight}
        >>> params |= {"c": torch.ones(4), "d": torch.ones(4)}
        >>> copies_of({name: draw_of(tensor) for name, tensor in params.items()}, params)
        {'b': 'a'}
    """
    firsts: dict[tuple[float, ...], list[str]] = {}
    copies: dict[str, str] = {}
    for name, draw in found.items():
        if draw is None or draw.family in ("zero", "constant"):
            continue
        alike = firsts.setdefault((draw.mean, draw.std, draw.largest), [])
        first = next((other for other in alike if _same_numbers(params[name], params[other])), None)
        if first is None:
            alike.append(name)
            if _repeats_a_part(params[name]):
                copies[name] = name
        elif not _same_memory(params[name], params[first]):
            copies[name] = first
    return copies


def _same_numbers(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and the same numbers."""
    return tensor.shape == other.shape and torch.equal(tensor.to(other.device), other)


def _repeats_a_part(tensor: Tensor) -> bool:
    """Whether a stack of matrices holds one of them twice, or a matrix is one block of rows or
    columns repeated.
    """
    if tensor.dim() == 3:
        return _repeats_a_matrix(tensor)
    if tensor.dim() != 2:
        return False
    return any(
        _repeats_a_block(matrix, count) for matrix in (tensor, tensor.T) for count in _SHARDS
    )


def _repeats_a_matrix(stack: Tensor) -> bool:
    beginnings: dict[tuple[float, ...], int] = {}
    for index, numbers in enumerate(stack[:, 0, :8].tolist()):
        earlier = beginnings.setdefault(tuple(numbers), index)
        if earlier != index and torch.equal(stack[earlier], stack[index]):
            return True
    return False


def _repeats_a_block(matrix: Tensor, count: int) -> bool:
    """Whether a matrix is `count` times the same block of rows."""
    rows, columns = matrix.shape
    if rows % count or rows < 2 * count or columns < 2:
        return False
    length = rows // count
    if not torch.equal(matrix[0], matrix[length]):
        return False
    return all(torch.equal(matrix[:length], block) for block in matrix.split(length)[1:])


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are one; both are held, so that neither can take a freed
    one's place.
    """
    return tensor.data_ptr() == other.data_ptr()


def pieces_of(names: Iterable[str], params: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which vectors hold the numbers of a piece of a matrix: name -> the matrix.

    Memory that is handed out again often holds a piece of a tensor that lay there before. Every
    matrix is read for each vector, so that only those that no init explains should be asked for; of
    many, the first 16 are searched.

    Args:
        names: the vectors. Those of less than 8 numbers, and constant ones, are left out.
        params: all parameters by name.

    Example:
        >>> matrix = torch.randn(8, 8)
        >>> pieces_of(["gain"], {"weight": matrix, "gain": matrix.flatten()[5:21].clone()})
        {'gain': 'weight'}
    """
    vectors = {name: params[name].detach().flatten() for name in names}
    suited = [
        n
        for n, vector in vectors.items()
        if vector.numel() >= 8 and bool((vector != vector[0]).any())
    ]
    chosen = {name: vectors[name] for name in suited[:_MOST_SEARCHED]}
    pieces: dict[str, str] = {}
    if not chosen:
        return pieces
    for other in params:
        tensor = params[other]
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        for name, vector in chosen.items():
            if name not in pieces and _holds_piece(tensor.detach(), vector):
                pieces[name] = other
    return pieces


def _holds_piece(tensor: Tensor, vector: Tensor) -> bool:
    """Whether a tensor, row by row, holds the numbers of a vector in their order, in memory of its
    own.
    """
    flat, length = tensor.reshape(-1), vector.numel()
    places = flat.numel() - length + 1
    if places < 1 or flat.dtype != vector.dtype or _storage(tensor) == _storage(vector):
        return False
    matching = flat[:places] == vector[0].to(flat.device)
    if not bool(matching.any()):
        return False
    starts = matching.nonzero().flatten()
    for offset in range(1, length):
        starts = starts[flat[starts + offset] == vector[offset].to(flat.device)]
        if not starts.numel():
            return False
    return True


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def std_of(tensor: Tensor, correction: int = 0) -> float:
    """Standard deviation over all elements in float64, without a copy of the tensor in float64; NaN
    of too few.
    """
    found = moments(tensor.detach()) if tensor.numel() > correction else None
    return (
        math.nan
        if found is None
        else found.std * math.sqrt(found.count / (found.count - correction))
    )


def moments(tensor: Tensor, table: bool = False) -> Moments:
    """Figures of a tensor, in float64, piece by piece."""
    flat = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
    rows = max(1, _CHUNK // max(1, flat.shape[1]))
    count, zero_rows, tiny = 0, 0, 0
    low, high = math.inf, -math.inf
    sums = torch.zeros(4, dtype=torch.float64)
    shift = float(flat[0, : min(64, flat.shape[1])].double().mean())
    for piece in flat.split(rows):
        if table:
            kept = piece[(piece != 0).any(dim=1)]
            zero_rows += piece.shape[0] - kept.shape[0]
            piece = kept
        if not piece.numel():
            continue
        ends = torch.aminmax(piece)
        low, high = min(low, float(ends.min)), max(high, float(ends.max))
        tiny += _count_tiny(piece)
        centred = piece.flatten().to(torch.float64, copy=True).sub_(shift)
        square = centred * centred
        powers = centred.sum(), centred @ centred, square @ centred, square @ square
        sums += torch.stack(powers).cpu()
        count += piece.numel()
    if not count:
        return Moments(0, 0.0, 0.0, 0.0, 0.0, zero_rows)
    m1, m2, m3, m4 = (float(x) / count for x in sums)
    variance = max(m2 - m1 * m1, 0.0)
    fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
    kurtosis = fourth / variance**2 if variance > 0 else 0.0
    mean = m1 + shift
    return Moments(
        count,
        mean,
        math.sqrt(variance),
        kurtosis,
        largest=max(abs(low), abs(high)),
        zero_rows=zero_rows,
        tiny=tiny,
        furthest=max(high - mean, mean - low),
    )


def _count_tiny(piece: Tensor) -> int:
    """Return how many numbers are closer to zero than `TINY`, and not zero."""
    if piece.dtype == torch.float16:  # its smallest number is 6e-8
        return 0
    close = piece.abs() < TINY
    return int(close.sum() - (piece == 0).sum()) if bool(close.any()) else 0


def interval(std: float, count: int, kurtosis: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Bounds of the std of a distribution whose sample of `count` numbers has the population std
    `std`.

    Example:
        >>> [round(end, 3) for end in interval(1.0, 10_000, 3.0)]
        [0.966, 1.036]
    """
    if count < 2:
        return 0.0, math.inf
    freedom = 2.0 / (max(kurtosis - 1, 1e-9) / count + 2.0 / (count * (count - 1)))
    square = std * std * count / (count - 1)
    low = 2 * gammainccinv(freedom / 2, alpha / 2) / freedom
    high = 2 * gammaincinv(freedom / 2, alpha / 2) / freedom
    upper = math.sqrt(square / high) if high > 0 else math.inf
    return math.sqrt(square / low) * (1 - _ROUNDING), upper * (1 + _ROUNDING)


def truncated(cut: float) -> tuple[float, float]:
    """Std and kurtosis of a standard normal that is cut off at +-cut.

    >>> std, kurtosis = truncated(2.0)
    >>> round(std, 4), round(kurtosis, 3)
    (0.8796, 2.366)
    """
    mass = math.erf(cut / math.sqrt(2))
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    second = 1 - 2 * cut * density / mass
    fourth = 3 * second - 2 * cut**3 * density / mass
    return math.sqrt(second), fourth / second**2


def _family(found: Moments) -> tuple[str, float, float]:
    """Family, kurtosis of that family, and std over that before truncation.

    A normal sample of that size reaches a largest distance from its mean that hardly varies: one
    that stays far below is bounded, one far above is a mixture. Each of the tests errs with a
    chance below 1e-6.
    """
    n, reach = found.count, found.furthest / found.std
    error = 6 * math.sqrt(24 / n)
    bounded = n * math.log(max(math.erf(reach / math.sqrt(2)), 1e-300)) < math.log(1e-7)
    if bounded:
        flat = 6 * 0.8 / math.sqrt(n) + 0.01
        if abs(found.kurtosis - UNIFORM_KURTOSIS) < flat and reach < math.sqrt(3) * (
            1 + 6 / math.sqrt(n)
        ):
            return "uniform", UNIFORM_KURTOSIS, 1.0
        cut = _cut_of(reach)
        if cut is not None:
            std, kurtosis = truncated(cut)
            if abs(found.kurtosis - kurtosis) < error:
                return "truncated", kurtosis, std
    beyond = n * math.erfc(reach / math.sqrt(2)) < 1e-7
    if not bounded and not beyond and abs(found.kurtosis - 3) < max(error, 100 / n):
        return "normal", 3.0, 1.0
    return "other", max(found.kurtosis, 1.0), 1.0


def _cut_of(reach: float) -> float | None:
    """Where a normal was cut off whose largest magnitude is `reach` of its own std after the
    cut.
    """
    if not 1.8 < reach < 6:
        return None
    from scipy.optimize import brentq  # a third of a second, and rarely asked for

    return float(brentq(lambda cut: cut / truncated(cut)[0] - reach, 0.5, 8))


def _orthogonal(matrix: Tensor) -> bool:
    """Whether some of the shorter side's vectors stand exactly at right angles and have one
    length.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if short.shape[0] < 3:
        return False
    rows = short[: min(16, short.shape[0])].double()
    gram = rows @ rows.T
    scale = gram.diagonal().mean()
    apart = (gram - scale * torch.eye(len(rows), dtype=gram.dtype, device=gram.device)).abs().max()
    return bool(scale > 0) and bool(apart < 1e-3 * scale)
