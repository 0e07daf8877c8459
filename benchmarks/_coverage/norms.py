"""Where the norm of a sub-layer stands by the model's own norm modules: an answer that the tracer
has no part in.

Every module whose class is called a norm says what it was given and what it made; both are
compared, value by value, with the shortcut, the branch and the sum of each sub-layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[Tensor, Tensor]
CLOSE = 1e-5


def calls_of(model: nn.Module, inputs: dict[str, Any]) -> list[Call]:
    """What each norm module was given and made, in one forward."""
    calls: list[Call] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((args[0].detach().clone(), output.detach().clone()))

    handles = [m.register_forward_hook(note) for m in model.modules() if _normalises_tokens(m)]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _normalises_tokens(module: nn.Module) -> bool:
    """By name. A batch norm in eval mode is affine, a group norm goes over positions, MobileBERT's
    NoNorm is none.
    """
    name = type(module).__name__
    return bool(re.search("norm", name, re.I)) and not re.search("batch|group|nonorm", name, re.I)


def placements(sites: Sequence[Any], calls: Sequence[Call]) -> list[str | None]:
    """The placement of every sub-layer, None where the norm modules leave it open (behind the last
    sum).
    """
    if not calls:
        return [None] * len(sites)
    return [_placement(site, sites, calls) for site in sites]


def _placement(site: Any, sites: Sequence[Any], calls: Sequence[Call]) -> str | None:
    entry = any(_same(given, site.shortcut) for given, _ in calls)
    exit_ = any(_same(made, site.value, scaled=True) for _, made in calls)
    if entry or exit_:
        return "sandwich" if entry and exit_ else "pre" if entry else "reordered"
    total = site.total if site.total is not None else site.shortcut + site.value
    behind = [made for given, made in calls if _same(given, total)]
    if any(_same(made, other.shortcut) for made in behind for other in sites):
        return "post"
    return None if behind else "none"


def _same(a: Tensor, b: Tensor, *, scaled: bool = False) -> bool:
    """Whether two tensors hold the same numbers, in whatever shape; or, `scaled`, one number times
    the same.
    """
    if a.numel() != b.numel() or not a.is_floating_point():
        return False
    a, b = a.flatten().double(), b.flatten().double()
    if scaled and bool(a.norm() > 0):
        a = a * (a @ b) / (a @ a)
    return bool((a - b).norm() <= CLOSE * b.norm())
