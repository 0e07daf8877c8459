"""A training step that is captured into a CUDA graph: nothing is measured in it, and replays count.

The device cannot replay a graph. The tests write what a replay writes: gradients into the same
memory and weights, neither with a hook nor with a change that torch counts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import batch, lines, small
from torch import Tensor, nn

import jacdiag
from accelerator import device_module
from accelerator.pretended import NAME, Counts, pretended_device

RATE = 0.1
OPTIONS: dict[str, Any] = {"every": None, "stats_every": None, "quiet": True, "strict": True}


class GraphedTraining:
    """A model, its optimizer, and a step that can be captured and replayed."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        self.model = small(n_layer=1, dropout=0.0).to(NAME)
        self.optimizer = optimizer(self.model.parameters(), lr=RATE)
        # It has the weights of the model, and no hook of the watch.
        self.twin = copy.deepcopy(self.model)
        self.norms: list[float] = []
        # A graph reads its batch from one place. The host may not send another while it captures.
        self.ids, self.targets = (tensor.to(NAME) for tensor in batch(0))

    def load(self, number: int) -> None:
        """Put a batch into its place."""
        ids, targets = batch(number)
        self.ids.copy_(ids)
        self.targets.copy_(targets)

    def run(self, number: int) -> Tensor:
        """Make a step with the hooks of the watch."""
        self.load(number)
        return self.make_step()

    def make_step(self) -> Tensor:
        """Make a step on the batch that is there."""
        self.optimizer.zero_grad()
        _, loss = self.model(self.ids, self.targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def replay(self, number: int) -> Tensor:
        """Do to the memory what the replay of a graph does, and keep the norm of the gradient."""
        # 1. The gradients, computed on the twin.
        self.twin.load_state_dict(self.model.state_dict())
        self.twin.zero_grad()
        self.load(number)
        _, loss = self.twin(self.ids, self.targets)
        loss.backward()

        # 2. Write them and the weights, without a change that torch counts.
        norms = []
        for parameter, other in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            assert parameter.grad is not None and other.grad is not None
            parameter.grad.data.copy_(other.grad)
            parameter.data.sub_(RATE * other.grad)
            norms.append(other.grad.norm())
        self.norms.append(float(torch.stack(norms).norm()))
        return loss.detach()


def capture(training: GraphedTraining, counts: Counts) -> int:
    """Capture a step; return how many operations it launched."""
    before = counts.operations
    with device_module.capturing():
        training.make_step()
    return counts.operations - before


def operations_without_watch() -> int:
    with pretended_device() as counts:
        return capture(GraphedTraining(), counts)


def test_nothing_is_launched_into_the_graph() -> None:
    plain = operations_without_watch()
    with pretended_device() as counts:
        training = GraphedTraining()
        with jacdiag.watch(training.model, training.optimizer, **OPTIONS):
            assert capture(training, counts) == plain


@pytest.mark.parametrize("warm_ups", [0, 3])
def test_replays_are_no_missing_steps(warm_ups: int, tmp_path: Path) -> None:
    with pretended_device() as counts:
        training = GraphedTraining()
        with jacdiag.watch(
            training.model, training.optimizer, log_dir=tmp_path, log_every=4, **OPTIONS
        ) as watch:
            for number in range(warm_ups):
                watch.step(training.run(number))
            capture(training, counts)
            for number in range(24):
                watch.step(training.replay(number))
            assert watch.alerts == []
    rows = lines(tmp_path, "step")[warm_ups:]

    # 1. Whether a replay was left out is not known, and is not claimed.
    assert {row["optimizer_step"] for row in rows} == {"replayed"}
    assert {row["skipped"] for row in rows} == {None}

    # 2. What can be read after a replay is right.
    assert [row["grad_norm_post"] for row in rows] == pytest.approx(training.norms, rel=1e-5)
    assert {row["lr"] for row in rows} == {RATE}
    (start,) = lines(tmp_path, "run")
    rows_with_update = [row for row in rows if row["update"] is not None]
    assert len(rows_with_update) > 10
    for row in rows_with_update:
        gradient = row["grad"][start["groups"].index(row["update"]["where"])]
        assert row["update"]["norm"] == pytest.approx(RATE * gradient, rel=1e-4)

    # 3. It is said once what is not measured.
    texts = [row["text"] for row in lines(tmp_path, "note")]
    (explanation,) = [text for text in texts if text.startswith("the step of SGD")]
    assert "whether a step was left out" in explanation
    assert not lines(tmp_path, "fault")


def test_a_step_that_is_missing_without_a_graph_is_an_error(tmp_path: Path) -> None:
    with pretended_device():
        training = GraphedTraining()
        with jacdiag.watch(
            training.model, training.optimizer, log_dir=tmp_path, log_every=4, **OPTIONS
        ) as watch:
            for number in range(3):
                watch.step(training.run(number))
            for _ in range(12):
                watch.step(torch.ones(()).to(NAME))
    (alert,) = lines(tmp_path, "alert")
    assert alert["code"] == "JD505" and "made no step in 10 steps in a row" in alert["what"]
    assert lines(tmp_path, "step")[-1]["skipped"] is True


def test_a_graph_that_is_not_used_any_more_hides_no_missing_step(tmp_path: Path) -> None:
    """A capture may fail, and the loop goes on without it."""
    with pretended_device() as counts:
        training = GraphedTraining()
        with jacdiag.watch(
            training.model, training.optimizer, log_dir=tmp_path, log_every=4, **OPTIONS
        ) as watch:
            capture(training, counts)
            for number in range(12):
                watch.step(training.run(number))
            for _ in range(12):
                watch.step(torch.ones(()).to(NAME))
    assert [alert["code"] for alert in lines(tmp_path, "alert")] == ["JD505"]


def test_a_step_without_the_graph_now_and_then_is_seen(tmp_path: Path) -> None:
    """The last batch of an epoch has another size, and is trained without the graph."""
    with pretended_device() as counts:
        training = GraphedTraining()
        with jacdiag.watch(
            training.model, training.optimizer, log_dir=tmp_path, log_every=4, **OPTIONS
        ) as watch:
            capture(training, counts)
            for number in range(1, 25):
                is_last_batch = number % 12 == 0
                step = training.run if is_last_batch else training.replay
                watch.step(step(number))
    outcomes = [row["optimizer_step"] for row in lines(tmp_path, "step")]
    assert outcomes == [*["replayed"] * 11, "seen"] * 2
    assert lines(tmp_path, "alert") == []


@pytest.mark.parametrize("method", ["step", "prepare", "flush"])
def test_a_call_of_the_watch_inside_the_capture_does_nothing(method: str, tmp_path: Path) -> None:
    with pretended_device() as counts:
        training = GraphedTraining()
        with jacdiag.watch(training.model, training.optimizer, log_dir=tmp_path) as watch:
            arguments = [training.run(0)] if method == "step" else []
            counts.clear()
            with device_module.capturing():
                getattr(watch, method)(*arguments)
            assert counts.operations == 0 and watch.count == 0
    texts = [row["text"] for row in lines(tmp_path, "note")]
    is_explained = any("Call w.step(loss) once after each graph.replay()" in text for text in texts)
    assert is_explained == (method == "step")
    assert not lines(tmp_path, "fault")


def test_a_covered_step_is_only_noted_while_it_is_captured() -> None:
    """An optimizer that does not run torch's own hooks."""

    class Plain:
        """Descent with the two attributes that a watch needs."""

        def __init__(self, model: nn.Module) -> None:
            self.param_groups = [{"params": list(model.parameters()), "lr": RATE}]

        def step(self) -> None:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(RATE * parameter.grad)

    with pretended_device() as counts:
        model = small(n_layer=1, dropout=0.0).to(NAME)
        optimizer: Any = Plain(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        counts.clear()
        optimizer.step()
        plain = counts.operations
        with jacdiag.watch(model, optimizer, **OPTIONS) as watch:
            counts.clear()
            with device_module.capturing():
                optimizer.step()
            assert counts.operations == plain
            watch.step(0.0)
            assert watch.observer.usage.ever


def test_a_rate_that_is_a_number_is_that_of_the_capture(tmp_path: Path) -> None:
    """A scheduler that changes it later does not reach the graph."""
    with pretended_device() as counts:
        training = GraphedTraining()
        with jacdiag.watch(
            training.model, training.optimizer, log_dir=tmp_path, **OPTIONS
        ) as watch:
            capture(training, counts)
            training.optimizer.param_groups[0]["lr"] = RATE / 2
            watch.step(training.replay(1))
    assert lines(tmp_path, "step")[0]["lr"] == RATE


def test_a_forward_that_is_only_in_the_graph_is_named(tmp_path: Path) -> None:
    with pretended_device() as counts:
        training = GraphedTraining()
        with jacdiag.watch(training.model, training.optimizer, log_dir=tmp_path, quiet=True) as w:
            capture(training, counts)
            for number in range(6):
                w.step(training.replay(number))
    texts = [row["text"] for row in lines(tmp_path, "note")]
    assert any(
        "was captured into a CUDA graph, and a replay of it calls no hook" in t for t in texts
    )
