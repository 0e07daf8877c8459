"""Histograms of weights and gradients: counts by NumPy, and what the real libraries read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monitor.rig import adam, lines, plain_step, small

import jacdiag
from jacdiag.monitor.histograms import Histogram, histogram_of, moments


def test_counts_are_those_of_numpy() -> None:
    tensors = [torch.randn(50, 7), torch.randn(9, dtype=torch.float64), torch.zeros(3).bfloat16()]
    shown = histogram_of(tensors)
    values = torch.cat([t.float().flatten() for t in tensors]).numpy()
    counts, _ = np.histogram(values, bins=np.float32(shown.edges))
    assert shown.counts == counts.tolist() and shown.left_out == 0
    assert shown.edges[-1] == pytest.approx(float(np.abs(values).max()))


def test_numbers_that_are_not_finite_are_left_out_and_counted() -> None:
    shown = histogram_of([torch.tensor([1.0, -2.0, math.inf, -math.inf, math.nan])])
    assert (sum(shown.counts), shown.left_out, shown.edges[0]) == (2, 3, -2.0)


@pytest.mark.parametrize("extra", [0, 5])
def test_a_bin_counts_more_than_float32_can(extra: int) -> None:
    """Counts in float32 stop at 2^24, and what is missing there is finite."""
    count = 2**24 + extra
    values = torch.zeros(count + 2)
    values[:2] = torch.tensor([1.0, math.nan])
    shown = histogram_of([values])
    assert (max(shown.counts), sum(shown.counts), shown.left_out) == (count, count + 1, 1)


@pytest.mark.parametrize("warn_only", [False, True])
def test_counting_is_allowed_where_algorithms_have_to_be_deterministic(
    warn_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA has no such kernel for histc, and torch raises there."""
    histc = torch.histc

    def histc_of_cuda(*args: Any) -> torch.Tensor:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("_histc_cuda does not have a deterministic implementation")
        return histc(*args)

    monkeypatch.setattr(torch, "histc", histc_of_cuda)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert sum(histogram_of([torch.randn(9)]).counts) == 9
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("has_float64", [True, False])
def test_counts_on_a_device_are_those_of_the_cpu(has_float64: bool) -> None:
    pretended = pytest.importorskip("accelerator.pretended")
    tensors = [torch.randn(50, 7), torch.tensor([math.inf, -3.0]), torch.zeros(3).bfloat16()]
    with pretended.pretended_device(float64=has_float64) as counts:
        on_device = [tensor.to(pretended.NAME) for tensor in tensors]
        counts.clear()
        assert histogram_of(on_device) == histogram_of(tensors)
        assert counts.waits == 2


@pytest.mark.parametrize(
    "tensors", [[], [torch.zeros(0)], [torch.zeros(5)]], ids=["none", "empty", "zeros"]
)
def test_nothing_to_show_is_no_error(tensors: list[torch.Tensor]) -> None:
    shown = histogram_of(tensors)
    assert sum(shown.counts) == sum(t.numel() for t in tensors) and shown.edges[-1] > 0


def test_moments_are_close_to_those_of_the_elements() -> None:
    values = torch.randn(10_000)
    total, squares = moments(histogram_of([values]))
    assert total == pytest.approx(float(values.sum()), abs=100) and squares == pytest.approx(
        float(values.square().sum()), rel=0.01
    )


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.shown: dict[int, dict[str, Histogram]] = {}

    def write(self, step: int, figures: Any) -> None: ...

    def write_histograms(self, step: int, shown: Any) -> None:
        self.shown[step] = dict(shown)

    def close(self) -> None: ...


def run(folder: Path, sinks: Any, steps: int = 6, **options: Any) -> torch.nn.Module:
    model = small()
    optimizer = adam(model)
    given = {"every": None, "stats_every": None, "quiet": True, "histograms_every": 3, **options}
    with jacdiag.watch(model, optimizer, log_dir=folder, sinks=sinks, **given) as watch:
        for step in range(1, steps + 1):
            loss, norm = plain_step(model, optimizer, step)
            watch.step(loss, grad_norm=norm)
    return model


def test_a_sink_gets_them_at_its_steps_for_every_sub_layer(tmp_path: Path) -> None:
    kept = Kept()
    model = run(tmp_path, [kept])
    assert list(kept.shown) == [3, 6]
    last = kept.shown[6]
    weights = {name: one for name, one in last.items() if name.startswith("jacdiag/weights/")}
    assert sum(sum(one.counts) for one in weights.values()) == sum(
        p.numel() for p in model.parameters()
    )
    gradients = {name for name in last if name.startswith("jacdiag/gradients/")}
    assert {name.replace("/gradients/", "/weights/") for name in gradients} == weights.keys()


def test_a_sink_that_shows_none_is_left_alone(tmp_path: Path) -> None:
    class Plain:
        def write(self, step: int, figures: Any) -> None: ...
        def close(self) -> None: ...

    run(tmp_path, [Plain()])
    assert lines(tmp_path, "fault") == []


def test_tensorboard_reads_them_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = run(tmp_path, ["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    names = events.Tags()["histograms"]
    assert {event.step for name in names for event in events.Histograms(name)} == {3, 6}
    count = sum(
        events.Histograms(n)[-1].histogram_value.num
        for n in names
        if n.startswith("jacdiag/weights/")
    )
    assert count == sum(p.numel() for p in model.parameters())


def test_weights_and_biases_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, ["wandb"])
    assert lines(tmp_path, "fault") == []


def test_a_cadence_that_is_no_number_of_steps_is_refused() -> None:
    model = small()
    with pytest.raises(jacdiag.JacdiagError, match="histograms_every cannot be 0"):
        jacdiag.watch(model, adam(model), histograms_every=0)
