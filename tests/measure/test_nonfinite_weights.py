"""JD906: a mask or a table may hold -inf on purpose; what breaks an activation, or is a used
weight, is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacdiag

INF, NAN = math.inf, math.nan


class Masked(nn.Module):
    """One attention whose scores get a mask and a table of distances added."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(16, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((6, 6), -INF).triu(1))
        self.table = nn.Parameter(torch.zeros(12))
        self.spare = nn.Parameter(torch.zeros(4, 4))
        self.fused = fused

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        tokens = x.shape[1]
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        place = torch.arange(tokens)
        distance = (place[:, None] - place[None, :]).clamp(min=0)
        scores = self.mask[:tokens, :tokens] + self.table[distance]
        if self.fused:
            mixed = F.scaled_dot_product_attention(
                q[:, None], k[:, None], v[:, None], attn_mask=scores
            )[:, 0]
        else:
            mixed = (q @ k.transpose(1, 2) / 8**0.5 + scores).softmax(-1) @ v
        return x + self.out(mixed)


def broken_names(change: Callable[[Masked], None], fused: bool = False) -> tuple[list[str], str]:
    torch.manual_seed(0)
    model = Masked(fused).requires_grad_(False)
    change(model)
    report = jacdiag.audit(model, torch.arange(5).repeat(2, 1), max_products=8)
    findings = [f for f in report.findings if f.code == "JD906"]
    names = [name for f in findings for name in f.evidence["parameters"]]
    return names, "; ".join(report.notes)


def put(name: str, place: object, value: float) -> Callable[[Masked], None]:
    def change(model: Masked) -> None:
        dict([*model.named_parameters(), *model.named_buffers()])[name][place] = value  # type: ignore[index]

    return change


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        put("table", 3, -INF),
        put("table", slice(3, None), -INF),
        put("mask", (5, 5), NAN),
    ],
    ids=["mask", "one distance", "far distances", "unused row of the mask"],
)
def test_what_is_meant_is_no_finding(change: Callable[[Masked], None], fused: bool) -> None:
    assert broken_names(change, fused)[0] == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "change,name",
    [
        (put("qkv.weight", (0, 0), NAN), "qkv.weight"),
        (put("qkv.weight", (0, 0), INF), "qkv.weight"),
        # a row that this probe does not look up
        (put("embed.weight", (15, 0), INF), "embed.weight"),
        (put("norm.bias", 0, NAN), "norm.bias"),
        (put("mask", (0, 0), NAN), "mask"),
        (put("table", 0, NAN), "table"),
    ],
)
def test_what_breaks_is_named(change: Callable[[Masked], None], name: str, fused: bool) -> None:
    assert broken_names(change, fused)[0] == [name]


def test_a_mask_that_hides_a_whole_row_is_named_as_nothing_else_is_to_blame() -> None:
    assert "mask" in broken_names(put("mask", slice(None), -INF))[0]


def test_a_weight_that_is_not_read_is_a_note() -> None:
    names, notes = broken_names(put("spare", (0, 0), NAN))
    assert names == []
    assert "does not read: spare" in notes
    assert "does not read" not in broken_names(lambda model: None)[1]


def of_file(tmp_path: Path, **extra: Tensor) -> tuple[list[str], str]:
    weights = {
        f"layers.0.mlp.{name}.weight": torch.randn(8, 8) for name in ("up_proj", "down_proj")
    }
    path = tmp_path / "weights.pt"
    torch.save(weights | extra, path)
    report = jacdiag.audit(path)
    return list(report.settings["checks"]["non_finite"]), "; ".join(report.notes)


def test_weights_alone_take_masks_and_tables_for_what_they_are(tmp_path: Path) -> None:
    mask = torch.full((4, 4), -INF).triu(1)
    distances = torch.tensor([0.0, 1.0, INF])
    names, notes = of_file(
        tmp_path, **{"layers.0.attn.bias": mask, "layers.0.attn.distances": distances}
    )
    assert names == []
    assert "layers.0.attn.bias" in notes and "on purpose" in notes
    assert "on purpose" not in of_file(tmp_path)[1]


def test_weights_alone_still_name_what_is_broken(tmp_path: Path) -> None:
    broken = torch.randn(8, 8)
    broken[0, 0] = -INF
    poisoned = torch.zeros(4, 4)
    poisoned[1, 1] = NAN
    names, _ = of_file(
        tmp_path, **{"layers.0.attn.out.weight": broken, "layers.0.attn.mask": poisoned}
    )
    assert names == ["layers.0.attn.out.weight", "layers.0.attn.mask"]
