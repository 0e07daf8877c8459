"""What a watch says of the weights before the first update: the rules JD2xx, as an audit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import batch, lines, small
from torch import nn

import jacdiag

pytestmark = pytest.mark.usefixtures("deterministic")
SIZES = {"n_embd": 32, "n_layer": 4, "dropout": 0.0}
CAVEAT = "the optimizer keeps no state"
Make = Callable[[Any], torch.optim.Optimizer]


def adam_without_decay(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def adam_with_decay(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=1e-3)


def one_wrong_output() -> nn.Module:
    """Return a model in which one layer's output matrix is drawn eight times too large."""
    model = small("scaled-embed", **SIZES)
    with torch.no_grad():
        model.get_parameter("transformer.h.2.attn.c_proj.weight").mul_(8)
    return model


def codes_of_run(
    model: nn.Module,
    make: Make = adam_without_decay,
    *,
    folder: Path | None = None,
    steps_before: int = 0,
    first_step: int = 1,
    **options: Any,
) -> list[str]:
    """Return the codes JD2xx among the findings of a short run.

    Args:
        model: what is trained.
        make: returns the optimizer of its parameters.
        folder: of the run log.
        steps_before: steps before the watch begins.
        first_step: the number that the loop passes first.
        options: of the watch.
    """
    optimizer = make(model.parameters())

    def train_step(number: int) -> torch.Tensor:
        loss: torch.Tensor = model(*batch(number))[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for number in range(steps_before):
        train_step(number)
    settings = {"every": 10, "quiet": True, "strict": True, "on_alert": "raise", **options}
    with jacdiag.watch(model, optimizer, log_dir=folder, **settings) as w:
        for step in range(first_step, first_step + 3):
            w.step(train_step(step), step=step)
    assert w.alerts == []
    return [f.code for f in w.findings if f.code.startswith("JD2")]


@pytest.mark.parametrize("first_step", [0, 1])
def test_a_wrong_matrix_is_found_before_the_first_update(first_step: int, tmp_path: Path) -> None:
    model = one_wrong_output()
    assert codes_of_run(model, folder=tmp_path, first_step=first_step) == ["JD205"]
    (finding,) = [row for row in lines(tmp_path, "finding") if row["code"] == "JD205"]
    assert "in layer 2" in finding["what"] and CAVEAT not in finding["what"]


def test_a_right_init_is_not_found_fault_with() -> None:
    assert codes_of_run(small("scaled-embed", **SIZES)) == []


def test_weights_that_decay_are_those_of_the_watched_optimizer() -> None:
    model = small("scaled-embed", **SIZES)
    ids = batch(0)[0]
    audited = jacdiag.audit(model, ids, optimizer=adam_with_decay(model.parameters()))
    loud = [f.code for f in audited.findings if f.level != "info" and f.code.startswith("JD2")]
    assert codes_of_run(model, adam_with_decay) == loud
    assert set(loud) == {"JD207"}


def test_an_optimizer_that_makes_its_state_when_it_is_built_is_fresh() -> None:
    assert codes_of_run(one_wrong_output(), adagrad) == ["JD205"]


def test_a_run_that_goes_on_is_not_judged_as_a_fresh_one(tmp_path: Path) -> None:
    # The optimizer has stepped.
    assert codes_of_run(one_wrong_output(), steps_before=1) == []
    # The loop says where it is, once the first step is made.
    assert codes_of_run(one_wrong_output(), first_step=401) == []
    # The log goes on.
    codes_of_run(one_wrong_output(), folder=tmp_path)
    assert codes_of_run(one_wrong_output(), folder=tmp_path, first_step=4, resume=True) == []


def test_without_a_probe_nothing_is_judged() -> None:
    assert codes_of_run(one_wrong_output(), every=None) == []


def test_an_optimizer_without_state_leaves_open_whether_it_has_stepped(tmp_path: Path) -> None:
    assert codes_of_run(one_wrong_output(), plain_sgd, folder=tmp_path) == ["JD205"]
    (finding,) = [row for row in lines(tmp_path, "finding") if row["code"] == "JD205"]
    assert CAVEAT in finding["what"]


def test_what_cannot_be_judged_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no weight can be read")

    monkeypatch.setattr("jacdiag.monitor.measurements.judge_init", fails)
    assert codes_of_run(one_wrong_output(), folder=tmp_path, strict=False) == []
    (fault,) = lines(tmp_path, "fault")
    assert fault["part"] == "init" and "how the weights were drawn" in fault["off"]
    assert len(lines(tmp_path, "probe")) == 1
