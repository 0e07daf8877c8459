"""The use of every weight, found from the dataflow: the truth is what the authors of a model call
its parameters.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from benchmarks._families import CONFIGS, family, recipe
from jacdiag.trace.discovery.weight_roles import pattern, tied_to_head, uses_of

# Names in transformers -> the role that they say.
NAMES = {
    r"(wte|embed_tokens|embed_in|word_embeddings|shared)\.weight$": "embedding",
    r"(wpe|embed_positions|relative_attention_bias)\.weight$": "positions",
    r"(c_attn|query_key_value)\.weight$": "W_QKV",
    r"(q_proj|Attention\.q)\.weight$": "W_Q",
    r"(k_proj|Attention\.k)\.weight$": "W_K",
    r"(v_proj|Attention\.v)\.weight$": "W_V",
    r"(attn\.c_proj|attention\.dense|o_proj|out_proj|Attention\.o)\.weight$": "W_O",
    r"(c_fc|dense_h_to_4h|fc1|up_proj|\.wi)\.weight$": "W_1",
    r"gate_proj\.weight$": "W_gate",
    r"(mlp\.c_proj|dense_4h_to_h|fc2|down_proj|\.wo)\.weight$": "W_2",
    r"lm_head\.weight$": "head",
    r"(ln_\w|layernorm|layer_norm|norm)\.weight$": "norm_gain",
    r"\.bias$": "bias",
}


def named(parameter: str) -> str:
    return next(role for words, role in NAMES.items() if re.search(words, parameter))


@pytest.mark.parametrize("name", CONFIGS)
def test_roles_are_what_the_names_say(name: str) -> None:
    subject = family(name, 0)
    uses = uses_of(jacdiag.sites(subject.model, **subject.probe))
    assert {p: use.role for p, use in uses.items()} == {p: named(p) for p in uses}
    assert set(uses) == {n for n, _ in subject.model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_fans_are_those_of_the_map_whichever_way_it_is_stored(name: str) -> None:
    subject = family(name, 0)
    uses = uses_of(jacdiag.sites(subject.model, **subject.probe))
    for parameter, use in uses.items():
        shape = tuple(subject.model.get_parameter(parameter).shape)
        if use.role.startswith("W_"):
            turned = name == "gpt2"  # its Conv1D is (in, out)
            assert (use.fan_in, use.fan_out) == (shape if turned else shape[::-1]), parameter


def test_layers_are_numbered_by_depth() -> None:
    subject = family("llama", 0)
    uses = uses_of(jacdiag.sites(subject.model, **subject.probe))
    for parameter, use in uses.items():
        number = re.search(r"layers\.(\d+)\.", parameter)
        assert use.layer == (int(number[1]) if number else None)


@pytest.mark.parametrize(
    ("name", "tied"), [("gpt2", True), ("llama", False), ("gemma", True), ("gpt_neox", False)]
)
def test_head_tied_to_the_embedding_is_detected(name: str, tied: bool) -> None:
    subject = family(name, 0)
    assert bool(tied_to_head(jacdiag.sites(subject.model, **subject.probe))) is tied


class Routed(nn.Module):
    """A mixture of experts in plain code: the router's result weighs what the experts return."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(8, 3, bias=False)
        self.up, self.down = (
            nn.Parameter(torch.randn(3, 8, 16)),
            nn.Parameter(torch.randn(3, 16, 8)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.pick(x).softmax(-1).topk(1)
        h = torch.einsum("btd,btdf->btf", x, self.up[chosen[..., 0]]).relu()
        return x + weight * torch.einsum("btf,btfd->btd", h, self.down[chosen[..., 0]])


def test_router_weight_has_the_router_role() -> None:
    uses = uses_of(jacdiag.sites(Routed(), torch.randn(2, 5, 8)))
    assert {name: use.role for name, use in uses.items()} == {
        "pick.weight": "router",
        "up": "W_1",
        "down": "W_2",
    }


class Swapped(nn.Module):
    """An attention that computes keys first, and calls nothing by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.a(x), self.b(x), self.c(x)
        weights = (third @ first.transpose(-1, -2) / 8**0.5).softmax(-1)
        return x + self.d(weights @ second)


def test_order_and_names_do_not_matter() -> None:
    uses = uses_of(jacdiag.sites(Swapped(), torch.randn(2, 5, 8)))
    assert [uses[f"{letter}.weight"].role for letter in "abcd"] == ["W_K", "W_V", "W_Q", "W_O"]


def test_roles_of_the_reference_gpt_agree_with_its_names() -> None:
    subject = recipe("vanilla", 0, layers=2)
    uses = uses_of(jacdiag.sites(subject.model, subject.probe))
    assert {p: u.role for p, u in uses.items() if not p.endswith("bias")} == {
        p: named(p) for p in uses if not p.endswith("bias")
    }


def test_pattern_stars_the_layer_only() -> None:
    assert pattern("h.3.mlp.experts.1.w2.weight") == "h.*.mlp.experts.1.w2.weight"
    assert pattern("fc1.weight") == "fc1.weight"


def test_a_loop_of_cuts_and_joins_is_followed_in_short_time() -> None:
    """Each of its rounds doubles the ways on which a result can have come, as in the chunks of
    linear attention.
    """

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.outer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            for _ in range(40):
                first, second = y.chunk(2, -1)
                y = torch.cat([first + second, first - second], -1) / 2**0.5
            return x + self.outer(y)

    sites = jacdiag.sites(nn.Sequential(Mixer(), Mixer()), torch.randn(2, 5, 8))
    assert len(sites) == 2
    uses = uses_of(sites)
    assert uses["0.outer.weight"].role == "W_2"
    assert uses["0.inner.weight"].role == "W_1"
