"""Not one bit: a watched run is the same run, and nothing of the watch is left on it."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import (
    PROBE_EVERY,
    STATS_EVERY,
    STEPS,
    adam,
    assert_same_state,
    batch,
    lines,
    plain_step,
    small,
    trained,
)
from test_model_stays_unchanged import assert_same
from test_model_stays_unchanged import state_of as state_of_model
from torch import nn

import jacdiag
from jacdiag.monitor import AlertRaised

pytestmark = pytest.mark.usefixtures("deterministic")
FREQUENT = {
    "every": PROBE_EVERY,
    "stats_every": STATS_EVERY,
    "log_every": 5,
    "keep_batches": 2,
    "strict": True,
}


def test_watched_run_is_the_same_bit_for_bit_with_dropout(tmp_path: Path) -> None:
    plain = trained(STEPS, None)
    watched = trained(STEPS, {**FREQUENT, "log_dir": tmp_path})
    assert plain[0] == watched[0]
    assert_same_state(plain[1], watched[1])
    assert plain[2] == watched[2]
    assert [row["step"] for row in lines(tmp_path, "step")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in lines(tmp_path, "probe")] == list(
        range(0, STEPS + 1, PROBE_EVERY)
    )


class Accumulated:
    """Three micro-batches a step."""

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Any:
        loss = torch.zeros(())
        for k in range(3):
            _, part = model(*batch(3 * step + k, rows=2))
            (part / 3).backward()
            loss = loss + part.detach() / 3
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm


class Scaled:
    """Mixed precision with a loss scaler that grows, and skips a step now and then."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss = model(*batch(step))
        self.scaler.scale(loss).backward()
        if step % 50 == 7:
            model.get_parameter("transformer.wte.weight").grad[0, 0] = float("inf")  # type: ignore[index]
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        return loss.detach(), norm


@pytest.mark.parametrize("one", [Accumulated, Scaled])
def test_watched_run_is_the_same_with_accumulation_and_with_mixed_precision(
    one: Any, tmp_path: Path
) -> None:
    plain = trained(STEPS, None, one=one())
    watched = trained(STEPS, {**FREQUENT, "log_dir": tmp_path}, one=one())
    assert plain[0] == watched[0] and plain[2] == watched[2]
    assert_same_state(plain[1], watched[1])
    rows = lines(tmp_path, "step")
    assert len(rows) == STEPS and not lines(tmp_path, "fault")
    assert sum(row["skipped"] for row in rows) == (
        len(range(7, STEPS + 1, 50)) if one is Scaled else 0
    )


def test_the_comparison_sees_a_draw_and_a_changed_bit() -> None:
    """Proves that the test above can fail."""
    plain = trained(5, None)
    drawn = trained(5, None, inside=lambda step: torch.rand(()) if step == 3 else None)
    assert plain[2] != drawn[2]
    with pytest.raises(AssertionError):
        assert_same_state(plain[1], drawn[1])


def test_everything_is_taken_off_at_the_end() -> None:
    model = small()
    optimizer = adam(model)

    def hooks() -> list[Any]:
        return [
            *optimizer._optimizer_step_pre_hooks.items(),
            *optimizer._optimizer_step_post_hooks.items(),
        ]

    optimizer.register_step_pre_hook(lambda *_: None)
    before, there = state_of_model(model), hooks()
    jacdiag.watch(model, optimizer, quiet=True).close()
    assert_same(before, state_of_model(model))
    assert hooks() == there


@pytest.mark.parametrize("where", ["forward", "after the step"])
def test_everything_is_taken_off_after_an_exception_in_the_loop(where: str, tmp_path: Path) -> None:
    model = small()
    model.transformer["h"][1].eval()
    optimizer = adam(model)
    before = state_of_model(model)
    with (
        pytest.raises(ValueError, match="broken loop"),
        jacdiag.watch(model, optimizer, log_dir=tmp_path, quiet=True, **FREQUENT) as w,
    ):
        loss, norm = plain_step(model, optimizer, 1)
        w.step(loss, grad_norm=norm)
        if where == "forward":
            model(*batch(2))
        raise ValueError("broken loop")
    after = state_of_model(model)
    for key in ("hooks", "modes", "attributes", "requires_grad", "flags"):
        assert before[key] == after[key], key
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert lines(tmp_path, "note")[-1]["text"].startswith("flight recorder")
    assert lines(tmp_path)[-1]["type"] == "end"


@pytest.mark.parametrize("cycles", [4, pytest.param(50, marks=pytest.mark.long)])
def test_repeated_watch_cycles_leak_no_memory(cycles: int) -> None:
    model = small()
    optimizer = adam(model)
    plain_step(model, optimizer, 0)

    def cycle() -> weakref.ref[Any]:
        w = jacdiag.watch(
            model, optimizer, every=1, stats_every=1, log_every=1, quiet=True, strict=True
        )
        loss, norm = plain_step(model, optimizer, 1)
        w.step(loss, grad_norm=norm)
        w.close()
        return weakref.ref(w)

    def alive() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    gc.collect()
    gc.freeze()  # what earlier tests left may be collected at any time: it is not counted
    try:
        cycle()
        before = alive()
        refs = [cycle() for _ in range(cycles)]
        assert alive() == before
    finally:
        gc.unfreeze()
    assert not any(ref() for ref in refs)


def test_a_closed_watch_lets_go_of_the_model(tmp_path: Path) -> None:
    """At once, not when Python next looks for cycles: a process group may have to outlive a wrapped
    model.
    """
    model = small()
    optimizer = adam(model)
    w = jacdiag.watch(model, optimizer, log_dir=tmp_path, quiet=True, **FREQUENT)
    loss, norm = plain_step(model, optimizer, 1)
    w.step(loss, grad_norm=norm)
    saved = w.state_dict()
    gone = weakref.ref(model), weakref.ref(next(model.parameters()))
    gc.collect()
    gc.disable()
    try:
        w.close()
        del model, optimizer, loss, norm
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
    assert w.closed and w.count == 1
    again = w.state_dict()  # what is saved behind the loop goes on all the same
    assert again["step"] == saved["step"] and again["live"] == saved["live"]
    assert torch.equal(again["probe"]["args"][0], saved["probe"]["args"][0])


class Tied(nn.Module):
    """Tied weights, a frozen parameter, and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        return self.inner(idx, targets)


def test_tied_frozen_and_idle_parameters(tmp_path: Path) -> None:
    plain = trained(STEPS, None, make=Tied)
    watched = trained(STEPS, {**FREQUENT, "log_dir": tmp_path}, make=Tied)
    assert plain[0] == watched[0]
    assert_same_state(plain[1], watched[1])
    groups = lines(tmp_path, "run")[0]["groups"]
    assert groups[:4] == [
        f"inner.transformer.h.{k}.{part}" for k in (0, 1) for part in ("attn", "mlp")
    ]
    assert "(embedding)" in groups


def test_alert_that_raises_leaves_no_hooks() -> None:
    model = small("vanilla", n_embd=64)
    optimizer = adam(model)
    with (
        pytest.raises(AlertRaised, match="JD505") as caught,
        jacdiag.watch(model, optimizer, on_alert="raise", log_every=1, quiet=True) as w,
    ):
        for step in range(1, 4):
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss * (math.nan if step == 3 else 1.0), grad_norm=norm)
    assert caught.value.alert.step == 3
    assert not model._forward_pre_hooks and not optimizer._optimizer_step_pre_hooks


def test_what_the_model_came_with_is_a_report_and_raises_nothing(tmp_path: Path) -> None:
    """GPT-2's own init does not meet the large shortcut: said once, in the log and in `findings`;
    the run goes on.
    """
    model = small("vanilla", n_embd=64)
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, on_alert="raise", log_dir=tmp_path, every=2, quiet=True
    ) as w:
        for step in range(1, 6):
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
        assert [(found.code, found.step) for found in w.findings if found.code == "JD102"] == [
            ("JD102", 0)
        ]
        assert w.alerts == []
    assert "JD102" in {row["code"] for row in lines(tmp_path, "finding")} and not lines(
        tmp_path, "alert"
    )


def test_an_error_by_the_users_own_threshold_is_an_alert_from_the_first_probe_on() -> None:
    model = small("vanilla", n_embd=64)
    optimizer = adam(model)
    limits = {"norm_gain": {"error": 9.0}}
    with (
        pytest.raises(AlertRaised, match="JD102 error"),
        jacdiag.watch(model, optimizer, on_alert="raise", thresholds=limits, quiet=True) as w,
    ):
        loss, norm = plain_step(model, optimizer, 1)
        w.step(loss, grad_norm=norm)
