"""One small model per mechanism of the tracer that real architectures need; what must be found is
written beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.measure.replay_check import verify_replay

D = 8


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D))


class RoutedWeights(nn.Module):
    """Each expert's matrix is picked from one parameter by an index that depends on the data: a
    weight nevertheless.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(D), nn.Linear(D, 3)
        self.up, self.down = (
            nn.Parameter(torch.randn(3, D, 12) / 3),
            nn.Parameter(torch.randn(3, 12, D) / 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(0, 1)
        weights, chosen = self.router(h).softmax(-1).topk(1)
        out = torch.zeros_like(h)
        for expert in chosen.unique():
            token, slot = torch.where(chosen == expert)
            rows = (h[token] @ self.up[expert]).relu() @ self.down[expert]
            out.index_add_(0, token, weights[token, slot, None] * rows)
        return x + out.view_as(x)


class GateWithStatistic(nn.Module):
    """The branch is scaled by a gate that divides by the norm of x: one number per token carries no
    shortcut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.body = nn.Linear(D, 1), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + torch.sigmoid(self.gate(x) * scale) * self.body(x).tanh()


class BiasOnTheShortcut(nn.Module):
    """x and f(x) both get a learned bias and gain before they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.bias, self.gain = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.rand(2, D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bias[0]) * self.gain[0] + (self.body(x) + self.bias[1]) * self.gain[1]


class ConvolvedValues(nn.Module):
    """Attention adds a convolution of its values to its output: positions mixed like streams, and
    no shortcut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.conv = nn.Conv2d(2, 2, (3, 1), padding=(1, 0), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / math.sqrt(D)).softmax(-1) @ v
        return x + self.out((mixed + self.conv(v)).transpose(1, 2).reshape(b, t, D))


class SharedBias(nn.Module):
    """Every layer's scores get one bias that depends on the input: a sum inside a branch, its
    shortcut from outside.
    """

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            return x + self.out((q @ k.mT + bias).softmax(-1) @ v)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Attention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        place = x[..., :1].detach()
        bias = -(place - place.mT).abs()
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Fourier(nn.Module):
    """Mixes tokens without any parameter (FNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + torch.fft.fftn(x, dim=(1, 2)).real)
        return self.norms[1](x + self.mlp(x))


class NormBehindExperts(nn.Module):
    """A norm at the branch's end, behind rows that routing permuted and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 2), nn.Parameter(torch.randn(2, D, D) / 2)
        self.gain = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(0, 1)
        weights, chosen = self.router(h).softmax(-1).topk(2)
        rows = torch.stack([h @ self.experts[0], h @ self.experts[1]], 1).gather(
            1, chosen.unsqueeze(-1).expand(-1, -1, D)
        )
        y = (rows * weights.unsqueeze(-1)).sum(1).view_as(x)
        return x + self.gain * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


class ChannelsFirst(nn.Module):
    """Post-norm on (B, C, T): the norm transposes, works, and transposes back; 1x1 convolutions are
    linear maps.
    """

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = (
                nn.Conv1d(D, 12, 1),
                nn.Conv1d(12, D, 1),
                nn.LayerNorm(D),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.norm((x + self.down(self.up(x).relu())).transpose(1, 2)).transpose(1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.Layer(), self.Layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


class ShortConvolution(nn.Module):
    """A depthwise convolution over time of a transposed shortcut: tokens meet, channels do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=1, groups=D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class UnderNoGrad(nn.Module):
    """The code switches gradients off for all cycles but the last; every cycle has a Jacobian
    nevertheless.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + self.body(x)
        return x + self.body(x)


MODELS: dict[Callable[[], nn.Module], list[tuple[str, str, bool | None]]] = {
    RoutedWeights: [("moe", "pre", True)],
    GateWithStatistic: [("mlp", "none", True)],
    BiasOnTheShortcut: [("mlp", "pre", True)],
    ConvolvedValues: [("attention", "pre", False)],
    SharedBias: [("attention", "pre", False)] * 3,
    Fourier: [("mixer", "post", False), ("mlp", "post", True)],
    NormBehindExperts: [("moe", "reordered", True)],
    ChannelsFirst: [("mlp", "post", True)] * 2,
    ShortConvolution: [("conv", "none", False)],
    UnderNoGrad: [("mlp", "pre", True)] * 2,
}
every = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def build(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return kind().double(), torch.randn(2, 5, D, dtype=torch.float64)


@every
def test_each_mechanism_gives_exactly_the_expected_sublayers(kind: Callable[[], nn.Module]) -> None:
    model, x = build(kind)
    sites = jacdiag.sites(model, x)
    assert [(s.kind, s.placement, s.token_wise) for s in sites] == MODELS[kind]
    assert not any(s.nested for s in sites) and not sites.coverage.uncovered


@every
def test_each_mechanism_replays_exactly_with_the_right_jacobian(
    kind: Callable[[], nn.Module],
) -> None:
    """Bit-exact values; J^T w is the slope of the values, and that of a run of the whole model."""
    model, x = build(kind)
    sites = jacdiag.sites(model, x)
    for site in sites:
        assert torch.equal(site.branch(site.shortcut), site.value)
        generator = torch.Generator().manual_seed(1)
        u, w = (
            torch.randn(t.shape, generator=generator, dtype=t.dtype)
            for t in (site.shortcut, site.value)
        )
        with torch.enable_grad():
            point = site.shortcut.clone().requires_grad_()
            (pulled,) = torch.autograd.grad(site.branch(point), point, w)
        ahead, behind = (site.branch(site.shortcut + sign * 1e-6 * u) for sign in (1, -1))
        slope = (ahead - behind) / 2e-6
        assert abs(float((slope * w).sum() - (pulled * u).sum())) <= 1e-6 * float(
            slope.norm() * w.norm()
        )
    assert max(verify_replay(sites).values()) <= 1e-12


@every
def test_grad_mode_is_left_alone(kind: Callable[[], nn.Module]) -> None:
    model, x = build(kind)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            before = torch.is_grad_enabled()
            sites = jacdiag.sites(model, x)
            sites[0].branch(sites[0].shortcut.clone().requires_grad_())
            assert torch.is_grad_enabled() is before
