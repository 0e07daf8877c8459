"""The core: every placement of the norm, parallel branches, the usual kinds of sub-layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from menagerie.parts import (
    LAYERS,
    MLP,
    AnnotatedLayerNorm,
    Attention,
    D,
    Decoder,
    GatedMLP,
    HandLayerNorm,
    HandRMS,
    MoE,
    floats,
    seeded,
    tokens,
)
from menagerie.specimen import Body, Context, Norm, Specimen, SublayerTruth


class Block(nn.Module):
    """An attention, an MLP, and the norms that a placement asks for."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        attn: Callable[[], nn.Module] = Attention,
        mlp: Callable[[], nn.Module] = MLP,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = norm(D), norm(D), attn(), mlp()


class Pre(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Post(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Sandwich(Block):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__(norm)
        self.norm3, self.norm4 = norm(D), norm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm3(self.attn(self.norm1(x)))
        return x + self.norm4(self.mlp(self.norm2(x)))


class Reordered(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Bare(Block):
    def __init__(self) -> None:
        super().__init__(lambda d: nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class ParallelLeft(Block):
    """(x + a) + m, one norm for both (Cohere, GPT-J)."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm2

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return x + self.attn(h) + self.mlp(h)


class ParallelRight(Block):
    """x + (a + m), a norm for each (GPT-NeoX)."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        m = self.mlp(self.norm2(x))
        return x + (m + a)


def begin(m: Any, c: Context) -> Tensor:
    return m.begin(c.args[0])


def end(m: Any, x: Tensor, c: Context) -> Tensor:
    return m.end(x)


def pair(
    placement: str,
    layer: int,
    *,
    norms: tuple[str, str] = ("norm1", "norm2"),
    exits: tuple[str, str] | None = None,
    kind: str = "mlp",
    parallel: bool = False,
    mlp: Callable[[Any, Tensor], Tensor] | None = None,
    gain: Any = 1.0,
    dress: Callable[[Any, int, Tensor], Tensor] | None = None,
    names: tuple[str | None, str | None] | None = None,
) -> list[SublayerTruth]:
    """The two sub-layers of block `layer` of a Decoder: attn and mlp, with the norms at their
    places.

    `gain` is a, or a function (block, 0 or 1) of the block; `dress` (block, 0 or 1, h) scales what
    a body returns.
    """

    def norm(which: str) -> Norm:
        return Norm(lambda m: getattr(m.blocks[layer], which))

    def body(k: int) -> Body:
        def run(m: Any, h: Tensor, c: Context) -> Tensor:
            block = m.blocks[layer]
            h = block.attn(h) if k == 0 else block.mlp(h) if mlp is None else mlp(block.mlp, h)
            return h if dress is None else dress(block, k, h)

        return run

    def shortcut_gain(k: int) -> Any:
        return (lambda m: gain(m.blocks[layer], k)) if callable(gain) else gain

    found = []
    for k, name in enumerate(names or (f"blocks.{layer}.attn", f"blocks.{layer}.mlp")):
        place = {
            "pre": {"entry": norm(norms[k])},
            "sandwich": {"entry": norm(norms[k]), "exit": norm((exits or norms)[k])},
            "reordered": {"exit": norm(norms[k])},
            "post": {"behind": norm(norms[k])},
            "none": {},
        }[placement]
        found.append(
            SublayerTruth(
                name,
                kind if k else "attention",
                placement,
                body(k),
                parallel=parallel,
                token_wise=k == 1,
                layer=layer,
                shortcut_gain=shortcut_gain(k),
                start=begin if layer == 0 and k == 0 else None,
                **place,
            )
        )
    return found


def decoder(
    name: str,
    block: Callable[[], nn.Module],
    placement: str,
    *,
    norm: Any = nn.LayerNorm,
    scale: float = 1.0,
    casts: bool = False,
    model: Callable[..., nn.Module] = Decoder,
    seed: int = 0,
    uncovered: tuple[str, ...] = (),
    **options: Any,
) -> Specimen:
    """A Decoder of two blocks with `pair`'s sub-layers."""
    final = None if placement == "post" else norm
    return Specimen(
        name,
        lambda: seeded(lambda: model(block, final), seed=seed, scale=scale),
        ((tokens(),), {}),
        [one for layer in range(LAYERS) for one in pair(placement, layer, **options)],
        end,
        casts=casts,
        uncovered=uncovered,
    )


def _fused_rms(d: int) -> nn.Module:
    return nn.RMSNorm(d, eps=1e-6)


IDLE = tuple(
    f"blocks.{layer}.mlp.experts.4.{p}"
    for layer in range(LAYERS)
    for p in ("up.weight", "up.bias", "down.weight", "down.bias")
)

PLACEMENTS = [
    decoder("pre", Pre, "pre"),
    decoder("post", Post, "post"),
    decoder("sandwich", Sandwich, "sandwich", exits=("norm3", "norm4")),
    decoder("reordered", Reordered, "reordered"),
    decoder("none", Bare, "none", scale=0.6),
    decoder("parallel left", ParallelLeft, "pre", norms=("norm1", "norm1"), parallel=True),
    decoder("parallel right", ParallelRight, "pre", parallel=True),
    decoder("fused RMSNorm", lambda: Pre(_fused_rms), "pre", norm=_fused_rms),
    decoder("fused RMSNorm, eps None", lambda: Pre(nn.RMSNorm), "pre", norm=nn.RMSNorm),
    decoder("hand-written RMSNorm", lambda: Pre(HandRMS), "pre", norm=HandRMS, casts=True),
    decoder("hand-written RMSNorm, post", lambda: Post(HandRMS), "post", casts=True),
    decoder(
        "hand-written RMSNorm, sandwich",
        lambda: Sandwich(HandRMS),
        "sandwich",
        norm=HandRMS,
        exits=("norm3", "norm4"),
        casts=True,
    ),
    decoder(
        "hand-written RMSNorm, reordered",
        lambda: Reordered(HandRMS),
        "reordered",
        norm=HandRMS,
        casts=True,
    ),
    decoder("hand-written LayerNorm", lambda: Pre(HandLayerNorm), "pre", norm=HandLayerNorm),
    decoder("annotated LayerNorm", lambda: Pre(AnnotatedLayerNorm), "pre", norm=AnnotatedLayerNorm),
    decoder("annotated LayerNorm, post", lambda: Post(AnnotatedLayerNorm), "post"),
    decoder(
        "annotated LayerNorm, sandwich",
        lambda: Sandwich(AnnotatedLayerNorm),
        "sandwich",
        norm=AnnotatedLayerNorm,
        exits=("norm3", "norm4"),
    ),
    decoder(
        "annotated LayerNorm, reordered",
        lambda: Reordered(AnnotatedLayerNorm),
        "reordered",
        norm=AnnotatedLayerNorm,
    ),
    decoder(
        "grouped queries with rotary",
        lambda: Pre(HandRMS, lambda: Attention(D, 4, 2, turns=True, by_hand=True)),
        "pre",
        norm=HandRMS,
        casts=True,
    ),
    decoder("gated MLP", lambda: Pre(_fused_rms, mlp=GatedMLP), "pre", norm=_fused_rms),
    # The seed is one that gives every expert a token but the idle one, which is then covered by
    # nothing.
    decoder("MoE", lambda: Pre(mlp=MoE), "pre", kind="moe", mlp=MoE.truth, seed=3, uncovered=IDLE),
    decoder(
        "MoE with a shared expert",
        lambda: Pre(mlp=lambda: MoE(shared=True)),
        "pre",
        kind="moe",
        mlp=MoE.truth,
        seed=3,
        uncovered=IDLE,
    ),
]


class ConvBlock(nn.Module):
    """A pre-activation residual block."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, channels, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ConvNet(nn.Module):
    """Images (B, 3, 4, 4) -> logits (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock() for _ in range(LAYERS))
        self.head = nn.Linear(4, 5)

    def end(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x).mean((2, 3)))

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


def _conv(layer: int) -> SublayerTruth:
    return SublayerTruth(
        f"blocks.{layer}",
        "conv",
        "none",
        lambda m, x, c: m.blocks[layer].body(x),
        token_wise=False,
        layer=layer,
        start=(lambda m, c: m.stem(c.args[0])) if layer == 0 else None,
    )


CONV = Specimen(
    "convolutional",
    lambda: seeded(ConvNet),
    ((floats(2, 3, 4, 4),), {}),
    [_conv(layer) for layer in range(LAYERS)],
    end,
)


class CrossBlock(nn.Module):
    """A decoder block: self attention, attention to a memory, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.cross, self.mlp = Attention(), Attention(), MLP()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class CrossDecoder(Decoder):
    """Two inputs: tokens (B, T) and an encoder's output (B, S, d)."""

    def __init__(self) -> None:
        super().__init__(CrossBlock)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        x = self.begin(ids)
        for block in self.blocks:
            x = block(x, memory)
        return self.end(x)


def cross_triple(
    layer: int,
    blocks: str = "blocks",
    start: Any = begin,
    memory: Callable[[Context], Tensor] = lambda c: c.args[1],
) -> list[SublayerTruth]:
    """The three sub-layers of a CrossBlock."""

    def block(m: Any) -> Any:
        return getattr(m, blocks)[layer]

    return [
        SublayerTruth(
            f"{blocks}.{layer}.attn",
            "attention",
            "pre",
            lambda m, h, c: block(m).attn(h),
            Norm(lambda m: block(m).norm1),
            token_wise=False,
            layer=layer,
            start=start if layer == 0 else None,
        ),
        SublayerTruth(
            f"{blocks}.{layer}.cross",
            "attention",
            "pre",
            lambda m, h, c: block(m).cross(h, memory(c)),
            Norm(lambda m: block(m).norm2),
            layer=layer,
        ),
        SublayerTruth(
            f"{blocks}.{layer}.mlp",
            "mlp",
            "pre",
            lambda m, h, c: block(m).mlp(h),
            Norm(lambda m: block(m).norm3),
            layer=layer,
        ),
    ]


CROSS = Specimen(
    "two inputs",
    lambda: seeded(CrossDecoder),
    ((tokens(), floats(2, 4, D)), {}),
    [one for layer in range(LAYERS) for one in cross_triple(layer)],
    end,
)


class Massive(Decoder):
    """A pre-norm model whose stream has one massive feature and one nearly dead token."""

    def begin(self, ids: Tensor) -> Tensor:
        x = super().begin(ids)
        scale = torch.ones(D)
        scale[3] = 40.0
        shrink = torch.ones(ids.shape[1], 1)
        shrink[2] = 1e-3
        return x * scale.to(x) * shrink.to(x)


MASSIVE = Specimen(
    "massive feature",
    lambda: seeded(lambda: Massive(Pre)),
    ((tokens(),), {}),
    [one for layer in range(LAYERS) for one in pair("pre", layer)],
    end,
)

CORE: list[Specimen] = [*PLACEMENTS, CONV, CROSS, MASSIVE]
