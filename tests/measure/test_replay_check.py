"""The check of the replay: what it compares with, and what it holds meanwhile."""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar

import pytest
import torch
from menagerie import CORE, STYLES, Specimen
from torch import Tensor, nn

import jacdiag
from jacdiag.measure import replay_check
from jacdiag.measure.replay_check import verify_replay
from jacdiag.sources import gpt

SPECIMENS = [specimen for specimen in [*CORE, *STYLES] if specimen.groups()]


@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_every_branch_has_the_jacobian_that_it_has_within_the_model(specimen: Specimen) -> None:
    args, kwargs = specimen.arguments()
    model: Any = specimen.build().double()
    sites = jacdiag.sites(model, *args, dtype=torch.float64, **kwargs)
    errors = verify_replay(sites)
    assert errors.keys() == {site.name for site in sites if not site.nested}
    assert max(errors.values()) < 1e-12


class TwoStreams(nn.Module):
    """A norm of the stream is a shortcut of its own, and the beginning of another branch."""

    def __init__(self, has_own_norm: bool) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(8), nn.LayerNorm(8) if has_own_norm else nn.Identity()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.f(h).tanh()
        return x + (h + self.g(self.other(h)).tanh())


@pytest.mark.parametrize("has_own_norm", [False, True])
def test_a_norm_of_the_stream_may_be_a_shortcut_too(has_own_norm: bool) -> None:
    torch.manual_seed(0)
    model = TwoStreams(has_own_norm).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    errors = verify_replay(jacdiag.sites(model, x, dtype=torch.float64))
    assert len(errors) >= 2 and max(errors.values()) < 1e-12


class Remembers(nn.Module):
    """Goes on with the numbers of an earlier run, which stand outside of all modules, if this run
    gives the same: they have no graph.
    """

    earlier: ClassVar[list[Tensor]] = []

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.earlier and torch.equal(self.earlier[0], y.detach()):
            y = self.earlier[0] + 0 * y
        self.earlier[:] = [y.detach()]
        return x + y


def test_a_branch_that_is_another_within_the_model_is_named() -> None:
    """Run by itself, its module has the Jacobian that its numbers have; within the model, none."""
    torch.manual_seed(0)
    report = jacdiag.audit(Remembers(), torch.randn(2, 3, 8), state="init")
    (row,) = report.sublayers
    assert row.branch_norm is not None and row.branch_norm.lower > 0.1
    assert report.settings["checks"]["replay"] == {row.name: 1.0}


def test_the_run_of_the_model_holds_the_graph_of_one_branch_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def most_alive(layers: int) -> int:
        """How many tensors are kept for a backward at once, at most."""
        torch.manual_seed(0)
        model: Any = gpt.build(
            "vanilla", n_layer=layers, n_embd=16, n_head=2, vocab_size=32, block_size=8
        )
        sites = jacdiag.sites(model, torch.randint(32, (2, 8)))
        alive: list[weakref.ref[Any]] = []
        counts: list[int] = []
        pull_back = replay_check._ModelPulls._pull_back

        class Packed:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor.detach()  # an output would hold its own graph

        def pack(tensor: Tensor) -> Packed:
            packed = Packed(tensor)
            alive.append(weakref.ref(packed))
            return packed

        def counted(self: Any, index: int, term: Tensor) -> None:
            pull_back(self, index, term)
            gc.collect()
            counts.append(sum(ref() is not None for ref in alive))

        monkeypatch.setattr(replay_check._ModelPulls, "_pull_back", counted)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            replay_check.ReplayCheck(sites)
        monkeypatch.undo()
        assert len(counts) == 2 * layers
        return max(counts)

    assert 0 < most_alive(6) == most_alive(2)
