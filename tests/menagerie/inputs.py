"""Inputs that are no token ids in first place, and what the caller left switched on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from menagerie.core import Block, Pre, decoder
from menagerie.layouts import of_blocks
from menagerie.parts import LAYERS, B, D, Decoder, HandRMS, T, floats, seeded, tokens
from menagerie.specimen import Context, Specimen, SublayerTruth


class KeywordOnly(Decoder):
    def forward(self, *, ids: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(ids) * scale


class DictInput(Decoder):
    """One dict of tensors in."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        x = self.begin(batch["ids"]) * batch["weight"][..., None]
        for block in self.blocks:
            x = block(x)
        return self.end(x)


class FloatInput(nn.Module):
    """Blocks alone: the input is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pre() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Patches(nn.Module):
    """A small ViT: image -> patches, a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, D, 2, stride=2), nn.Parameter(torch.zeros(1, 1, D))
        self.place = nn.Parameter(torch.zeros(1, 5, D))
        self.blocks = nn.ModuleList(Pre() for _ in range(LAYERS))
        self.final, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def begin(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.place

    def end(self, x: Tensor) -> Tensor:
        return self.head(self.final(x)[:, 0])

    def forward(self, image: Tensor) -> Tensor:
        x = self.begin(image)
        for block in self.blocks:
            x = block(x)
        return self.end(x)


class Normed(Block):
    """BatchNorm on the way in: (B T, d), so that tokens are coupled in train mode and not in
    eval.
    """

    def __init__(self) -> None:
        super().__init__(lambda d: nn.BatchNorm1d(d))
        del self.attn, self.norm1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


def _batch_normed(layer: int) -> SublayerTruth:
    return SublayerTruth(
        f"blocks.{layer}.mlp",
        "mlp",
        "none",
        lambda m, x, c: m.blocks[layer].mlp(m.blocks[layer].norm2(x)),
        layer=layer,
        start=(lambda m, c: c.args[0]) if layer == 0 else None,
    )


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Normed() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _float_start(m: Any, c: Context) -> Tensor:
    return c.args[0]


def _as_is(m: Any, x: Tensor, c: Context) -> Tensor:
    return x


_BF16 = decoder("bfloat16 weights", lambda: Pre(HandRMS), "pre", norm=HandRMS, casts=True)

INPUTS: list[Specimen] = [
    of_blocks(
        "keyword-only inputs",
        lambda: KeywordOnly(Pre),
        ((), {"ids": tokens()}),
        lambda m, c: m.begin(c.kwargs["ids"]),
    ),
    of_blocks(
        "a dict of tensors",
        lambda: DictInput(Pre),
        (({"ids": tokens(), "weight": floats(B, T)},), {}),
        lambda m, c: m.begin(c.args[0]["ids"]) * c.args[0]["weight"][..., None],
    ),
    of_blocks("floats", FloatInput, ((floats(B, T, D),), {}), _float_start, _as_is),
    of_blocks("images", Patches, ((floats(2, 3, 4, 4),), {})),
    Specimen(
        "BatchNorm in eval",
        lambda: seeded(BatchNormed),
        ((floats(7, D),), {}),
        [_batch_normed(k) for k in range(LAYERS)],
        _as_is,
    ),
    replace(_BF16, build=lambda: _BF16.build().to(torch.bfloat16)),
]
