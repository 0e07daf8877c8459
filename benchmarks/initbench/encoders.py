"""Encoders and encoder-decoders: BERT, ViT, T5, post-norm stacks, and torch's own
nn.Transformer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.initbench.decoders import RMSNorm, attend, config_of, split_heads


# -- BERT ----------
class BertLayer(nn.Module):
    """Post-norm layer with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.intermediate = nn.Linear(width, 4 * width)
        self.output = nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = attend(self.query(x), self.key(x), self.value(x), self.heads, causal=False)
        x = self.attention_norm(x + self.attention_output(mixed))
        return self.output_norm(x + self.output(F.gelu(self.intermediate(x))))


class Bert(nn.Module):
    """BERT with a masked-language head whose matrix is tied. Weights keep the defaults of torch.

    Args:
        layers, width, heads, vocabulary, length: sizes.
        padding: the token whose embedding is zero, if there is one.
        shared: whether one layer is applied at every depth, as in ALBERT.
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
        padding: int | None = None,
        shared: bool = False,
        model_type: str | None = None,
    ) -> None:
        super().__init__()
        if model_type is not None:
            self.config = config_of(model_type, layers, width, heads, vocabulary)
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.position_embeddings = nn.Embedding(length, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.repeats = layers if shared else 1
        self.layer = nn.ModuleList(BertLayer(width, heads) for _ in range(1 if shared else layers))
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.weight = self.word_embeddings.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        x = self.embedding_norm(self.word_embeddings(input_ids) + positions)
        for _ in range(self.repeats):
            for layer in self.layer:
                x = layer(x)
        return self.decoder(self.transform_norm(F.gelu(self.transform(x))))


# -- ViT ----------
class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ViTAttention(nn.Module):
    """Attention over patches with one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1), self.heads, causal=False))


class ViTFeedForward(nn.Module):
    """Feed-forward network with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """Pre-norm block, with LayerScale if it has a value."""

    def __init__(self, width: int, heads: int, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = ViTAttention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = ViTFeedForward(width)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer on images of (3, 16, 16). Weights keep the defaults of torch; token and
    positions are zero.
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        classes: int = 32,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads, layer_scale) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


# -- T5 ----------
class T5Attention(nn.Module):
    """Attention without a factor on the logits: the init of the queries carries it."""

    def __init__(self, width: int, heads: int, key_width: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        inner = heads * key_width
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mixed = attend(
            self.q(x), self.k(memory), self.v(memory), self.heads, causal=self.causal, scale=1.0
        )
        return self.o(mixed)


class T5FeedForward(nn.Module):
    """Feed-forward network with ReLU, or gated with GELU."""

    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.wi = nn.Linear(width, hidden, bias=False)
        self.wi_1 = nn.Linear(width, hidden, bias=False) if gated else None
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.wi_1 is None:
            return self.wo(F.relu(self.wi(x)))
        return self.wo(F.gelu(self.wi(x)) * self.wi_1(x))


class T5Block(nn.Module):
    """Pre-norm block; a decoder's block also reads the encoder."""

    def __init__(
        self, width: int, heads: int, key_width: int, hidden: int, gated: bool, decoder: bool
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = T5Attention(width, heads, key_width, causal=decoder)
        if decoder:
            self.cross_norm = RMSNorm(width)
            self.cross = T5Attention(width, heads, key_width, causal=False)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = T5FeedForward(width, hidden, gated)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed)
        if memory is not None:
            x = x + self.cross(self.cross_norm(x), memory)
        return x + self.feed_forward(self.feed_forward_norm(x))


class T5(nn.Module):
    """T5-like encoder-decoder. Weights keep the defaults of torch.

    Args:
        layers, width, heads, key_width, hidden, vocabulary: sizes; `layers` on either side.
        gated: whether the feed-forward network is gated, as in version 1.1.
        tied: whether the head shares the embedding's weight; its output is then divided by
            sqrt(width).
        model_type: the family that the model's config names.
    """

    def __init__(
        self,
        *,
        layers: int = 3,
        width: int = 64,
        heads: int = 4,
        key_width: int = 24,
        hidden: int = 160,
        vocabulary: int = 256,
        gated: bool = False,
        tied: bool = True,
        model_type: str | None = "t5",
    ) -> None:
        super().__init__()
        if model_type is not None:
            self.config: Any = config_of(model_type, layers, width, heads, vocabulary)
            self.config.d_model, self.config.d_kv, self.config.d_ff = width, key_width, hidden
            self.config.initializer_factor = 1.0
            self.config.num_decoder_layers = layers
            self.config.is_encoder_decoder = True
        self.width, self.tied = width, tied
        self.shared = nn.Embedding(vocabulary, width)
        sizes = (width, heads, key_width, hidden, gated)
        self.encoder = nn.ModuleList(T5Block(*sizes, False) for _ in range(layers))
        self.encoder_norm = RMSNorm(width)
        self.decoder = nn.ModuleList(T5Block(*sizes, True) for _ in range(layers))
        self.decoder_norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.shared.weight

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory = self.shared(input_ids)
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoder_norm(memory)
        x = self.shared(decoder_input_ids)
        for block in self.decoder:
            x = block(x, memory)
        x = self.decoder_norm(x)
        return self.lm_head(x * self.width**-0.5 if self.tied else x)


# -- post-norm decoder ----------
class PostNormBlock(nn.Module):
    """norm(alpha x + f(x)), as in DeepNorm; `on_branch` puts the factor on f(x) in place of x."""

    def __init__(self, width: int, heads: int, alpha: float, fused: bool, on_branch: bool) -> None:
        super().__init__()
        self.heads, self.alpha, self.fused, self.on_branch = heads, alpha, fused, on_branch
        if fused:
            self.in_proj = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q_proj = nn.Linear(width, width, bias=False)
            self.k_proj = nn.Linear(width, width, bias=False)
            self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)

    def attention(self, x: Tensor) -> Tensor:
        """Return the output of the attention."""
        if self.fused:
            query, key, value = self.in_proj(x).chunk(3, dim=-1)
        else:
            query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(query, key, value, self.heads))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the sum of stream and branch, one of them times alpha."""
        if self.on_branch:
            return x + self.alpha * branch
        return self.alpha * x + branch

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.add(x, self.attention(x)))
        return self.norm2(self.add(x, self.fc2(F.relu(self.fc1(x)))))


class PostNormDecoder(nn.Module):
    """Post-norm decoder. Weights keep the defaults of torch.

    Args:
        layers, width, heads, vocabulary: sizes.
        alpha: factor on the shortcut.
        fused: whether queries, keys and values share one matrix.
        on_branch: whether alpha multiplies the branch, by mistake.
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        vocabulary: int = 256,
        alpha: float = 1.0,
        fused: bool = False,
        on_branch: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            PostNormBlock(width, heads, alpha, fused, on_branch) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


# -- torch's own ----------
class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a head. Its layers are copies of one, as
    torch builds them.
    """

    def __init__(
        self,
        *,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        vocabulary: int = 256,
        norm_first: bool = True,
        redraw: bool = True,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        final = nn.LayerNorm(width) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, layers, norm=final, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        if redraw:
            redraw_layers(self.encoder)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) * math.sqrt(self.width)
        return self.head(self.encoder(x))


def redraw_layers(module: nn.Module) -> None:
    """Draw every linear layer and attention again, as its own class does."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
        elif isinstance(part, nn.MultiheadAttention):
            part._reset_parameters()


class TorchSeq2Seq(nn.Module):
    """`nn.Transformer` between an embedding and a head."""

    def __init__(
        self, *, layers: int = 3, width: int = 64, heads: int = 4, vocabulary: int = 256
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(
            width, heads, layers, layers, 4 * width, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        scale = math.sqrt(self.width)
        mask = nn.Transformer.generate_square_subsequent_mask(decoder_input_ids.shape[1])
        out = self.transformer(
            self.embedding(input_ids) * scale,
            self.embedding(decoder_input_ids) * scale,
            tgt_mask=mask,
        )
        return self.head(out)


# -- attention pooling ----------
class PooledEncoder(nn.Module):
    """ViT-like encoder of tokens, whose output is a mean weighted by one learned vector."""

    def __init__(
        self, *, layers: int = 4, width: int = 64, heads: int = 4, vocabulary: int = 256
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(ViTBlock(width, heads, None) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.attention_vector = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        weights = (x @ self.attention_vector).softmax(-1)
        return self.head((weights.unsqueeze(-1) * x).sum(1))


class RelativeEncoder(nn.Module):
    """Encoder whose attention adds a learned content bias and position bias to the queries, as
    Transformer-XL does.
    """

    def __init__(
        self, *, layers: int = 4, width: int = 64, heads: int = 4, vocabulary: int = 256
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(RelativeBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class RelativeBlock(nn.Module):
    """Pre-norm block with relative positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.linear_out = nn.Linear(width, width)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = ViTFeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        """Return the output of the attention."""
        length, width = x.shape[1:]
        query = split_heads(self.linear_q(x), self.heads)
        key, value = (
            split_heads(self.linear_k(x), self.heads),
            split_heads(self.linear_v(x), self.heads),
        )
        positions = split_heads(self.linear_pos(sinusoids(length, width)[None]), self.heads)
        content = (query + self.pos_bias_u[:, None]) @ key.mT
        place = (query + self.pos_bias_v[:, None]) @ positions.mT
        weights = ((content + place) / math.sqrt(width // self.heads)).softmax(-1)
        return self.linear_out((weights @ value).transpose(1, 2).flatten(2))


def sinusoids(length: int, width: int) -> Tensor:
    """Return the sine and cosine table of positions, (length, width)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
