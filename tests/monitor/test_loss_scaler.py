"""A loss scaler that leaves out step after step: alerts, and what is said of steps that never come.

Each gradient is set by hand, so that it is known which steps a scaler has to leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, small

import jacdiag

pytestmark = pytest.mark.usefixtures("deterministic")
STEPS = 30
NEVER_FINITE = "the watch has seen no finite step before them"


def scaler_run(
    folder: Path,
    value: float,
    *,
    since: int = 1,
    fused: bool = False,
    clips: bool = True,
    unscales: bool = True,
    wrap: Callable[[Any, Any], Any] | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train with a gradient that has a bad element from a step on; return the watch and its rows.

    Args:
        folder: of the run log.
        value: of the bad element.
        since: the first step that has it.
        fused: the optimizer is called at each step, with the scaler's flag.
        clips: the loop clips, and passes the norm.
        unscales: the loop unscales the gradients itself.
        wrap: makes the optimizer that steps from the one that is given and the scaler.
    """
    model = small("scaled-embed", dropout=0.0)
    optimizer: Any = adam(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wrapped = wrap(optimizer, scaler) if wrap is not None else None
    watched = optimizer if wrapped is None else wrapped
    with jacdiag.watch(
        model, watched, log_dir=folder, every=None, stats_every=None, quiet=True, strict=True
    ) as w:
        for step in range(1, STEPS + 1):
            _, loss = model(*batch(step))
            scaler.scale(loss).backward()
            if step >= since:
                next(model.parameters()).grad.view(-1)[0] = value  # type: ignore[union-attr]
            if unscales:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) if clips else None
            if wrapped is None:
                scaler.step(optimizer)
                scaler.update()
            else:
                wrapped.step()
            optimizer.zero_grad()
            w.step(loss.detach(), grad_norm=norm)
    return w, lines(folder, "step")


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_scaler_that_never_makes_a_step_alerts(value: float, fused: bool, tmp_path: Path) -> None:
    w, rows = scaler_run(tmp_path, value, fused=fused)
    (alert,) = w.alerts
    assert (alert.code, alert.step) == ("JD505", 10)
    assert "10 steps in a row were skipped for gradients that are not finite" in alert.what
    assert NEVER_FINITE in alert.what
    assert all(row["skipped"] for row in rows)
    assert {row["skipped_for"] for row in rows} == {"nan" if math.isnan(value) else "inf"}
    assert {str(row["grad_norm"]) for row in rows} == {str(value)}


def test_a_loop_that_leaves_the_unscaling_to_the_scaler(tmp_path: Path) -> None:
    w, _ = scaler_run(tmp_path, math.nan, unscales=False)
    assert [alert.step for alert in w.alerts] == [10]


def test_after_finite_steps_the_first_scale_is_no_cause(tmp_path: Path) -> None:
    w, _ = scaler_run(tmp_path, math.nan, since=15)
    (alert,) = w.alerts
    assert alert.step == 24 and alert.evidence["since"] == 15
    assert NEVER_FINITE not in alert.what


@pytest.mark.parametrize("since", [STEPS - 8, STEPS + 1], ids=["nine skips", "none"])
def test_few_skips_are_no_alert(since: int, tmp_path: Path) -> None:
    w, _ = scaler_run(tmp_path, math.nan, since=since)
    assert w.alerts == []


def test_without_a_norm_it_is_not_known_why_nothing_steps(tmp_path: Path) -> None:
    """An optimizer that another one has replaced looks the same."""
    w, rows = scaler_run(tmp_path, math.nan, clips=False)
    assert w.alerts == [] and {row["skipped"] for row in rows} == {None}
    (note,) = [row["text"] for row in lines(tmp_path, "note")]
    assert "another optimizer steps" in note and "a loss scaler leaves out every step" in note


def test_an_accelerated_optimizer_that_never_steps(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)

    def wrap(optimizer: Any, scaler: Any) -> Any:
        return AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)

    w, _ = scaler_run(tmp_path, math.nan, wrap=wrap)
    assert [(alert.code, alert.step) for alert in w.alerts] == [("JD505", 10)]


def test_a_norm_of_nan_that_finite_gradients_contradict_is_no_norm(tmp_path: Path) -> None:
    """Some loops pass NaN at the steps for which they know none."""
    model = small(dropout=0.0)
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, stats_every=None, quiet=True, strict=True
    ) as w:
        for step in range(1, 13):
            _, loss = model(*batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss.detach(), grad_norm=math.nan)
    rows = lines(tmp_path, "step")
    assert w.alerts == [] and {row["grad_norm"] for row in rows} == {None}
    assert not any(row["skipped"] for row in rows)
