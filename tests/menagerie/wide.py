"""Several streams, mixed or side by side, and code that autograd sees as one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from menagerie.core import CrossBlock, Pre, begin, cross_triple, end, pair
from menagerie.parts import LAYERS, MLP, Attention, D, Decoder, seeded, tokens
from menagerie.specimen import Specimen, SublayerTruth

S = 3  # residual streams


class Hyper(nn.Module):
    """Hyper-connections: S streams, mixed by a small matrix; the branch reads one mixture and
    writes to all.
    """

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(D), body()
        self.read, self.write = nn.Parameter(torch.ones(S)), nn.Parameter(torch.ones(S))
        self.mix = nn.Parameter(torch.eye(S))

    def reads(self, x: Tensor) -> Tensor:
        return (x * self.read[:, None]).sum(-2)

    def mixed(self, x: Tensor) -> Tensor:
        return torch.einsum("st,bntd->bnsd", self.mix, x)

    def writes(self, h: Tensor) -> Tensor:
        return h.unsqueeze(-2) * self.write[:, None]

    def branch(self, x: Tensor) -> Tensor:
        return self.writes(self.body(self.norm(self.reads(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x) + self.branch(x)


class HyperMatmul(Hyper):
    """The same with matmul for every mixture."""

    def reads(self, x: Tensor) -> Tensor:
        return torch.matmul(self.read, x)

    def mixed(self, x: Tensor) -> Tensor:
        return self.mix @ x


class HyperUnmixed(Hyper):
    """No mixing on the way: x + the outer product."""

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__(body)
        del self.mix

    def mixed(self, x: Tensor) -> Tensor:
        return x


class HyperDynamic(Hyper):
    """The mixing matrix is a function of the streams themselves (dynamic hyper-connections)."""

    def __init__(self, body: Callable[[], nn.Module]) -> None:
        super().__init__(body)
        self.to_mix = nn.Linear(D, S)

    def mixed(self, x: Tensor) -> Tensor:
        mix = self.mix + torch.tanh(self.to_mix(F.layer_norm(x, (D,))))  # (B, T, S, S)
        return mix.transpose(-1, -2) @ x


class HyperModel(Decoder):
    def __init__(self, layer: Callable[[Callable[[], nn.Module]], nn.Module]) -> None:
        super().__init__(nn.Identity)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": layer(Attention), "mlp": layer(MLP)}) for _ in range(LAYERS)
        )

    def begin(self, ids: Tensor) -> Tensor:
        return super().begin(ids).unsqueeze(2).expand(-1, -1, S, -1)

    def end(self, x: Tensor) -> Tensor:
        return super().end(x.sum(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.begin(ids)
        for block in self.blocks:
            x = block["mlp"](block["attn"](x))
        return self.end(x)


def _hyper(layer: int, gain: float | None, body: str) -> list[SublayerTruth]:
    def part(m: Any, which: str) -> Any:
        return m.blocks[layer][which]

    return [
        SublayerTruth(
            f"blocks.{layer}.{which}{body}",
            kind,
            "none",
            lambda m, x, c, w=which: part(m, w).branch(x),
            token_wise=which == "mlp",
            shortcut_gain=gain,
            layer=layer,
            carry=lambda m, x, c, w=which: part(m, w).mixed(x),
            start=begin if (layer, which) == (0, "attn") else None,
        )
        for which, kind in (("attn", "attention"), ("mlp", "mlp"))
    ]


def hyper(
    name: str, layer: Callable[..., nn.Module], gain: float | None = None, body: str = ".body"
) -> Specimen:
    return Specimen(
        name,
        lambda: seeded(lambda: HyperModel(layer)),
        ((tokens(),), {}),
        [one for k in range(LAYERS) for one in _hyper(k, gain, body)],
        end,
    )


# -- two streams -----------------------------------------------------------------------------------
class EncoderDecoder(Decoder):
    """An encoder's stream, and a decoder's that reads its end by cross attention."""

    def __init__(self) -> None:
        super().__init__(CrossBlock)
        self.encoder = nn.ModuleList(
            Pre(attn=lambda: Attention(causal=False)) for _ in range(LAYERS)
        )
        self.between = nn.LayerNorm(D)

    def encode(self, source: Tensor) -> Tensor:
        x = self.begin(source)
        for block in self.encoder:
            x = block(x)
        return self.between(x)

    def forward(self, source: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        memory = self.encode(source)
        x = self.begin(ids)
        for block in self.blocks:
            x = block(x, memory)
        return self.end(x)


def _encoder(layer: int) -> list[SublayerTruth]:
    found = []
    for one in pair("pre", layer):
        name = (one.name or "").replace("blocks", "encoder")
        entry = (
            None
            if one.entry is None
            else type(one.entry)(lambda m, e=one.entry: e.module(_Encoder(m)))
        )
        found.append(
            SublayerTruth(
                name,
                one.kind,
                "pre",
                lambda m, h, c, o=one: o.body(_Encoder(m), h, c),
                entry,
                token_wise=one.token_wise,
                layer=layer,
                start=begin if one.start else None,
            )
        )
    return found


class _Encoder:
    """The encoder seen as a model with `blocks`."""

    def __init__(self, model: Any) -> None:
        self.blocks = model.encoder


def _decoder(layer: int) -> list[SublayerTruth]:
    found = cross_triple(layer, start=lambda m, c: m.begin(c.args[1]), memory=lambda c: c.extra)
    return [replace(one, layer=LAYERS + layer) for one in found]


# -- one call for autograd -------------------------------------------------------------------------
class Squared(torch.autograd.Function):
    """relu(h)^2 with a hand-written backward, in the old style: torch.func refuses it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h)
        return torch.relu(h) ** 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return 2 * torch.relu(h) * grad


class SquaredNew(torch.autograd.Function):
    """The same with setup_context and generate_vmap_rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor) -> Tensor:
        return torch.relu(h) ** 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return 2 * torch.relu(h) * grad


class LinearFunction(torch.autograd.Function):
    """A whole matrix product in a Function, as Megatron's LinearWithGradAccumulation is."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h, weight)
        return F.linear(h, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        h, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # vmap has no rule for flatten
        return grad @ weight, flat.mT @ h.reshape(-1, h.shape[-1]), flat.sum(0)


class ByFunction(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return LinearFunction.apply(h, self.weight, self.bias)


class FunctionMLP(MLP):
    """Both matrix products lie in Functions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = ByFunction(D, 2 * D), ByFunction(2 * D, D)


class AddFunction(torch.autograd.Function):
    """The addition itself in a Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor) -> Tensor:  # type: ignore[override]
        return x + f

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad


class AddedByFunction(Pre):
    def forward(self, x: Tensor) -> Tensor:
        x = AddFunction.apply(x, self.attn(self.norm1(x)))
        return AddFunction.apply(x, self.mlp(self.norm2(x)))


def blocks(name: str, block: Callable[[], nn.Module]) -> Specimen:
    return Specimen(
        name,
        lambda: seeded(lambda: Decoder(block)),
        ((tokens(),), {}),
        [one for layer in range(LAYERS) for one in pair("pre", layer)],
        end,
    )


WIDE: list[Specimen] = [
    hyper("several streams, einsum", Hyper),
    hyper("several streams, matmul", HyperMatmul, body=""),
    hyper("several streams, unmixed", HyperUnmixed, 1.0),
    hyper("several streams, mixed by themselves", HyperDynamic),
    Specimen(
        "encoder and decoder",
        lambda: seeded(EncoderDecoder),
        ((tokens(length=4, seed=9), tokens()), {}),
        [
            *(e for k in range(LAYERS) for e in _encoder(k)),
            *(e for k in range(LAYERS) for e in _decoder(k)),
        ],
        end,
        prepare=lambda m, args, kwargs: m.encode(args[0]),
    ),
    blocks("a custom Function as activation", lambda: Pre(mlp=lambda: MLP(act=Squared.apply))),
    blocks(
        "a custom Function with setup_context", lambda: Pre(mlp=lambda: MLP(act=SquaredNew.apply))
    ),
    blocks("matrix products in custom Functions", lambda: Pre(mlp=FunctionMLP)),
]
