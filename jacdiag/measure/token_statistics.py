"""Plain figures of recorded tensors: standard deviations per token, gains of norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.records.report import Interval, PerToken, Spread, TokenAt


def locate(flat: int, shape: torch.Size, feature_dim: int, token_ids: Tensor | None) -> TokenAt:
    """Return sequence, position and token id of an index over tokens.

    Tokens are all dimensions but features.

    Args:
        flat: the index.
        shape: of the tensor, with features.
        feature_dim: the dimension that holds the features.
        token_ids: (B, T), to name the token.
    """
    # 1. One index for each dimension.
    lead = list(shape)
    del lead[feature_dim]
    index = _unravelled(flat, lead)

    # 2. A single index is a position; more begin with the sequence.
    if not index:
        return TokenAt(None, None, None)
    if len(index) == 1:
        return TokenAt(None, index[0], None)

    sequence = index[0]
    position = index[1]

    # 3. The token, if there is an id for each.
    if token_ids is None:
        return TokenAt(sequence, position, None)

    is_of_sequences = len(lead) == 2
    has_ids = is_of_sequences and list(token_ids.shape) == lead
    if not has_ids:
        return TokenAt(sequence, position, None)

    token = int(token_ids[sequence, position])
    return TokenAt(sequence, position, token)


def _unravelled(flat: int, shape: Sequence[int]) -> list[int]:
    """Return the indices of an element whose index in the flat tensor is given."""
    index = []
    for size in reversed(shape):
        flat, remainder = divmod(flat, size)
        index.append(remainder)

    index.reverse()
    return index


def spread_of(x: Tensor, feature_dim: int = -1, token_ids: Tensor | None = None) -> Spread:
    """Return the spread over tokens of the standard deviation over features (population).

    Args:
        x: any shape.
        feature_dim: the dimension that holds the features; all others are tokens.
        token_ids: (B, T), to name the extreme tokens.
    """
    return spread_of_stds(stds_of(x, feature_dim).cpu(), x.shape, feature_dim, token_ids)


def stds_of(x: Tensor, feature_dim: int = -1) -> Tensor:
    """Return the standard deviation over features (population) of each token, in float64."""
    return in_float64(x.detach()).std(dim=feature_dim, correction=0).flatten()


def spread_of_stds(
    std: Tensor, shape: torch.Size, feature_dim: int, token_ids: Tensor | None
) -> Spread:
    """Return the spread of the standard deviations of tokens.

    Args:
        std: one number per token, on the CPU.
        shape: of the tensor, with features.
        feature_dim: the dimension that holds the features.
        token_ids: (B, T), to name the extreme tokens.
    """
    low, high = int(std.argmin()), int(std.argmax())
    return Spread(
        median=float(std.median()),
        min=float(std[low]),
        max=float(std[high]),
        p01=_quantile(std, 0.01),
        argmin=locate(low, shape, feature_dim, token_ids),
        argmax=locate(high, shape, feature_dim, token_ids),
    )


def gain_interval(
    gain: Tensor, shape: torch.Size, feature_dim: int, token_ids: Tensor | None
) -> Interval:
    """Return the gain of a norm, 1 / sqrt(var + eps): exact, the largest over tokens.

    The interval carries the distribution over tokens.

    Args:
        gain: one number per token, in the order of x without its features.
        shape: shape of x.
        feature_dim: the dimension of x that holds the features.
        token_ids: (B, T), to name the token of the largest gain.
    """
    flat = in_float64(gain.detach()).flatten().cpu()
    top = int(flat.argmax())
    per_token = PerToken(
        median=float(flat.median()),
        p99=_quantile(flat, 0.99),
        max=float(flat[top]),
        argmax=locate(top, shape, feature_dim, token_ids),
    )
    return Interval.exact(float(flat[top]), per_token=per_token, stop="closed form of the norm")


def _quantile(values: Tensor, q: float) -> float:
    """Return the q-quantile, interpolated.

    It is NumPy's, because torch.quantile raises for more than 16M values.
    """
    return float(np.quantile(values.numpy(), q))
