"""What a watch does not see is said once, and is not said of a watch that sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, small
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import jacdiag
from jacdiag.monitor.blind_spots import FIRST_STEPS, Silence

OPTIONS: dict[str, Any] = {
    "every": 20,
    "stats_every": 20,
    "log_every": 5,
    "quiet": True,
    "strict": True,
}


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said, findings of the probe and of the init left out."""
    found = [
        r.getMessage()
        for r in caplog.records
        if r.name == "jacdiag.watch" and r.levelno >= logging.WARNING
    ]
    return [text for text in found if "JD1" not in text and "JD2" not in text]


def run(
    folder: Path | None,
    *,
    steps: int = 25,
    model: nn.Module | None = None,
    optimizers: Callable[[Any], Any] = adam,
    watched: Callable[[Any, Any], tuple[Any, Any]] = lambda model, optimizers: (model, optimizers),
    call: Callable[[nn.Module, int], Tensor] = lambda model, step: model(*batch(step))[1],
    clip: float | None = None,
    tell: bool = False,
    normalise: bool = False,
    **more: Any,
) -> Any:
    """A loop in which one thing is left out."""
    model = model if model is not None else small(dropout=0.0)
    made = optimizers(model)
    every = made if isinstance(made, list) else [made]
    norm = None
    with jacdiag.watch(*watched(model, made), log_dir=folder, **{**OPTIONS, **more}) as w:
        for step in range(1, steps + 1):
            loss = call(model, step)
            loss.backward()
            if clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            if normalise:
                for p in model.parameters():
                    p.grad = p.grad.sign() if p.grad is not None else None
            for optimizer in every:
                optimizer.step()
                optimizer.zero_grad()
            w.step(loss, grad_norm=norm if tell else None)
    return w


def test_a_watch_that_sees_all_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "a", clip=0.1, tell=True)
    run(tmp_path / "b")  # nothing is clipped
    run(tmp_path / "c", clip=1e3)  # a bound that is never reached
    run(None, clip=0.1, tell=True)
    assert not messages(caplog)
    assert not lines(tmp_path / "a", "note") and not lines(tmp_path / "b", "note")


# -- batches ---------------------------------------------------------------------------------------
def test_a_model_in_eval_mode_is_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, model=small(dropout=0.0).eval())
    first, second = messages(caplog)
    assert "GPT ran in eval mode in the first 5 steps" in first and "probe=input_ids" in first
    assert "random tokens, not on data of the run" in second
    in_log = [f"jacdiag.watch: {row['text']}" for row in lines(tmp_path, "note")]
    assert in_log == [first, second]


def test_evaluations_in_the_first_steps_are_no_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def call(model: nn.Module, step: int) -> Tensor:
        model.eval()
        model(*batch(100 + step))
        model.train()
        loss: Tensor = model(*batch(step))[1]
        return loss

    run(tmp_path, call=call)
    assert not messages(caplog)


class Outer(nn.Module):
    """Its parts are called by the loop, and its own forward is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small(dropout=0.0)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        return self.inner(idx, targets)


def test_a_forward_that_is_not_called_is_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def inner(model: Any, step: int) -> Tensor:
        loss: Tensor = model.inner(*batch(step))[1]
        return loss

    run(tmp_path / "a", model=Outer(), call=inner, strict=False)
    second, first = messages(caplog)
    assert "the forward of Outer was not called in the first 5 steps" in first
    assert "Watch the module that the loop calls" in first
    assert "no batch was seen" in second and "pass probe=input_ids" in second
    caplog.clear()
    # The cure that is named, and a probe of the user's own.
    run(
        tmp_path / "b",
        model=Outer(),
        call=inner,
        watched=lambda model, optimizer: (model.inner, optimizer),
    )
    assert not messages(caplog)
    run(tmp_path / "c", model=Outer(), call=inner, probe=batch(1)[0])
    (text,) = messages(caplog)
    assert "was not called" in text and "random" not in text


def test_a_forward_that_is_called_past_the_hooks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def past_hooks(model: nn.Module, step: int) -> Tensor:
        loss: Tensor = model.forward(*batch(step))[1]
        return loss

    run(tmp_path, call=past_hooks)
    first, second = messages(caplog)
    assert (
        "the forward of GPT was not called" in first
        and "random tokens, not on data of the run" in second
    )
    caplog.clear()
    # Nothing is kept and nothing is probed: nothing is missing.
    run(None, call=past_hooks, every=None, stats_every=None)
    assert not messages(caplog)


def test_a_probe_that_came_too_early_is_said_to_be_random(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches are seen, but the probe was settled before the first of them."""
    model = small(dropout=0.0)
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        w.prepare()
        for step in range(1, 8):
            loss = model(*batch(step))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    (text,) = messages(caplog)
    assert "random tokens" in text and "no batch had been seen when it was first needed" in text
    assert all(row["batches"] for row in lines(tmp_path, "step"))


# -- sub-layers ------------------------------------------------------------------------------------
def test_a_model_without_sublayers_is_said_to_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def call(model: nn.Module, step: int) -> Tensor:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        loss: Tensor = model(x).square().mean()
        return loss

    run(tmp_path, model=model, call=call, strict=False)
    (text,) = messages(caplog)
    assert "no residual sub-layer was found" in text and "no Jacobian norms" in text
    assert all(row["grad_norm_post"] > 0 for row in lines(tmp_path, "step"))


# -- optimizers ------------------------------------------------------------------------------------
def two(model: nn.Module) -> list[Any]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.SGD(matrices, lr=0.05), torch.optim.AdamW(others, lr=1e-3)]


def test_gradients_that_no_optimizer_holds_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "a", optimizers=two, watched=lambda model, optimizers: (model, optimizers[0]))
    (text,) = messages(caplog)
    model = small()
    count = sum(p.dim() != 2 for p in model.parameters())
    assert f"{count} parameters have gradients and no optimizer that is watched holds them" in text
    name = text.split("such as '")[1].split("'")[0]
    assert model.get_parameter(name).dim() != 2
    caplog.clear()
    run(tmp_path / "b", optimizers=two)
    assert not messages(caplog)


def test_frozen_and_unused_parameters_are_not_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Outer()
    model.idle = nn.Parameter(torch.ones(3))
    model.inner.transformer["h"][0].requires_grad_(False)
    run(
        tmp_path,
        model=model,
        optimizers=lambda m: adam(
            nn.ParameterList(p for n, p in m.named_parameters() if p.requires_grad and n != "idle")
        ),
    )
    assert not messages(caplog)


# -- clipping --------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [{"clip": 0.05}, {"normalise": True}])
def test_norms_at_a_ceiling_are_said_to_be_rescaled(
    how: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, **how)
    (text,) = messages(caplog)
    assert "clipped or rescaled before" in text and "w.step(loss, grad_norm=norm)" in text


def rows_of(values: list[tuple[float, float]], given: float | None = None) -> list[dict[str, Any]]:
    return [{"grad_norm": given, "grad_norm_post": norm, "loss": loss} for norm, loss in values]


def said(rows: list[dict[str, Any]]) -> list[str]:
    found: list[str] = []
    Silence(lambda topic, text: found.append(topic), lambda text: None).look_at_rows(rows)
    return found


def test_which_norms_are_a_ceiling() -> None:
    losses = [2.0 + 0.1 * (k % 5) for k in range(20)]
    below = [0.3 + 0.02 * k for k in range(20)]
    # 1. At the bound in each step, in half of the steps, and in fewer.
    assert said(rows_of([(1.0, loss) for loss in losses])) == ["clip"]
    assert said(rows_of([(1.0 if k % 2 else below[k], losses[k]) for k in range(20)])) == ["clip"]
    assert not said(rows_of([(1.0 if k % 2 and k > 1 else below[k], losses[k]) for k in range(20)]))
    # 2. Norms that differ; the same batch over and over; a norm that the loop passes.
    assert not said(rows_of([(1.0 + 0.002 * k, losses[k]) for k in range(20)]))
    assert not said(rows_of([(1.0, 2.0 + 1e-4 * k) for k in range(20)]))
    assert not said(rows_of([(1.0, loss) for loss in losses], given=1.3))
    assert not said(rows_of([(0.0, loss) for loss in losses]))
    # 3. Too few steps to say.
    assert not said(rows_of([(1.0, loss) for loss in losses[:19]]))


def test_healthy_gradient_norms_are_no_ceiling() -> None:
    """Norms of 100,000 steps that scatter by 1% only, a tenth of what small batches do."""
    generator = torch.Generator().manual_seed(0)
    norms = (1 + 0.01 * torch.randn(100_000, generator=generator)).tolist()
    losses = (2 + 0.1 * torch.randn(100_000, generator=generator)).tolist()
    assert not said(rows_of(list(zip(norms, losses, strict=True))))


def test_the_first_steps_are_few() -> None:
    """A message that comes after thousands of steps is of no use."""
    assert FIRST_STEPS <= 10


# -- sub-layers that the probe cannot measure ------------------------------------------------------
class CutOff(torch.autograd.Function):
    """Tanh with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class CutOffAfter(nn.Module):
    """A module whose output goes through that function."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return CutOff.apply(self.inner(x))


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_sub_layer_that_the_probe_cannot_measure_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_cut: bool
) -> None:
    model = small(dropout=0.0)
    if is_cut:
        model.transformer["h"][1].mlp.c_proj = CutOffAfter(model.transformer["h"][1].mlp.c_proj)
    run(tmp_path, model=model)
    texts = messages(caplog)
    assert len(texts) == is_cut
    for text in texts:
        assert "cannot measure transformer.h.1.mlp, whose norms JD504 does not watch" in text
        assert "once_differentiable" in text
