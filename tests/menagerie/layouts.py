"""Ways of arranging a model around its residuals: loops, layouts, containers, inputs that are no
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from menagerie.core import Block, Pre, begin, end, pair
from menagerie.parts import LAYERS, MLP, Attention, B, D, Decoder, T, V, seeded, tokens
from menagerie.specimen import Context, Norm, Specimen, SublayerTruth

Place = Callable[[Any], Any]


def two(
    layer: int,
    names: tuple[str | None, str | None],
    parts: Callable[[Any], tuple[Any, Any, Any, Any]],
    start: Callable[[Any, Context], Tensor] | None = begin,
    **options: Any,
) -> list[SublayerTruth]:
    """An attention and an MLP, pre-norm; `parts` (model) -> norm1, attn, norm2, mlp."""
    return [
        SublayerTruth(
            names[0],
            "attention",
            "pre",
            lambda m, h, c: parts(m)[1](h),
            Norm(lambda m: parts(m)[0]),
            token_wise=False,
            layer=layer,
            start=start if layer == 0 else None,
            **options,
        ),
        SublayerTruth(
            names[1],
            "mlp",
            "pre",
            lambda m, h, c: parts(m)[3](h),
            Norm(lambda m: parts(m)[2]),
            layer=layer,
            **options,
        ),
    ]


def of_blocks(
    name: str,
    model: Callable[[], nn.Module],
    inputs: Any = None,
    start: Any = begin,
    finish: Any = end,
    **options: Any,
) -> Specimen:
    """A model whose blocks are `Pre` ones, arranged in some way."""
    expected = [
        replace(one, start=start if one.start is not None else None)
        for layer in range(LAYERS)
        for one in pair("pre", layer)
    ]
    return Specimen(
        name, lambda: seeded(model), inputs or ((tokens(),), {}), expected, finish, **options
    )


# -- no blocks -------------------------------------------------------------------------------------
class TopLevel(Decoder):
    """Every addition stands in the model's own forward; attentions and MLPs lie in lists of their
    own.
    """

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        del self.blocks
        self.attns = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.mlps = nn.ModuleList(MLP() for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2 * LAYERS))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for k in range(LAYERS):
            x = x + self.attns[k](self.norms[2 * k](x))
            x = x + self.mlps[k](self.norms[2 * k + 1](x))
        return self.end(x)

    def parts(self, k: int) -> tuple[Any, Any, Any, Any]:
        return self.norms[2 * k], self.attns[k], self.norms[2 * k + 1], self.mlps[k]


class Alternating(Decoder):
    """One list of layers, attention and MLP by turns, each with its norm inside; the loop adds."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), make())
            for _ in range(LAYERS)
            for make in (Attention, MLP)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.end(x)

    def parts(self, k: int) -> tuple[Any, Any, Any, Any]:
        attn, mlp = self.blocks[2 * k], self.blocks[2 * k + 1]
        return attn[0], attn[1], mlp[0], mlp[1]


class Stacked(nn.Module):
    """Functional code over parameters stacked in one tensor per role; no module but the model
    itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(V, D))
        self.qkv, self.out = (
            nn.Parameter(torch.zeros(LAYERS, D, 3 * D)),
            nn.Parameter(torch.zeros(LAYERS, D, D)),
        )
        self.up, self.down = (
            nn.Parameter(torch.zeros(LAYERS, D, 12)),
            nn.Parameter(torch.zeros(LAYERS, 12, D)),
        )
        self.head = nn.Parameter(torch.zeros(D, V))

    def attn(self, h: Tensor, k: int) -> Tensor:
        q, key, v = (h @ self.qkv[k]).chunk(3, dim=-1)
        scores = q @ key.transpose(-1, -2) / D**0.5
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=h.dtype).triu(1)
        return scores.softmax(-1) @ v @ self.out[k]

    def mlp(self, h: Tensor, k: int) -> Tensor:
        return torch.einsum(
            "btf,fd->btd", torch.relu(torch.einsum("btd,df->btf", h, self.up[k])), self.down[k]
        )

    def begin(self, ids: Tensor) -> Tensor:
        return self.embed[ids]

    def end(self, x: Tensor) -> Tensor:
        return x @ self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for k in range(LAYERS):
            x = x + self.attn(F.layer_norm(x, (D,)), k)
            x = x + self.mlp(F.layer_norm(x, (D,)), k)
        return self.end(x)


class Unbound(Stacked):
    """The stacked weights taken apart with unbind, the layer a pure function of (x, weights)."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for qkv, out, up, down in zip(
            *(w.unbind(0) for w in (self.qkv, self.out, self.up, self.down)), strict=True
        ):
            x = _layer(x, qkv, out, up, down)
        return self.end(x)


def _layer(x: Tensor, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor) -> Tensor:
    q, key, v = F.linear(F.layer_norm(x, (D,)), qkv.mT).chunk(3, dim=-1)
    x = x + F.scaled_dot_product_attention(q, key, v, is_causal=True) @ out
    return x + F.layer_norm(x, (D,)).matmul(up).relu().matmul(down)


def _plain_norm(m: Any) -> nn.Module:
    return nn.LayerNorm(D, elementwise_affine=False)


def _functional(layer: int) -> list[SublayerTruth]:
    return [
        SublayerTruth(
            None,
            "attention",
            "pre",
            lambda m, h, c: m.attn(h, layer),
            Norm(_plain_norm),
            token_wise=False,
            layer=layer,
            start=begin if layer == 0 else None,
        ),
        SublayerTruth(
            None, "mlp", "pre", lambda m, h, c: m.mlp(h, layer), Norm(_plain_norm), layer=layer
        ),
    ]


# -- layers that run several times -----------------------------------------------------------------
class Shared(Decoder):
    """ALBERT, Universal Transformer: one block, run twice."""

    def __init__(self) -> None:
        super().__init__(Pre, layers=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for _ in range(LAYERS):
            x = self.blocks[0](x)
        return self.end(x)


def _shared(layer: int) -> list[SublayerTruth]:
    repeat = f"@{layer + 1}" if layer else ""
    names = (f"blocks.0.attn{repeat}", f"blocks.0.mlp{repeat}")
    return two(layer, names, lambda m: (b := m.blocks[0], (b.norm1, b.attn, b.norm2, b.mlp))[1])


class Tied(Decoder):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__(Pre)
        self.head.weight = self.embed.weight


# -- layouts ---------------------------------------------------------------------------------------
class SequenceFirst(Decoder):
    """(T, B, d) throughout, as Megatron and fairseq have it."""

    def __init__(self) -> None:
        super().__init__(lambda: Pre())
        for block in self.blocks:
            block.attn = SequenceFirstAttention()

    def begin(self, ids: Tensor) -> Tensor:
        return super().begin(ids).transpose(0, 1)

    def end(self, x: Tensor) -> Tensor:
        return super().end(x).transpose(0, 1)


class SequenceFirstAttention(Attention):
    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Flattened(Decoder):
    """(B T, d): the attention alone knows about sequences."""

    def __init__(self) -> None:
        super().__init__(lambda: Pre())
        for block in self.blocks:
            block.attn = FlattenedAttention()

    def begin(self, ids: Tensor) -> Tensor:
        return super().begin(ids).reshape(-1, D)

    def end(self, x: Tensor) -> Tensor:
        return super().end(x).view(B, T, V)


class FlattenedAttention(Attention):
    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        return super().forward(x.view(B, T, D)).reshape(-1, D)


# -- containers ------------------------------------------------------------------------------------
class ListState(Decoder):
    """Every state is kept in a list, and the last one read back from it; the output is a dict."""

    def forward(self, ids: Tensor) -> dict[str, Any]:  # type: ignore[override]
        states = [self.begin(ids)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return {"logits": self.end(states[-1]), "states": states}


class DictBlock(Block):
    """Reads and returns a dict."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        x = batch["x"] + self.attn(self.norm1(batch["x"]))
        batch = {**batch, "x": x}
        batch["x"] = batch["x"] + self.mlp(self.norm2(batch["x"]))
        return batch


class DictState(Decoder):
    def __init__(self) -> None:
        super().__init__(DictBlock)

    def forward(self, ids: Tensor) -> Tensor:
        batch: dict[str, Any] = {"x": self.begin(ids), "mask": None}
        for block in self.blocks:
            batch = block(batch)
        return self.end(batch["x"])


@dataclass
class Carrier:
    """What the blocks of `Dataclass` hand on: the stream and what a user needs beside it."""

    hidden: Tensor
    seen: tuple[Tensor, ...] = ()


class CarrierBlock(Block):
    def forward(self, state: Carrier) -> Carrier:  # type: ignore[override]
        x = state.hidden + self.attn(self.norm1(state.hidden))
        return Carrier(x + self.mlp(self.norm2(x)), (*state.seen, x))


class Dataclass(Decoder):
    """A dataclass goes in and out of every block, and out of the model."""

    def __init__(self) -> None:
        super().__init__(CarrierBlock)

    def forward(self, ids: Tensor) -> Carrier:  # type: ignore[override]
        state = Carrier(self.begin(ids))
        for block in self.blocks:
            state = block(state)
        return Carrier(self.end(state.hidden), state.seen)


class TupleBlock(Block):
    """hidden, residual: the sum is made at the beginning of the next norm (vLLM, Mamba,
    FlashAttention).
    """

    def forward(self, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        residual = h if residual is None else h + residual
        h = self.attn(self.norm1(residual))
        residual = h + residual
        return self.mlp(self.norm2(residual)), residual


class Deferred(Decoder):
    def __init__(self) -> None:
        super().__init__(TupleBlock)

    def forward(self, ids: Tensor) -> Tensor:
        h, residual = self.begin(ids), None
        for block in self.blocks:
            h, residual = block(h, residual)
        return self.end(h + residual)


LAYOUTS: list[Specimen] = [
    Specimen(
        "loop in the model's forward",
        lambda: seeded(TopLevel),
        ((tokens(),), {}),
        [
            e
            for k in range(LAYERS)
            for e in two(k, (f"attns.{k}", f"mlps.{k}"), lambda m, k=k: m.parts(k))
        ],
        end,
    ),
    Specimen(
        "attention and MLP by turns",
        lambda: seeded(Alternating),
        ((tokens(),), {}),
        [
            e
            for k in range(LAYERS)
            for e in two(
                k, (f"blocks.{2 * k}.1", f"blocks.{2 * k + 1}.1"), lambda m, k=k: m.parts(k)
            )
        ],
        end,
    ),
    Specimen(
        "stacked parameters",
        lambda: seeded(Stacked),
        ((tokens(),), {}),
        [e for k in range(LAYERS) for e in _functional(k)],
        end,
    ),
    Specimen(
        "stacked parameters, unbound",
        lambda: seeded(Unbound),
        ((tokens(),), {}),
        [e for k in range(LAYERS) for e in _functional(k)],
        end,
    ),
    Specimen(
        "one block run twice",
        lambda: seeded(Shared),
        ((tokens(),), {}),
        [e for k in range(LAYERS) for e in _shared(k)],
        end,
    ),
    of_blocks("tied embeddings", Tied),
    of_blocks("sequence first", SequenceFirst),
    of_blocks("flattened", Flattened),
    of_blocks("states in a list, output a dict", lambda: ListState(Pre)),
    of_blocks("blocks that pass a dict", DictState),
    of_blocks("blocks that pass a dataclass", Dataclass),
    of_blocks("the sum is made in the next block", Deferred),
]
