"""Additions that are no sub-layer, and sub-layers inside sub-layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from menagerie.core import Block, Pre, begin, decoder, end, pair
from menagerie.parts import LAYERS, MLP, Attention, D, Decoder, MoE, seeded, tokens
from menagerie.specimen import Norm, Specimen, SublayerTruth


def gelu_new(x: Tensor) -> Tensor:
    """x + 0.0447 x^3 is an addition of a value and a function of it."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


class Biased(MoE):
    """A bias that balances the load (DeepSeek-V3) is added to the router's scores."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("balance", torch.linspace(-0.05, 0.05, self.router.out_features))

    def weights(self, flat: Tensor) -> Tensor:
        scores = self.router(flat)
        scores = scores + self.balance.to(scores.dtype)
        scores = scores - 1e4 * (torch.arange(scores.shape[-1]) >= scores.shape[-1] - self.idle).to(
            scores.dtype
        )
        return torch.softmax(scores, dim=-1)


class Recurrent(nn.Module):
    """A diagonal state-space mixer with a loop over time, a skip D u inside it, and a gate
    (Mamba).
    """

    def __init__(self) -> None:
        super().__init__()
        self.into, self.select, self.out = nn.Linear(D, 2 * D), nn.Linear(D, 3), nn.Linear(D, D)
        self.log_a, self.skip = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.ones(D))
        self.conv = nn.Conv1d(D, D, 2, padding=1, groups=D)

    def forward(self, u: Tensor) -> Tensor:
        u, gate = self.into(u).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :-1].transpose(1, 2))
        b, c, dt = self.select(u).split(1, dim=-1)
        decay = torch.exp(-F.softplus(dt) * self.log_a.exp())
        state, outputs = torch.zeros_like(u[:, 0]), []
        for t in range(u.shape[1]):
            state = decay[:, t] * state + b[:, t] * u[:, t]
            outputs.append(state * c[:, t])
        y = torch.stack(outputs, dim=1)
        y = y + u * self.skip
        return self.out(y * F.silu(gate))


class Hybrid(nn.Module):
    """A pre-norm block with a mixer of its own kind and an MLP."""

    def __init__(self, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer, self.mlp = (
            nn.LayerNorm(D),
            nn.LayerNorm(D),
            mixer(),
            MLP(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HybridStack(Decoder):
    """Attention in one layer, a recurrent mixer in the other."""

    def __init__(self) -> None:
        kinds = iter((Recurrent, Attention))
        super().__init__(lambda: Hybrid(next(kinds)))


def _hybrid(layer: int) -> list[SublayerTruth]:
    def block(m: Any) -> Any:
        return m.blocks[layer]

    return [
        SublayerTruth(
            f"blocks.{layer}.mixer",
            "attention" if layer else "mixer",
            "pre",
            lambda m, h, c: block(m).mixer(h),
            Norm(lambda m: block(m).norm1),
            token_wise=False,
            layer=layer,
            start=None if layer else begin,
        ),
        SublayerTruth(
            f"blocks.{layer}.mlp",
            "mlp",
            "pre",
            lambda m, h, c: block(m).mlp(h),
            Norm(lambda m: block(m).norm2),
            layer=layer,
        ),
    ]


class LoRA(nn.Module):
    """W h + B A h: the low-rank path reads what the linear reads, no shortcut passes."""

    def __init__(self, inside: int, outside: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside)
        self.a, self.b = nn.Linear(inside, rank, bias=False), nn.Linear(rank, outside, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        out = self.base(h)
        return out + 0.5 * self.b(self.a(h))


class LoRABlock(Pre):
    def __init__(self) -> None:
        super().__init__()
        self.attn.q, self.attn.v, self.mlp.up = LoRA(D, D), LoRA(D, D), LoRA(D, 2 * D)


class OneHotPosition(Decoder):
    """Positions by a matrix product, added to the embedding; a causal mask added to the scores."""

    def __init__(self) -> None:
        super().__init__(lambda: Pre(attn=lambda: Attention(by_hand=True, turns=True)))
        self.place = nn.Linear(5, D)
        del self.position

    def begin(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.place(
            torch.eye(ids.shape[1], 5, dtype=self.place.weight.dtype)
        )


class EmbeddingMixer(Decoder):
    """The embedding is projected, and a projection of the same ids by another table added: no
    shortcut yet.
    """

    def __init__(self) -> None:
        super().__init__(Pre)
        self.wide, self.project = nn.Embedding(11, 4), nn.Linear(4, D)
        del self.position

    def begin(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.project(self.wide(ids))


# -- sub-layers inside sub-layers ------------------------------------------------------------------
class Adapter(nn.Module):
    """h + up(relu(down(h))) behind a sub-layer (Houlsby): inside the branch it is a residual of its
    own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, 3), nn.Linear(3, D)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(torch.relu(self.down(h)))


class Adapted(Block):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = Adapter()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.adapter(self.mlp(self.norm2(x)))


def _adapted(layer: int) -> list[SublayerTruth]:
    def block(m: Any) -> Any:
        return m.blocks[layer]

    attn, _ = pair("pre", layer)
    return [
        attn,
        SublayerTruth(
            None,
            "mlp",
            "pre",
            lambda m, h, c: block(m).adapter(block(m).mlp(h)),
            Norm(lambda m: block(m).norm2),
            layer=layer,
        ),
        SublayerTruth(
            f"blocks.{layer}.adapter",
            "mlp",
            "none",
            lambda m, h, c: block(m).adapter.up(torch.relu(block(m).adapter.down(h))),
            nested=True,
            layer=layer,
        ),
    ]


class Dense(nn.Module):
    """A residual in a residual in a residual, the deepest of them ungated."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.middle, self.inner = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def deepest(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))

    def between(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.middle(x))
        return h + self.deepest(h)

    def whole(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.outer(x))
        return h + self.between(h)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.whole(x)


class Nest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dense() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _nest(layer: int) -> list[SublayerTruth]:
    def block(m: Any) -> Any:
        return m.blocks[layer]

    return [
        SublayerTruth(
            None,
            "mlp",
            "none",
            lambda m, x, c: block(m).whole(x),
            layer=layer,
            start=(lambda m, c: c.args[0]) if layer == 0 else None,
        ),
        SublayerTruth(
            None, "mlp", "none", lambda m, x, c: block(m).between(x), nested=True, layer=layer
        ),
        SublayerTruth(
            None, "mlp", "none", lambda m, x, c: block(m).deepest(x), nested=True, layer=layer
        ),
    ]


NEW = decoder("gelu_new", lambda: Pre(mlp=lambda: MLP(act=gelu_new)), "pre")
IDLE = tuple(
    f"blocks.{layer}.mlp.experts.4.{p}"
    for layer in range(LAYERS)
    for p in ("up.weight", "up.bias", "down.weight", "down.bias")
)

TRAPS: list[Specimen] = [
    NEW,
    decoder(
        "router bias",
        lambda: Pre(mlp=Biased),
        "pre",
        kind="moe",
        mlp=Biased.truth,
        seed=3,
        uncovered=IDLE,
    ),
    decoder("LoRA inside linears", LoRABlock, "pre"),
    decoder(
        "projected positions, rotary, mask", nn.Identity, "pre", model=lambda *_: OneHotPosition()
    ),
    decoder("two embeddings, one projected", nn.Identity, "pre", model=lambda *_: EmbeddingMixer()),
    Specimen(
        "attention and a scan with a skip",
        lambda: seeded(HybridStack),
        ((tokens(),), {}),
        [one for layer in range(LAYERS) for one in _hybrid(layer)],
        end,
    ),
    Specimen(
        "adapters",
        lambda: seeded(lambda: Decoder(Adapted)),
        ((tokens(),), {}),
        [one for layer in range(LAYERS) for one in _adapted(layer)],
        end,
    ),
    Specimen(
        "residuals in residuals",
        lambda: seeded(Nest),
        ((torch.linspace(-2, 2, 2 * 3 * D).view(2, 3, D),), {}),
        [one for layer in range(LAYERS) for one in _nest(layer)],
        lambda m, x, c: x,
    ),
]
