"""Kernels that add in another order in every run, as those of CUDA with atomics do.

A function stands in for such a kernel. Like those of torch it is the same in every run if the
deterministic algorithms are on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from menagerie.core import Pre
from menagerie.parts import MLP, Attention, Decoder, seeded, tokens
from torch import Tensor, nn

import jacdiag

Kernel = Callable[[Tensor], Tensor]


class _Kernel:
    """Return its input, times a number close to 1 that differs from call to call."""

    def __init__(self, *, difference: float, has_deterministic_form: bool) -> None:
        self.difference = difference
        self.has_deterministic_form = has_deterministic_form
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        is_fixed = self.has_deterministic_form and torch.are_deterministic_algorithms_enabled()
        if is_fixed:
            return x * 1.0
        return x * (1 + self.difference * (self.calls % 5))


class _Feed(MLP):
    """An FFN whose output passes a kernel."""

    kernel: Kernel

    def forward(self, x: Tensor) -> Tensor:
        return type(self).kernel(super().forward(x))


@pytest.fixture
def model() -> Iterator[nn.Module]:
    yield seeded(lambda: Decoder(lambda: Pre(attn=Attention, mlp=_Feed)), seed=3)


def _sites(model: nn.Module, kernel: _Kernel) -> jacdiag.Sites:
    _Feed.kernel = staticmethod(kernel)
    return jacdiag.sites(model, tokens())


def test_a_model_that_differs_by_rounding_of_a_kernel_is_measured(model: nn.Module) -> None:
    _Feed.kernel = staticmethod(_Kernel(difference=2.0**-22, has_deterministic_form=True))
    report = jacdiag.audit(model, tokens(), state="init")
    assert all(row.branch_norm is not None for row in report.sublayers)
    assert "JD905" not in {finding.code for finding in report.findings}
    (note,) = [note for note in report.notes if "deterministic kernels" in note]
    assert note.startswith("two runs differ by rounding") and "mul gives another result" in note
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_without_a_deterministic_form_stays_named(model: nn.Module) -> None:
    sites = _sites(model, _Kernel(difference=2.0**-22, has_deterministic_form=False))
    assert not sites.deterministic and "mul gives another result" in sites.culprit
    assert not any("deterministic kernels" in note for note in sites.notes)


def test_a_difference_beyond_rounding_is_no_kernel(model: nn.Module) -> None:
    """Whatever made it: norms of another function would be reported."""
    sites = _sites(model, _Kernel(difference=0.1, has_deterministic_form=True))
    assert not sites.deterministic and sites.culprit


def test_random_numbers_are_no_kernel(model: nn.Module) -> None:
    def noise(x: Tensor) -> Tensor:
        return x * (1 + 1e-6 * torch.randn_like(x))

    _Feed.kernel = staticmethod(noise)
    sites = jacdiag.sites(model, tokens())
    assert not sites.deterministic and "draws random numbers" in sites.culprit


def test_a_mode_of_the_process_is_left_as_it_was(model: nn.Module) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _sites(model, _Kernel(difference=2.0**-22, has_deterministic_form=False))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
