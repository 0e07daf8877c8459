"""Ways of writing the addition itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from menagerie.core import Block, begin, decoder, end, pair
from menagerie.parts import LAYERS, MLP, D, Decoder, HandRMS, seeded, tokens
from menagerie.specimen import Norm, Specimen, SublayerTruth

ALPHA = 1.7  # DeepNorm's gain on the shortcut


class InPlace(Block):
    """x += f(x). Autograd cannot run through two of these in a row where the norm keeps its
    input.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class AddFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attn(self.norm1(x)))
        return torch.add(input=self.mlp(self.norm2(x)), other=x)


class AddMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x.add(self.attn(self.norm1(x)))
        return self.mlp(self.norm2(x)).add(other=x)


class AddInPlaceMethod(Block):
    """x.add_(f(x)), and the result of the call thrown away."""

    def forward(self, x: Tensor) -> Tensor:
        x.add_(self.attn(self.norm1(x)))
        x.add_(self.mlp(self.norm2(x)))
        return x


class ShortcutOntoBranch(Block):
    """h = f(x); h += x, as transformers' ResNet does."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.attn(self.norm1(x))
        x += shortcut
        shortcut = x
        x = self.mlp(self.norm2(x))
        x += shortcut
        return x


class PythonSum(Block):
    """sum((x, f(x))): Python starts with 0 + x."""

    def forward(self, x: Tensor) -> Tensor:
        x = sum((x, self.attn(self.norm1(x))))
        return sum([self.mlp(self.norm2(x)), x])


class Helper(Block):
    """One helper adds for every sub-layer: the additions share their source line."""

    def join(self, x: Tensor, f: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        return x + F.dropout(f(norm(x)), 0.1, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.join(x, self.attn, self.norm1), self.mlp, self.norm2)


class Dropout(Block):
    """Dropout on the branch and on the stream; the caller may have left the model in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return self.drop(x + self.drop(self.mlp(self.norm2(x))))


class SliceAssignment(Block):
    """y[:, :] += f(x): a write through a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :] += self.attn(self.norm1(x))
        z = y.clone()
        z[...] += self.mlp(self.norm2(y))
        return z


class DeepNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x * ALPHA + self.attn(x))
        return self.norm2(ALPHA * x + self.mlp(x))


class AddAlphaOnShortcut(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(self.attn(self.norm1(x)), x, alpha=ALPHA)
        return torch.add(self.mlp(self.norm2(x)), x, alpha=ALPHA)


class AddAlphaOnBranch(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attn(self.norm1(x)), alpha=0.5)
        return x.add_(self.mlp(self.norm2(x)), alpha=0.5)


class Subtract(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x - self.attn(self.norm1(x))
        return torch.sub(x, self.mlp(self.norm2(x)))


class Scaled(Block):
    """Blocks with two learned vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.a2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def scales(self, k: int) -> Tensor:
        return self.a2 if k else self.a1


class LayerScale(Scaled):
    """x + g * f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a1 * self.attn(self.norm1(x))
        return self.mlp(self.norm2(x)) * self.a2 + x


class AddCMul(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.a1, self.attn(self.norm1(x)))
        return x.addcmul(self.mlp(self.norm2(x)), self.a2)


class LearnedGain(Scaled):
    """residual * weight + f(x), as in Doge."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.a1 + self.attn(self.norm1(x))
        return self.a2 * x + self.mlp(self.norm2(x))


class ReZero(Block):
    """A learned number on the branch."""

    def __init__(self) -> None:
        super().__init__(lambda d: nn.Identity())
        self.alpha = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.alpha[0] * self.attn(x)
        return x + self.alpha[1] * self.mlp(x)


class Lerp(Block):
    """(1 - t) x + t f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.lerp(x, self.attn(self.norm1(x)), 0.25)
        return x.lerp(self.mlp(self.norm2(x)), 0.25)


class MiniMax(Block):
    """The shortcut is taken behind the norm: the norm is that of the stream, as in post-norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        x = x * 0.9 + self.attn(x) * 1.3
        x = self.norm2(x)
        return x * 0.9 + self.mlp(x) * 1.3


def _minimax(layer: int) -> list[SublayerTruth]:
    def following(m: Any) -> nn.Module:
        return m.blocks[layer + 1].norm1 if layer + 1 < LAYERS else m.final

    first = Norm(lambda m: m.blocks[0].norm1)
    return [
        SublayerTruth(
            f"blocks.{layer}.attn",
            "attention",
            "post",
            lambda m, h, c: m.blocks[layer].attn(h) * 1.3,
            behind=Norm(lambda m: m.blocks[layer].norm2),
            token_wise=False,
            shortcut_gain=0.9,
            layer=layer,
            start=(lambda m, c: first(m, begin(m, c))) if layer == 0 else None,
        ),
        SublayerTruth(
            f"blocks.{layer}.mlp",
            "mlp",
            "post",
            lambda m, h, c: m.blocks[layer].mlp(h) * 1.3,
            behind=Norm(following),
            shortcut_gain=0.9,
            layer=layer,
        ),
    ]


class Macaron(Block):
    """Half an MLP, attention, half an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3, self.mlp2 = nn.LayerNorm(D), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.mlp(self.norm1(x))
        x = x + self.attn(self.norm2(x))
        return x + 0.5 * self.mlp2(self.norm3(x))


def _macaron(layer: int) -> list[SublayerTruth]:
    def block(m: Any) -> Any:
        return m.blocks[layer]

    return [
        SublayerTruth(
            f"blocks.{layer}.mlp",
            "mlp",
            "pre",
            lambda m, h, c: block(m).mlp(h) / 2,
            Norm(lambda m: block(m).norm1),
            layer=layer,
            start=begin if layer == 0 else None,
        ),
        SublayerTruth(
            f"blocks.{layer}.attn",
            "attention",
            "pre",
            lambda m, h, c: block(m).attn(h),
            Norm(lambda m: block(m).norm2),
            token_wise=False,
            layer=layer,
        ),
        SublayerTruth(
            f"blocks.{layer}.mlp2",
            "mlp",
            "pre",
            lambda m, h, c: block(m).mlp2(h) / 2,
            Norm(lambda m: block(m).norm3),
            layer=layer,
        ),
    ]


class FusedProduct(nn.Module):
    """The output projection adds the shortcut itself: addmm, on a flattened stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(D), nn.Linear(D, 12)
        self.out = nn.Parameter(torch.zeros(12, D))

    def body(self, h: Tensor) -> Tensor:
        return F.gelu(self.up(h)) @ self.out

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return torch.addmm(flat, F.gelu(self.up(self.norm(flat))), self.out).view_as(x)


class Float32Stream(Block):
    """A float32 stream around bfloat16 branches, with the casts written out."""

    def __init__(self) -> None:
        super().__init__(HandRMS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() + self.attn(self.norm1(x).to(self.attn.q.weight.dtype)).float()
        return x + self.mlp(self.norm2(x).to(self.mlp.up.weight.dtype)).float()


class ScaledSum(Block):
    """(x + f(x)) / sqrt(2)."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.attn(self.norm1(x))) * 0.5**0.5
        return (x + self.mlp(self.norm2(x))) * 0.5**0.5


def styled(
    name: str, block: Callable[[], nn.Module], placement: str = "pre", **options: Any
) -> Specimen:
    return decoder(name, block, placement, **options)


ADDITIONS: list[Specimen] = [
    styled("x += f(x)", InPlace),
    styled("torch.add", AddFunction),
    styled("x.add", AddMethod),
    styled("x.add_", AddInPlaceMethod),
    styled("h += x", ShortcutOntoBranch),
    styled("sum((x, f(x)))", PythonSum),
    styled("a helper adds", Helper),
    styled("dropout", Dropout),
    styled("slice assignment", SliceAssignment),
    styled("DeepNorm", DeepNorm, "post", gain=ALPHA),
    styled("torch.add, alpha on the shortcut", AddAlphaOnShortcut, gain=ALPHA),
    styled("torch.add, alpha on the branch", AddAlphaOnBranch, dress=lambda block, k, h: 0.5 * h),
    styled("x - f(x)", Subtract, dress=lambda block, k, h: -h),
    styled("LayerScale", LayerScale, dress=lambda block, k, h: h * block.scales(k)),
    styled("addcmul", AddCMul, dress=lambda block, k, h: h * block.scales(k)),
    styled("learned gain on the shortcut", LearnedGain, gain=lambda block, k: block.scales(k)),
    styled("ReZero", ReZero, "none", dress=lambda block, k, h: h * block.alpha[k]),
    styled("lerp", Lerp, gain=0.75, dress=lambda block, k, h: h * 0.25),
    styled("float32 stream, bfloat16 branches", Float32Stream, casts=True, norm=HandRMS),
    Specimen(
        "MiniMax",
        lambda: seeded(lambda: Decoder(MiniMax)),
        ((tokens(),), {}),
        [one for layer in range(LAYERS) for one in _minimax(layer)],
        lambda m, x, c: m.head(x),
    ),
    Specimen(
        "Macaron",
        lambda: seeded(lambda: Decoder(Macaron)),
        ((tokens(),), {}),
        [one for layer in range(LAYERS) for one in _macaron(layer)],
        end,
    ),
    Specimen(
        "addmm adds the shortcut",
        lambda: seeded(lambda: Decoder(FusedProduct)),
        ((tokens(),), {}),
        [
            SublayerTruth(
                f"blocks.{layer}",
                "mlp",
                "pre",
                lambda m, h, c, k=layer: m.blocks[k].body(h),
                Norm(lambda m, k=layer: m.blocks[k].norm),
                layer=layer,
                start=(lambda m, c: begin(m, c).flatten(0, 1)) if layer == 0 else None,
            )
            for layer in range(LAYERS)
        ],
        lambda m, x, c: m.end(x).unflatten(0, (2, -1)),
    ),
    Specimen(
        "scaled sum",
        lambda: seeded(lambda: Decoder(ScaledSum)),
        ((tokens(),), {}),
        [
            replace(one, after=lambda y: y * 0.5**0.5)
            for layer in range(LAYERS)
            for one in pair("pre", layer)
        ],
        end,
    ),
]
