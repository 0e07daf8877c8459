"""Small models and what is compared of their reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.records import Report
from jacdiag.sources.gpt import GPT, build

V, T = 32, 8
_CLOCKS = {"command", "created", "device", "peak_memory_mb", "phases", "seconds"}


def tiny(recipe: str = "vanilla", **sizes: Any) -> GPT:
    """Return a small GPT, the same at each call."""
    torch.manual_seed(0)
    given = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": V, "block_size": T}
    return build(recipe, **{**given, "dropout": 0.0, **sizes}).eval()


def ids() -> Tensor:
    """Return token ids for it."""
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))


class Elsewhere(nn.Module):
    """A block that lies on a device of its own, and brings its input there and its result back."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        weight = next(self.block.parameters())
        result: Tensor = self.block(x.to(weight.device)).to(x.device)
        return result


def figures(report: Report) -> dict[str, Any]:
    """Return what a report says, but for clocks, memory and the name of the device."""
    kept: dict[str, Any] = _without_clocks(report.to_dict())
    return kept


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clocks(x) for key, x in value.items() if key not in _CLOCKS}
    if isinstance(value, list):
        return [_without_clocks(x) for x in value]
    return value
