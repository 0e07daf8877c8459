"""Router load and entropy on the probe, against forward hooks on other people's models and a closed
form.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from monitor.rig import lines
from torch import Tensor, nn

import jacdiag
from jacdiag.monitor.router_statistics import routing_of
from jacdiag.sources.gpt import build

EXPERTS, WIDTH = 4, 16


class Experts(nn.Module):
    """A mixture of experts whose router has a bias, so that experts can be shut."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.router(x).softmax(-1)
        top, index = probabilities.topk(self.chosen, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(-1, index, top)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * weights[..., None, :]).sum(-1)


class Model(nn.Module):
    def __init__(self, chosen: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = Experts(chosen)
        self.plain = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.experts(self.norm(x))
        return x + self.plain(x)


IDS = torch.arange(24).reshape(2, 12)


def test_load_and_entropy_are_those_that_a_hook_sees() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    seen: list[Tensor] = []
    model.experts.router.register_forward_hook(
        lambda _module, _args, out: seen.append(out.detach())
    )
    model(IDS)
    probabilities = seen[0].double().softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean() / math.log(EXPERTS)
    load = torch.bincount(seen[0].topk(2, dim=-1).indices.flatten(), minlength=EXPERTS) / (
        2 * IDS.numel()
    )

    [routing] = routing_of(jacdiag.sites(model, IDS)).values()
    assert routing.entropy == pytest.approx(float(entropy), rel=1e-5)
    assert routing.load == pytest.approx(load.tolist())


def test_an_expert_that_gets_no_token_is_counted() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    [routing] = routing_of(jacdiag.sites(model, IDS)).values()
    assert routing.unused == 0
    with torch.no_grad():
        model.experts.router.bias[1] = -100.0
    [routing] = routing_of(jacdiag.sites(model, IDS)).values()
    assert routing.unused == 1 and routing.load[1] == 0


def test_a_router_without_a_preference_has_entropy_one_and_a_certain_one_none() -> None:
    torch.manual_seed(0)
    model = Model(chosen=1).eval()
    with torch.no_grad():
        model.experts.router.weight.zero_()
        model.experts.router.bias.zero_()
    [routing] = routing_of(jacdiag.sites(model, IDS)).values()
    assert routing.entropy == pytest.approx(1.0)
    with torch.no_grad():
        model.experts.router.bias[2] = 1e3
    [routing] = routing_of(jacdiag.sites(model, IDS)).values()
    assert routing.entropy == pytest.approx(0.0, abs=1e-6)
    assert routing.imbalance == EXPERTS and routing.unused == EXPERTS - 1


def test_a_model_without_experts_has_no_routers() -> None:
    model = build(n_layer=1, n_head=2, n_embd=16, vocab_size=32, block_size=16).eval()
    assert routing_of(jacdiag.sites(model, IDS)) == {}


@pytest.mark.parametrize(
    "family", ["Mixtral", "Qwen2Moe", "DeepseekV3", "SwitchTransformersEncoder"]
)
def test_router_statistics_of_each_transformers_moe_family(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    if family == "Mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    elif family == "Qwen2Moe":
        config = transformers.Qwen2MoeConfig(
            **sizes,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        )
    elif family == "DeepseekV3":
        config = transformers.DeepseekV3Config(
            **sizes,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=8,
            first_k_dense_replace=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_shared_experts=1,
        )
    else:
        config = transformers.SwitchTransformersConfig(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            num_experts=4,
            num_sparse_encoder_layers=1,
        )
    name = family + ("Model" if family.endswith("Encoder") else "ForCausalLM")
    model = getattr(transformers, name)(config).eval()
    found = routing_of(jacdiag.sites(model, input_ids=IDS))
    assert found
    for routing in found.values():
        assert sum(routing.load) == pytest.approx(1.0) and 0 <= routing.entropy <= 1 + 1e-6


def test_the_log_of_a_watch_holds_them_and_the_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    with jacdiag.watch(model, optimizer, every=None, log_dir=tmp_path, quiet=True) as watch:
        loss = model(IDS).square().mean()
        loss.backward()
        optimizer.step()
        watch.step(loss)
    [stats] = lines(tmp_path, "stats")
    [name] = stats["figures"]["router_entropy"]
    assert len(stats["experts"][name]) == EXPERTS
    assert stats["figures"]["unused_experts"] == {name: 0.0}
    assert "heads" not in stats, "this model has no attention"
