"""The small reference GPT for checkpoints in nanoGPT's layout, and the recipes of the paper.

Parameter names and shapes are nanoGPT's (`transformer.wte`, `transformer.h.0.attn.c_attn`, ...).
Unlike nanoGPT, the logits of every position are returned, so that a language-model loss can be
differentiated without targets at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jacdiag.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes, under nanoGPT's names, and what the recipes do to the embedding.

    Attributes:
        block_size: longest sequence.
        embed_scale: factor on the token embedding (scaled-embed: sqrt(n_embd)).
        embed_norm: a LayerNorm on the embedding (embed-ln, BLOOM).
        embed_grad: g in x <- g x + (1 - g) stopgrad(x) (embed-detach, GLM-130B); 1 leaves x alone.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    embed_scale: float = 1.0
    embed_norm: bool = False
    embed_grad: float = 1.0

    def __post_init__(self) -> None:
        sizes = (self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        if min(sizes) < 1:
            raise UsageError("a GPT needs sizes of at least 1", got=str(self))
        # The heads share the width.
        if self.n_embd % self.n_head:
            raise UsageError(
                "n_embd must be a multiple of n_head",
                got=f"n_embd {self.n_embd}, n_head {self.n_head}",
            )


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the attention adds to the stream, (B, T, d)."""
        # 1. Queries, keys and values of every head, (B, heads, T, d / heads).
        B, T, d = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(d, dim=2)
        )

        # 2. Attend, and join the heads.
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, d)))


class MLP(nn.Module):
    """The feed-forward network, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the feed-forward network adds to the stream, (B, T, d)."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after the block, (B, T, d)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT in nanoGPT's layout, with tied embedding and head.

    Args:
        config: sizes. Weights are N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), as
            in GPT-2.

    Example:
        >>> import torch
        >>> model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=4))
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 16])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # 1. The parts, in nanoGPT's order.
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.dropout),
        }
        if config.embed_norm:
            parts["ln_e"] = nn.LayerNorm(config.n_embd, bias=config.bias)
        parts["h"] = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        parts["ln_f"] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(parts)

        # 2. The head is the embedding.
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]
        initialise(self, gpt2_std)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        """Return logits (B, T, vocabulary), or (logits, mean cross entropy) with targets (B, T)."""
        # 1. The embedding, as the recipe changes it.
        parts = self.transformer
        x = parts["wte"](idx)
        if self.config.embed_scale != 1.0:
            x = x * self.config.embed_scale
        x = x + parts["wpe"](torch.arange(idx.shape[1], device=idx.device))
        if self.config.embed_norm:
            x = parts["ln_e"](x)
        if self.config.embed_grad != 1.0:
            x = self.config.embed_grad * x + (1 - self.config.embed_grad) * x.detach()

        # 2. The blocks.
        x = parts["drop"](x)
        for block in parts["h"]:  # type: ignore[attr-defined]
            x = block(x)

        # 3. The head.
        logits = self.lm_head(parts["ln_f"](x))
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


# -- the recipes of the paper (arXiv 2312.16903, sections 3 and 4) ---------------------------------
Std = Callable[[str, Tensor, GPTConfig], float]


def gpt2_std(name: str, _weight: Tensor, config: GPTConfig) -> float:
    """Return GPT-2's own std: 0.02, residual projections divided by sqrt(2N).

    Args:
        name: of the weight.
        config: of the model, with N layers.
    """
    if not _residual(name):
        return 0.02
    # 2N sub-layers add up in the residual stream
    return 0.02 / math.sqrt(2 * config.n_layer)


def vanilla_std(name: str, _weight: Tensor, config: GPTConfig) -> float:
    """Return s = sqrt(2 / (5 d)) (Nguyen & Salazar 2019); W_2 and W_O / sqrt(2N) (Shoeybi 2020).

    Args:
        name: of the weight.
        config: of the model, with width d and N layers.
    """
    s = math.sqrt(2 / (5 * config.n_embd))
    if _residual(name):
        return s / math.sqrt(2 * config.n_layer)
    return s


def xavier_std(name: str, weight: Tensor, config: GPTConfig) -> float:
    """Return Xavier's std for every matrix of a sub-layer; the embedding stays at s.

    There is no depth scaling.

    Args:
        name: of the weight.
        weight: (fan out, fan in).
        config: of the model.
    """
    if ".h." not in name:
        return vanilla_std(name, weight, config)

    fan_out, fan_in = weight.shape
    # three matrices in one
    if name.endswith("c_attn.weight"):
        fan_out //= 3
    return math.sqrt(2 / (fan_in + fan_out))


def _residual(name: str) -> bool:
    """Return whether a weight writes into the residual stream."""
    return name.endswith("c_proj.weight")


@dataclass(frozen=True)
class Recipe:
    """An initialisation: the std of every matrix, and what happens to the embedding."""

    std: Std
    change: Callable[[GPTConfig], Mapping[str, Any]] = lambda _config: {}


RECIPES: dict[str, Recipe] = {
    "vanilla": Recipe(vanilla_std),
    "xavier": Recipe(xavier_std),
    "embed-detach": Recipe(vanilla_std, lambda _config: {"embed_grad": 0.1}),
    "embed-ln": Recipe(vanilla_std, lambda _config: {"embed_norm": True}),
    "scaled-embed": Recipe(vanilla_std, lambda config: {"embed_scale": math.sqrt(config.n_embd)}),
    "gpt2": Recipe(gpt2_std),
}


def build(recipe: str = "gpt2", **sizes: Any) -> GPT:
    """Build a GPT by recipe, randomly initialised from torch's global generator.

    Args:
        recipe: vanilla, xavier, embed-detach, embed-ln, scaled-embed or gpt2.
        sizes: fields of `GPTConfig`.

    Returns:
        The model, in training mode.

    Raises:
        UsageError: unknown recipe or size.

    Example:
        >>> sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 8, "block_size": 4}
        >>> build("scaled-embed", **sizes).config.embed_scale
        4.0
    """
    if recipe not in RECIPES:
        raise UsageError("unknown recipe", got=recipe, hint=f"one of {', '.join(RECIPES)}")
    config = config_of(sizes)
    model = GPT(replace(config, **RECIPES[recipe].change(config)))
    initialise(model, RECIPES[recipe].std)
    return model


def config_of(sizes: Mapping[str, Any]) -> GPTConfig:
    """Return the config of nanoGPT's `model_args`.

    Args:
        sizes: by nanoGPT's names.

    Raises:
        UsageError: a key that it does not know.
    """
    known = {f.name for f in fields(GPTConfig)}
    unknown = sorted(sizes.keys() - known)
    if unknown:
        raise UsageError(
            "unknown size of the reference GPT",
            got=", ".join(unknown),
            hint=f"it knows {', '.join(sorted(known))}",
        )
    return GPTConfig(**sizes)


@torch.no_grad()
def initialise(model: GPT, std: Std) -> None:
    """Draw every matrix from N(0, std^2); gains become 1, biases 0."""
    for name, p in model.named_parameters():
        # matrices and embeddings
        if p.dim() >= 2:
            p.normal_(0.0, std(name, p, model.config))
        elif name.endswith("bias"):
            p.zero_()
        else:
            p.fill_(1.0)
