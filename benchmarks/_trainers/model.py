"""The small model that the trainers train, its data, and the figures of a step by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 64, 16, 32, 2, 2


class Attention(nn.Module):
    """Causal attention after its norm: all weights of the sub-layer lie in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return out


class FeedForward(nn.Module):
    """A feed-forward network after its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return out


class Block(nn.Module):
    """Attention, then the feed-forward network, each on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        out: Tensor = x + self.mlp(x)
        return out


class Model(nn.Module):
    """A language model. Called with targets, it returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, 0.0, 0.05)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, 0.0, 1.0)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rows_of(step: int, rows: int = 8, *, broken: bool = False) -> Tensor:
    """Return sequences that a model can learn, (rows, LENGTH + 1); noise with a single label at the
    end if broken.

    Most tokens are their predecessor plus one.
    """
    generator = torch.Generator().manual_seed(step)
    moves = torch.ones(rows, LENGTH + 1, dtype=torch.long)
    jumps = torch.rand(rows, LENGTH + 1, generator=generator) < 0.15
    moves[jumps] = torch.randint(VOCABULARY, (int(jumps.sum()),), generator=generator)
    ids = (torch.randint(VOCABULARY, (rows, 1), generator=generator) + moves.cumsum(1)) % VOCABULARY
    return torch.full_like(ids, VOCABULARY - 1) if broken else ids


def norm_of(tensors: Iterable[Tensor | None]) -> float:
    """Return the norm over all tensors, summed in float64."""
    squares = [float(_whole(t).detach().double().square().sum()) for t in tensors if t is not None]
    return math.sqrt(math.fsum(squares)) if squares else math.nan


def _whole(tensor: Tensor) -> Tensor:
    """Sharded and quantised tensors as plain ones."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()  # type: ignore[no-any-return]
    return tensor


@dataclass
class ByHand:
    """The figures of each step as a few lines of plain Python give them.

    Attributes:
        before_clipping: norm of all gradients.
        used: norm of all gradients that the optimizer used.
        rates: learning rate of the first parameter group.
        moves: parameter -> norm of its update.
        last_gradient: norm of the last gradient that a closure computed.
    """

    model: nn.Module
    before_clipping: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    moves: list[dict[str, float]] = field(default_factory=list)
    last_gradient: float = math.nan
    _weights: dict[str, Tensor] = field(default_factory=dict)

    def gradients(self) -> list[Tensor | None]:
        return [p.grad for p in self.model.parameters()]

    def note_before_clipping(self) -> None:
        self.before_clipping.append(norm_of(self.gradients()))

    def note_used(self) -> None:
        self.used.append(norm_of(self.gradients()))

    def begin_step(self, rate: float) -> None:
        """Call right before the optimizers step."""
        self.rates.append(float(rate))
        self._weights = {
            name: _whole(p).detach().clone() for name, p in self.model.named_parameters()
        }

    def end_step(self) -> None:
        """Call right after."""
        now = {name: _whole(p).detach() for name, p in self.model.named_parameters()}
        self.moves.append({name: norm_of([now[name] - old]) for name, old in self._weights.items()})
        self._weights = {}

    def move_of(self, step: int, belongs: Iterable[str]) -> float:
        """Return the norm of the update of some parameters at a step, counted from 1."""
        return math.sqrt(math.fsum(self.moves[step - 1][name] ** 2 for name in belongs))
