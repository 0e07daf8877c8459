"""At which steps the update norm is measured, and what the rule on updates says about them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from monitor.rig import adam, batch, lines, plain_step, small
from torch import nn

import jacdiag
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.monitor.step_metrics import YOUNG_UPDATES
from jacdiag.monitor.training_watch import Watch
from jacdiag.rules.thresholds import load_thresholds


def watch_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, updates: bool | int = True
) -> Watch:
    """Watch the figures of single steps, without statistics and probes."""
    return jacdiag.watch(
        model,
        optimizer,
        log_dir=folder,
        every=None,
        stats_every=None,
        updates=updates,
        quiet=True,
    )


def measured_steps(folder: Path) -> list[int]:
    return [row["step"] for row in lines(folder, "step") if row["update"]]


def test_default_measures_every_step_of_a_young_run_and_every_fourth_later(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    with watch_steps(model, optimizer, tmp_path) as w:
        for step in range(9 * YOUNG_UPDATES):
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
        groups = len(w.record.header["groups"])
    young = groups * YOUNG_UPDATES
    steps = measured_steps(tmp_path)
    assert steps[:young] == list(range(1, young + 1))
    assert {later - earlier for earlier, later in itertools.pairwise(steps[young - 1 :])} == {4}


@pytest.mark.parametrize(("factor", "is_close"), [(30.0, True), (1.5, False)])
def test_learning_rate_that_jumps_is_followed_step_by_step(
    tmp_path: Path, factor: float, is_close: bool
) -> None:
    model = small()
    optimizer = adam(model)
    with watch_steps(model, optimizer, tmp_path) as w:
        for step in range(9 * YOUNG_UPDATES):
            if step == 8 * YOUNG_UPDATES:
                optimizer.param_groups[0]["lr"] *= factor
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
    later = [step for step in measured_steps(tmp_path) if step > 8 * YOUNG_UPDATES]
    if is_close:
        assert later == list(range(8 * YOUNG_UPDATES + 1, 9 * YOUNG_UPDATES + 1))
    else:
        assert {b - a for a, b in itertools.pairwise(later)} == {4}


def test_updates_that_leap_are_followed_step_by_step(tmp_path: Path) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    jump = 8 * YOUNG_UPDATES
    with watch_steps(model, optimizer, tmp_path) as w:
        for step in range(jump + 40):
            _, loss = model(*batch(step))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if step >= jump:  # not by the learning rate, which stays
                for parameter in model.parameters():
                    parameter.grad.mul_(1e4)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss, grad_norm=norm)
    seen = [step for step in measured_steps(tmp_path) if step > jump]
    assert 4 in {b - a for a, b in itertools.pairwise(seen[:4])}  # before the log was looked at
    assert list(range(jump + 21, jump + 31)) == [s for s in seen if jump + 21 <= s <= jump + 30]


def test_optimizer_that_steps_four_times_in_a_step_of_the_run_loses_no_turn(
    tmp_path: Path,
) -> None:
    model = small()
    optimizer = adam(model)
    with watch_steps(model, optimizer, tmp_path, updates=4) as w:
        for step in range(9):
            for part in range(4):
                loss, norm = plain_step(model, optimizer, 4 * step + part)
            w.step(loss, grad_norm=norm)
    assert measured_steps(tmp_path) == [1, 5, 9]


def test_step_without_gradients_leaves_its_turn_to_the_next(tmp_path: Path) -> None:
    model = small()
    optimizer = adam(model)
    with watch_steps(model, optimizer, tmp_path, updates=4) as w:
        for step in range(10):
            if step == 4:  # the turn of step 5
                optimizer.zero_grad()
                optimizer.step()
                w.step(None)
                continue
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
    assert measured_steps(tmp_path) == [1, 6, 10]


def run_with_leap(live: LiveRules, steps_between: int, first: int) -> list[tuple[int, int]]:
    """Return (step, evidence of since) of each JD501, if updates leap from step `first` on."""
    source = random.Random(4)
    alerts = []
    for step in range(first + 4 * steps_between):
        is_out = step >= first
        update = None
        if step % steps_between == 0:
            name = "abcd"[step // steps_between % 4]
            update = (name, 3e-2 if is_out else 1e-3)
        figures = StepFigures(
            step,
            2 + source.gauss(0, 0.05),
            1 + source.gauss(0, 0.1) + (0.6 if is_out else 0),
            1e-3,
            update=update,
        )
        alerts += [(a.step, a.evidence["since"]) for a in live.step(figures).alerts]
    return alerts


@pytest.mark.parametrize("steps_between", [1, 4])
def test_leap_of_updates_is_dated_from_the_first_update_that_leapt(steps_between: int) -> None:
    first = 400
    alerts = run_with_leap(LiveRules(load_thresholds()), steps_between, first)
    (alert,) = alerts
    assert alert == (first + 2 * steps_between, first)


def test_leap_goes_on_from_its_state() -> None:
    live = LiveRules(load_thresholds())
    state = live.state()
    state["joint"]["leap"] = {"samples": {}, "in_a_row": 2, "since": 17}
    live.load(state)
    assert live.state()["joint"]["leap"] == {"samples": {}, "in_a_row": 2, "since": 17}
    # One of an older version does not say since when: its count begins again.
    del state["joint"]["leap"]["since"]
    live = LiveRules(load_thresholds())
    live.load(state)
    assert live.state()["joint"]["leap"]["in_a_row"] == 0
