"""Changes that turn the weights of a tiny model into the layout of a published repository."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
Edit = Callable[[State], State]


def rename(pattern: str, new: str) -> Edit:
    """Rename every weight whose name matches."""
    return lambda state: {re.sub(pattern, new, name): tensor for name, tensor in state.items()}


def drop(pattern: str) -> Edit:
    """Leave out every weight whose name matches."""
    return lambda state: {
        name: tensor for name, tensor in state.items() if not re.search(pattern, name)
    }


def keep(pattern: str) -> Edit:
    """Keep the weights whose names match."""
    return lambda state: {
        name: tensor for name, tensor in state.items() if re.search(pattern, name)
    }


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Edit:
    """Add a tensor that the model does not have."""

    def edit(state: State) -> State:
        generator = torch.Generator().manual_seed(7)
        values = torch.randn(shape, generator=generator)
        return {**state, name: values.to(dtype)}

    return edit


def copy(source: str, *names: str) -> Edit:
    """Add another name for a weight, as files of tied weights have it."""
    return lambda state: {**state, **{name: state[source].clone() for name in names}}


def beside(pattern: str, new: str, *shape: int, dtype: torch.dtype = torch.float32) -> Edit:
    """Add a tensor next to every weight whose name matches: a buffer that each layer once had."""

    def edit(state: State) -> State:
        added = {}
        for name in state:
            if re.search(pattern, name):
                added[re.sub(pattern, new, name)] = torch.ones(shape, dtype=dtype)
        return {**state, **added}

    return edit


def cast(dtype: torch.dtype) -> Edit:
    """Store every number in floating point in another precision."""
    return lambda state: {
        name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()
    }


@dataclass(frozen=True, kw_only=True)
class Files:
    """How the weights are stored.

    Attributes:
        kind: "safetensors" or "bin".
        shards: how many files, with an index where there are more than one.
    """

    kind: str = "safetensors"
    shards: int = 1
