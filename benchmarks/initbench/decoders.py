"""Decoders: a GPT, a Llama with its variants, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Return multi-head attention of (batch, length, width) projections."""
    mixed = F.scaled_dot_product_attention(
        split_heads(query, heads),
        split_heads(key, heads),
        split_heads(value, heads),
        is_causal=causal,
        scale=scale,
    )
    return mixed.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return (batch, heads, length, head width)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


# -- GPT ----------
class GPTAttention(nn.Module):
    """Attention with one fused projection."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*self.c_attn(x).chunk(3, dim=-1), self.heads))


class GPTFeedForward(nn.Module):
    """Feed-forward network with GELU, four times as wide inside."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class GPTBlock(nn.Module):
    """Pre-norm block, sequential or parallel."""

    def __init__(self, width: int, heads: int, bias: bool, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = GPTAttention(width, heads, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = GPTFeedForward(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT with learned positions. Weights keep the defaults of torch.

    Args:
        layers, width, heads, vocabulary, length: sizes.
        tied: whether the head shares the embedding's weight.
        bias: whether linear layers and norms have biases.
        parallel: whether attention and feed-forward network read the same stream.
        embedding_norm: whether a norm follows the embedding.
        model_type: the family that the model's config names, if it has a config.
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        vocabulary: int = 256,
        length: int = 32,
        tied: bool = True,
        bias: bool = True,
        parallel: bool = False,
        embedding_norm: bool = False,
        model_type: str | None = None,
    ) -> None:
        super().__init__()
        if model_type is not None:
            self.config = config_of(model_type, layers, width, heads, vocabulary)
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(length, width)
        self.ln_e = nn.LayerNorm(width) if embedding_norm else nn.Identity()
        self.h = nn.ModuleList(GPTBlock(width, heads, bias, parallel) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=bias)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.ln_e(self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]])
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def config_of(
    model_type: str, layers: int, width: int, heads: int, vocabulary: int, **more: Any
) -> SimpleNamespace:
    """Return a config as models of transformers have it."""
    return SimpleNamespace(
        model_type=model_type,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        initializer_range=0.02,
        **more,
    )


# -- Llama ----------
class RMSNorm(nn.Module):
    """Root-mean-square norm. Its gain is `weight`, or `1 + weight` if it is centred at one."""

    def __init__(self, width: int, *, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.zeros(width) if centred else torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + self.weight if self.centred else self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain


class ScaleNorm(nn.Module):
    """One learned length for every vector: g x / |x|."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.full((1,), width**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.g * F.normalize(x, dim=-1)


class Rotary(nn.Module):
    """Rotary positions from a buffer of inverse frequencies."""

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        powers = torch.arange(0, head_width, 2).float() / head_width
        self.register_buffer("inv_freq", 10000.0**-powers, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2]).float(), self.inv_freq)
        first, second = x.chunk(2, dim=-1)
        rotated = (
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        )
        return torch.cat(rotated, dim=-1)


class LlamaAttention(nn.Module):
    """Attention with separate projections and rotary positions."""

    def __init__(
        self, width: int, heads: int, *, bias: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        query = rotary(self.q_norm(split_heads(self.q_proj(x), self.heads)))
        key = rotary(self.k_norm(split_heads(self.k_proj(x), self.heads)))
        value = split_heads(self.v_proj(x), self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """Pre-norm block. A factor on the norms' outputs can be kept in a buffer."""

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        scale: float | None,
    ) -> None:
        super().__init__()
        self.input_layernorm = norm()
        self.self_attn = attention
        self.post_attention_layernorm = norm()
        self.mlp = feed_forward
        if scale is not None:
            self.register_buffer("ln_scale", torch.tensor(scale))

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        scale = getattr(self, "ln_scale", 1.0)
        x = x + self.self_attn(scale * self.input_layernorm(x), rotary)
        return x + self.mlp(scale * self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama-like decoder. Weights keep the defaults of torch.

    Args:
        layers, width, heads, hidden, vocabulary: sizes.
        tied: whether the head shares the embedding's weight.
        centred: whether the gain of a norm is one plus its weight.
        bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normed.
        feed_forward: builds the feed-forward network of a layer.
        norm: builds a norm.
        embedding_scale: factor on the embedding.
        scaled_norms: whether the norms of layer l are multiplied by 1/sqrt(l + 1).
        model_type: the family that the model's config names, if it has a config.
        config: further entries of the config.
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        hidden: int = 176,
        vocabulary: int = 256,
        tied: bool = False,
        centred: bool = False,
        bias: bool = False,
        qk_norm: bool = False,
        feed_forward: Callable[[], nn.Module] | None = None,
        norm: Callable[[], nn.Module] | None = None,
        embedding_scale: float = 1.0,
        scaled_norms: bool = False,
        model_type: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if model_type is not None:
            self.config = config_of(model_type, layers, width, heads, vocabulary, **(config or {}))
        build_norm = norm or (lambda: RMSNorm(width, centred=centred))
        build_feed_forward = feed_forward or (lambda: SwiGLU(width, hidden))
        self.embedding_scale = embedding_scale
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.rotary = Rotary(width // heads)
        self.layers = nn.ModuleList(
            LlamaBlock(
                LlamaAttention(width, heads, bias=bias, qk_norm=qk_norm),
                build_feed_forward(),
                build_norm,
                (index + 1) ** -0.5 if scaled_norms else None,
            )
            for index in range(layers)
        )
        self.norm = build_norm()
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding_scale * self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, self.rotary)
        return self.lm_head(self.norm(x))


# -- mixtures of experts ----------
def route(logits: Tensor, count: int) -> Tensor:
    """Return the weight of every expert for every token; all but the `count` largest are zero."""
    probabilities = logits.softmax(-1)
    values, chosen = probabilities.topk(count, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, chosen, values)


class MixtureOfExperts(nn.Module):
    """Two experts per token, each a module of its own."""

    def __init__(
        self, width: int = 64, hidden: int = 96, experts: int = 4, router_bias: bool = False
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=router_bias)
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = route(self.gate(x), 2)
        outputs = [
            weights[..., index : index + 1] * expert(x) for index, expert in enumerate(self.experts)
        ]
        return torch.stack(outputs).sum(0)


class GroupedExperts(nn.Module):
    """Two experts per token, whose matrices are slices of two three-dimensional parameters."""

    def __init__(self, width: int = 64, hidden: int = 96, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.weight1 = nn.Parameter(torch.zeros(experts, hidden, width))
        self.weight2 = nn.Parameter(torch.zeros(experts, width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        weights = route(self.gate(x), 2)
        inner = F.gelu(torch.einsum("btd,ehd->bteh", x, self.weight1))
        return torch.einsum("bteh,edh,bte->btd", inner, self.weight2, weights)
