"""A small GPT whose stability can be spoilt: placement of the norm, the paper's recipes, and sizes
as factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PLACEMENTS = ("pre", "post", "sandwich", "reordered", "none")
RECIPES = ("vanilla", "xavier", "embed-detach", "embed-ln", "scaled-embed")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a model is made of.

    Attributes:
        placement: of the norms, see `jacdiag`; a norm behind the last layer where the stream has
            none of its own.
        recipe: of the paper: what is done to the embedding, and how matrices are drawn.
        embed_std: factor on the std of the embedding's draw.
        branch_std: factor on the std of the matrices of the sub-layers.
    """

    layers: int = 6
    width: int = 64
    heads: int = 4
    length: int = 64
    vocabulary: int = 256
    placement: str = "pre"
    recipe: str = "vanilla"
    embed_std: float = 1.0
    branch_std: float = 1.0

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS or self.recipe not in RECIPES:
            raise ValueError(f"unknown placement or recipe: {self.placement}, {self.recipe}")


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(d, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, t, d))
        return out


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.inner = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.out = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.gelu(self.inner(x)))
        return out


class SubLayer(nn.Module):
    """x + f(x) with its norms where the placement wants them."""

    def __init__(self, core: nn.Module, shape: Shape) -> None:
        super().__init__()
        self.core, self.placement = core, shape.placement
        first = shape.placement in ("pre", "sandwich")
        last = shape.placement in ("sandwich", "reordered", "post")
        self.norm_in = nn.LayerNorm(shape.width) if first else nn.Identity()
        self.norm_out = nn.LayerNorm(shape.width) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.core(self.norm_in(x))
        made: Tensor = self.norm_out(x + y) if self.placement == "post" else x + self.norm_out(y)
        return made


class Model(nn.Module):
    """Embedding, sub-layers, norm, head; the head is its own matrix.

    Example:
        >>> shape = Shape(layers=1, width=16, heads=2, length=8)
        >>> Model(shape)(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 256])
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.norm_embedding = (
            nn.LayerNorm(shape.width) if shape.recipe == "embed-ln" else nn.Identity()
        )
        cores = [kind(shape) for _ in range(shape.layers) for kind in (Attention, FeedForward)]
        self.sublayers = nn.ModuleList([SubLayer(core, shape) for core in cores])
        self.norm = nn.Identity() if shape.placement == "post" else nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """The paper's: s = sqrt(2 / (5 d)), W_O and W_2 by sqrt(2 N); Xavier without depth scaling
        for `xavier`.
        """
        shape = self.shape
        s = math.sqrt(2 / (5 * shape.width))
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            std = s
            if name.startswith("sublayers."):
                if shape.recipe == "xavier":
                    rows = weight.shape[0] // (3 if name.endswith("qkv.weight") else 1)
                    std = math.sqrt(2 / (rows + weight.shape[1]))
                elif name.endswith("out.weight"):
                    std = s / math.sqrt(2 * shape.layers)
                std *= shape.branch_std
            elif name == "embedding.weight":
                std = s * shape.embed_std
            weight.normal_(0.0, std)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or the mean cross entropy where targets are given."""
        x = self.embedding(ids)
        if self.shape.recipe == "scaled-embed":
            x = x * math.sqrt(self.shape.width)
        x = self.norm_embedding(x + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        if self.shape.recipe == "embed-detach":
            x = 0.1 * x + 0.9 * x.detach()
        for sublayer in self.sublayers:
            x = sublayer(x)
        logits: Tensor = self.head(self.norm(x))
        return (
            logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        )


def smoke() -> Model:
    """Return an untrained model of the grid `smoke`, for `jacdiag audit` and `jacdiag gate`."""
    shape = Shape(layers=2, width=16, heads=2, length=16, placement="none")
    return Model(shape)
