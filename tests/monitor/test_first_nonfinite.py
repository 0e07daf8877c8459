"""What was not finite first: named where the figures decide it, and not named where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, small
from torch import nn

import jacdiag
from jacdiag.monitor.square_sums import find_nonfinite
from jacdiag.records.run_log import Alert

pytestmark = pytest.mark.check("monitor")

NAME = "transformer.h.1.mlp.c_fc.weight"
BAD = 6
Break = Callable[[nn.Module, torch.optim.Optimizer], Any]


def go(fault: Break, *, clip: bool = True, **options: Any) -> list[Alert]:
    """Train eight steps; the fault strikes before the forward of step 6."""
    model = small("scaled-embed", dropout=0.0)
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, quiet=True, strict=True, **options
    ) as w:
        for step in range(1, BAD + 3):
            if step == BAD:
                fault(model, optimizer)
            _, loss = model(*batch(step))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5) if clip else None
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss, grad_norm=norm)
        w.flush()
        return w.alerts


@torch.no_grad()
def write(name: str, value: float) -> Break:
    def fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            model.get_parameter(name).view(-1)[7] = value

    return fault


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", [NAME, "transformer.h.0.attn.c_attn.weight", "transformer.h.0.ln_1.weight"]
)
def test_a_weight_is_named_and_no_other(name: str, value: float) -> None:
    (alert,) = go(write(name, value))
    assert (alert.step, alert.code, alert.where) == (BAD, "JD505", [name])
    assert alert.what.startswith(
        f"the weight {name} was not finite before the optimizer's step, every other weight"
    )
    assert f"the loss and the gradients of step {BAD - 1} were finite" in alert.what
    assert "the update of that step" not in alert.what  # nobody looked at the weights of that step


def test_two_weights_are_both_named_and_none_is_the_first() -> None:
    other = "transformer.h.0.attn.c_attn.weight"

    def fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        write(NAME, math.nan)(model, optimizer)
        write(other, math.nan)(model, optimizer)

    (alert,) = go(fault)
    assert set(alert.where) == {NAME, other} and "which of them first is not known" in alert.what


def test_a_frozen_weight_is_named_though_no_optimizer_holds_it() -> None:
    def fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        write(NAME, math.nan)(model, optimizer)

    model = small("scaled-embed", dropout=0.0)
    model.get_parameter(NAME).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, quiet=True, strict=True
    ) as w:
        for step in range(1, 5):
            if step == 3:
                fault(model, optimizer)
            _, loss = model(*batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
        w.flush()
        assert w.alerts[0].step == 3 and w.alerts[0].where == [NAME]


def hooked(name: str) -> Break:
    def fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)

    return fault


def test_the_gradient_of_one_weight_is_named_without_clipping() -> None:
    (alert,) = go(hooked(NAME), clip=False)
    assert (alert.step, alert.where) == (BAD, [NAME])
    assert alert.what.startswith(
        f"the gradient of {NAME} is not finite, every other gradient is; the loss and every"
    )


def test_no_gradient_is_named_where_clipping_has_spread_it() -> None:
    (alert,) = go(hooked(NAME))
    assert alert.where == [] and "every gradient is not finite" in alert.what
    assert "Which was first is not known" in alert.what and "error_if_nonfinite" in alert.what


def test_forward_overflow_and_bad_batch_do_not_name_a_weight() -> None:
    def overflow(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        part: Any = model.get_submodule("transformer.h.1.mlp")
        part.register_forward_hook(lambda module, args, output: output * math.inf)

    (alert,) = go(overflow)
    assert alert.where == [] and "every weight was before the optimizer's step" in alert.what
    assert "the batch or the forward made it" in alert.what and "transformer" not in alert.what


def test_a_nan_in_the_state_of_the_optimizer_is_found_in_the_weight_that_it_makes() -> None:
    def fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.state[model.get_parameter(NAME)]["exp_avg"].view(-1)[3] = math.nan

    (alert,) = go(fault)
    assert (alert.step, alert.where) == (BAD + 1, [NAME])  # the step itself had finite gradients
    assert f"the gradients of step {BAD} were finite" in alert.what


def test_first_nonfinite_gradient_is_nearest_to_the_loss() -> None:
    """Without clipping a NaN from inside a branch reaches all that lies before it, and nothing
    after it.
    """

    def fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        part: Any = model.get_submodule("transformer.h.1.attn")
        part.register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * math.nan,))

    (alert,) = go(fault, clip=False)
    assert (
        alert.where[0] == "transformer.h.1.attn"
        and "The backward meets transformer.h.1.attn first" in alert.what
    )
    assert "transformer.h.1.mlp" not in alert.where


def test_closures_and_steps_that_were_not_seen_name_no_weight() -> None:
    """LBFGS computes its gradients inside the step: by the time they are read the weights have
    moved.
    """
    model = small("scaled-embed", dropout=0.0)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, quiet=True, strict=True
    ) as w:
        for step in range(1, 4):
            if step == 3:
                write(NAME, math.nan)(model, optimizer)

            def closure(step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                _, loss = model(*batch(step))
                loss.backward()
                return loss

            w.step(optimizer.step(closure))
        w.flush()
        (alert,) = w.alerts
    assert alert.where == [] and "not known" in alert.what


def test_a_scaler_that_skips_is_no_alert(tmp_path: Path) -> None:
    model = small("scaled-embed", dropout=0.0)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, stats_every=None, quiet=True
    ) as w:
        for step in range(1, 25):
            _, loss = model(*batch(step))
            scaler.scale(loss).backward()
            if step % 8 == 0:
                next(model.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            w.step(loss)
        w.flush()
        assert w.alerts == []
    assert [row["step"] for row in lines(tmp_path, "step") if row["skipped"]] == [8, 16, 24]


def test_weights_seen_before_make_the_update_a_suspect() -> None:
    from jacdiag.detectors.first_nonfinite import NonFiniteStep, explain_nonfinite

    def said(**options: Any) -> str:
        return explain_nonfinite(
            NonFiniteStep(loss=math.nan, weights=["w"], gradients=["w"], parameters=3, **options)
        ).what

    assert "the update of that step or a write from outside made it" in said(
        previous=4, weights_before=True
    )
    assert "the update of that step" not in said(previous=4)
    assert "step" not in said().replace("the optimizer's step", "")


def test_flags_do_not_overflow_and_see_every_value() -> None:
    good = [
        torch.full((3, 4), 1e30),
        torch.zeros(0),
        torch.ones(2, dtype=torch.long),
        torch.ones(3).bfloat16(),
    ]
    bad = [
        torch.tensor([1.0, math.inf]),
        torch.tensor([math.nan]),
        torch.tensor([complex(0, math.nan)]),
    ]
    assert find_nonfinite([*good, *bad], torch.device("cpu")).tolist() == [False] * 4 + [True] * 3


def test_the_log_has_the_names_only_where_something_is_wrong(tmp_path: Path) -> None:
    go(write(NAME, math.nan), log_dir=tmp_path)
    rows = {row["step"]: row for row in lines(tmp_path, "step")}
    assert "nonfinite_weights" not in rows[BAD - 1] and rows[BAD - 1]["weights_seen"] is False
    assert rows[BAD]["nonfinite_weights"] == [NAME]
    assert rows[BAD]["with_gradient"] == len(rows[BAD]["nonfinite_gradients"])
    assert len(rows[BAD + 1]["nonfinite_weights"]) > 10  # by then the optimizer has spread it
