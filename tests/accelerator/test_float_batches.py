"""Fingerprints of batches of floats on a device without float64: those of every other device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import lines
from torch import Tensor, nn

import jacdiag
from accelerator.pretended import NAME, Counts, pretended_device
from jacdiag.monitor.batch_fingerprints import fingerprint

LOG_EVERY = 4
EDGES = [0.0, -0.0, 1.0, -1.5, 1e38, -1e-38, 1e-40, -1e-45, 3e-42, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_batch_has_one_fingerprint_on_every_device(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batches = [torch.tensor(EDGES).to(dtype), torch.randn(3, 50).to(dtype)]
    of_cpu = [fingerprint(batch) for batch in batches]
    for has_float64 in (True, False):
        with pretended_device(float64=has_float64):
            assert [fingerprint(batch.to(NAME)) for batch in batches] == of_cpu


def test_every_exponent_of_float32_has_the_bits_of_float64() -> None:
    """All bit patterns of sign and exponent, each with several fractions."""
    upper = torch.arange(2**9) << 23
    fractions = torch.tensor([0, 1, 2, 3, 0x3FFFFF, 0x400000, 0x555555, 0x7FFFFF])
    bits = (upper[:, None] | fractions).reshape(-1)
    values = bits.to(torch.int32).view(torch.float32)
    with pretended_device(float64=False):
        for value in values.split(64):
            assert fingerprint(value.to(NAME)) == fingerprint(value)


def train(folder: Path, device: str, counts: Counts | None = None, **options: Any) -> list[int]:
    """Train on batches of floats; return how often the watch made the host wait in each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randn(4, 8).to(device) for _ in range(8)]
    waits: list[int] = []
    with jacdiag.watch(
        model, optimizer, log_dir=folder, every=None, stats_every=None, quiet=True, **options
    ) as watch:
        for batch in batches:
            before = 0 if counts is None else counts.waits
            loss: Tensor = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            watch.step(loss.detach())
            optimizer.zero_grad()
            waits.append(0 if counts is None else counts.waits - before)
    return waits


@pytest.mark.parametrize("keep_batches", [None, 0])
def test_a_watch_sees_batches_of_floats_without_float64(
    keep_batches: int | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"log_every": LOG_EVERY, "keep_batches": keep_batches}
    with pretended_device(float64=False) as counts:
        waits = train(tmp_path / "device", NAME, counts, **options)
    train(tmp_path / "cpu", "cpu", **options)
    of_device = [row["batches"] for row in lines(tmp_path / "device", "step")]
    assert of_device == [row["batches"] for row in lines(tmp_path / "cpu", "step")]
    assert all(of_device)
    faults = [row["part"] for row in lines(tmp_path / "device", "fault")]
    assert "batches" not in faults

    # The first step sets the watch up.
    between_logs = [count for step, count in enumerate(waits, 1) if step > 1 and step % LOG_EVERY]
    assert set(between_logs) == {0}
