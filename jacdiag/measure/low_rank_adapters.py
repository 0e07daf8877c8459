"""Low-rank additions to weights: which two factors belong together, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from jacdiag.records.structure import AdapterRecord

_FIRST = re.compile(r"(^|[._])(lora_(?:embedding_)?)(A|a|down)(?=$|[._])")
_START = re.compile(r"(^|[._])lora_(?:embedding_)?")
_OTHER = {"A": "B", "a": "b", "down": "up"}
# of a decomposition in float32; draws of 8 vectors of 64 numbers have cosines of 0.1
_RIGHT_ANGLE = 1e-3


def adapters_of(params: Mapping[str, Tensor]) -> list[AdapterRecord]:
    """Return the pairs of factors of low-rank additions, by their names.

    Known names are lora_A and lora_B, and lora_down and lora_up.

    Example:
        >>> factors = {"q.lora_A.weight": torch.zeros(2, 8), "q.lora_B.weight": torch.zeros(8, 2)}
        >>> [pair.second for pair in adapters_of(factors)]
        ['q.lora_B.weight']
    """
    # 1. Parameters by what their names begin with, up to "lora_".
    additions: dict[str, list[str]] = {}
    for name in params:
        start = _START.search(name)
        if start is not None:
            additions.setdefault(name[: start.end()], []).append(name)

    # 2. Pairs of factors, and a third one between them.
    pairs = []
    for name in params:
        match = _FIRST.search(name)
        if match is None:
            continue
        before, after = name[: match.start(3)], name[match.end(3) :]
        other = f"{before}{_OTHER[match[3]]}{after}"
        if other not in params:
            continue
        first, second = params[name], params[other]
        rank = min(first.shape, default=0)
        decomposed = _has_right_angles(first) or _has_right_angles(second)
        zero_between = ""
        for third in additions[before]:
            word = third[len(before) : len(third) - len(after)]
            is_relative = third not in (name, other) and third.endswith(after)
            if (
                is_relative
                and _can_stand_between(word, params[third], rank)
                and _is_zero(params[third])
            ):
                zero_between = third
                break
        pairs.append(
            AdapterRecord(name, other, _is_zero(first), _is_zero(second), decomposed, zero_between)
        )
    return pairs


def _can_stand_between(word: str, tensor: Tensor, rank: int) -> bool:
    """Return whether a tensor can be a factor between two others: lora_E in lora_B lora_E lora_A.

    Args:
        word: what its name has where theirs have A and B.
        tensor: its value. One of its sides is the rank.
        rank: of the two others.
    """
    is_bias = "bias" in word or not word.isidentifier()
    return not is_bias and tensor.dim() >= 2 and rank in tensor.shape


def _is_zero(tensor: Tensor) -> bool:
    return not bool(tensor.detach().any())


def _has_right_angles(factor: Tensor) -> bool:
    """Return whether the vectors along the shorter side stand at right angles."""
    matrix = factor.detach()
    if matrix.dim() != 2 or not matrix.is_floating_point() or min(matrix.shape) < 2:
        return False
    rows = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    lengths = rows.norm(dim=1)
    if not bool((lengths > 0).all()) or not bool(torch.isfinite(lengths).all()):
        return False
    cosines = (rows @ rows.T) / (lengths[:, None] * lengths)
    apart = cosines - torch.eye(len(rows), dtype=cosines.dtype, device=cosines.device)
    return bool(apart.abs().max() < _RIGHT_ANGLE)
