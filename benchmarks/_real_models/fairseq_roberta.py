"""RoBERTa with the parameter names of fairseq 0.9, which the package of Sapiens needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PADDING = 1  # id of <pad> in every fairseq dictionary


class SelfAttention(nn.Module):
    """Multi-head attention with four separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        split = (*hidden.shape[:2], self.heads, -1)
        query = self.q_proj(hidden).view(split).transpose(1, 2)
        key = self.k_proj(hidden).view(split).transpose(1, 2)
        value = self.v_proj(hidden).view(split).transpose(1, 2)

        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        mixed = scores.softmax(dim=-1) @ value
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Post-norm layer: attention and feed-forward."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Return the output of the feed-forward sub-layer before the addition."""
        return self.fc2(F.gelu(self.fc1(hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.self_attn_layer_norm(hidden + self.self_attn(hidden))
        return self.final_layer_norm(hidden + self.feed_forward(hidden))


class SentenceEncoder(nn.Module):
    """Embeddings and layers."""

    def __init__(
        self, vocabulary: int, positions: int, layers: int, width: int, inner: int, heads: int
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width, padding_idx=PADDING)
        self.embed_positions = nn.Embedding(positions, width, padding_idx=PADDING)
        self.layers = nn.ModuleList(Layer(width, inner, heads) for _ in range(layers))
        self.emb_layer_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        # fairseq counts positions from padding_idx + 1.
        positions = torch.arange(ids.shape[1], device=ids.device) + PADDING + 1
        hidden = self.embed_tokens(ids) + self.embed_positions(positions)
        hidden = self.emb_layer_norm(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Head(nn.Module):
    """Masked-language-model head."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocabulary, width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.layer_norm(F.gelu(self.dense(hidden)))
        return F.linear(hidden, self.weight, self.bias)


class Decoder(nn.Module):
    """Encoder and head, under the name that fairseq gives them."""

    def __init__(
        self, vocabulary: int, positions: int, layers: int, width: int, inner: int, heads: int
    ) -> None:
        super().__init__()
        self.sentence_encoder = SentenceEncoder(vocabulary, positions, layers, width, inner, heads)
        self.lm_head = Head(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.sentence_encoder(ids))


class Roberta(nn.Module):
    """fairseq's RobertaModel."""

    def __init__(
        self, vocabulary: int, positions: int, layers: int, width: int, inner: int, heads: int
    ) -> None:
        super().__init__()
        self.decoder = Decoder(vocabulary, positions, layers, width, inner, heads)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(ids)


def build_heavy() -> nn.Module:
    """Build Sapiens for heavy chains: `args` of its checkpoint holds these sizes."""
    return Roberta(vocabulary=25, positions=146, layers=4, width=128, inner=256, heads=8)


def build_light() -> nn.Module:
    """Build Sapiens for light chains, whose sequences are shorter."""
    return Roberta(vocabulary=25, positions=130, layers=4, width=128, inner=256, heads=8)
