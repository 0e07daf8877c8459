"""A tiny GPT, and every way in which somebody may have saved it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacdiag.sources import Source, gpt
from jacdiag.sources.factory import seeded
from jacdiag.sources.load_weights import fit

SIZES: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 64,
    "block_size": 32,
}
BUILD = "jacdiag.sources.gpt:build"


def tiny() -> gpt.GPT:
    with seeded(0):
        return gpt.build("vanilla", **SIZES)


def weights() -> dict[str, Tensor]:
    return dict(tiny().state_dict())


def save(path: Path, what: Any, **how: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(what, path, **how)
    return path


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Equal names, values and precisions."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in expected.items()
    )


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    """What a Trainer of Lightning writes: the module's names behind `model.`, and much that is no
    tensor.
    """
    return {
        "epoch": 1,
        "global_step": 77,
        "pytorch-lightning_version": "2.2.0",
        "loops": {},
        "callbacks": {},
        "state_dict": {f"model.{name}": t for name, t in state.items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(9999)}}}],
        "hyper_parameters": argparse.Namespace(lr=0.1),
    }


def whole(source: Source) -> torch.nn.Module:
    """The source's model with all of its weights in memory."""
    assert source.model is not None
    if source.weights is not None:
        fit(source.model, {**source.model.state_dict(), **source.weights}, "the files")
        source.weights = None
    return source.model
