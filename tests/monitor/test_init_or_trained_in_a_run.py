"""A watch takes a fresh model for fresh and a trained one for trained, whatever vectors it
holds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monitor.rig import adam, lines, plain_step, small
from torch import nn

import jacdiag
from jacdiag.sources.gpt import GPT

SIZES = {"n_embd": 32, "n_layer": 4, "dropout": 0.0}


def with_drawn_vectors() -> GPT:
    """Return a fresh model whose gains and biases are drawn, as some families do it."""
    model = small("vanilla", **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def of_low_rank(model: GPT) -> GPT:
    """Return the model after a push of low rank on every matrix, as training leaves them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                left, right = torch.randn(parameter.shape[0], 2), torch.randn(2, parameter.shape[1])
                parameter.add_(left @ right, alpha=float(parameter.std()))
    return model


def first_probe(model: nn.Module, folder: Path) -> tuple[str, set[str]]:
    """Return the state that the first probe of a run sees, and the codes of its warnings."""
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, every=100, log_dir=folder, quiet=True) as watch:
        loss, norm = plain_step(model, optimizer, 1)
        watch.step(loss, grad_norm=norm)
    report = lines(folder, "probe")[0]["report"]
    return report["state"], {
        finding["code"] for finding in report["findings"] if finding["level"] != "info"
    }


@pytest.mark.parametrize("seed", range(2))
def test_a_fresh_model_with_drawn_vectors_is_judged_by_the_rules_of_an_init(
    tmp_path: Path, seed: int
) -> None:
    torch.manual_seed(seed)
    state, codes = first_probe(with_drawn_vectors(), tmp_path)
    assert state == "init" and "JD103" in codes


def test_trained_weights_are_not_judged_by_the_rules_of_an_init(tmp_path: Path) -> None:
    state, codes = first_probe(of_low_rank(with_drawn_vectors()), tmp_path)
    assert state == "trained" and not codes & {"JD101", "JD102"}
