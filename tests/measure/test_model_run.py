"""The graphs of branches in the model's own run: the same Jacobian as a branch that is run by
itself, the digits of the recorded forward, and no trust in a graph that was spoiled.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from menagerie import CORE, STYLES, Specimen
from torch import Tensor, nn

import jacdiag
from jacdiag.measure import model_run, replay_check
from jacdiag.measure.linearization import Linearised, linearise
from jacdiag.measure.replay_check import ReplayCheck
from jacdiag.sources import gpt
from jacdiag.trace import Sites

SPECIMENS = [specimen for specimen in [*CORE, *STYLES] if specimen.groups()]


def sites_of(specimen: Specimen, dtype: torch.dtype) -> Sites:
    args, kwargs = specimen.arguments()
    return jacdiag.sites(specimen.build().to(dtype), *args, dtype=dtype, **kwargs)


def gpt_sites(layers: int = 2, dtype: torch.dtype = torch.float64) -> Sites:
    torch.manual_seed(0)
    model: Any = gpt.build(
        "vanilla", n_layer=layers, n_embd=16, n_head=2, vocab_size=32, block_size=8
    )
    return jacdiag.sites(model.to(dtype), torch.randint(32, (2, 8)), dtype=torch.float64)


def difference(first: Linearised, second: Linearised) -> float:
    """The largest relative difference of two products with each, of the same random vectors."""
    assert first.dims == second.dims
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for way in ("pull", "push"):
            size = first.branch.codomain if way == "pull" else first.branch.domain
            vector = torch.randn(
                first.branch.problems, size, generator=generator, dtype=first.branch.dtype
            )
            one, other = (getattr(item.branch, way)(vector) for item in (first, second))
            scale = float(other.norm()) or 1.0
            worst = max(worst, float((one - other).norm()) / scale)
    return worst


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_a_graph_of_the_run_gives_the_jacobian_of_the_branch_alone(specimen: Specimen) -> None:
    sites = sites_of(specimen, torch.float64)
    check = ReplayCheck(sites)
    for site in sites:
        is_kept = site.index in check._graphs
        has_gain_before = site.input_norm is not None and site.input_norm.gain_before is not None
        assert is_kept is not (site.nested or has_gain_before), site
        assert difference(check.linearise(site), linearise(site)) < 1e-12
    assert max(check.finish().values(), default=0.0) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("specimen", SPECIMENS[::3], ids=str)
def test_the_run_has_the_digits_of_the_recorded_forward(
    specimen: Specimen, dtype: torch.dtype
) -> None:
    sites = sites_of(specimen, dtype)
    check = ReplayCheck(sites)
    assert check._graphs
    for index, graph in check._graphs.items():
        assert torch.equal(graph.y, sites[index].value)


def test_a_branch_with_a_graph_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = gpt_sites()
    check = ReplayCheck(sites)
    for site in sites:
        monkeypatch.setattr(site, "branch", None)
        monkeypatch.setattr(site, "core_of_norm", None)
        assert check.linearise(site).products == 1
    assert set(check.finish()) == {site.name for site in sites}


def test_products_of_several_vectors_are_made_together_from_a_graph() -> None:
    [site, *_] = sites = gpt_sites()
    by_graph, alone = ReplayCheck(sites).linearise(site), linearise(site)
    vectors = [torch.randn(2, 128, dtype=torch.float64) for _ in range(3)]
    for way in ("pull", "push"):
        found = by_graph.owned[0].products_of(way, vectors)  # type: ignore[union-attr, arg-type]
        true = alone.owned[0].products_of(way, vectors)  # type: ignore[union-attr, arg-type]
        for one, other in zip(found, true, strict=True):
            torch.testing.assert_close(one, other)
    assert by_graph.owned[0].stacks  # type: ignore[union-attr]


# -- room ------------------------------------------------------------------------------------------
def test_without_room_no_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = gpt_sites()
    values = [value for value in sites.graph.values if value.live and value.is_float]
    held = sum(8 * torch.Size(value.shape).numel() for value in values)
    for free, is_kept in ((None, False), (2 * held - 1, False), (2 * held, True)):
        monkeypatch.setattr(model_run, "free_host_memory", lambda free=free: free)
        check = ReplayCheck(sites)
        assert bool(check._graphs) is is_kept
        assert difference(check.linearise(sites[0]), linearise(sites[0])) < 1e-12
        assert max(check.finish().values()) < 1e-12


def test_weights_in_low_precision_are_not_kept_in_graphs() -> None:
    check = ReplayCheck(gpt_sites(dtype=torch.bfloat16))
    assert not check._graphs
    assert max(check.finish().values()) < 1e-9


def test_an_audit_frees_each_graph_when_it_is_done_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []
    begin = ReplayCheck.__init__
    release = ReplayCheck.release

    def noted(self: ReplayCheck, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        alive.extend(weakref.ref(graph.y) for graph in self._graphs.values())

    def counted(self: ReplayCheck, site: Any) -> None:
        release(self, site)
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(ReplayCheck, "__init__", noted)
    monkeypatch.setattr(ReplayCheck, "release", counted)
    torch.manual_seed(0)
    model: Any = gpt.build("vanilla", n_layer=3, n_embd=16, n_head=2, vocab_size=32, block_size=8)
    jacdiag.audit(model, torch.randint(32, (2, 8)))
    assert counts == [5, 4, 3, 2, 1, 0]


# -- graphs that were spoiled ----------------------------------------------------------------------
class HoldsItsInput(torch.autograd.Function):
    """x^2, whose backward reads x where torch does not see that it was written to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.x * gradient


class Reuses(nn.Module):
    """A residual block that writes over the hidden numbers of its branch once that has run."""

    def __init__(self, is_seen: bool) -> None:
        super().__init__()
        self.up, self.down, self.is_seen = nn.Linear(6, 6), nn.Linear(6, 6), is_seen

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        squared = hidden * hidden if self.is_seen else HoldsItsInput.apply(hidden)
        y = x + self.down(squared)
        target = hidden if self.is_seen else hidden.detach()
        target.mul_(3)
        return y


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_graph_that_was_written_to_is_not_trusted(is_seen: bool) -> None:
    torch.manual_seed(0)
    block = Reuses(is_seen).double()
    sites = jacdiag.sites(block, torch.randn(2, 3, 6, dtype=torch.float64), dtype=torch.float64)
    check = ReplayCheck(sites)
    assert set(check._graphs) == {0}
    linearised = check.linearise(sites[0])
    assert not check._graphs, "the branch was run by itself"
    x = sites[0].shortcut
    slope = 2 * block.up(x)
    jacobian = block.down.weight @ (slope.unsqueeze(-1) * block.up.weight)
    vector = torch.randn(*linearised.branch.push(torch.zeros(6, 6).double()).shape).double()
    true = (jacobian @ vector.reshape(2, 3, 6, 1)).reshape(6, 6)
    torch.testing.assert_close(linearised.branch.push(vector), true)
    assert max(check.finish().values()) < 1e-12


def test_an_error_of_the_graph_is_that_of_the_branch_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sites = gpt_sites()
    check = ReplayCheck(sites)
    by_itself = replay_check.linearise

    def failing(site: Any, seed: int, graph: Any = None) -> Linearised:
        if graph is not None:
            raise RuntimeError("modified by an inplace operation")
        return by_itself(site, seed)

    monkeypatch.setattr(replay_check, "linearise", failing)
    assert difference(check.linearise(sites[1]), linearise(sites[1])) < 1e-12
    assert check.finish()[sites[1].name] < 1e-12
