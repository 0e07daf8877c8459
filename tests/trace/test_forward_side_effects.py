"""Code that draws random numbers, writes to its weights or rebuilds itself when it runs: the guest
stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import jacdiag
from jacdiag.measure.replay_check import verify_replay

D = 8


def build(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return kind().double(), torch.randn(2, 5, D, dtype=torch.float64)


class DrawsNumbers(nn.Module):
    """Draws random numbers in eval mode, before and inside its branches (hash buckets, random
    attention blocks).
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand(1) * self.up(x)
        return x + self.down(F.relu(x) * torch.randn_like(x))


def test_random_numbers_are_given_back_and_the_same_in_every_run() -> None:
    model, x = build(DrawsNumbers)
    before = torch.get_rng_state()
    sites = jacdiag.sites(model, x)
    again = jacdiag.sites(model, x)
    for site, other in zip(sites, again, strict=True):
        assert torch.equal(site.branch(site.shortcut), site.value)
        assert torch.equal(site.value, other.value)
    assert torch.equal(torch.get_rng_state(), before)
    assert max(verify_replay(sites).values()) <= 1e-12
    assert not sites.deterministic, "with other numbers it gives another result"


class RescalesItsWeights(nn.Module):
    """Divides a weight in place when it first runs in eval mode (RWKV): the guest's own must not be
    touched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.rescaled = nn.Linear(D, D), nn.Linear(D, D), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.rescaled:
            with torch.no_grad():
                self.down.weight.div_(2)
            self.rescaled = True
        return x + self.down(self.up(x).relu())


def test_a_forward_that_writes_to_weights_writes_to_copies() -> None:
    model, x = build(RescalesItsWeights)
    states = {name: (p.clone(), p._version, p.data_ptr()) for name, p in model.named_parameters()}
    [site] = jacdiag.sites(model, x)
    assert torch.equal(site.branch(site.shortcut), site.value)
    assert not model.rescaled
    for name, parameter in model.named_parameters():
        value, version, place = states[name]
        assert torch.equal(parameter, value) and (parameter._version, parameter.data_ptr()) == (
            version,
            place,
        )
    with torch.no_grad():
        assert torch.equal(x + site.value, model(x))


class SwapsItsModules(nn.Module):
    """Chooses another kind of mixing when it first sees a short input, and keeps to it
    (BigBird).
    """

    class Long(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.roll(1, 1)

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, h: Tensor) -> Tensor:
            return self.inner(h.flip(1))

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.down = self.Long(), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 9 and isinstance(self.mix, self.Long):
            self.mix = self.Short()
        return x + self.down(self.mix(self.up(x)))


def test_a_forward_that_swaps_its_modules_is_recorded_as_it_stays() -> None:
    model, x = build(SwapsItsModules)
    [site] = jacdiag.sites(model, x)
    assert isinstance(model.mix, SwapsItsModules.Long)
    assert (site.kind, site.token_wise) == ("mixer", False)
    assert torch.equal(site.branch(site.shortcut), site.value)
    with torch.no_grad():
        assert torch.equal(x + site.value, model(x))


def test_default_dtype_is_given_back() -> None:
    class Default(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(x * torch.full((), torch.finfo(x.dtype).max)).relu()

    x = torch.randn(1, 3, D)
    for dtype in (torch.float32, torch.float64):
        [site] = jacdiag.sites(Default(), x, dtype=dtype)
        assert site.value.dtype is dtype and torch.get_default_dtype() is torch.float32
