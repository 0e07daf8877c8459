"""What is copied to the host is read only after the copy is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import batch, lines, small

import jacdiag
from accelerator.pretended import NAME, pretended_device
from jacdiag.devices.accelerators import send
from jacdiag.monitor.parameter_groups import group_parameters
from jacdiag.monitor.square_sums import find_nonfinite, read_square_sums
from jacdiag.monitor.step_metrics import MICRO, MICRO_SUM, StepMetrics

CPU = torch.device("cpu")
DEVICE = torch.device(NAME, 0)
FROZEN = "transformer.wte.weight"


def test_only_the_weight_that_is_not_finite_is_found() -> None:
    with pretended_device():
        weights = [torch.ones(8, 8), torch.full((4,), torch.inf), torch.ones(3)]
        on_device = [weight.to(NAME) for weight in weights]
        assert find_nonfinite(on_device, CPU).tolist() == [False, True, False]


def test_sums_over_two_devices_are_those_of_the_cpu() -> None:
    with pretended_device():
        tensors = [torch.full((8, 8), 2.0), torch.full((4,), 3.0)]
        assert read_square_sums([tensors[0], tensors[1].to(NAME)]) == read_square_sums(tensors)


def test_a_download_is_waited_for_and_an_upload_is_not() -> None:
    with pretended_device() as counts:
        there = torch.arange(4.0).to(NAME)
        counts.clear()
        assert send(there, CPU, torch.float64).tolist() == [0.0, 1.0, 2.0, 3.0]
        assert counts.waits == 1
        send(torch.arange(4.0), DEVICE)
        assert counts.waits == 1


def test_sums_of_micro_batches_reach_a_table_on_the_cpu() -> None:
    """The first parameter lies on the CPU, and the first one with a gradient on the device."""
    with pretended_device():
        parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2).to(NAME))]
        names = {id(parameter): str(place) for place, parameter in enumerate(parameters)}
        metrics = StepMetrics(group_parameters(parameters, names, {}, [], 1), capacity=1)
        assert metrics.is_on_cpu
        metrics.put_micro_batches(torch.tensor([2.0, 5.0]).to(NAME), count=2, sequences=4)
        assert metrics.table[0, MICRO : MICRO_SUM + 1].tolist() == [2.0, 5.0]


def train_with_a_frozen_weight(folder: Path, *, is_frozen_broken: bool) -> None:
    """Train on the device; the gradient of one weight is not finite at step 3."""
    model = small(n_layer=1, dropout=0.0).to(NAME)
    model.get_parameter(FROZEN).requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    options: dict[str, Any] = {"every": None, "stats_every": None, "log_every": 3}
    with jacdiag.watch(model, optimizer, log_dir=folder, quiet=True, **options) as watch:
        for step in range(1, 4):
            ids, targets = (tensor.to(NAME) for tensor in batch(step))
            _, loss = model(ids, targets)
            loss.backward()
            if step == 3:
                gradient = trained[0].grad
                assert gradient is not None
                gradient.fill_(torch.inf)
                if is_frozen_broken:
                    with torch.no_grad():
                        model.get_parameter(FROZEN)[0, 0] = torch.nan
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)


@pytest.mark.parametrize("is_frozen_broken", [False, True])
def test_a_frozen_weight_is_named_only_if_it_is_not_finite(
    is_frozen_broken: bool, tmp_path: Path
) -> None:
    with pretended_device():
        train_with_a_frozen_weight(tmp_path, is_frozen_broken=is_frozen_broken)
    row = lines(tmp_path, "step")[2]
    assert row["nonfinite_weights"] == ([FROZEN] if is_frozen_broken else [])
    (alert,) = lines(tmp_path, "alert")
    assert (alert["code"], FROZEN in alert["where"]) == ("JD505", is_frozen_broken)
