"""Families and sampling intervals of weights, against drawn numbers and against scipy."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from jacdiag.measure.init_distribution import Draws, draw_of, interval, truncated
from jacdiag.measure.moments import moments


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def std_of_truncated(cut: float) -> float:
    """Return the std of a standard normal that is cut at `cut`, by SciPy (a slow integral)."""
    return float(stats.truncnorm(-cut, cut).std())


def drawn(family: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    g = generator(seed)
    if family == "normal":
        return torch.empty(shape).normal_(0, std, generator=g)
    if family == "uniform":
        return torch.empty(shape).uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=g)
    cut = float(family.removeprefix("truncated "))
    scale = std / std_of_truncated(cut)
    made = torch.empty(shape)
    return torch.nn.init.trunc_normal_(made, 0, scale, -cut * scale, cut * scale, generator=g)


FAMILIES = ("normal", "uniform", "truncated 2", "truncated 3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (256, 1024)])
def test_normal_uniform_and_other_families_are_distinguished(
    family: str, shape: tuple[int, int]
) -> None:
    # A normal of 4,096 numbers may well stay within 3 std (a chance of 6e-5): that cut shows in
    # larger ones only.
    shows = family != "truncated 3" or math.prod(shape) > 20_000
    for seed in range(20):
        draw = draw_of(drawn(family, shape, 0.02, seed))
        assert draw is not None and draw.family in (
            family.split()[0],
            *(() if shows else ("normal",)),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_interval_holds_as_often_as_it_says(family: str) -> None:
    """At alpha 0.05 over 2,000 small weights: a binomial with 100 expected, within 4 standard
    deviations.
    """
    outside = 0
    kurtosis = {"normal": 3.0, "uniform": 1.8}.get(family) or truncated(float(family.split()[1]))[1]
    for seed in range(2000):
        found = moments(drawn(family, (20, 20), 1.0, seed))
        low, high = interval(found.std, found.count, kurtosis, 0.05)
        outside += not low <= 1.0 <= high
    assert abs(outside - 100) < 4 * math.sqrt(2000 * 0.05 * 0.95)


def test_the_normal_interval_is_the_exact_one() -> None:
    for n in (2, 17, 4096, 10**7):
        low, high = interval(1.0, n, 3.0, 1e-6)
        exact = [math.sqrt(n / stats.chi2.ppf(q, n - 1)) for q in (1 - 5e-7, 5e-7)]
        assert low == pytest.approx(exact[0], rel=3e-4) and high == pytest.approx(
            exact[1], rel=3e-4
        )


def test_another_std_is_outside() -> None:
    for family in FAMILIES:
        draw = draw_of(drawn(family, (64, 64), 0.02, 1))
        assert draw is not None and not draw.lower <= 0.02 * 1.15 <= draw.upper


@pytest.mark.parametrize("cut", [1.5, 2.0, 3.0])
def test_moments_of_truncated_normal_equal_scipy(cut: float) -> None:
    exact = stats.truncnorm(-cut, cut)
    std, kurtosis = truncated(cut)
    assert std == pytest.approx(exact.std()) and kurtosis - 3 == pytest.approx(
        float(exact.stats(moments="k"))
    )
    draw = draw_of(drawn(f"truncated {cut}", (300, 300), 0.02, 0))
    assert draw is not None and draw.truncation == pytest.approx(std, rel=1e-2)


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_orthogonal_has_no_spread(shape: tuple[int, int], gain: float) -> None:
    w = torch.nn.init.orthogonal_(torch.empty(shape), gain, generator=generator(0))
    draw = draw_of(w)
    assert draw is not None and draw.family == "orthogonal"
    assert (
        draw.lower <= gain / math.sqrt(max(shape)) <= draw.upper and draw.upper / draw.lower < 1.003
    )


def test_zero_constant_and_mixtures() -> None:
    zero, ones = draw_of(torch.zeros(7)), draw_of(torch.full((5,), 0.1))
    assert zero is not None and ones is not None
    assert (zero.family, ones.family, ones.mean) == ("zero", "constant", pytest.approx(0.1))
    mixed = draw_of(
        torch.cat([drawn("normal", (64, 64), 0.02, 0), drawn("normal", (64, 64), 0.1, 1)])
    )
    assert mixed is not None and mixed.family == "other"


def test_rows_of_padding_are_no_draws() -> None:
    w = drawn("normal", (64, 64), 0.02, 0)
    w[3] = 0
    whole, table = draw_of(w), draw_of(w, table=True)
    assert table is not None and whole is not None
    assert (table.zero_rows, whole.zero_rows) == (1, 0)
    assert table.std == pytest.approx(float(w[w.any(1)].double().std(correction=0)), rel=1e-9)


def test_moments_are_numpys_in_any_layout() -> None:
    # more than one piece; a mean that would cancel in float32
    w = drawn("normal", (700, 1900), 0.02, 0) + 5.0
    for tensor in (w, w.T, w.bfloat16(), w[None]):
        values = tensor.double().numpy()
        found = moments(tensor)
        assert found.std == pytest.approx(values.std(), rel=1e-7)
        assert found.mean == pytest.approx(values.mean(), rel=1e-12)
        assert found.kurtosis == pytest.approx(
            float(stats.kurtosis(values.ravel(), fisher=False)), rel=1e-5
        )
        assert found.largest == np.abs(values).max()


def test_what_is_no_draw() -> None:
    assert draw_of(torch.arange(5)) is None
    assert draw_of(torch.empty(3, device="meta")) is None
    assert draw_of(torch.empty(0, 3)) is None
    assert draw_of(torch.tensor([1.0, float("nan")])) is None


def test_a_weight_is_read_once_however_often_its_draw_is_asked_for() -> None:
    class Reads(dict[str, torch.Tensor]):
        count = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            self.count += 1
            return super().__getitem__(name)

    weights = Reads(w=drawn("normal", (64, 64), 0.02, 0))
    draws = Draws(weights)
    first = draws.of("w")
    assert first is not None and draws.of("w") is first and weights.count == 1
    assert draws.of("w", table=True) == first and weights.count == 2
