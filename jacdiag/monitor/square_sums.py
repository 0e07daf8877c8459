"""Sums of squares of many tensors, in float64, on their device and without a look at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from operator import attrgetter

import torch
from torch import Tensor

from jacdiag.devices.accelerators import send, widest

# elements summed in float32: off by 5e-9 at 81M elements, where one sum over all was off by 2.6e-3
_CHUNK = 4096
# float32 elements up to which one sum is taken: off by at most 7e-7 in 300 draws
_WHOLE = 4 * _CHUNK
# pieces of a tensor up to which each is summed like a tensor of its own; beyond, chunks cost less
_MOST_CUTS = 8

_WITH_NORM = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LOW = (torch.float16, torch.bfloat16)
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_DTYPE, _LAYOUT, _IS_CPU = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_cpu")


def square_sums(tensors: Sequence[Tensor | None], device: torch.device | None = None) -> Tensor:
    """Return the sum of squares of each tensor, 0 for None: (len(tensors),), float64.

    One call takes all tensors of a dtype, and nothing is sent to their device. On a GPU the partial
    sums of that call are short. On a CPU a large tensor is summed in chunks: float32 sums over many
    millions of elements lose three digits. Squares below 1e-38 are lost, so that an element below
    1e-19 counts as 0.

    Args:
        tensors: of any shapes, dtypes and layouts; sparse ones by their values.
        device: of the result; that of the first tensor if not given.

    Example:
        >>> square_sums([torch.tensor([3.0, 4.0]), None])
        tensor([25.,  0.], dtype=torch.float64)
    """
    # 1. On a CPU, as numbers.
    if device is None:
        device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    if device.type == "cpu":
        return torch.tensor(read_square_sums(tensors), dtype=torch.float64)

    # 2. On any other device, without waiting for it.
    return stack_norms(tensors, device).to(widest(device)).square()


def stack_norms(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the norm of each tensor on a device that is no CPU, 0 for None: (len(tensors),).

    The device is not waited for.

    Args:
        tensors: of any shapes, dtypes and layouts; sparse ones by their values.
        device: of the norms.
    """
    if not tensors:
        return torch.zeros(0, device=device)
    with torch.no_grad():
        return torch.stack(_by_kind(tensors, device, _norms))


def read_square_sums(tensors: Sequence[Tensor | None]) -> list[float]:
    """Return the sum of squares of each tensor on a CPU as a number, 0 for None.

    The digits are those of `square_sums`. The first call of each torch operation in a step takes as
    long as five more of the same, since the step has emptied the caches. So Python numbers are used
    for what they can do.
    """
    # 1. What is not there is 0.
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return [0.0] * len(tensors)
    squares = _read_squares(present)
    if len(squares) == len(tensors):
        return squares
    following = iter(squares)
    return [0.0 if tensor is None else next(following) for tensor in tensors]


def _read_squares(tensors: Sequence[Tensor]) -> list[float]:
    """Return the sum of squares of each tensor on a CPU as a number."""
    # 1. Mostly one call takes all tensors as they are.
    are_plain = _are_plain_float32(tensors)
    if are_plain and max(map(Tensor.numel, tensors)) <= _WHOLE:
        with torch.no_grad():
            whole = torch._foreach_norm(list(tensors), 2)
        return [norm * norm for norm in map(Tensor.item, whole)]

    # 2. Cut what is neither small nor large, so that one call takes all of it.
    pieces: list[Tensor] = []
    counts: list[int] = []
    for tensor in tensors:
        parts = _cut(tensor)
        pieces += parts
        counts.append(len(parts))

    # 3. Sum the squares of each piece.
    norms: Sequence[Tensor]
    with torch.no_grad():
        if are_plain:
            norms = _norms(pieces)
        else:
            norms = _by_kind(pieces, torch.device("cpu"), _norms)
    squares = [norm * norm for norm in map(Tensor.item, norms)]

    # 4. Add up the pieces of each tensor, if one of them was cut.
    if len(squares) == len(counts):
        return squares
    following = iter(squares)
    return [sum(islice(following, count)) for count in counts]


def _are_plain_float32(tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are dense, on the CPU and of float32, as they mostly are.

    Each test is one pass that runs no Python code for each tensor.
    """
    if not set(map(type, tensors)) <= _PLAIN_TYPES:
        return False
    if set(map(_DTYPE, tensors)) != {torch.float32}:
        return False
    return all(map(_IS_CPU, tensors)) and set(map(_LAYOUT, tensors)) == {torch.strided}


def _cut(tensor: Tensor) -> Sequence[Tensor]:
    """Cut a tensor into pieces for which one sum in float32 is exact enough.

    Small tensors need no cut, and large ones are summed in chunks later: they stay in one piece.
    """
    is_medium = _WHOLE < tensor.numel() <= _MOST_CUTS * _WHOLE
    if not is_medium:
        return (tensor,)
    if tensor.layout is not torch.strided or tensor.dtype in _LOW:
        return (tensor,)
    return _flat(tensor.detach()).split(_WHOLE)


def largest_elements(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return a number for each tensor that is finite if all its elements are: (len(tensors),).

    On a GPU it is the largest absolute value. On a CPU it is 0 or inf, which takes one pass less.

    Args:
        tensors: of any shapes; those of a dtype without an infinity norm, and empty ones, count as
            finite.
        device: of the result. Nothing is sent to it from the host.
    """
    if not tensors:
        return torch.zeros(0, device=device)
    with torch.no_grad():
        readable: list[Tensor | None] = []
        for tensor in tensors:
            if tensor is None:
                readable.append(None)
                continue
            values = _values(tensor)
            has_norm = values.dtype in _WITH_NORM and values.numel() > 0
            readable.append(values if has_norm else None)
        return torch.stack(_by_kind(readable, device, _largest))


def find_nonfinite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return which tensors hold a value that is not finite: (len(tensors),), bool.

    Their device is not waited for. Unlike a sum of squares this does not overflow: a weight of 1e30
    is finite.

    Args:
        tensors: of any shapes; those of a dtype without an infinity norm, and empty ones, count as
            finite.
        device: of the result.
    """
    return largest_elements(tensors, device).isfinite().logical_not()


def _by_kind(
    tensors: Sequence[Tensor | None],
    device: torch.device,
    reduce: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Reduce each tensor to one number on `device`.

    Tensors that share device and dtype are reduced by one call.

    Args:
        tensors: None gives 0.
        device: of the numbers.
        reduce: takes tensors of one device and dtype, returns a number for each.
    """
    # 1. Reduce those that are there; mostly they are of one kind, and there is nothing to sort.
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return [torch.zeros((), device=device)] * len(tensors)
    if _are_plain(present, device):
        numbers = reduce(present)
    else:
        numbers = _reduce_sorted(present, device, reduce)
    if len(numbers) == len(tensors):
        return numbers

    # 2. What is not there is 0.
    zero = torch.zeros((), device=device)
    following = iter(numbers)
    return [zero if tensor is None else next(following) for tensor in tensors]


def _reduce_sorted(
    tensors: Sequence[Tensor], device: torch.device, reduce: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Reduce tensors of several kinds, one call for each device and dtype."""
    # 1. Sort the tensors by device and dtype.
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        values = _values(tensor)
        places, members = kinds.setdefault((values.device, values.dtype), ([], []))
        places.append(place)
        members.append(values)

    # 2. Reduce each kind. From another device the numbers travel together.
    numbers: dict[int, Tensor] = {}
    for (where, _), (places, members) in kinds.items():
        reduced = reduce(members)
        if where != device:
            reduced = list(send(torch.stack(reduced), device).unbind())
        numbers |= zip(places, reduced, strict=True)

    return [numbers[place] for place in range(len(tensors))]


def _are_plain(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether tensors are dense, real, of one dtype and on `device`."""
    # 1. One real dtype.
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) != 1:
        return False
    if dtypes.pop().is_complex:
        return False

    # 2. Dense, and on the device.
    if {t.device for t in tensors} != {device}:
        return False
    return not any(t.is_sparse for t in tensors)


def _values(t: Tensor) -> Tensor:
    """Return the elements of a tensor as a dense tensor of real numbers."""
    if t.is_sparse:
        t = t.detach().coalesce().values()
    if t.is_complex():
        t = torch.view_as_real(t)
    return t


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the norm of each tensor, in float32 or float64; all have one device and dtype."""
    is_low = tensors[0].dtype in _LOW
    dtype = torch.float32 if is_low else None
    if tensors[0].device.type != "cpu":
        return list(torch._foreach_norm(tensors, 2, dtype))

    # 1. Large tensors are summed in chunks. They leave the list from its end on, so that the places
    # before them stay right.
    limit = _CHUNK if is_low else _WHOLE
    large = [place for place, t in enumerate(tensors) if t.numel() > limit]
    chunked = [_chunked(tensors[place], dtype) for place in large]
    small = list(tensors)
    for place in reversed(large):
        del small[place]

    # 2. One call takes all others. The large ones come back from the beginning on.
    norms: list[Tensor] = []
    if small:
        norms = list(torch._foreach_norm(small, 2, dtype))
    for place, norm in zip(large, chunked, strict=True):
        norms.insert(place, norm)
    return norms


def _largest(tensors: list[Tensor]) -> list[Tensor]:
    """Return a number for each tensor that is finite if all its elements are."""
    if tensors[0].device.type != "cpu":
        return list(torch._foreach_norm(tensors, math.inf))

    # On a CPU this takes one pass less than the largest value.
    flags = torch.stack([t.isfinite().all() for t in tensors])
    return list(torch.where(flags, 0.0, math.inf).unbind())


def _chunked(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the norm of a tensor on a CPU from the norms of its chunks, in float64."""
    flat = _flat(t)
    count, left_over = divmod(flat.numel(), _CHUNK)
    chunks = flat[: count * _CHUNK].view(count, _CHUNK)
    norms = torch.linalg.vector_norm(chunks, dim=1, dtype=dtype)
    if left_over:
        last = flat[count * _CHUNK :]
        last_norm = torch.linalg.vector_norm(last, dim=0, keepdim=True, dtype=dtype)
        norms = torch.cat([norms, last_norm])
    return torch.linalg.vector_norm(norms, dtype=torch.float64)


def _flat(t: Tensor) -> Tensor:
    """Return all elements in the order of memory, without a copy if possible."""
    if t.is_contiguous():
        return t.view(-1)
    # A transpose too lies in memory without a gap.
    if torch.ops.aten.is_non_overlapping_and_dense.default(t):
        return t.as_strided((t.numel(),), (1,))
    return t.reshape(-1)
