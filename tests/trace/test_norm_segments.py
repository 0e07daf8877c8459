"""A norm is tested by its own module alone; it is the same norm as by the block that holds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.spectra import dense_norm

RUNS: list[str] = []


class Counted(nn.Linear):
    """A linear map that notes every run."""

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append("run")
        return super().forward(x).tanh()


class HandWritten(nn.Module):
    """An RMSNorm of several calls, with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Two sub-layers in one module; the norm of the second follows a matrix product."""

    def __init__(self, norm: type[nn.Module], is_module: bool) -> None:
        super().__init__()
        self.n1, self.n2 = norm(8), norm(8)
        self.first, self.second = Counted(8, 8), nn.Linear(8, 8)
        self.is_module = is_module

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.n1(x))
        # A norm that is no module call of its own is run by the block.
        normed = self.n2(x) if self.is_module else self.n2.forward(x)
        return x + self.second(normed).tanh()


@pytest.mark.parametrize("norm", [nn.LayerNorm, HandWritten])
@pytest.mark.parametrize("is_module", [True, False])
def test_a_norm_that_is_a_module_does_not_run_what_comes_before_it(
    norm: type[nn.Module], is_module: bool
) -> None:
    torch.manual_seed(0)
    block = Block(norm, is_module).double()
    RUNS.clear()
    first, second = jacdiag.sites(block, torch.randn(2, 3, 8, dtype=torch.float64))

    # One run is recorded, and one is kept.
    assert (len(RUNS) == 2) == is_module
    for site in (first, second):
        assert site.placement == "pre" and site.input_norm is not None
        assert torch.equal(site.core(site.norm(site.shortcut)), site.value)
        ratio = site.norm(3 * site.shortcut) / site.normalized
        assert ratio.sub(1).abs().max() < 1e-4, "a norm does not see the scale"
        assert dense_norm(site.branch, site.shortcut) > 0
