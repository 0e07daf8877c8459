"""A small pre-norm decoder and its relatives, written without any code of jacdiag."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY = 16, 2, 40


class Attention(nn.Module):
    """Causal attention; by hand, or by the fused call. It keeps its last queries and keys for
    tests.
    """

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.by_hand = by_hand

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if self.by_hand:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            mixed = F.dropout(scores.softmax(-1), 0.0) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two matrices and a ReLU, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.relu(self.w1(x)))


class Block(nn.Module):
    """Pre-norm block; `after` is called on the stream behind it."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(by_hand), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, layers: int = 3, by_hand: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.h = nn.ModuleList(Block(by_hand) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def between(self, x: Tensor, index: int) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for index, block in enumerate(self.h):
            x = self.between(x, index)
            x = block(x)
        return self.head(self.norm(x))


def decoder(kind: type[Decoder] = Decoder, seed: int = 0, **options: object) -> Decoder:
    """Return a decoder of a seed."""
    torch.manual_seed(seed)
    return kind(**options)  # type: ignore[arg-type]


def ids(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
