"""Find weights that repeat each other's numbers, up to a factor.

They were drawn from one state of a generator.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download
from jacdiag.measure.init_distribution import FittedDraw

_DRAWN = ("normal", "truncated", "uniform")
# numbers whose order finds the candidates: two draws share it with a chance of 1 to 16! = 2e13
_FIRST = 16
_LEAST = 64  # numbers that two weights must share
# torch draws a normal in blocks of 16 and draws the last block again if the size is no multiple of
# 16.
_BLOCK = 16
# How far a number may lie from the other one times the factor, in std: bfloat16 keeps 8 bits of a
# number of 5 std.
_TOLERANCE = 0.02


def streams_of(
    found: Mapping[str, FittedDraw | None], params: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return which weights repeat another's numbers, up to a factor: name -> first of them.

    Weights of unlike shape are compared over the numbers of the smaller one: a generator that
    starts at one state gives both the same first numbers.

    Args:
        found: the draws of the weights by name.
        params: the weights themselves.

    Example:
        >>> import torch
        >>> from jacdiag.measure.init_distribution import draw_of
        >>> generator = torch.Generator()
        >>> draw = lambda std, *shape: std * torch.randn(shape, generator=generator.manual_seed(0))
        >>> params = {"q": draw(0.02, 16, 16), "up": draw(0.1, 32, 16), "down": torch.randn(16, 32)}
        >>> streams_of({name: draw_of(tensor) for name, tensor in params.items()}, params)
        {'up': 'q'}
    """
    # 1. The first numbers of each weight that was drawn.
    beginnings: dict[str, Tensor] = {}
    for name, draw in found.items():
        tensor = params[name]
        if _can_be_compared(tensor, draw):
            beginnings[name] = tensor.detach().reshape(-1)[:_FIRST].clone()

    firsts: dict[tuple[int, ...], list[str]] = {}
    streams: dict[str, str] = {}
    numbers = download(list(beginnings.values()))
    for name, beginning in zip(beginnings, numbers, strict=True):
        # 2. Only weights whose first numbers stand in the same order are compared in full.
        alike = firsts.setdefault(tuple(beginning.argsort().tolist()), [])
        if not alike:
            alike.append(name)
            continue

        tensor = params[name]
        repeated = [other for other in alike if _repeats(tensor, params[other])]

        # 3. A tied weight is the same, and repeats nothing.
        if not repeated:
            alike.append(name)
        elif tensor.data_ptr() != params[repeated[0]].data_ptr():
            streams[name] = repeated[0]

    return streams


def _can_be_compared(tensor: Tensor, draw: FittedDraw | None) -> bool:
    """Return whether a weight was drawn number by number, and has enough of them."""
    was_drawn = draw is not None and draw.family in _DRAWN
    if not was_drawn:
        return False

    # Vectors are constant, or share too few numbers.
    return tensor.dim() >= 2 and tensor.numel() >= _LEAST


def _repeats(tensor: Tensor, other: Tensor) -> bool:
    """Return whether the smaller of two weights repeats the larger one's numbers.

    They may differ by a positive factor.
    """
    # 1. How many numbers they share. The end of the smaller one was drawn again.
    count = min(tensor.numel(), other.numel())
    if tensor.numel() != other.numel():
        count -= _BLOCK
    if count < _LEAST - _BLOCK:
        return False

    # 2. The factor that fits best, and what is left.
    own = in_float64(tensor.detach().reshape(-1)[:count])
    theirs = in_float64(other.detach().reshape(-1)[:count]).to(own.device)
    factor = float(own @ theirs) / max(float(theirs @ theirs), 1e-300)
    if factor <= 0:
        return False

    return float((own - factor * theirs).abs().max()) <= _TOLERANCE * float(own.std())
