"""The gradient noise scale, against models whose gradients have a known mean and variance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, small
from torch import Tensor, nn

import jacdiag
from jacdiag.monitor.noise_scale import LEAST_LOOKS, MicroBatchNorms, NoiseScale

WIDTH, ROWS = 20, 3
MEAN, SPREAD = 0.5, 1.5


class Mean(nn.Module):
    """The gradient of its output is the mean of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).mean()


def noise_scales(folder: Path, *, steps: int, micro_batches: int, scale: float = 1.0) -> list[Any]:
    """Train without moving, on draws of a normal distribution; return the figure of each step."""
    model = Mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    generator = torch.Generator().manual_seed(0)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, log_every=1, log_dir=folder, quiet=True
    ) as watch:
        for _ in range(steps):
            for _ in range(micro_batches):
                loss = model(MEAN + SPREAD * torch.randn(ROWS, WIDTH, generator=generator))
                (loss * scale).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)
    return [row["noise_scale"] for row in lines(folder, "step")]


@pytest.mark.parametrize("scale", [1.0, 1 / 8, 1024.0], ids=["summed", "averaged", "scaled"])
def test_it_is_the_variance_over_the_squared_mean(tmp_path: Path, scale: float) -> None:
    values = noise_scales(tmp_path, steps=60, micro_batches=8, scale=scale)
    assert values[: LEAST_LOOKS - 1] == [None] * (LEAST_LOOKS - 1)
    # 50 steps of 8 micro-batches: the mean of 1,050 sequences has a standard error of 2 %, the
    # variance of 3 %.
    assert values[-1] == pytest.approx(SPREAD**2 / MEAN**2, rel=0.15)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_not_known_from_fewer_than_three_micro_batches(
    tmp_path: Path, micro_batches: int
) -> None:
    assert set(noise_scales(tmp_path, steps=15, micro_batches=micro_batches)) == {None}


def test_two_forwards_before_a_backward_are_no_micro_batches(tmp_path: Path) -> None:
    model = Mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, log_every=1, log_dir=tmp_path, quiet=True
    ) as watch:
        for _ in range(15):
            loss = sum(model(torch.randn(ROWS, WIDTH)) for _ in range(4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)
    assert {row["noise_scale"] for row in lines(tmp_path, "step")} == {None}


def test_the_estimates_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    means, variances = [], []
    for _ in range(4000):
        draws = MEAN + SPREAD * torch.randn(5, ROWS, WIDTH, generator=generator)
        gradients = draws.mean(dim=1)
        norms = MicroBatchNorms(
            first=float(gradients[0].square().sum()),
            summed=float(gradients.sum(0).square().sum()),
            count=5,
            rows=ROWS,
        )
        means.append(norms.squared_mean)
        variances.append(norms.variance)
    for values, truth in ((means, WIDTH * MEAN**2), (variances, WIDTH * SPREAD**2)):
        values = torch.tensor(values)
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(len(values))


def test_noise_that_hides_the_gradient_gives_no_figure() -> None:
    noise = NoiseScale()
    for _ in range(LEAST_LOOKS):
        # less than 4 times the first
        noise.add(MicroBatchNorms(first=4.0, summed=12.0, count=4, rows=1))
    assert noise.value is None


def test_a_run_that_accumulates_gets_the_figure_and_is_not_changed(tmp_path: Path) -> None:
    def train(folder: Path | None) -> dict[str, Tensor]:
        model = small()
        optimizer = adam(model)
        options = {"every": None, "stats_every": None, "quiet": True}
        watch = (
            jacdiag.watch(model, optimizer, log_dir=folder, log_every=2, **options)
            if folder
            else None
        )
        for step in range(24):
            for part in range(4):
                _, loss = model(*batch(4 * step + part))
                (loss / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
            if watch is not None:
                watch.step(loss)
        if watch is not None:
            watch.close()
        return model.state_dict()

    plain, watched = train(None), train(tmp_path)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    values = [row["noise_scale"] for row in lines(tmp_path, "step")]
    assert sum(value is not None for value in values) == 24 // 2 - LEAST_LOOKS + 1
