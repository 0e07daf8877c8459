"""On an accelerator: no wait for the device between two logs, one at a log, few operations a step.

The accelerator is the pretended one of `tests/accelerator`, which counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import lines
from torch import nn

import jacdiag
from jacdiag.devices.pinned_download import Download
from jacdiag.sources.gpt import build

pretended = pytest.importorskip("accelerator.pretended")

LOG_EVERY = 5
STEPS = 12
VOCABULARY, LENGTH = 32, 8


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim < 2]


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-3)]


def two_groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    groups = [{"params": matrices(model)}, {"params": vectors(model), "weight_decay": 0.0}]
    return [torch.optim.SGD(groups, lr=1e-3, momentum=0.9)]


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(matrices(model), lr=1e-3, momentum=0.9),
        torch.optim.AdamW(vectors(model), lr=1e-3),
    ]


def rate_on_the_device(model: nn.Module) -> list[torch.optim.Optimizer]:
    rate = torch.tensor(1e-3, device=pretended.NAME)
    return [torch.optim.AdamW(model.parameters(), lr=rate, capturable=True, foreach=True)]


OPTIMIZERS = [adamw, two_groups, two_optimizers, rate_on_the_device]


def train(
    make: Callable[[nn.Module], list[torch.optim.Optimizer]], folder: Path | None, counts: Any
) -> tuple[list[dict[str, int]], list[torch.Tensor]]:
    """Train some steps; return what the device was asked in each step, and the weights.

    Args:
        make: the optimizers.
        folder: of the watch; None for a run without one.
        counts: of the device; None to train on the CPU.
    """
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    model = build("gpt2", vocab_size=VOCABULARY, block_size=LENGTH, **sizes)
    ids = torch.randint(VOCABULARY, (2, LENGTH + 1))
    if counts is not None:
        model, ids = model.to(pretended.NAME), ids.to(pretended.NAME)
    optimizers = make(model)
    watch: Any = None
    if folder is not None:
        cadences: dict[str, Any] = {"every": None, "stats_every": None, "log_every": LOG_EVERY}
        options: dict[str, Any] = {**cadences, "quiet": True, "strict": True}
        watch = jacdiag.watch(model, optimizers, log_dir=folder, **options)

    of_steps: list[dict[str, int]] = []
    for _ in range(STEPS):
        before = counts.as_dict() if counts is not None else {}
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if watch is not None:
            watch.step(loss)
        after = counts.as_dict() if counts is not None else {}
        of_steps.append({name: after[name] - before[name] for name in after})
        for optimizer in optimizers:
            optimizer.zero_grad()
    if watch is not None:
        watch.close()
    return of_steps, [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_host_waits_once_a_log_and_launches_few_operations(
    make: Callable[[nn.Module], list[torch.optim.Optimizer]], tmp_path: Path
) -> None:
    with pretended.pretended_device() as counts:
        plain, weights = train(make, None, counts)
        watched, watched_weights = train(make, tmp_path, counts)
    assert all(map(torch.equal, weights, watched_weights))

    # 1. The first step finds the sub-layers. Each fifth one reads the figures, by one wait for two
    # downloads that block nothing; the first of them also sends places to the device.
    groups = sum(len(optimizer.param_groups) for optimizer in make(nn.Linear(2, 2)))
    for step in range(2, STEPS + 1):
        added = {name: watched[step - 1][name] - plain[step - 1][name] for name in plain[0]}
        is_log = step % LOG_EVERY == 0
        assert added["waits"] - added["uploads"] == is_log, f"step {step}: {added}"
        assert added["free_downloads"] == 2 * is_log
        if step != LOG_EVERY:
            assert added["uploads"] == 0 and added["staged_uploads"] == 0
        if not is_log:
            assert added["operations"] <= 20 + 2 * groups, f"step {step}: {added}"

    # 2. What the log says of the waits.
    assert lines(tmp_path, "end")[0]["host_syncs"] == -(-STEPS // LOG_EVERY)


@pytest.mark.parametrize("make", [adamw, two_optimizers])
def test_the_log_has_the_figures_of_the_cpu(
    make: Callable[[nn.Module], list[torch.optim.Optimizer]], tmp_path: Path
) -> None:
    with pretended.pretended_device() as counts:
        train(make, tmp_path / "device", counts)
        train(make, tmp_path / "cpu", None)
    for ours, cpus in zip(
        lines(tmp_path / "device", "step"), lines(tmp_path / "cpu", "step"), strict=True
    ):
        assert ours["batches"] == cpus["batches"]
        assert ours["grad"] == pytest.approx(cpus["grad"], rel=1e-5)
        assert ours["update"]["where"] == cpus["update"]["where"]
        assert ours["update"]["norm"] == pytest.approx(cpus["update"]["norm"], rel=1e-4)
        assert ours["update"]["weight"] == pytest.approx(cpus["update"]["weight"], rel=1e-5)


def test_a_write_to_a_weight_on_the_device_is_named(tmp_path: Path) -> None:
    with pretended.pretended_device():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(pretended.NAME)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        options: dict[str, Any] = {"every": None, "stats_every": None, "quiet": True}
        with jacdiag.watch(model, optimizer, log_dir=tmp_path, **options) as watch:
            for step in range(1, 9):
                if step == 5:
                    with torch.no_grad():
                        model[1].weight.mul_(3.0)
                loss = model(torch.ones(2, 8).to(pretended.NAME)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watch.step(loss)
    (alert,) = [row for row in lines(tmp_path, "alert") if row["code"] == "JD508"]
    assert (alert["step"], alert["where"]) == (5, ["1.weight"])
    assert alert["what"].endswith("1.weight, multiplied by 3.00")


def test_a_download_that_is_read_before_its_event_would_give_garbage() -> None:
    """Proves that the tests above would fail without the wait."""
    with pretended.pretended_device():
        values = torch.arange(4.0).to(pretended.NAME)
        download = Download(values)
        assert download.waits and not torch.equal(download._host, torch.arange(4.0))
        assert torch.equal(download.read(), torch.arange(4.0))
