"""A norm of channels-first data works on a transposed shortcut, which may have the shape of the
shortcut itself.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacdiag
from jacdiag.spectra import dense_norm


class ChannelsFirst(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.bias = (
            nn.Parameter(torch.rand(channels) + 0.5),
            nn.Parameter(torch.rand(channels)),
        )
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.gain, self.bias)
        return x + self.down(F.gelu(self.up(h))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
@pytest.mark.parametrize("decide", [False, True])
def test_norms_hold_the_dense_ones(size: tuple[int, int], decide: bool) -> None:
    torch.manual_seed(0)
    model, x = ChannelsFirst(4).double(), torch.randn(2, 4, *size, dtype=torch.float64)
    [site] = jacdiag.sites(model, x)
    assert (site.kind, site.placement, site.feature_dim, site.token_wise) == ("mlp", "pre", 1, True)
    [row] = jacdiag.audit(model, (x,), dtype="float64", decide=decide, state="init").sublayers
    for interval, fn in ((row.branch_norm, site.branch), (row.residual_norm, site.residual)):
        assert interval is not None
        assert interval.lower <= dense_norm(fn, x) <= interval.upper
    assert row.core_norm is None and "laid out otherwise" in row.notes["core_norm"]
    assert row.shortcut_std is not None
    assert row.shortcut_std.max == pytest.approx(float(x.std(1, correction=0).max()), rel=1e-12)
