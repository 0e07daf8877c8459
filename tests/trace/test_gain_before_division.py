"""Norms that multiply by their learned gain before they divide, as g * (x - mean) / (std + eps)."""

from __future__ import annotations

import pytest
import torch
from menagerie.parts import AnnotatedLayerNorm
from torch import Tensor, nn

import jacdiag

WIDTH = 8


class RMSGainFirst(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class GainByFunctionOfTheInput(nn.Module):
    """Not a norm: what it divides by is a softplus of one feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (1 + nn.functional.softplus(x[..., :1]))


class Layer(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


def layer(norm: nn.Module, gain: Tensor | None = None) -> tuple[Layer, Tensor]:
    """Return a layer whose gain is drawn, or given, and its input."""
    generator = torch.Generator().manual_seed(3)
    drawn = 0.5 + torch.rand(WIDTH, generator=generator)
    norm.weight = nn.Parameter(drawn if gain is None else gain)
    return Layer(norm).double().eval(), torch.randn(2, 5, WIDTH, generator=generator).double()


def test_gain_is_taken_off_the_normalised_value() -> None:
    model, x = layer(AnnotatedLayerNorm(WIDTH))
    (site,) = jacdiag.sites(model, x, dtype=torch.float64)
    assert site.placement == "pre"
    centred = x - x.mean(-1, keepdim=True)
    factor = 1 / (x.std(-1, keepdim=True) + 1e-6)
    assert torch.allclose(site.normalized, centred * factor)
    assert torch.allclose(site.norm(x), centred * factor)
    assert torch.allclose(site.input_norm.gain, factor[..., 0])
    assert torch.allclose(site.core(site.normalized), site.value)


def test_core_has_the_jacobian_of_the_branch_after_the_norm() -> None:
    model, x = layer(AnnotatedLayerNorm(WIDTH))
    (site,) = jacdiag.sites(model, x, dtype=torch.float64)
    z = site.normalized
    found = torch.autograd.functional.jacobian(site.core, z)
    true = torch.autograd.functional.jacobian(
        lambda z: model.ffn(z * model.norm.weight + model.norm.bias), z
    )
    assert torch.allclose(found, true)


def test_rms_norm_with_gain_before_division_is_recognized() -> None:
    model, x = layer(RMSGainFirst(WIDTH))
    (site,) = jacdiag.sites(model, x, dtype=torch.float64)
    assert site.placement == "pre"
    assert torch.allclose(site.normalized, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.allclose(site.core(site.normalized), site.value)


@pytest.mark.parametrize("gain", [torch.ones(WIDTH), -torch.ones(WIDTH)], ids=["ones", "negative"])
def test_constant_gain_keeps_the_core_consistent(gain: Tensor) -> None:
    model, x = layer(AnnotatedLayerNorm(WIDTH), gain)
    (site,) = jacdiag.sites(model, x, dtype=torch.float64)
    assert site.placement == "pre"
    assert torch.allclose(site.core(site.normalized), site.value)


def test_a_gain_of_zero_leaves_no_norm_to_recognise() -> None:
    gain = torch.ones(WIDTH)
    gain[2] = 0
    model, x = layer(AnnotatedLayerNorm(WIDTH), gain)
    (site,) = jacdiag.sites(model, x, dtype=torch.float64)
    assert site.placement == "none"
    assert torch.equal(site.branch(site.shortcut), site.value)


def test_what_is_no_norm_is_called_none() -> None:
    model, x = layer(GainByFunctionOfTheInput(WIDTH))
    (site,) = jacdiag.sites(model, x, dtype=torch.float64)
    assert site.placement == "none"


class PostLayer(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.norm = norm(WIDTH)
        self.norm.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.ffn(x))


@pytest.mark.parametrize("norm", [AnnotatedLayerNorm, RMSGainFirst])
def test_gain_before_division_in_post_norm_is_recognized(norm: type[nn.Module]) -> None:
    model = nn.Sequential(PostLayer(norm), PostLayer(norm), nn.Linear(WIDTH, 3)).double().eval()
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    sites = jacdiag.sites(model, x, dtype=torch.float64)
    assert [site.placement for site in sites] == ["post", "post"]
    summed = x + model[0].ffn(x)
    assert torch.allclose(sites[0].residual(x), model[0].norm(summed))
