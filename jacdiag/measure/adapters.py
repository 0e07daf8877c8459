"""Low-rank additions to weights: which two factors belong together, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from jacdiag.report.tables import AdapterRecord

_FIRST = re.compile(r"(^|[._])(lora_(?:embedding_)?)(A|a|down)(?=$|[._])")
_OTHER = {"A": "B", "a": "b", "down": "up"}
_RIGHT_ANGLE = 1e-3  # of a decomposition in float32; draws of 8 vectors of 64 numbers have cosines of 0.1


def adapters_of(params: Mapping[str, Tensor]) -> list[AdapterRecord]:
    """Return the pairs of factors of low-rank additions, by their names: lora_A and lora_B, lora_down and lora_up.

    Example:
        >>> factors = {"q.lora_A.weight": torch.zeros(2, 8), "q.lora_B.weight": torch.zeros(8, 2)}
        >>> [pair.second for pair in adapters_of(factors)]
        ['q.lora_B.weight']
    """
    pairs = []
    for name in params:
        match = _FIRST.search(name)
        if match is None:
            continue
        other = f"{name[: match.start(3)]}{_OTHER[match[3]]}{name[match.end(3) :]}"
        if other not in params:
            continue
        first, second = params[name], params[other]
        decomposed = _has_right_angles(first) or _has_right_angles(second)
        pairs.append(AdapterRecord(name, other, _is_zero(first), _is_zero(second), decomposed))
    return pairs


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
