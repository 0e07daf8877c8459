"""Figures of the residual stream over depth, from the tensors of the recorded forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download
from jacdiag.measure.token_statistics import locate
from jacdiag.records.signal_propagation import ForwardRecord, Peak
from jacdiag.trace import Sites

Point = tuple[str, Tensor, int]  # name, value and feature dimension

_ROWS = 4096  # tokens that are looked at together: no copy of an entire stream is made


def stream_points(sites: Sites) -> list[Point]:
    """Return name, value and feature dimension of each point of the main stream.

    The points are the shortcuts, then the stream's end.

    The end is left out where the recorded forward did not keep it, or where it has another layout.
    """
    # 1. The shortcuts. Parallel branches share one.
    groups = [sites.streams.groups[index] for index in sites.streams.main]
    firsts = [sites[group.sites[0]] for group in groups]
    points = [(site.name, site.shortcut, site.feature_dim) for site in firsts]
    if not firsts:
        return []

    # 2. The end.
    last = firsts[-1]
    end = last.total
    if end is None or end.shape != last.shortcut.shape:
        return points

    if last.after is not None:
        end = last.after(end)
    return [*points, ("end", end, last.feature_dim)]


def forward_record(sites: Sites, token_ids: Tensor | None) -> ForwardRecord:
    """Measure variance, largest activation and token cosine along the main stream.

    Args:
        sites: of one recorded forward.
        token_ids: (B, T) ids of the probe, to name tokens.

    Returns:
        The record. A point that holds NaN or Inf leaves all figures None, with the reason.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> record = forward_record(jacdiag.sites(layer, torch.randn(2, 4, 8)), None)
        >>> len(record.points), len(record.variance)
        (3, 3)
    """
    # 1. The points of the stream; one that is not finite leaves nothing to measure.
    points = stream_points(sites)
    if not points:
        return _without_figures([], "no sub-layer lies on the residual stream")

    names = [name for name, _, _ in points]
    broken = _first_not_finite(points)
    if broken is not None:
        return _without_figures(names, f"NaN or Inf in the stream at {broken}")

    # 2. The figures of each point.
    cosines = token_cosines(points)
    notes = {}
    if cosines is None:
        notes["token_cosine"] = "fewer than two tokens with a vector that is not zero"
    return ForwardRecord(
        points=names,
        variance=variances(points),
        peaks=[peak(x, dim, token_ids) for _, x, dim in points],
        token_cosine=cosines,
        notes=notes,
    )


def _first_not_finite(points: Sequence[Point]) -> str | None:
    """Return the name of the first point that holds NaN or Inf."""
    flags = download([torch.isfinite(x).all() for _, x, _ in points])
    for (name, _, _), is_finite in zip(points, flags, strict=True):
        if not is_finite:
            return name

    return None


def variances(points: Sequence[Point]) -> list[float]:
    """Return the population variance over features of each point, averaged over tokens."""
    # 1. One sum for each point, of pieces: no copy of the stream in float64 is made.
    sums = []
    counts = []
    for _, x, dim in points:
        rows = _tokens(x, dim)
        pieces = rows.split(_ROWS)
        of_pieces = [in_float64(piece).var(-1, correction=0).sum() for piece in pieces]
        sums.append(torch.stack(of_pieces).sum())
        counts.append(max(len(rows), 1))

    # 2. One look at all of them.
    return [float(total) / count for total, count in zip(download(sums), counts, strict=True)]


def token_cosines(points: Sequence[Point]) -> list[float] | None:
    """Return the token cosine of each point; None unless all have one.

    It is the mean cosine between two different tokens of the probe that are not zero. The sum over
    all pairs is |sum of unit vectors|^2, without the products of each vector with itself.
    """
    # 1. The sums of each point, and one look at all of them.
    sums: list[Tensor] = []
    for _, x, dim in points:
        sums += _sum_of_unit_vectors(_tokens(x, dim))
    figures = download(sums)

    # 2. A cosine takes two tokens.
    cosines = []
    for square, number in zip(figures[0::2], figures[1::2], strict=True):
        count = int(number)
        if count < 2:
            return None

        cosines.append((float(square) - count) / (count * (count - 1)))
    return cosines


def _sum_of_unit_vectors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square of the norm of the sum of rows of length 1, and how many there are."""
    total = in_float64(rows.new_zeros(rows.shape[-1]))
    present = torch.zeros((), dtype=torch.int64, device=total.device)
    for part in rows.split(_ROWS):
        part = in_float64(part)
        norms = part.norm(dim=-1, keepdim=True)
        # A token that is zero has no direction, and adds nothing.
        is_zero = norms == 0
        total += (part / norms.masked_fill(is_zero, 1.0)).sum(0)
        present += (~is_zero).sum()

    return total @ total, present


def _without_figures(names: list[str], reason: str) -> ForwardRecord:
    """Return a record that says why nothing was measured."""
    return ForwardRecord(names, notes=dict.fromkeys(("variance", "peaks", "token_cosine"), reason))


def peak(x: Tensor, feature_dim: int, token_ids: Tensor | None) -> Peak:
    """Return the largest absolute activation and where it is, with the median of all."""
    # 1. The figures, in one download.
    rows = _tokens(x, feature_dim).abs()
    where, largest, median = download([rows.argmax(), rows.max(), rows.flatten().median()])

    # 2. Where it is.
    token, feature = divmod(int(where), rows.shape[-1])
    place = locate(token, x.shape, feature_dim, token_ids)
    return Peak(float(largest), float(median), feature, place.sequence, place.position, place.token)


def _tokens(x: Tensor, feature_dim: int) -> Tensor:
    """Return x as (tokens, features)."""
    moved = x.detach().movedim(feature_dim, -1)
    return moved.reshape(-1, moved.shape[-1])
