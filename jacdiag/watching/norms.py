"""Sums of squares of many tensors, in float64, on their device and without a look at them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 4096  # elements summed in float32: off by 5e-9 at 81M elements, where one sum over all was off by 2.6e-3

_WITH_NORM = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def square_sums(tensors: Sequence[Tensor | None], device: torch.device | None = None) -> Tensor:
    """Returns the sum of squares of each tensor, 0 for None: (len(tensors),), float64.

    On a GPU one fused kernel takes all of them; its partial sums are short. On a CPU each tensor is summed in chunks:
    float32 sums over many millions of elements lose three digits. Squares below 1e-38 are lost, so that an element
    below 1e-19 counts as 0.

    Args:
        tensors: of any shapes, dtypes and layouts; sparse ones by their values.
        device: of the result; that of the first tensor if not given.

    Example:
        >>> square_sums([torch.tensor([3.0, 4.0]), None])
        tensor([25.,  0.], dtype=torch.float64)
    """
    present = [(k, _values(t)) for k, t in enumerate(tensors) if t is not None]
    if device is None:
        device = present[0][1].device if present else torch.device("cpu")
    found = torch.zeros(len(tensors), dtype=widest(device), device=device)
    for where in {t.device for _, t in present}:
        here = [(k, t) for k, t in present if t.device == where]
        if where.type == "cpu":
            sums = _chunked([t for _, t in here])
        else:
            norms = torch._foreach_norm([t for _, t in here], 2, torch.float32)
            sums = torch.stack(norms).to(widest(where)).square()
        places = torch.tensor([k for k, _ in here], dtype=torch.long, device=device)
        found.index_copy_(0, places, sums.to(device, found.dtype, non_blocking=True))
    return found


def find_nonfinite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return which tensors hold a value that is not finite: (len(tensors),), bool, without a look at their device.

    Unlike a sum of squares this does not overflow: a weight of 1e30 is finite.

    Args:
        tensors: of any shapes; those of a dtype without an infinity norm, and empty ones, count as finite.
        device: of the result.
    """
    found = torch.zeros(len(tensors), dtype=torch.bool, device=device)
    for where in {t.device for t in tensors}:
        here = [(k, _values(t)) for k, t in enumerate(tensors) if t.device == where]
        here = [(k, t) for k, t in here if t.dtype in _WITH_NORM and t.numel()]
        if not here:
            continue
        if where.type == "cpu":
            flags = torch.stack([t.isfinite().all() for _, t in here]).logical_not()
        else:
            flags = torch.stack(torch._foreach_norm([t for _, t in here], math.inf)).isfinite().logical_not()
        places = torch.tensor([k for k, _ in here], dtype=torch.long, device=device)
        found.index_copy_(0, places, flags.to(device, non_blocking=True))
    return found


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on the one kind of device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _values(t: Tensor) -> Tensor:
    t = t.detach()
    if t.is_sparse:
        t = t.coalesce().values()
    return torch.view_as_real(t) if t.is_complex() else t


def _chunked(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each of some tensors on a CPU: one norm for all its whole chunks, one for what is left."""
    norms: list[Tensor] = []
    counts: list[int] = []
    for t in tensors:
        flat = _flat(t)
        dtype = torch.float64 if flat.dtype is torch.float64 else torch.float32
        whole = flat.numel() // _CHUNK
        if whole:
            norms.append(torch.linalg.vector_norm(flat[: whole * _CHUNK].view(whole, _CHUNK), dim=1, dtype=dtype))
        left = flat.numel() > whole * _CHUNK
        if left:
            norms.append(torch.linalg.vector_norm(flat[whole * _CHUNK :], dim=0, keepdim=True, dtype=dtype))
        counts.append(whole + left)
    owner = torch.arange(len(tensors)).repeat_interleave(torch.tensor(counts))
    squares = torch.cat(norms).double().square() if norms else torch.zeros(0, dtype=torch.float64)
    return torch.zeros(len(tensors), dtype=torch.float64).index_add_(0, owner, squares)


def _flat(t: Tensor) -> Tensor:
    """All elements in the order of memory: a norm does not ask for another, and nothing is copied."""
    if t.is_contiguous():
        return t.view(-1)
    if torch.ops.aten.is_non_overlapping_and_dense.default(t):
        return t.as_strided((t.numel(),), (1,))
    return t.reshape(-1)
