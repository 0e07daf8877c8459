"""Fresh models of many inits and shapes, as dicts of named parameters. Nothing is run, so that
thousands are cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Width, layers, size of the FFN over the width, vocabulary.
SHAPES = [
    (16, 2, 4, 64),
    (16, 12, 2, 32),
    (24, 4, 4, 100),
    (32, 1, 4, 64),
    (32, 2, 4, 256),
    (32, 6, 3, 128),
    (32, 24, 2, 64),
    (48, 4, 4, 256),
    (64, 2, 4, 256),
    (64, 4, 4, 512),
    (64, 12, 4, 128),
    (64, 24, 2, 64),
    (80, 3, 4, 300),
    (96, 6, 4, 256),
    (112, 6, 4, 256),
    (128, 2, 4, 1000),
    (128, 8, 3, 256),
    (192, 4, 4, 500),
    (256, 2, 4, 256),
    (384, 2, 2, 400),
]

Shape = tuple[int, int, int, int]
Weights = dict[str, Tensor]
Fill = Callable[[Tensor], object]


def plain(shape: Shape, fill: Fill, *, fill_vector: Fill | None = None) -> Weights:
    """Return a pre-norm transformer's parameters whose matrices are filled by one function.

    Args:
        shape: of SHAPES.
        fill: writes into a matrix.
        fill_vector: writes into a gain; 1 if not given.
    """
    width, layers, ratio, vocabulary = shape
    weights: Weights = {"embed.weight": torch.empty(vocabulary, width)}
    for layer in range(layers):
        start = f"layers.{layer}"
        weights[f"{start}.attn.qkv.weight"] = torch.empty(3 * width, width)
        weights[f"{start}.attn.out.weight"] = torch.empty(width, width)
        weights[f"{start}.mlp.up.weight"] = torch.empty(ratio * width, width)
        weights[f"{start}.mlp.down.weight"] = torch.empty(width, ratio * width)
    for tensor in weights.values():
        fill(tensor)
    for layer in range(layers):
        for norm in ("norm1", "norm2"):
            gain = torch.ones(width)
            if fill_vector is not None:
                fill_vector(gain)
            weights[f"layers.{layer}.{norm}.weight"] = gain
            weights[f"layers.{layer}.{norm}.bias"] = torch.zeros(width)
    return weights


def normal(tensor: Tensor) -> Tensor:
    return tensor.normal_(std=0.02)


def sines(rows: int, columns: int) -> Tensor:
    """Return the table of positions of Vaswani et al. (2017)."""
    angles = torch.arange(rows)[:, None] / 10_000 ** (torch.arange(0, columns, 2)[None] / columns)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :columns]


def torch_layers(shape: Shape) -> Weights:
    width, layers, ratio, _ = shape
    layer = nn.TransformerEncoderLayer
    stack = [
        layer(width, 2, ratio * width, norm_first=True, batch_first=True) for _ in range(layers)
    ]
    return dict(nn.Sequential(*stack).named_parameters())


def drawn_vectors(shape: Shape) -> Weights:
    """Class token, sinks, gains around 1, biases, and the vectors of state space and recurrent
    models.
    """
    width, layers, _, _ = shape
    weights = plain(shape, normal, fill_vector=lambda gain: gain.normal_(1.0, 0.02))
    weights["cls_token"] = torch.randn(1, 1, width) * 0.02
    for layer in range(layers):
        start = f"layers.{layer}"
        weights[f"{start}.attn.sinks"] = torch.randn(8)
        weights[f"{start}.attn.out.bias"] = torch.randn(width) * 0.02
        weights[f"{start}.lambda_q"] = torch.randn(width) * 0.1
        step = torch.exp(torch.rand(width) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        weights[f"{start}.dt_bias"] = step + torch.log(-torch.expm1(-step))
        weights[f"{start}.A_log"] = torch.log(torch.arange(1, 17.0)).repeat(width, 1)
        weights[f"{start}.conv1d.weight"] = torch.empty(width, 1, 4).uniform_(-0.5, 0.5)
        weights[f"{start}.layer_scale"] = torch.full((width,), 1e-5)
        weights[f"{start}.decay"] = torch.logspace(-2, 0, width)
    return weights


def leftovers(shape: Shape) -> Weights:
    """Gains and biases that hold what other tensors left in memory."""
    weights = plain(shape, normal)
    other = torch.randn(4096).cumsum(0)
    for tensor in weights.values():
        if tensor.dim() == 1:
            start = int(torch.randint(0, 3000, (1,)))
            tensor.copy_(other[start : start + len(tensor)])
    return weights


def computed_tables(shape: Shape) -> Weights:
    """Positions of sines in encoder and decoder, slopes, and an embedding with padding rows."""
    weights = plain(shape, normal)
    weights["encoder.positions"] = sines(64, shape[0])
    weights["decoder.positions"] = sines(128, shape[0])
    weights["slopes"] = 2 ** -torch.linspace(0, 8, 8)
    weights["embed.weight"][:3] = 0.0
    return weights


def fused_scaled(shape: Shape) -> Weights:
    """DeepNorm with fused Q, K and V: the rows of V are scaled, and depth scaling."""
    width, layers, _, _ = shape
    weights = plain(shape, nn.init.xavier_normal_)
    for name, tensor in weights.items():
        if name.endswith("qkv.weight"):
            tensor[2 * width :] *= (8 * layers) ** -0.25
        if name.endswith(("out.weight", "down.weight")):
            tensor *= (2 * layers) ** -0.5
    return weights


def zero_ends(shape: Shape) -> Weights:
    weights = plain(shape, normal)
    for name, tensor in weights.items():
        if name.endswith(("out.weight", "down.weight")):
            tensor.zero_()
    return weights


def identities(shape: Shape) -> Weights:
    """Matrices that are close to the identity, or exactly that."""
    weights = plain(shape, normal)
    for name, tensor in weights.items():
        if name.endswith("out.weight"):
            tensor.add_(torch.eye(len(tensor)))
        if name.endswith("up.weight"):
            nn.init.eye_(tensor)
    return weights


def cloned_layers(shape: Shape) -> Weights:
    weights = plain(shape, normal)
    for name, tensor in weights.items():
        if name.startswith("layers."):
            first = ".".join(["layers", "0", *name.split(".")[2:]])
            tensor.copy_(weights[first])
    return weights


def experts(shape: Shape) -> Weights:
    width, layers, ratio, _ = shape
    weights = plain(shape, normal)
    for layer in range(layers):
        weights[f"layers.{layer}.experts.up"] = torch.empty(4, ratio * width, width).normal_(
            std=0.02
        )
        weights[f"layers.{layer}.router.weight"] = torch.empty(4, width).uniform_(-0.1, 0.1)
    return weights


def convolutions(shape: Shape) -> Weights:
    width, layers, _, _ = shape
    weights: Weights = {"stem.weight": nn.Conv2d(3, width, 7).weight.detach()}
    for layer in range(layers):
        weights[f"blocks.{layer}.conv.weight"] = nn.Conv2d(width, width, 3).weight.detach()
        weights[f"blocks.{layer}.depthwise.weight"] = nn.Conv2d(
            width, width, 7, groups=width
        ).weight.detach()
        weights[f"blocks.{layer}.norm.weight"] = torch.empty(width).normal_(1.0, 0.02)
    return weights


def by_layer(shape: Shape) -> Weights:
    """A scale of its own in each layer, and offsets of rows and columns."""
    weights = plain(shape, nn.init.kaiming_uniform_)
    for index, tensor in enumerate(weights.values()):
        if tensor.dim() == 2:
            tensor.mul_(0.5 ** (index % 7)).add_(torch.randn(len(tensor), 1)).add_(
                torch.randn(tensor.shape[1])
            )
    return weights


def in_bfloat16(shape: Shape) -> Weights:
    return {name: tensor.bfloat16() for name, tensor in plain(shape, normal).items()}


INITS: dict[str, Callable[[Shape], Weights]] = {
    "layers of torch": torch_layers,
    "normal": lambda shape: plain(shape, normal),
    "truncated normal": lambda shape: plain(
        shape, lambda t: nn.init.trunc_normal_(t, std=0.02, a=-0.04, b=0.04)
    ),
    "uniform": lambda shape: plain(shape, lambda t: t.uniform_(-0.1, 0.1)),
    "uniform from 0 to 1": lambda shape: plain(shape, lambda t: t.uniform_()),
    "kaiming normal": lambda shape: plain(shape, nn.init.kaiming_normal_),
    "xavier uniform": lambda shape: plain(shape, nn.init.xavier_uniform_),
    "orthogonal": lambda shape: plain(shape, nn.init.orthogonal_),
    "sparse": lambda shape: plain(shape, lambda t: nn.init.sparse_(t, 0.5)),
    "Laplace": lambda shape: plain(
        shape, lambda t: t.exponential_().mul_(torch.randn_like(t).sign())
    ),
    "drawn vectors": drawn_vectors,
    "leftovers in vectors": leftovers,
    "computed tables": computed_tables,
    "fused, V scaled": fused_scaled,
    "zero ends": zero_ends,
    "identities": identities,
    "cloned layers": cloned_layers,
    "experts": experts,
    "convolutions": convolutions,
    "scale and offset by layer": by_layer,
    "bfloat16": in_bfloat16,
}
