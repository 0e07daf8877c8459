"""Low-rank additions are found by their use: W x + B (A x), whatever the names are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jacdiag
from jacdiag.records import Report
from jacdiag.trace.discovery.low_rank import LowRankPair, find_low_rank_pairs

WIDTH = 16
RANK = 4

Combine = Callable[["Adapted", Tensor], Tensor]


class Adapted(nn.Module):
    def __init__(self, combine: Combine) -> None:
        super().__init__()
        self.base = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.narrow = nn.Parameter(0.02 * torch.randn(RANK, 2 * WIDTH))
        self.widen = nn.Parameter(torch.zeros(WIDTH, RANK))
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)


class Block(nn.Module):
    def __init__(self, combine: Combine) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = Adapted(combine)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, combine: Combine) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(combine) for _ in range(3)])
        for block in self.blocks:
            nn.init.normal_(block.up.weight, std=0.02)
            nn.init.normal_(block.down.base.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def plain(module: Adapted, x: Tensor) -> Tensor:
    return module.base(x) + (x @ module.narrow.T) @ module.widen.T


def scaled(module: Adapted, x: Tensor) -> Tensor:
    low = F.linear(F.dropout(x, 0.1, training=False), module.narrow)
    return module.base(x) + 2.0 * F.linear(low, module.widen)


def non_linear(module: Adapted, x: Tensor) -> Tensor:
    return module.base(x) + F.gelu(x @ module.narrow.T) @ module.widen.T


def another_input(module: Adapted, x: Tensor) -> Tensor:
    return module.base(x) + (x.square() @ module.narrow.T) @ module.widen.T


def inputs() -> Tensor:
    return torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("combine", [plain, scaled])
def test_low_rank_additions_are_found_by_their_use(combine: Combine) -> None:
    pairs = find_low_rank_pairs(jacdiag.sites(Model(combine), inputs()))
    expected = []
    for index in range(3):
        path = f"blocks.{index}.down"
        expected.append(LowRankPair(f"{path}.narrow", f"{path}.widen", f"{path}.base.weight"))
    assert pairs == expected


@pytest.mark.parametrize("combine", [non_linear, another_input])
def test_what_is_not_linear_or_reads_something_else_is_none(combine: Combine) -> None:
    assert find_low_rank_pairs(jacdiag.sites(Model(combine), inputs())) == []


def audit(model: nn.Module) -> Report:
    return jacdiag.audit(model, inputs(), products=False, state="init", remedies="none")


def named_by(report: Report) -> set[str]:
    return {finding.code for finding in report.findings if finding.level != "info"}


def test_factors_are_judged_as_those_of_an_adapter() -> None:
    # 1. One factor is zero: nothing is wrong.
    model = Model(plain)
    assert not named_by(audit(model)) & {"JD203", "JD204", "JD205", "JD208", "JD215"}

    # 2. One layer has both drawn.
    nn.init.normal_(model.blocks[1].down.widen, std=0.02)
    report = audit(model)
    assert "JD215" in named_by(report) and not named_by(report) & {"JD203", "JD204", "JD205"}
    [finding] = [finding for finding in report.findings if finding.code == "JD215"]
    assert finding.fix == "set blocks.1.down.widen to zero"

    # 3. Both are zero in every layer.
    model = Model(plain)
    for block in model.blocks:
        nn.init.zeros_(block.down.narrow)
    [finding] = [finding for finding in audit(model).findings if finding.code == "JD215"]
    assert "no gradient can reach either" in finding.what
