"""Residual wrappers that get their sub-layer as an argument, as the Annotated Transformer has
it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jacdiag

WIDTH = 8


class Connection(nn.Module):
    """Adds a sub-layer that comes in as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, sublayer: nn.Module) -> Tensor:
        return x + sublayer(self.norm(x))


class Layer(nn.Module):
    """Passes its sub-layers to the wrappers: one as a module, one in a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.connections = nn.ModuleList([Connection(), Connection()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.connections[0](x, lambda h: self.mixer(h).tanh())
        return self.connections[1](x, self.feed_forward)


class Model(nn.Module):
    """Two such layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def dense_norms(model: Model, ids: Tensor) -> list[float]:
    """Return the norm of every branch, from a dense Jacobian of the formula."""
    norms = []
    x = model.embedding(ids).detach()
    for layer in model.layers:
        mixer_norm, ffn_norm = (connection.norm for connection in layer.connections)
        branches = [
            lambda h, layer=layer, norm=mixer_norm: layer.mixer(norm(h)).tanh(),
            lambda h, layer=layer, norm=ffn_norm: layer.feed_forward(norm(h)),
        ]
        for branch in branches:
            jacobian = torch.autograd.functional.jacobian(branch, x)
            matrix = jacobian.reshape(x.numel(), x.numel())
            norms.append(float(torch.linalg.svdvals(matrix)[0]))
            x = (x + branch(x)).detach()
    return norms


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms_of_sublayers_that_are_passed_in(dtype: str) -> None:
    torch.manual_seed(0)
    model = Model().eval()
    ids = torch.tensor([[1, 5, 3]])

    report = jacdiag.audit(model, ids, dtype=dtype, decide=False, remedies="none")

    assert [sublayer.placement for sublayer in report.sublayers] == ["pre"] * 4
    assert report.model.covered_parameters == report.model.parameters
    expected = dense_norms(model.double(), ids)
    for sublayer, norm in zip(report.sublayers, expected, strict=True):
        bounds = sublayer.branch_norm
        assert bounds.lower * (1 - 1e-5) <= norm <= bounds.upper * (1 + 1e-5), sublayer.name
        assert bounds.upper < 1.1 * norm, sublayer.name
