"""A probe that begins with the top vectors of the last one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.measure.branch_norms import Effort
from jacdiag.measure.sublayer_norms import measure_group
from jacdiag.monitor.warm_start import TopVectors, WarmSolver
from jacdiag.records import SublayerRecord


class Steep(nn.Module):
    """A residual branch with a slope, in two factors: their product may leave the range."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.linear(x) * self.slope) * self.slope


def probe(site: jacdiag.Sublayer, memory: TopVectors) -> SublayerRecord:
    effort = Effort(max_products=24, solver=partial(WarmSolver, memory=memory))
    (record,) = measure_group([site], effort, None, "trained", lambda names: {})
    return record


@pytest.mark.parametrize("slope", [1.0, 1e25])
def test_the_second_probe_says_what_the_first_said(slope: float) -> None:
    """The branch of zeros is finite. With the large slope its products are not."""
    torch.manual_seed(0)
    [site] = jacdiag.sites(Steep(slope), torch.zeros(2, 3, 6))
    memory = TopVectors()
    first = probe(site, memory)
    second = probe(site, memory)
    if slope > 1.0:
        for record in (first, second):
            assert record.branch_norm is not None
            assert "not finite" in record.branch_norm.stop
            assert not record.branch_norm.converged
        return

    # The branch is linear: its values on unit vectors are the columns of its matrix.
    columns = [site.branch(row.expand(2, 3, 6))[0, 0] for row in torch.eye(6)]
    truth = float(torch.linalg.svdvals(torch.stack(columns).double())[0])
    assert first.branch_norm is not None and second.branch_norm is not None
    assert first.branch_norm.lower <= second.branch_norm.lower <= truth * (1 + 1e-6)
    assert truth <= second.branch_norm.upper
