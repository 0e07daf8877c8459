"""Low-rank additions to weights: which two factors belong together, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.records.structure import AdapterRecord
from jacdiag.trace.discovery.low_rank import LowRankPair

_FIRST = re.compile(r"(^|[._])(lora_(?:embedding_)?)(A|a|down)(?=$|[._])")
_START = re.compile(r"(^|[._])lora_(?:embedding_)?")
_OTHER = {"A": "B", "a": "b", "down": "up"}
# of a decomposition in float32; draws of 8 vectors of 64 numbers have cosines of 0.1
_RIGHT_ANGLE = 1e-3


def adapters_of(
    params: Mapping[str, Tensor], pairs_by_use: Iterable[LowRankPair] = ()
) -> list[AdapterRecord]:
    """Return the pairs of factors of low-rank additions, by their names and by their use.

    Known names are lora_A and lora_B, and lora_down and lora_up.

    Args:
        params: the parameters of a model by name.
        pairs_by_use: the pairs that a forward shows.

    Example:
        >>> factors = {"q.lora_A.weight": torch.zeros(2, 8), "q.lora_B.weight": torch.zeros(8, 2)}
        >>> [pair.second for pair in adapters_of(factors)]
        ['q.lora_B.weight']
    """
    additions = _by_beginning(params)
    records = []
    for pair in _pairs(params):
        # 1. What the two factors hold.
        first, second = params[pair.first], params[pair.second]
        decomposed = _has_right_angles(first) or _has_right_angles(second)

        # 2. A third one between them, which may be zero in their place.
        rank = min(first.shape, default=0)
        between = _factor_between(pair, additions[pair.before], params, rank)
        records.append(
            AdapterRecord(
                pair.first, pair.second, _is_zero(first), _is_zero(second), decomposed, between
            )
        )

    # 3. Those with other names.
    named = {record.first for record in records} | {record.second for record in records}
    for use in pairs_by_use:
        if named.isdisjoint((use.first, use.second)):
            records.append(_record_by_use(use, params))
    return records


def _record_by_use(pair: LowRankPair, params: Mapping[str, Tensor]) -> AdapterRecord:
    """Return the record of two factors that were found by their use, between which none stands."""
    first = params[pair.first]
    second = params[pair.second]
    decomposed = _has_right_angles(first) or _has_right_angles(second)
    return AdapterRecord(pair.first, pair.second, _is_zero(first), _is_zero(second), decomposed)


@dataclass(frozen=True)
class _FactorPair:
    """The names of two factors.

    Attributes:
        first, second: of the factor that is applied first, and of the other one.
        before, after: what stands in both before and after A and B.
    """

    first: str
    second: str
    before: str
    after: str


def _by_beginning(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters of additions by what their names begin with, up to "lora_"."""
    additions: dict[str, list[str]] = {}
    for name in names:
        start = _START.search(name)
        if start is not None:
            beginning = name[: start.end()]
            additions.setdefault(beginning, []).append(name)

    return additions


def _pairs(names: Collection[str]) -> Iterator[_FactorPair]:
    """Yield the pairs of factors, by their names."""
    for name in names:
        match = _FIRST.search(name)
        if match is None:
            continue

        # The other factor has another word in place of "A" or "down".
        before, after = name[: match.start(3)], name[match.end(3) :]
        other = f"{before}{_OTHER[match[3]]}{after}"
        if other in names:
            yield _FactorPair(name, other, before, after)


def _factor_between(
    pair: _FactorPair, names: Iterable[str], params: Mapping[str, Tensor], rank: int
) -> str:
    """Return a factor of zeros between two others; "" if there is none."""
    others = [name for name in names if name not in (pair.first, pair.second)]
    for name in others:
        # It is named as the two are, with another word for A and B.
        is_relative = name.endswith(pair.after)
        if not is_relative:
            continue

        word = name[len(pair.before) : len(name) - len(pair.after)]
        if _can_stand_between(word, params[name], rank) and _is_zero(params[name]):
            return name

    return ""


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
    """Return whether all numbers of a tensor are zero."""
    return not bool(tensor.detach().any())


def _has_right_angles(factor: Tensor) -> bool:
    """Return whether the vectors along the shorter side stand at right angles."""
    matrix = factor.detach()
    if matrix.dim() != 2 or not matrix.is_floating_point():
        return False
    if min(matrix.shape) < 2:
        return False

    # 1. The vectors, none of which may be zero.
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    rows = in_float64(matrix)
    lengths = rows.norm(dim=1)
    have_lengths = bool((lengths > 0).all()) and bool(torch.isfinite(lengths).all())
    if not have_lengths:
        return False

    # 2. The cosines of their angles.
    cosines = (rows @ rows.T) / (lengths[:, None] * lengths)
    apart = cosines - torch.eye(len(rows), dtype=cosines.dtype, device=cosines.device)
    return bool(apart.abs().max() < _RIGHT_ANGLE)
