"""The spike lab: its plan, that a run depends on its setting alone, that one which was stopped goes
on as if not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import jacdiag
from examples.spike_lab.__main__ import settings
from examples.spike_lab.model import PLACEMENTS, Model, Shape, smoke
from examples.spike_lab.run import FAULTS, Setting, train
from jacdiag.backtest import label, read_runs

TINY: dict[str, Any] = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "length": 16,
    "steps": 8,
    "rows": 2,
    "warmup": 2,
}


def log(folder: Path) -> list[Any]:
    return [
        (r["loss"], r["grad_norm"])
        for r in map(json.loads, (folder / "run.jsonl").open())
        if r["type"] == "step"
    ]


def test_the_plan_is_as_large_as_it_says() -> None:
    cpu = settings("cpu")
    assert len(cpu) >= 300 and {s["placement"] for s in cpu} == set(PLACEMENTS)
    for grid in ("smoke", "cpu", "gpu"):
        for factors in settings(grid):
            setting = Setting.of(factors)
            assert Setting.of(setting.factors()) == setting
    with pytest.raises(TypeError):
        Setting.of({"colour": "red"})


def test_the_smallest_grid_has_runs_that_end_well_and_runs_that_diverge(tmp_path: Path) -> None:
    grid = settings("smoke")
    rates = sorted(factors["lr"] for factors in grid)
    for rate, outcome in ((rates[0], "healthy"), (rates[-1], "diverged")):
        factors = next(f for f in grid if f["lr"] == rate and f["recipe"] == "vanilla")
        assert train(Setting.of(factors), tmp_path / f"{rate}", audit=False)
        (run,) = read_runs([tmp_path / f"{rate}"])
        assert run.whole and label(run.loss).outcome == outcome


def test_the_model_of_the_smallest_grid_can_be_audited() -> None:
    plain = [factors for factors in settings("smoke") if factors["recipe"] == "vanilla"]
    assert {Setting.of(factors).shape for factors in plain} == {smoke().shape}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_jacdiag_sees_the_placement_that_was_asked_for(placement: str) -> None:
    model = Model(Shape(layers=2, width=16, heads=2, length=8, placement=placement))
    found = {site.placement for site in jacdiag.sites(model, torch.zeros(1, 8, dtype=torch.long))}
    assert found == {placement}


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    setting = Setting.of({**TINY, "recipe": "scaled-embed", "lr": 1e-2, "seed": 3})
    assert train(setting, tmp_path / "whole")
    pauses = 0
    while not train(setting, tmp_path / "torn", limit_s=0.0):
        pauses += 1
    assert pauses == TINY["steps"] - 1
    assert (
        log(tmp_path / "torn") == log(tmp_path / "whole")
        and len(log(tmp_path / "whole")) == TINY["steps"]
    )
    assert not (tmp_path / "torn" / "state.pt").exists() and train(setting, tmp_path / "torn")
    (run,) = read_runs([tmp_path / "whole"])
    assert run.factors["recipe"] == "scaled-embed" and run.figures["end-to-end norm x lr"] > 0
    assert run.figures["sum of excess x width"] == pytest.approx(16 * run.figures["sum of excess"])
    assert len(run.loss) == TINY["steps"] and math.isfinite(
        run.figures["mean bound, Eq. 15 and 20"]
    )


def test_a_run_that_was_killed_before_its_first_state_begins_again(tmp_path: Path) -> None:
    setting = Setting.of({**TINY, "lr": 1e-2})
    assert train(setting, tmp_path / "whole") and not train(setting, tmp_path / "torn", limit_s=0.0)
    (tmp_path / "torn" / "state.pt").unlink()
    assert train(setting, tmp_path / "torn")
    assert log(tmp_path / "torn") == log(tmp_path / "whole")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_strikes_at_its_step_and_not_before(fault: str, tmp_path: Path) -> None:
    base = {**TINY, "lr": 1e-2}
    train(Setting.of(base), tmp_path / "plain")
    train(Setting.of({**base, "fault": fault, "at": 5}), tmp_path / "fault")
    plain, struck = log(tmp_path / "plain"), log(tmp_path / "fault")
    assert plain[:4] == struck[:4] and plain[5:] != struck[5:]
