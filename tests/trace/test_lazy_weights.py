"""A model whose weights are read call by call gives what it gives with its weights in memory, to
the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from menagerie import ALL, CORE, Specimen
from menagerie.traced import traced
from selection import every_third
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import jacdiag
from jacdiag.trace import Sites


class Shelf(Mapping[str, Tensor]):
    """Hands out a fresh copy each time, like a file, and notes what it was asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = {
            name: p.detach().clone() for name, p in module.named_parameters(remove_duplicate=False)
        }
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def emptied(module: nn.Module) -> nn.Module:
    """A copy with its parameters on the meta device and its buffers as they are; ties stay ties."""
    empty = copy.deepcopy(module)
    made: dict[int, nn.Parameter] = {}
    for part in empty.modules():
        for key, p in part._parameters.items():
            if p is not None and id(p) not in made:
                made[id(p)] = nn.Parameter(p.detach().to("meta"))
            if p is not None:
                part._parameters[key] = made[id(p)]
    return empty


def both(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Sites, Sites, Shelf]:
    shelf = Shelf(module)
    mine = jacdiag.sites(emptied(module), *args, weights=shelf, **kwargs)
    return jacdiag.sites(module, *args, **kwargs), mine, shelf


def same(plain: Sites, stored: Sites) -> None:
    assert [(s.name, s.kind, s.placement, s.parameters) for s in plain] == [
        (s.name, s.kind, s.placement, s.parameters) for s in stored
    ]
    assert plain.coverage == stored.coverage and plain.deterministic and stored.deterministic
    for a, b in zip(plain, stored, strict=True):
        assert torch.equal(a.shortcut, b.shortcut) and torch.equal(a.value, b.value), a.name
        assert torch.equal(b.branch(b.shortcut), a.value), a.name
        assert a.independent() == b.independent(), a.name
        w = torch.randn(a.value.shape, generator=torch.Generator().manual_seed(0)).to(a.value)
        assert torch.equal(pull(a, w), pull(b, w)), a.name


def pull(site: Any, w: Tensor) -> Tensor:
    with torch.enable_grad():
        x = site.shortcut.detach().clone().requires_grad_()
        return torch.autograd.grad(site.branch(x), x, w, allow_unused=True, materialize_grads=True)[
            0
        ]


@pytest.mark.parametrize("specimen", every_third(ALL, always=CORE.__contains__), ids=str)
def test_lazy_weights_give_the_same_sites_for_each_specimen(specimen: Specimen) -> None:
    args, kwargs = specimen.arguments()
    model = specimen.build()
    stored = jacdiag.sites(emptied(model), *args, weights=Shelf(model), **kwargs)
    same(traced(specimen.name, torch.float32), stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_lazy_weights_give_the_same_sites_in_each_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    same(*both(Odd().to(dtype), torch.randn(2, 5, 8))[:2])


class Odd(nn.Module):
    """Asks its weights for everything that code may ask a weight for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.wide = weight_norm(nn.Linear(8, 8))
        self.rows = nn.Embedding(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        assert (
            not self.a.weight.is_meta
            and self.a.weight.device == x.device
            and self.a.weight.dtype == x.dtype
        )
        assert self.a.weight.shape == (16, 8) and self.a.weight.size(0) == len(self.a.weight) == 16
        places = torch.arange(x.shape[1], device=self.a.weight.device)
        x = x + self.rows(places)
        h = self.norm(x).to(self.a.weight.dtype) @ self.a.weight.T + self.a.bias.data
        x = x + h.relu() @ self.b.weight.detach().t()
        return x + self.wide(x * self.scale.clamp(max=2.0).exp()).tanh()


def test_hooks_of_a_model_without_values_are_its_own() -> None:
    """Nobody can run such a guest to compare: its hooks are part of it."""
    torch.manual_seed(0)
    model = Odd()
    model.a.register_forward_hook(lambda module, args, out: 2 * out)
    model.b.register_forward_hook(lambda module, args, out: 3 * out)
    plain, stored, _ = both(model, torch.randn(2, 5, 8))
    same(plain, stored)


def test_a_weight_that_the_code_writes_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.counter = (
                nn.Linear(4, 4),
                nn.Parameter(torch.zeros(1), requires_grad=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            self.counter.add_(1)
            return x + self.f(x) * self.counter

    torch.manual_seed(0)
    plain, stored, shelf = both(Writes(), torch.randn(2, 3, 4))
    same(plain, stored)
    assert float(shelf.tensors["counter"]) == 0


def test_a_segment_reads_the_weights_that_it_runs_and_no_others() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    _, stored, shelf = both(
        nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 4, 8)
    )
    site = stored.named("layers.1.self_attn")
    shelf.asked.clear()
    site.branch(site.shortcut)
    assert shelf.asked and all(name.startswith("layers.1.") for name in shelf.asked)
    assert not any("linear2" in name for name in shelf.asked)


def test_a_graph_through_the_whole_model_keeps_no_weight() -> None:
    """It reads them again when the gradient passes; the graph itself holds activations only."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    _, stored, shelf = both(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 4, 8)
    )
    replayer = stored.replayer
    first = replayer.spot_of(stored.raw[0].shortcut, 0)
    last = replayer.spot_of(stored.raw[-1].output, 0)
    x = stored[0].shortcut.clone().requires_grad_()
    with torch.enable_grad(), replayer.whole_graph():
        y = replayer.segment(0, first, last)(x)
        before = len(shelf.asked)
        y.sum().backward()
    assert {n for n in shelf.asked[before:] if "linear" in n and "weight" in n} == {
        f"layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)
    }


def test_a_graph_through_the_whole_model_keeps_no_zeros() -> None:
    """The transpose of a pull is taken at zero: every cotangent of it is a zero that need not be
    held.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 2, 128, norm_first=True, batch_first=True)
    _, stored, _ = both(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 32, 64)
    )
    replayer, kept = stored.replayer, list[torch.Tensor]()
    pack = replayer.raisings._pack

    def noted(saved: Tensor) -> object:
        packed = pack(saved)
        kept.extend([packed] if isinstance(packed, Tensor) else [])
        return packed

    replayer.raisings._pack = noted  # type: ignore[method-assign]
    first, last = (
        replayer.spot_of(stored.raw[0].shortcut, 0),
        replayer.spot_of(stored.raw[-1].output, 0),
    )
    x = stored[0].shortcut.clone().requires_grad_()
    with torch.enable_grad(), replayer.whole_graph():
        y = replayer.segment(0, first, last)(x)
        w = torch.zeros_like(y).requires_grad_()
        (pulled,) = torch.autograd.grad(y, x, w, create_graph=True)
    assert kept and all(bool(t.any()) for t in kept if t.numel() >= 4096)
    u, v = torch.randn_like(x), torch.randn_like(y)
    (pushed,) = torch.autograd.grad(pulled, w, u, retain_graph=True)
    (back,) = torch.autograd.grad(y, x, v)
    assert float((pushed * v).sum()) == pytest.approx(float((u * back).sum()), rel=1e-4)


def test_a_weight_that_is_not_finite_is_named() -> None:
    torch.manual_seed(0)
    model = Odd()
    with torch.no_grad():
        model.b.weight[3, 3] = float("nan")
    shelf = Shelf(model)
    found = jacdiag.sites(emptied(model), torch.randn(2, 5, 8), weights=shelf)
    assert found.skeleton.non_finite() == ["b.weight"]


def test_reading_is_done_outside_of_transforms() -> None:
    """Inside one of torch.func a new tensor is a wrapper without memory: nothing could be read into
    it.
    """
    torch.manual_seed(0)

    class Disk(Shelf):
        def __getitem__(self, name: str) -> Tensor:
            made = torch.empty_like(self.tensors[name])
            made.numpy()[...] = self.tensors[name].numpy()
            return made

    model = Odd()
    site = jacdiag.sites(emptied(model), torch.randn(2, 5, 8), weights=Disk(model))[0]
    value, _ = torch.func.vjp(site.branch, site.shortcut)
    assert torch.equal(value, site.value)
