"""Published initialisations, each written onto a small decoder in our own code: none of them is a
fault.

A recipe gives the std of every role. A fused matrix is drawn part by part unless the recipe says
otherwise, so that its queries, keys and values may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH = 256, 24


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a decoder looks like.

    Attributes:
        layers, width, heads, hidden: Sizes.
        post_norm: Norm after the sum instead of before the branch.
        fused: Q, K and V in one matrix.
        interleaved: In the fused matrix every head has its own queries, keys and values.
        key_heads: Heads of keys and values; fewer than `heads` share them.
        gated: SwiGLU; `fused_gate` keeps gate and up in one matrix, `gate_last` with the gate
            second.
        parallel: Attention and FFN read one norm, in one sum.
        joined: One matrix makes queries, keys, values and the FFN's hidden features.
        tied: The head reads the embedding.
        positions: "" for none, "table" for a learned one, "free" for a parameter that is added,
            "sines".
        token: A class token stands before the sequence.
        scale: Factor on each branch that is learned: its first value; None for no such factor.
        modulated: Shift, scale and gate of each branch come from a condition (adaLN). "once" by one
            matrix per layer, "each" by one per branch.
        alpha: Factor on the shortcut (DeepNorm).
    """

    layers: int = 6
    width: int = 64
    heads: int = 4
    hidden: int = 192
    post_norm: bool = False
    fused: bool = False
    interleaved: bool = False
    key_heads: int = 4
    gated: bool = False
    fused_gate: bool = False
    gate_last: bool = False
    parallel: bool = False
    joined: bool = False
    tied: bool = False
    positions: str = ""
    token: bool = False
    scale: float | None = None
    modulated: str = ""
    alpha: float = 1.0


class Block(nn.Module):
    """One layer: attention and FFN."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, hidden = shape.width, shape.hidden
        keys = width // shape.heads * shape.key_heads
        if shape.joined:
            self.qkv_up = nn.Linear(width, width + 2 * keys + hidden, bias=False)
        elif shape.fused:
            self.qkv = nn.Linear(width, width + 2 * keys, bias=False)
        else:
            self.q = nn.Linear(width, width, bias=False)
            self.k = nn.Linear(width, keys, bias=False)
            self.v = nn.Linear(width, keys, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        if shape.fused_gate:
            self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        elif not shape.joined:
            self.up = nn.Linear(width, hidden, bias=False)
            if shape.gated:
                self.gate = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        if shape.scale is not None:
            self.scale1 = nn.Parameter(torch.full((width,), shape.scale))
            self.scale2 = nn.Parameter(torch.full((width,), shape.scale))
        if shape.modulated == "once":
            self.modulation = nn.Linear(width, 6 * width)
        elif shape.modulated:
            self.modulation = nn.Linear(width, 3 * width)
            self.modulation2 = nn.Linear(width, 3 * width)

    def attend(self, x: Tensor) -> Tensor:
        heads, groups = self.shape.heads, self.shape.key_heads
        size = x.shape[-1] // heads
        batch, length, width = x.shape
        if not self.shape.fused:
            q, k, v = self.q(x), self.k(x), self.v(x)
        elif self.shape.interleaved:
            rows = self.qkv(x).view(batch, length, groups, heads // groups + 2, size)
            q, k, v = rows[..., :-2, :].flatten(2), rows[..., -2, :], rows[..., -1, :]
            k, v = k.flatten(2), v.flatten(2)
        else:
            q, k, v = self.qkv(x).split([width, groups * size, groups * size], dim=-1)
        return self.mix(q, k, v)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the heads mix, through W_O."""
        batch, length, width = q.shape
        heads, groups = self.shape.heads, self.shape.key_heads
        size = width // heads
        q = q.reshape(batch, length, heads, size).transpose(1, 2)
        k = k.reshape(batch, length, groups, size).transpose(1, 2)
        v = v.reshape(batch, length, groups, size).transpose(1, 2)
        k = k.repeat_interleave(heads // groups, dim=1)
        v = v.repeat_interleave(heads // groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(batch, length, width))

    def feed(self, x: Tensor) -> Tensor:
        if self.shape.fused_gate:
            first, second = self.gate_up(x).chunk(2, dim=-1)
            gate, up = (second, first) if self.shape.gate_last else (first, second)
            return self.down(F.silu(gate) * up)
        if self.shape.gated:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shape = self.shape
        if shape.modulated:
            condition = F.silu(condition)
            if shape.modulated == "once":
                first, second = self.modulation(condition).chunk(2, dim=-1)
            else:
                first, second = self.modulation(condition), self.modulation2(condition)
            shift, scale, gate = first.chunk(3, dim=-1)
            x = x + gate * self.attend(self.norm1(x) * (1 + scale) + shift)
            shift, scale, gate = second.chunk(3, dim=-1)
            return x + gate * self.feed(self.norm2(x) * (1 + scale) + shift)
        if shape.joined:
            width = shape.width
            keys = width // shape.heads * shape.key_heads
            q, k, v, hidden = self.qkv_up(self.norm1(x)).split(
                [width, keys, keys, shape.hidden], dim=-1
            )
            return x + self.mix(q, k, v) + self.down(F.gelu(hidden))
        if shape.post_norm:
            x = self.norm1(shape.alpha * x + self.attend(x))
            return self.norm2(shape.alpha * x + self.feed(x))
        if shape.parallel:
            z = self.norm1(x)
            return x + self.attend(z) + self.feed(z)
        first, second = self.attend(self.norm1(x)), None
        x = x + (first if shape.scale is None else self.scale1 * first)
        second = self.feed(self.norm2(x))
        return x + (second if shape.scale is None else self.scale2 * second)


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        if shape.positions == "table":
            self.positions = nn.Embedding(2 * LENGTH, shape.width)
        elif shape.positions:
            values = torch.zeros(2 * LENGTH, shape.width)
            if shape.positions == "sines":
                values = sines(2 * LENGTH, shape.width)
            self.positions = nn.Parameter(values)
        if shape.token:
            self.token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.shape.token:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        if self.shape.positions == "table":
            x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        elif self.shape.positions:
            x = x + self.positions[: x.shape[1]]
        condition = x.mean(dim=1, keepdim=True)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x))


def sines(length: int, width: int) -> Tensor:
    """Return a table of positions made of sines and cosines."""
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# -- the rule of an init ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """Where a matrix, or a part of a fused one, stands.

    Attributes:
        role: q, k, v, o, gate, up, down, embedding, positions, token, head or modulation.
        layer: From 0; 0 outside the layers.
        fan_in, fan_out: Of this matrix or part.
        shape: Of the model.
    """

    role: str
    layer: int
    fan_in: int
    fan_out: int
    shape: Shape

    @property
    def writes(self) -> bool:
        """Whether it writes to the shortcut."""
        return self.role in ("o", "down")

    @property
    def inside(self) -> bool:
        return self.role in ("q", "k", "v", "o", "gate", "up", "down")

    @property
    def xavier(self) -> float:
        return math.sqrt(2 / (self.fan_in + self.fan_out))


Rule = Callable[[Place], float | None]  # the std of a place; None leaves the library's default


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published init.

    Attributes:
        source: Where it is published.
        std: The rule.
        shape: The model that it is written onto.
        draw: "normal", "uniform" or "truncated" (at two std of the normal before the cut).
        whole: Fused matrices are drawn whole, fan_out counting all rows.
    """

    source: str
    std: Rule
    shape: Shape
    draw: str = "normal"
    whole: bool = False


@torch.no_grad()
def build(recipe: Recipe, seed: int = 0) -> Decoder:
    """Build the model of a recipe; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(recipe.shape)
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and not (
                name == "positions" and recipe.shape.positions == "sines"
            ):
                initialise(recipe, name, weight)
    return model.eval()


def initialise(recipe: Recipe, name: str, weight: Tensor) -> None:
    """Draw one parameter by the rule of its place."""
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "blocks" else 0
    role = parts[2] if parts[0] == "blocks" else parts[0]
    for part, rows in split(recipe, role, weight):
        fan_out = rows.numel() // weight.shape[-1]
        place = Place(part, layer, weight.shape[-1], fan_out, recipe.shape)
        std = recipe.std(place)
        if std is not None:
            fill(rows, std, recipe.draw)


def split(recipe: Recipe, role: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """Return the parts of a matrix that are drawn for themselves, as views of it."""
    shape = recipe.shape
    if recipe.whole or role not in ("qkv", "gate_up", "qkv_up"):
        return [({"qkv": "q", "gate_up": "up", "qkv_up": "q"}.get(role, role), weight)]
    if role == "qkv_up":
        keys = shape.width // shape.heads * shape.key_heads
        sizes = [shape.width, keys, keys, shape.hidden]
        return list(zip(("q", "k", "v", "up"), weight.split(sizes), strict=True))
    if role == "gate_up":
        roles = ("up", "gate") if shape.gate_last else ("gate", "up")
        return list(zip(roles, weight.chunk(2), strict=True))
    size = shape.width // shape.heads
    if not shape.interleaved:
        keys = shape.key_heads * size
        return list(zip("qkv", weight.split([shape.width, keys, keys]), strict=True))
    groups = weight.view(shape.key_heads, shape.heads // shape.key_heads + 2, size, -1)
    return [("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])]


def fill(rows: Tensor, std: float, draw: str) -> None:
    """Draw values in place."""
    if std == 0:
        rows.zero_()
    elif draw == "uniform":
        rows.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)
    elif draw == "truncated":
        nn.init.trunc_normal_(rows, std=std, a=-2 * std, b=2 * std)
    else:
        rows.normal_(0.0, std)


# -- the rules -------------------------------------------------------------------------------------
def gpt2(place: Place, s: float = 0.02) -> float:
    return s / math.sqrt(2 * place.shape.layers) if place.writes else s


def plain(place: Place) -> float:
    return 0.02


def zero_outputs(place: Place) -> float | None:
    """W_O and W_2 zero, the others uniform with std 1/sqrt(d), embedding N(0, 1), a tiny head."""
    outer = {"embedding": 1.0, "head": 0.001}
    if not place.inside:
        return outer.get(place.role)
    return 0.0 if place.writes else place.shape.width**-0.5


def only_zero(*roles: str) -> Rule:
    """GPT-2's plain 0.02 with some roles zero in all layers."""
    return lambda place: 0.0 if place.role in roles else 0.02


def zero_on_default(*roles: str) -> Rule:
    return lambda place: 0.0 if place.role in roles else None


def adaln_zero(place: Place) -> float:
    """Xavier, the modulation and the head zero."""
    if place.role in ("modulation", "modulation2", "head"):
        return 0.0
    return place.xavier if place.inside else 0.02


def default(place: Place) -> None:
    return None


def deepnorm(place: Place) -> float | None:
    if not place.inside:
        return None
    beta = (8 * place.shape.layers) ** -0.25
    return place.xavier * (1.0 if place.role in ("q", "k") else beta)


def t_fixup(place: Place) -> float | None:
    factor = (9 * place.shape.layers) ** -0.25
    if place.role == "embedding":
        return factor * place.shape.width**-0.5
    if not place.inside:
        return None
    return place.xavier * (1.0 if place.role in ("q", "k") else factor)


def xavier(place: Place) -> float | None:
    return place.xavier if place.inside else None


def fairseq(place: Place) -> float | None:
    """Xavier matrices, embedding and head d^(-1/2)."""
    return place.xavier if place.inside else place.shape.width**-0.5


def small_init(place: Place) -> float:
    return gpt2(place, math.sqrt(2 / (5 * place.shape.width)))


def neox(place: Place) -> float:
    s = math.sqrt(2 / (5 * place.shape.width))
    return 2 / (place.shape.layers * math.sqrt(place.shape.width)) if place.writes else s


def mitchell(place: Place) -> float:
    if place.writes:
        return 1 / math.sqrt(2 * place.fan_in * (place.layer + 1))
    return place.shape.width**-0.5


def torchtitan(place: Place) -> float:
    outer = {"embedding": 1.0, "head": place.shape.width**-0.5}
    if place.role in ("o", "up", "down"):
        return 0.02 / math.sqrt(2 * (place.layer + 1))
    return outer.get(place.role, 0.02)


def mup(place: Place) -> float:
    """Width-scaled, zero queries and a zero head (Tensor Programs V, appendix D.2)."""
    if place.role in ("q", "head"):
        return 0.0
    return 0.8 / math.sqrt(place.fan_in) if place.inside else 0.8


def mup_plain(place: Place) -> float:
    if place.role == "head":
        return 1 / place.shape.width
    return 1 / math.sqrt(place.fan_in) if place.inside else 1.0


def clip(place: Place) -> float:
    d, n = place.shape.width, place.shape.layers
    stds = {
        "o": d**-0.5 * (2 * n) ** -0.5,
        "down": d**-0.5 * (2 * n) ** -0.5,
        "up": (2 * d) ** -0.5,
        "embedding": 0.02,
        "positions": 0.01,
    }
    return stds.get(place.role, d**-0.5)


def vision(place: Place) -> float:
    """0.02 everywhere, a class token of 1e-6, a zero head (timm)."""
    return {"token": 1e-6, "head": 0.0}.get(place.role, 0.02)


def untied(place: Place) -> float | None:
    return 1.0 if place.role == "embedding" else 0.02


def tiny_embedding(place: Place) -> float | None:
    return 1e-4 if place.role == "embedding" else 0.02


def free_positions(place: Place) -> float:
    """Positions of std 1 beside matrices of 0.02, added as they stand."""
    return 1.0 if place.role in ("positions", "token") else 0.02


def zero_positions(place: Place) -> float:
    return 0.0 if place.role in ("positions", "token") else 0.02


def default_with_positions(place: Place) -> float | None:
    return {"positions": 0.02, "token": 0.02}.get(place.role)


_SMALL = Shape()
_GATED = Shape(gated=True)
RECIPES: dict[str, Recipe] = {
    # Branches that start at zero.
    "nanochat": Recipe(source="karpathy/nanochat", std=zero_outputs, shape=_SMALL, draw="uniform"),
    "modded-nanogpt": Recipe(
        source="KellerJordan/modded-nanogpt", std=zero_on_default("o", "down", "head"), shape=_SMALL
    ),
    "zero W_O only": Recipe(source="zero W_O", std=only_zero("o"), shape=_GATED),
    "zero W_2 only": Recipe(source="zero W_2, as Fixup", std=only_zero("down"), shape=_SMALL),
    "zero outputs, fused": Recipe(
        source="zero outputs", std=only_zero("o", "down"), shape=Shape(fused=True, fused_gate=True)
    ),
    "zero outputs on Xavier": Recipe(
        source="zero outputs", std=lambda p: 0.0 if p.writes else xavier(p), shape=_GATED
    ),
    "ReZero": Recipe(source="Bachlechner et al. 2020", std=xavier, shape=Shape(scale=0.0)),
    "SkipInit on defaults": Recipe(source="De & Smith 2020", std=default, shape=Shape(scale=0.0)),
    "LayerScale": Recipe(
        source="Touvron et al. 2021",
        std=vision,
        shape=Shape(scale=1e-5, positions="free", token=True),
        draw="truncated",
    ),
    "adaLN-zero": Recipe(
        source="Peebles & Xie 2022",
        std=adaln_zero,
        shape=Shape(modulated="once", positions="sines"),
        draw="uniform",
    ),
    "adaLN-zero, one per branch": Recipe(
        source="Peebles & Xie 2022",
        std=adaln_zero,
        shape=Shape(modulated="each", positions="sines"),
        draw="uniform",
    ),
    # Factors on some roles.
    "DeepNorm": Recipe(
        source="Wang et al. 2022", std=deepnorm, shape=Shape(post_norm=True, alpha=12**0.25)
    ),
    "DeepNorm, fused": Recipe(
        source="Wang et al. 2022",
        std=deepnorm,
        shape=Shape(post_norm=True, alpha=12**0.25, fused=True),
    ),
    "DeepNorm, heads interleaved": Recipe(
        source="Wang et al. 2022",
        std=deepnorm,
        shape=Shape(post_norm=True, alpha=12**0.25, fused=True, interleaved=True),
    ),
    "DeepNorm, grouped queries, fused": Recipe(
        source="Wang et al. 2022",
        std=deepnorm,
        shape=Shape(post_norm=True, alpha=12**0.25, fused=True, key_heads=2),
    ),
    "DeepNorm, gated, fused": Recipe(
        source="Wang et al. 2022",
        std=deepnorm,
        shape=Shape(post_norm=True, alpha=12**0.25, fused=True, fused_gate=True),
    ),
    "T-Fixup": Recipe(source="Huang et al. 2020", std=t_fixup, shape=_SMALL),
    "T-Fixup, fused": Recipe(source="Huang et al. 2020", std=t_fixup, shape=Shape(fused=True)),
    # Xavier and its kin.
    "Xavier": Recipe(source="Glorot & Bengio 2010", std=xavier, shape=_SMALL, draw="uniform"),
    "Xavier, fused whole": Recipe(
        source="nn.init.xavier_uniform_ on every matrix",
        std=xavier,
        shape=Shape(fused=True, fused_gate=True),
        draw="uniform",
        whole=True,
    ),
    "Xavier, fused by part": Recipe(
        source="one by one, as fairseq", std=xavier, shape=Shape(fused=True, fused_gate=True)
    ),
    "Xavier, grouped queries, fused by part": Recipe(
        source="one by one", std=xavier, shape=Shape(fused=True, key_heads=2)
    ),
    "fairseq": Recipe(
        source="fairseq TransformerModel", std=fairseq, shape=Shape(positions="sines", tied=True)
    ),
    "Xavier, attention and FFN in one matrix": Recipe(
        source="one by one", std=xavier, shape=Shape(joined=True)
    ),
    "T-Fixup, attention and FFN in one matrix": Recipe(
        source="Huang et al. 2020", std=t_fixup, shape=Shape(joined=True, key_heads=2)
    ),
    "GPT-2, attention and FFN in one matrix": Recipe(
        source="ViT-22B's block", std=gpt2, shape=Shape(joined=True)
    ),
    # Depth.
    "GPT-2": Recipe(
        source="Radford et al. 2019",
        std=gpt2,
        shape=Shape(fused=True, positions="table", tied=True),
    ),
    "GPT-2, gated": Recipe(
        source="Llama by Megatron-LM", std=gpt2, shape=Shape(gated=True, key_heads=2)
    ),
    "GPT-2, gate and up fused": Recipe(
        source="Megatron-LM", std=gpt2, shape=Shape(fused=True, fused_gate=True)
    ),
    "GPT-2, parallel": Recipe(
        source="GPT-J's block", std=gpt2, shape=Shape(fused=True, parallel=True)
    ),
    "small init": Recipe(source="Nguyen & Salazar 2019", std=small_init, shape=_SMALL),
    "GPT-NeoX": Recipe(
        source="small_init and wang_init",
        std=neox,
        shape=Shape(fused=True, interleaved=True, parallel=True),
    ),
    "Mitchell": Recipe(source="OLMo, init_fn mitchell", std=mitchell, shape=_GATED),
    "torchtitan": Recipe(
        source="torchtitan llama3", std=torchtitan, shape=Shape(gated=True, key_heads=2)
    ),
    "torchtitan, gate and up fused": Recipe(
        source="torchtitan's rule on fused matrices", std=torchtitan, shape=Shape(fused_gate=True)
    ),
    "torchtitan, gate second": Recipe(
        source="torchtitan's rule on fused matrices",
        std=torchtitan,
        shape=Shape(fused_gate=True, gate_last=True),
    ),
    # Width.
    "muP": Recipe(source="Yang et al. 2022", std=mup, shape=_SMALL),
    "muP, small head": Recipe(source="Yang et al. 2022", std=mup_plain, shape=_SMALL),
    "CLIP": Recipe(
        source="Radford et al. 2021", std=clip, shape=Shape(fused=True, positions="table")
    ),
    # Defaults, tables and tokens.
    "nn.Linear": Recipe(source="torch", std=default, shape=Shape(fused=True, positions="table")),
    "nn.Linear, positions 0.02": Recipe(
        source="torch, nanoGPT's positions",
        std=default_with_positions,
        shape=Shape(positions="table", token=True),
    ),
    "plain": Recipe(
        source="BERT", std=plain, shape=Shape(positions="table", post_norm=True), draw="truncated"
    ),
    "ViT": Recipe(
        source="timm",
        std=vision,
        shape=Shape(fused=True, positions="free", token=True),
        draw="truncated",
    ),
    "untied embedding N(0, 1)": Recipe(source="nn.Embedding left alone", std=untied, shape=_GATED),
    "untied embedding N(0, 1), depth": Recipe(
        source="nn.Embedding left alone",
        std=lambda p: 1.0 if p.role == "embedding" else gpt2(p),
        shape=_GATED,
    ),
    "tiny embedding": Recipe(source="RWKV", std=tiny_embedding, shape=_SMALL),
    "positions N(0, 1)": Recipe(
        source="vit-pytorch", std=free_positions, shape=Shape(positions="free", token=True)
    ),
    "positions zero": Recipe(
        source="ViT", std=zero_positions, shape=Shape(positions="table", token=True)
    ),
}
