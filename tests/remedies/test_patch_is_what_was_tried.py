"""The printed code of a remedy leaves a model as the copy was that was tried."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from benchmarks.initbench.catalogue import tokens
from benchmarks.initbench.decoders import GPT, Llama
from benchmarks.initbench.draws import draw, normal, ones
from jacdiag.records import RemedyRecord
from jacdiag.remedies import trial
from jacdiag.remedies.candidates import Remedy
from jacdiag.sources.factory import seeded

LAYERS = 6
WIDTH = 64


def with_padding() -> nn.Module:
    """Return a model whose embedding and W_2 are wrong, with a padding row of zeros."""
    torch.manual_seed(0)
    model = Llama(layers=LAYERS, width=WIDTH)
    outputs = normal(0.02 / math.sqrt(2 * LAYERS))
    draw(model, ("norm", ones), ("o_proj", outputs), ("weight", normal(0.02)))
    table = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    with torch.no_grad():
        table.weight.mul_(7)
        table.weight[0].zero_()
    return model


def with_zero_keys() -> nn.Module:
    """Return a model of which the rows of the keys in one fused matrix were not drawn."""
    torch.manual_seed(0)
    model = GPT(layers=LAYERS, width=WIDTH, tied=False, bias=False)
    outputs = normal(0.02 / math.sqrt(2 * LAYERS))
    draw(model, ("ln_", ones), ("wte", normal(1.0)), ("c_proj", outputs), ("weight", normal(0.02)))
    model.h[3].attn.c_attn.weight.data[WIDTH : 2 * WIDTH].zero_()
    return model


def zero_rows(weight: Tensor) -> list[int]:
    return [] if weight.dim() < 2 else torch.nonzero((weight == 0).flatten(1).all(1)).tolist()


@pytest.mark.parametrize("build", [with_padding, with_zero_keys])
def test_the_printed_code_does_what_was_tried(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1. Keep each copy that is tried.
    tried: dict[str, dict[str, Tensor]] = {}
    apply = trial._changed

    def changed(model: nn.Module, remedy: Remedy, seed: int) -> nn.Module:
        result = apply(model, remedy, seed)
        if remedy.name not in tried:
            tried[remedy.name] = {n: p.detach().clone() for n, p in result.named_parameters()}
        return result

    monkeypatch.setattr(trial, "_changed", changed)
    model = build()
    report = jacdiag.audit(copy.deepcopy(model), tokens(), state="init", remedies="all")
    assert report.remedies

    # 2. Run the code of each remedy.
    for remedy in report.remedies:
        patched = run_patch(copy.deepcopy(model), remedy)
        assert patched.keys() == tried[remedy.name].keys()
        for name, weight in patched.items():
            other = tried[remedy.name][name]
            assert zero_rows(weight) == zero_rows(other), (remedy.name, name)
            assert float(weight.std()) == pytest.approx(float(other.std()), rel=0.1, abs=1e-9)


def run_patch(model: nn.Module, remedy: RemedyRecord) -> dict[str, Tensor]:
    namespace: dict[str, Any] = {}
    exec(remedy.patches["pytorch"], namespace)
    with seeded(5):
        namespace["remedy"](model)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
