"""Batches of one, sequences of one, and sizes that coincide: nothing may take one dimension for
another.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.errors import MeasureError
from jacdiag.spectra import JacobianOperator, dense_norm, independent_dims, spectral_norm


class Mixing(nn.Module):
    """Causal mixing of tokens without softmax: enough to couple them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[-2]
        mask = x.new_ones(tokens, tokens).tril() / tokens
        return self.out(torch.tanh(mask @ self.value(x)))


class Flattening(nn.Module):
    """OPT's block: tokens are flattened before the FFN, and the result may stay flat."""

    def __init__(self, width: int = 8, restore: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.norm, self.mix = nn.LayerNorm(width), Mixing(width)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.restore = restore

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mix(self.norm(x))
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        x = x + self.ffn(self.norm2(x))
        return x.view(shape) if self.restore else x


class Transposing(nn.Module):
    """Batch first in one half, sequence first in the other."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = (
            nn.Embedding(32, width),
            nn.LayerNorm(width),
            Mixing(width),
        )
        self.norm2, self.ffn = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mix(self.norm(x))
        x = x.transpose(0, 1)
        return x + torch.tanh(self.ffn(self.norm2(x)))


SHAPES = [(1, 6), (1, 1), (2, 1), (3, 3), (2, 8), (8, 8), (1, 8)]


@pytest.mark.parametrize("batch,seq", SHAPES)
@pytest.mark.parametrize("build", [Flattening, lambda: Flattening(restore=True), Transposing])
def test_the_end_to_end_norm_is_that_of_the_dense_jacobian(
    build: type[nn.Module], batch: int, seq: int
) -> None:
    torch.manual_seed(0)
    model = build().double().requires_grad_(False)
    ids = torch.randint(32, (batch, seq))
    report = jacdiag.audit(model, ids, tol=0.01, dtype="float64")
    assert len(report.sublayers) == 2
    assert report.network is not None
    interval = report.network.end_to_end
    assert interval is not None

    embedded = model.embed(ids).detach()

    def rest(x: Tensor) -> Tensor:
        embed, model.embed = model.embed, nn.Identity()
        try:
            return model(x)
        finally:
            model.embed = embed

    true = dense_norm(rest, embedded)
    assert interval.lower * 0.999 <= true <= interval.upper * 1.001


def test_a_swap_of_batch_and_tokens_is_not_independent() -> None:
    x = torch.randn(4, 4, 3)
    operator = JacobianOperator(lambda x: x.transpose(0, 1) * 2, x, ())
    generator = torch.Generator().manual_seed(0)
    dims = independent_dims(
        operator.pull_shaped, x.shape, operator.value.shape, -1, x.dtype, x.device, generator
    )
    assert dims == ()


def test_equal_sizes_that_are_independent_are_still_seen() -> None:
    x = torch.randn(4, 4, 3)
    operator = JacobianOperator(lambda x: x**2, x, ())
    generator = torch.Generator().manual_seed(0)
    dims = independent_dims(
        operator.pull_shaped, x.shape, operator.value.shape, -1, x.dtype, x.device, generator
    )
    assert dims == (0, 1)


def test_batch_dims_that_the_output_does_not_keep_are_refused() -> None:
    with pytest.raises(MeasureError, match="does not keep the batch dimensions"):
        spectral_norm(lambda x: x.flatten(0, 1), torch.randn(1, 6, 3), batch_dims=(0,))
    with pytest.raises(MeasureError, match="does not have"):
        spectral_norm(lambda x: x, torch.randn(2, 3), batch_dims=(5,))
    norm = spectral_norm(lambda x: 3 * x, torch.randn(2, 3), batch_dims=(-2,))
    assert norm.estimate.tolist() == pytest.approx([3.0, 3.0], rel=1e-5)
