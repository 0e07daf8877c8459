"""Each step of a remedy does what its own lines of PyTorch do, and leaves alone what it should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from jacdiag.remedies.candidates import Remedy
from jacdiag.remedies.changes import (
    Fill,
    ModelChange,
    NormOutput,
    Redraw,
    Reparametrise,
    Scale,
    ScaleOutput,
    Spare,
    Weights,
)
from jacdiag.remedies.patches import pytorch
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

pytestmark = pytest.mark.check("remedies")

IDS = torch.arange(12).reshape(2, 6)
ALL = ("transformer.h.0.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.weight")
W_2 = Weights(ALL, "transformer.h.*.mlp.c_proj.weight", "W_2")
ONE = Weights(ALL[:1])


def small() -> gpt.GPT:
    with seeded(3):
        return gpt.build(
            "vanilla", n_layer=2, n_embd=16, n_head=2, vocab_size=32, block_size=8
        ).eval()


def by_patch(model: nn.Module, *changes: ModelChange) -> Any:
    """Runs the text of the patch, as a user would."""
    namespace: dict[str, Any] = {}
    exec(pytorch(Remedy("name", "Title", changes, "", 1.0)), namespace)
    with seeded(11):
        return namespace["remedy"](model)


CHANGES: dict[str, ModelChange] = {
    "scale, by pattern": Scale(W_2, 0.25, "1/4"),
    "scale, by name": Scale(ONE, 3.0, "3"),
    "draw, normal": Redraw(W_2, 0.125, "1/8"),
    "draw, uniform": Redraw(Weights(ALL[1:]), 0.125, "1/8", uniform=True),
    "fill": Fill(Weights(("transformer.ln_f.weight",)), 0.5),
    "fixed scale": ScaleOutput(("transformer.wte",), 4.0, "sqrt(d)"),
    "learned scale": ScaleOutput(
        ("transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"), 0.5, "", learned=True
    ),
    "norm": NormOutput("transformer.wte", 16),
    "gain": Reparametrise(W_2, 0.02),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_patch_does_what_was_tried(name: str) -> None:
    tried, patched = small(), small()
    with seeded(11):
        CHANGES[name].apply(tried)
    by_patch(patched, CHANGES[name])
    ours, theirs = dict(tried.named_parameters()), dict(patched.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert torch.equal(tried(IDS), patched(IDS))
    if name != "gain":
        assert not torch.equal(tried(IDS), small()(IDS))


def test_draws_have_the_std_and_the_family_asked_for() -> None:
    for uniform in (False, True):
        model = small()
        with seeded(1):
            Redraw(W_2, 0.125, "1/8", uniform).apply(model)
        weight = torch.cat([model.get_parameter(n).detach().flatten() for n in ALL])
        assert float(weight.std()) == pytest.approx(0.125, rel=0.05)
        edge = 0.125 * 3**0.5
        assert bool((weight.abs() <= edge).all()) is uniform


def test_a_padding_row_stays_zero() -> None:
    weights = Weights(("0.weight",), role="embedding", have_padding=True)
    change = Redraw(weights, 1.0, "1")
    tried = nn.Sequential(nn.Embedding(8, 4, padding_idx=2))
    patched = copy.deepcopy(tried)
    with seeded(11):
        change.apply(tried)
    by_patch(patched, change)
    for table in (tried, patched):
        weight = table[0].weight
        assert not weight[2].any() and bool(weight[[0, 1, 3, 4, 5, 6, 7]].ne(0).all())
    assert torch.equal(tried[0].weight, patched[0].weight)


def test_rows_of_zeros_in_a_matrix_are_drawn_as_the_patch_draws_them() -> None:
    """They are keys that nobody drew, and no padding."""
    tried = nn.Sequential(nn.Linear(8, 24))
    tried[0].weight.data[8:16].zero_()
    patched = copy.deepcopy(tried)
    change = Redraw(Weights(("0.weight",), role="W_QKV"), 0.5, "0.5")
    with seeded(11):
        change.apply(tried)
    by_patch(patched, change)
    assert bool(tried[0].weight.ne(0).all())
    assert torch.equal(tried[0].weight, patched[0].weight)


def test_a_matrix_of_zeros_is_drawn() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    with seeded(1):
        Redraw(Weights(("0.weight",)), 1.0, "1").apply(model)
    assert float(model[0].weight.detach().std()) > 0.5  # type: ignore[union-attr]


def test_gains_keep_the_function_and_learn() -> None:
    model, before = small(), small()(IDS)
    CHANGES["gain"].apply(model)
    assert torch.equal(model(IDS), before)
    model(IDS).square().sum().backward()
    gains = [p for n, p in model.named_parameters() if n.endswith(".gain")]
    assert len(gains) == 2 and all(g.grad is not None and g.grad.abs() > 0 for g in gains)
    directions = [
        p for n, p in model.named_parameters() if n.endswith("parametrizations.weight.original")
    ]
    assert all(0.02 / 2**0.5 <= float(d.detach().std()) <= 0.02 * 2**0.5 for d in directions)


def test_a_learned_scale_is_a_parameter_and_the_model_can_be_copied() -> None:
    model = small()
    CHANGES["learned scale"].apply(model)
    CHANGES["fixed scale"].apply(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("transformer.h.0.attn.c_proj.scale").fill_(0.0)
    assert not torch.equal(twin(IDS), model(IDS)), "the copy's hook reads the copy's parameter"


def test_spared_parameters_leave_weight_decay() -> None:
    model = small()
    spared = ("transformer.wte.weight", "transformer.ln_f.weight")
    groups = by_patch(model, Spare(spared))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    held = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {n: held[id(p)] for n, p in model.named_parameters()} == {
        n: 0.0 if n in spared else 0.1 for n, _ in model.named_parameters()
    }


def test_a_pattern_is_kept_only_if_it_means_just_these() -> None:
    names = [f"h.{k}.mlp.w.weight" for k in range(3)] + ["h.0.mlp.inner.mlp.w.weight"]
    assert Weights.of(names[:3], "h.*.mlp.w.weight", names).pattern == "", "the star spans dots"
    assert Weights.of(names[:3], "h.*.mlp.w.weight", names[:3]).pattern == "h.*.mlp.w.weight"
    assert Weights.of(names[:2], "h.*.mlp.w.weight", names[:3]).pattern == ""


def test_names_of_a_checkpoint_cannot_write_code() -> None:
    name = "x'); import os; os.abort(); ('.weight"
    text = pytorch(Remedy("name", "Title", (Scale(Weights((name,)), 2.0, "2"),), "", 1.0))
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    with pytest.raises(AttributeError):
        namespace["remedy"](small())
