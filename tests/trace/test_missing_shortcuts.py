"""Parts of a layer without the shortcut that other layers have: found, and not found where there
is a way around.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacdiag
from jacdiag.sources import gpt
from jacdiag.trace import Sites

SIZES = {"n_layer": 4, "n_embd": 32, "n_head": 2, "vocab_size": 64, "block_size": 16}
WIDTH = 16


def parts(sites: Sites) -> list[tuple[str, str]]:
    return [(missing.part, missing.like) for missing in sites.missing_shortcuts]


def without(layer: int, part: str) -> gpt.GPT:
    """Return a GPT, one part of which has no shortcut."""
    model = gpt.build("scaled-embed", **SIZES)
    block = model.transformer.h[layer]

    class Cut(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            attended = self.attn(self.ln_1(x))
            x = attended if part == "attn" else x + attended
            made: Tensor = self.mlp(self.ln_2(x))
            return made if part == "mlp" else x + made

    block.__class__ = Cut
    return model


@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_part_without_a_shortcut_is_found_in_any_layer(layer: int, part: str) -> None:
    sites = jacdiag.sites(without(layer, part), torch.arange(16)[None])
    name = f"transformer.h.{layer}.{part}"
    other = 1 if layer == 0 else 0
    assert parts(sites) == [(name, f"transformer.h.{other}.{part}")]
    assert name not in [site.name for site in sites]

    # Its weights are in no place.
    weights = set(sites.missing_shortcuts[0].parameters)
    assert weights == {key for key in sites.skeleton.params if key.startswith(name)}
    assert weights.isdisjoint(sites.coverage.covered())
    assert weights <= sites.coverage.uncovered.keys()


def test_a_layer_without_any_shortcut_has_two_parts() -> None:
    model = without(2, "attn")
    block = model.transformer.h[2]

    class Plain(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.mlp(self.ln_2(self.attn(self.ln_1(x))))
            return made

    block.__class__ = Plain
    sites = jacdiag.sites(model, torch.arange(16)[None])
    names = [name for name, _ in parts(sites)]
    assert names == ["transformer.h.2.attn", "transformer.h.2.mlp"]

    # Each is compared with its own like.
    report = jacdiag.audit(model, torch.arange(16)[None], state="init", decide=True)
    (finding,) = [finding for finding in report.findings if finding.code == "JD410"]
    assert finding.what == (
        "no shortcut leads around transformer.h.2.attn, transformer.h.2.mlp, as one does around "
        "transformer.h.0.attn, transformer.h.0.mlp"
    )


@pytest.mark.parametrize("recipe", ["vanilla", "embed-detach"])
def test_a_model_with_all_shortcuts_has_none(recipe: str) -> None:
    model = gpt.build(recipe, **SIZES)
    assert not parts(jacdiag.sites(model, torch.arange(16)[None]))


# -- layers of one matrix, combined in any way -----------------------------------------------------
class Stack(nn.Module):
    """Layers with four matrices of attention and a norm, which a method combines."""

    def __init__(self, first: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(WIDTH),
                    **{name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "qkvo"},
                }
            )
            for _ in range(3)
        )
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 8)

    def mixed(self, layer: Any, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(layer["q"](x), layer["k"](x), layer["v"](x))
        made: Tensor = layer["o"](mixed)
        return made

    def combine(self, k: int, layer: Any, x: Tensor) -> Tensor:
        return x + self.mixed(layer, layer["norm"](x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for k, layer in enumerate(self.layers):
            x = self.combine(k, layer, x)
        return self.head(x)


class PreNorm(Stack):
    def combine(self, k: int, layer: Any, x: Tensor) -> Tensor:
        made = self.mixed(layer, layer["norm"](x))
        return made if k == 1 else x + made


class PostNorm(Stack):
    def combine(self, k: int, layer: Any, x: Tensor) -> Tensor:
        made = self.mixed(layer, x)
        return layer["norm"](made if k == 1 else x + made)


class ByHand(Stack):
    """The norm is written out: its mean is subtracted from what it reads."""

    def combine(self, k: int, layer: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        made = self.mixed(layer, centred * centred.square().mean(-1, keepdim=True).rsqrt())
        return made if k == 1 else x + made


@pytest.mark.parametrize("cls", [PreNorm, PostNorm, ByHand])
def test_matrices_that_stand_side_by_side_are_one_part(cls: type[Stack]) -> None:
    sites = jacdiag.sites(cls(), torch.arange(16)[None])
    assert parts(sites) == [("layers.1", "layers.0")]
    assert len(sites.missing_shortcuts[0].parameters) == 4


class Gated(Stack):
    def combine(self, k: int, layer: Any, x: Tensor) -> Tensor:
        made = self.mixed(layer, layer["norm"](x))
        return self.gate(x).sigmoid() * made if k == 1 else x + made


class Joined(Stack):
    def combine(self, k: int, layer: Any, x: Tensor) -> Tensor:
        made = self.mixed(layer, layer["norm"](x))
        if k != 1:
            return x + made
        return torch.cat([x[..., :8], made[..., 8:]], -1)


class Projected(Stack):
    """A shortcut that passes a matrix, as between stages of a convolutional network."""

    def combine(self, k: int, layer: Any, x: Tensor) -> Tensor:
        made = self.mixed(layer, layer["norm"](x))
        return self.gate(x) + made if k == 1 else x + made


@pytest.mark.parametrize("cls", [Stack, Gated, Joined, Projected])
def test_any_way_around_is_enough(cls: type[Stack]) -> None:
    assert not parts(jacdiag.sites(cls(), torch.arange(16)[None]))


class Ends(nn.Module):
    """A list of matrices, of which the first reads the input and the last makes the output."""

    def __init__(self, missing: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.missing = missing

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            made = layer(x).relu()
            is_plain = k in (0, self.missing, len(self.layers) - 1)
            x = made if is_plain else x + made
        return x


def test_the_ends_of_a_model_need_no_shortcut() -> None:
    x = torch.randn(2, WIDTH)
    assert not parts(jacdiag.sites(Ends(), x))
    assert parts(jacdiag.sites(Ends(missing=3), x)) == [("layers.3", "layers.1")]


class Stage(nn.Module):
    """A block of two convolutions; without a sum where it changes the width."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.has_sum = before == after

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x).relu())
        return x + made if self.has_sum else made


def test_a_part_of_which_only_some_weights_are_the_same_may_be_meant() -> None:
    widths = [(8, 8), (8, 16), (16, 16), (16, 16)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(Stage(*pair) for pair in widths))
    model.append(nn.Conv2d(16, 4, 1))
    sites = jacdiag.sites(model, torch.randn(1, 3, 8, 8))
    assert len(sites) == 3 and not parts(sites)
