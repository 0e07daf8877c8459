"""Attention logits and entropy, compared with the softmax weights computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from measure import flow_models as models
from torch import Tensor, nn

import jacdiag
from jacdiag.measure import attention
from jacdiag.measure.attention import Tally, add_products
from jacdiag.measure.gradients import gradient_profile
from jacdiag.records.signal_propagation import AttentionRecord

pytestmark = pytest.mark.check("measure")


def by_hand(scores: Tensor) -> tuple[float, float, float]:
    """Largest score, mean entropy, and that over uniform, of (B, H, T, S) with -inf where
    masked.
    """
    weights = scores.double().softmax(-1)
    entropies, most = [], []
    for row, probabilities in zip(scores.flatten(0, -2), weights.flatten(0, -2), strict=True):
        visible = row > -math.inf
        if int(visible.sum()) < 2:
            continue
        p = probabilities[visible]
        entropies.append(float(-(p * p.log()).sum()))
        most.append(math.log(int(visible.sum())))
    return float(scores.max()), sum(entropies) / len(entropies), sum(entropies) / sum(most)


def scores_of(module: models.Attention, x: Tensor) -> Tensor:
    q, k = module.split(module.q(x)), module.split(module.k(x))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def first(model: nn.Module, x: Tensor) -> AttentionRecord:
    sites = jacdiag.sites(model, x)
    profile = gradient_profile(sites, None if x.is_floating_point() else x)
    assert profile is not None
    index = next(str(site.index) for site in sites if site.kind == "attention")
    return profile.attention[index]


@pytest.mark.parametrize("written", [False, True], ids=["fused", "by hand"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_causal_attention_equals_the_softmax_by_hand(written: bool, scale: float) -> None:
    model, x = models.decoder(by_hand=written), models.ids()
    with torch.no_grad():
        model.h[0].attn.q.weight.mul_(scale)
        scores = scores_of(model.h[0].attn, model.h[0].norm1(model.wte(x)))
    found = first(model, x)
    logit, entropy, share = by_hand(scores)
    assert found.max_logit == pytest.approx(logit, rel=1e-5)
    assert found.entropy == pytest.approx(entropy, rel=1e-5)
    assert found.entropy_share == pytest.approx(share, rel=1e-5)
    lowest = min(by_hand(scores[:, head : head + 1])[1] for head in range(models.HEADS))
    assert found.lowest_head == pytest.approx(lowest, rel=1e-5)
    assert found.queries == 2 * models.HEADS * 5  # the first token sees itself only


def test_no_scores_are_uniform_and_huge_scores_are_one_hot() -> None:
    model, x = models.decoder(), models.ids()
    with torch.no_grad():
        model.h[0].attn.q.weight.zero_()
    uniform = first(model, x)
    assert uniform.max_logit == 0 and uniform.entropy_share == pytest.approx(1, abs=1e-6)
    torch.manual_seed(0)
    with torch.no_grad():
        model.h[0].attn.q.weight.normal_(std=1e6)
    peaked = first(model, x)
    assert peaked.entropy == pytest.approx(0, abs=1e-3) and (peaked.max_logit or 0) > 1e4


class TorchLayer(nn.Module):
    """torch's own attention in a residual branch, with both kinds of mask."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, -1] = True
        return (
            x
            + self.attn(
                z, z, z, key_padding_mask=padding, attn_mask=causal, need_weights=self.need_weights
            )[0]
        )


@pytest.mark.parametrize("need_weights", [False, True])
def test_torchs_own_module_equals_the_weights_that_it_returns(need_weights: bool) -> None:
    torch.manual_seed(0)
    model, x = TorchLayer(need_weights), torch.randn(2, 5, 16)
    found = first(model, x)
    z = model.norm(x)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, -1] = True
    _, weights = model.attn(
        z, z, z, key_padding_mask=padding, attn_mask=causal, average_attn_weights=False
    )
    rows = [
        row[row > 0].double() for row in weights.detach().flatten(0, -2) if int((row > 0).sum()) > 1
    ]
    entropy = sum(float(-(row * row.log()).sum()) for row in rows) / len(rows)
    assert found.entropy == pytest.approx(entropy, rel=1e-5) and found.queries == len(rows)


def test_grouped_keys_a_scale_and_a_mask_equal_a_plain_call() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8)
    mask = torch.randn(7, 9)
    tally = Tally()
    attention._read_sdpa(
        tally, (query, key, key), {"attn_mask": mask, "scale": 0.7, "enable_gqa": True}
    )
    scores = query @ key.repeat_interleave(2, 1).transpose(-2, -1) * 0.7 + mask
    logit, entropy, share = by_hand(scores)
    record = tally.record()
    assert record.max_logit == pytest.approx(logit, rel=1e-6)
    assert record.entropy == pytest.approx(entropy, rel=1e-6)
    assert record.entropy_share == pytest.approx(share, rel=1e-6)


def test_attention_statistics_do_not_depend_on_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 17, 4).double(), torch.randn(2, 3, 17, 4).double()
    whole = Tally()
    add_products(whole, query, key, None, True, None)
    monkeypatch.setattr(attention, "_AT_ONCE", 2 * 3 * 17 * 4)  # four queries at a time
    parts = Tally()
    add_products(parts, query, key, None, True, None)
    assert parts.record().entropy == pytest.approx(whole.record().entropy, rel=1e-12)
    assert parts.record().max_logit == whole.record().max_logit


class Mixture(nn.Module):
    """A soft mixture of two experts: a softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(16), nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        weights = self.router(z).softmax(-1)
        return x + sum(
            weights[..., k : k + 1] * expert(z).relu() for k, expert in enumerate(self.experts)
        )


class Linear(nn.Module):
    """Attention without a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        q, k, v = F.elu(self.q(z)) + 1, F.elu(self.k(z)) + 1, self.v(z)
        return x + q @ (k.transpose(-2, -1) @ v)


@pytest.mark.parametrize("kind", [Mixture, Linear])
def test_what_has_no_scores_has_no_figures_but_a_reason(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    report = jacdiag.audit(kind(), torch.randn(2, 5, 16), decide=True)
    [row] = report.sublayers
    assert row.attention is None
    if row.kind == "attention":
        assert "softmax over scores" in row.notes["attention"]
    status = {rule.code: rule.status for rule in report.rules}
    assert status["JD303"] == status["JD304"] == "not-applicable"
