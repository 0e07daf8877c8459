"""A model has "no norm" only if no branch may hold one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.records.placement_words import (
    NO_NORM_AT_ENDS,
    placement_in_words,
    placements_in_words,
)
from jacdiag.render.content.sentences import header

pytestmark = pytest.mark.check("measure")

WIDTH = 6


def by_hand(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    """Two branches, each with a function between its two products."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, WIDTH)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(self.inner(torch.tanh(up(x))))
        return x


def audited(inner: Callable[[Tensor], Tensor]) -> jacdiag.Report:
    ids = torch.arange(8).reshape(2, 4)
    return jacdiag.audit(Net(inner), ids, state="init", remedies="none")


@pytest.mark.parametrize(
    "inner",
    [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), by_hand],
    ids=["layer norm", "rms norm", "by hand"],
)
def test_a_norm_inside_the_branches_is_not_denied(inner: Callable[[Tensor], Tensor]) -> None:
    report = audited(inner)
    assert {row.placement for row in report.sublayers} == {"none"}
    assert {row.norm_inside for row in report.sublayers} == {True}
    assert placements_in_words(report.sublayers) == [NO_NORM_AT_ENDS]
    assert header(report)[0][-1] == f"init, {NO_NORM_AT_ENDS}"
    notes = {rule.code: rule.note for rule in report.rules}
    assert notes["JD101"] == f"the paper states it for pre-norm; this model has {NO_NORM_AT_ENDS}"
    why = report.sublayers[0].notes["norm_gain"]
    assert why == "no norm was found at the beginning of the branch (placement none)"


def test_a_model_without_norms_has_none() -> None:
    report = audited(torch.relu)
    assert {row.norm_inside for row in report.sublayers} == {False}
    assert header(report)[0][-1] == "init, no norm"
    notes = {rule.code: rule.note for rule in report.rules}
    assert notes["JD101"] == "the paper states it for pre-norm; this model has no norm"
    why = report.sublayers[0].notes["norm_gain"]
    assert why == "the branch does not begin with a norm (placement none)"


def test_one_norm_in_one_branch_is_enough() -> None:
    sites = jacdiag.sites(Net(torch.relu), torch.arange(8).reshape(2, 4))
    rows = list(audited(torch.relu).sublayers) + list(audited(by_hand).sublayers)
    assert placements_in_words(rows) == [NO_NORM_AT_ENDS]
    assert placement_in_words(rows[0]) == "no norm"
    assert "no norm, " in str(sites[0])
    sites = jacdiag.sites(Net(by_hand), torch.arange(8).reshape(2, 4))
    assert "no norm found at either end, " in str(sites[0])
