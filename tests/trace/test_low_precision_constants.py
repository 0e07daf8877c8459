"""A model in bfloat16 whose constants are plain attributes: they are raised with its weights.

torch does not say in one way that two types differ.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacdiag
from jacdiag.errors import TraceError

WIDTH, TOKENS = 8, 4
MIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda h, w: h @ w,
    "bmm": lambda h, w: torch.bmm(h, w),
    "baddbmm": lambda h, w: torch.baddbmm(h, h, w),
    "einsum": lambda h, w: torch.einsum("btd,bde->bte", h, w),
    "conv1d": lambda h, w: F.conv1d(h.transpose(1, 2), w[0].unsqueeze(2)).transpose(1, 2),
    "linear": lambda h, w: F.linear(h, w[0]),
    "index_add": lambda h, w: h.index_add(1, torch.arange(2), w[:, :2]),
}


class Block(nn.Module):
    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.constant = torch.randn(2, WIDTH, WIDTH).bfloat16()  # no buffer
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.project(self.norm(x)), self.constant)


@pytest.mark.parametrize("name", MIXES)
def test_constants_are_raised_with_the_weights(name: str) -> None:
    torch.manual_seed(0)
    block = Block(MIXES[name]).bfloat16().eval()
    (site,) = jacdiag.sites(block, torch.randn(2, TOKENS, WIDTH).bfloat16())
    assert site.shortcut.dtype is torch.float32

    # The same in float32 throughout.
    block.float()
    block.constant = block.constant.float()
    shortcut = site.shortcut.detach()
    expected = block(shortcut) - shortcut
    assert torch.allclose(site.branch(shortcut), expected, atol=1e-5)


def test_an_error_of_the_model_about_types_is_its_own() -> None:
    def mix(h: Tensor, w: Tensor) -> Tensor:
        return h @ w.to(torch.float64)

    with pytest.raises(TraceError, match="the model's forward raised") as error:
        jacdiag.sites(Block(mix).bfloat16(), torch.randn(2, TOKENS, WIDTH).bfloat16())
    assert "h @ w.to(torch.float64)" in str(error.value)
