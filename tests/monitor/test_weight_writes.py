"""Weights that are written between two steps: seen at their step, and silent for everything that
trainers do there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import lines
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations

import jacdiag
from jacdiag.records.run_log import Alert

pytestmark = pytest.mark.check("monitor")

AT = 5
Write = Callable[[nn.Module, Any], Any]


class Network(nn.Module):
    """One residual branch and a head: three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        out: Tensor = self.head(x)
        return out


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def train(
    between: Write,
    model: nn.Module | None = None,
    make: Any = None,
    steps: int = AT + 2,
    **options: Any,
) -> list[Alert]:
    """Train some steps; `between` is called before the forward of step 5."""
    model = model or network()
    optimizer = make(model) if make is not None else torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"every": None, "stats_every": None, "quiet": True, "strict": True, **options}
    with jacdiag.watch(model, optimizer, **settings) as w:
        for step in range(1, steps + 1):
            if step == AT:
                between(model, optimizer)
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
        w.flush()
        return [alert for alert in w.alerts if alert.code == "JD508"]


def scale(factor: float, *names: str) -> Write:
    def write(model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            for name in names or ("up.weight", "down.weight", "head.weight"):
                model.get_parameter(name).mul_(factor)

    return write


# -- it fires --------------------------------------------------------------------------------------
def test_weights_that_are_scaled_are_named_with_their_factor_at_their_step() -> None:
    (alert,) = train(scale(2.45, "up.weight", "head.weight"))
    assert (alert.step, alert.level, alert.where) == (AT, "warning", ["up.weight", "head.weight"])
    assert alert.what == (
        "2 of 3 weight matrices were written outside the optimizer, after its step 4 and before "
        "step 5, "
        "as samples of their elements show: "
        "up.weight, head.weight, each multiplied by 2.45"
    )
    assert alert.evidence["after"] == AT - 1 and alert.evidence["change"] == pytest.approx(
        1.45, rel=1e-3
    )


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
def test_a_doubling_and_a_halving_are_on_the_boundary_and_fire(factor: float) -> None:
    (alert,) = train(scale(factor, "down.weight"))
    assert alert.what.startswith("1 weight was written outside") and alert.where == ["down.weight"]
    # A factor below zero leaves the norm as it is: no multiple is claimed.
    assert ("multiplied by" in alert.what) == (factor > 0)


@pytest.mark.parametrize("factor", [1.98, 0.51])
def test_less_than_a_doubling_is_a_note_once_in_the_log(factor: float, tmp_path: Path) -> None:
    assert not train(scale(factor, "down.weight"), log_dir=tmp_path)
    (note,) = [row["text"] for row in lines(tmp_path, "note") if "written outside" in row["text"]]
    assert f"down.weight, multiplied by {factor:.2f}" in note.replace("0.510", "0.51")


def test_a_new_draw_is_seen_by_its_values_though_its_norm_is_the_same() -> None:
    def draw(model: nn.Module, optimizer: Any) -> None:
        weight = model.get_parameter("up.weight")
        with torch.no_grad():
            norm = weight.norm()
            weight.copy_(torch.randn_like(weight))
            weight.mul_(norm / weight.norm())

    (alert,) = train(draw)
    assert "up.weight changed by 1." in alert.what and "multiplied" not in alert.what


def test_zeros_and_what_was_zero_are_said_so() -> None:
    (alert,) = train(scale(0.0, "up.weight"))
    assert alert.what.endswith("up.weight set to zero")

    def set_one(model: nn.Module, optimizer: Any) -> None:
        nn.init.ones_(model.get_parameter("head.weight"))

    model = network()
    nn.init.zeros_(model.get_parameter("head.weight"))
    (alert,) = train(set_one, model, make=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    assert alert.what.endswith("head.weight, zero before")


def test_different_factors_are_not_called_one() -> None:
    def write(model: nn.Module, optimizer: Any) -> None:
        scale(3.0, "up.weight")(model, optimizer)
        scale(4.0, "down.weight")(model, optimizer)

    (alert,) = train(write)
    assert alert.what.endswith("down.weight multiplied by 4.00; up.weight multiplied by 3.00")


@pytest.mark.parametrize("way", ["data", "pointer", "state_dict"])
def test_every_way_to_write_is_seen(way: str) -> None:
    def write(model: nn.Module, optimizer: Any) -> None:
        weight = model.get_parameter("up.weight")
        if way == "data":
            weight.data.mul_(3)
        elif way == "pointer":
            weight.data = weight.data * 3
        else:
            state = model.state_dict()
            model.load_state_dict({**state, "up.weight": 3 * state["up.weight"]})

    (alert,) = train(write)
    assert alert.where == ["up.weight"] and alert.what.endswith("multiplied by 3.00")


def test_a_write_inside_the_closure_is_seen_if_prepare_is_called_before_the_update() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, quiet=True, strict=True
    ) as w:
        for step in range(1, AT + 2):

            def closure(step: int = step) -> Tensor:
                if step == AT:
                    scale(3.0)(model, optimizer)
                optimizer.zero_grad()
                loss: Tensor = model(torch.ones(2, 16)).square().mean()
                loss.backward()
                w.prepare()
                return loss

            w.step(optimizer.step(closure))
        w.flush()
        assert [(a.step, a.code) for a in w.alerts] == [(AT, "JD508")]


# -- it is silent ----------------------------------------------------------------------------------
def nothing(model: nn.Module, optimizer: Any) -> None:
    pass


def swap_and_back(model: nn.Module, optimizer: Any) -> None:
    """An average for an evaluation."""
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: 5 * t for name, t in own.items()})
    model(torch.ones(1, 16))
    model.load_state_dict(own)


def interpolate_and_back(model: nn.Module, optimizer: Any) -> None:
    """What schedule-free optimizers do for an evaluation: back but for rounding."""
    for p in model.parameters():
        z = 7 * p.detach()
        p.data.lerp_(z, 1 - 1 / 0.9)
        p.data.lerp_(z, 1 - 0.9)


def climb_and_back(model: nn.Module, optimizer: Any) -> None:
    """The first half of SAM, by hand, and its way back before the optimizer steps."""
    for p in model.parameters():
        step = 3 * torch.ones_like(p)
        p.data.add_(step)
        p.data.sub_(step)


def freeze(model: nn.Module, optimizer: Any) -> None:
    model.get_parameter("up.weight").requires_grad_(False)
    model.get_parameter("up.weight").grad = None


def write_frozen(model: nn.Module, optimizer: Any) -> None:
    """A merge of adapters writes to weights that no optimizer holds."""
    model.extra.weight.data.mul_(100)  # type: ignore[union-attr,operator]


def write_vectors(model: nn.Module, optimizer: Any) -> None:
    model.get_parameter("up.bias").data.mul_(100)


@pytest.mark.parametrize(
    "between",
    [
        nothing,
        swap_and_back,
        interpolate_and_back,
        climb_and_back,
        freeze,
        write_frozen,
        write_vectors,
    ],
)
def test_what_trainers_do_between_two_steps_is_silent(between: Write, tmp_path: Path) -> None:
    model = network()
    if between is write_frozen:
        model.extra = nn.Linear(2, 2)

    def make(model: nn.Module) -> Any:
        return torch.optim.AdamW(
            [p for name, p in model.named_parameters() if "extra" not in name], lr=1e-3
        )

    assert not train(between, model, make, log_dir=tmp_path)
    assert not [row for row in lines(tmp_path, "note") if "written outside" in row["text"]]


class Lookahead:
    """Moves the weights after the step of the optimizer inside, within its own step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.steps = 0

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p in self.param_groups[0]["params"]:
                p.data.mul_(3)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["huge rate", "wrapper", "two optimizers", "unfreezing"])
def test_what_optimizers_do_themselves_is_silent(kind: str) -> None:
    def make(model: nn.Module) -> Any:
        parameters = list(model.parameters())
        if kind == "huge rate":
            return torch.optim.SGD(parameters, lr=1e3)
        if kind == "wrapper":
            return Lookahead(torch.optim.SGD(parameters, lr=1e-3))
        return torch.optim.AdamW(parameters, lr=1e-3)

    model = network()
    if kind == "two optimizers":
        first = torch.optim.SGD(model.up.parameters(), lr=1e2)
        second = torch.optim.SGD([*model.down.parameters(), *model.head.parameters()], lr=1e2)
        with jacdiag.watch(
            model, [first, second], every=None, stats_every=None, quiet=True, strict=True
        ) as w:
            for step in range(8):
                loss = model(torch.ones(2, 16)).square().mean()
                loss.backward()
                (first if step % 2 else second).step()  # in turn, as the two sides of a GAN
                w.step(loss)
            w.flush()
            assert not [alert for alert in w.alerts if alert.code == "JD508"]
        return
    between = nothing
    if kind == "unfreezing":
        model.get_parameter("up.weight").requires_grad_(False)
        between = lambda m, o: m.get_parameter("up.weight").requires_grad_(True)  # noqa: E731
    assert not train(between, model, make)


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weights_are_silent(kind: Any) -> None:
    model = network()
    kind(model.down)
    assert not train(nothing, model)


def test_a_step_that_raised_is_not_compared_with_the_one_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Breaks(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.calls += 1
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(3)
            if self.calls == AT:
                raise RuntimeError("out of memory")

    model = network()
    optimizer = Breaks(model.parameters(), lr=1e-3)
    with (
        caplog.at_level(logging.WARNING),
        jacdiag.watch(model, optimizer, every=None, stats_every=None, quiet=True, strict=True) as w,
    ):
        for _ in range(AT + 2):
            loss = model(torch.ones(2, 16)).square().mean()
            loss.backward()
            try:
                optimizer.step()
            except RuntimeError:
                continue
            w.step(loss)
        w.flush()
        assert not [alert for alert in w.alerts if alert.code == "JD508"]


def test_a_weight_that_is_not_finite_is_the_matter_of_another_rule() -> None:
    assert not train(scale(float("nan"), "up.weight"))


def test_weights_are_not_held_between_steps() -> None:
    """A loop that moves its model off the device between steps gets the memory."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with jacdiag.watch(
        model, optimizer, every=None, stats_every=None, quiet=True, strict=True
    ) as w:
        for _ in range(3):
            loss = model(torch.ones(2, 16)).square().mean()
            loss.backward()
            optimizer.step()
            w.step(loss)
        writes = w.measurements.writes
        assert writes is not None and writes.before and not writes.stepping
        assert sum(map(len, writes.before.values())) <= 3 * 128
        old = StorageWeakRef(model.up.weight.untyped_storage())
        model.up.weight.data = model.up.weight.data.clone()
        assert old.expired()


def _move(weight: Tensor) -> None:
    weight.data = weight.data.clone()


def _transpose_memory(weight: Tensor) -> None:
    weight.data = weight.data.t().contiguous().t()


def _free_and_fill_again(weight: Tensor) -> None:
    values, storage = weight.detach().clone(), weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    weight.data.copy_(values)


@pytest.mark.parametrize("place", [_move, _transpose_memory, _free_and_fill_again])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_weight_that_lies_elsewhere_is_read_there(
    place: Callable[[Tensor], None], factor: float
) -> None:
    def write(model: nn.Module, optimizer: Any) -> None:
        scale(factor, "up.weight")(model, optimizer)
        place(model.get_parameter("up.weight"))

    # Other places in memory are other samples, where the elements were put in another order.
    alerts = train(write)
    is_reordered = place is _transpose_memory
    assert [alert.where for alert in alerts] == [["up.weight"]] * (factor != 1.0 or is_reordered)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_changes_its_dtype_between_steps_is_no_write(dtype: torch.dtype) -> None:
    model = network()

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(model.up.weight.dtype)).float()

    def cast(wrapper: nn.Module, optimizer: Any) -> None:
        model.to(dtype)
        model.zero_grad()

    assert not train(cast, Cast(), make=lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))


def test_a_weight_that_gets_gaps_in_memory_switches_the_part_off_and_nothing_else(
    tmp_path: Path,
) -> None:
    def spread(model: nn.Module, optimizer: Any) -> None:
        model.get_parameter("up.weight").data = torch.ones(24, 32)[:, ::2]

    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.0)  # noqa: E731
    assert not train(spread, make=make, log_dir=tmp_path, strict=False)
    (fault,) = lines(tmp_path, "fault")
    assert fault["part"] == "writes" and "up.weight is no dense tensor" in fault["error"]
    assert len(lines(tmp_path, "step")) == AT + 2


@pytest.mark.parametrize("factor", [None, 1.0, 2.45])
def test_a_checkpoint_that_was_changed_on_its_way_is_seen_at_the_first_step(
    factor: float | None,
) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"every": None, "stats_every": None, "quiet": True, "strict": True}

    def go(watch: Any, steps: int) -> None:
        for _ in range(steps):
            loss = model(torch.ones(2, 16)).square().mean()
            loss.backward()
            optimizer.step()
            watch.step(loss)

    with jacdiag.watch(model, optimizer, **options) as first:
        go(first, 3)
        state, weights = first.state_dict(), copy.deepcopy(model.state_dict())
        if factor is None:
            del state["weights"]  # of an older version
            factor = 2.45
        go(first, 2)
    model.load_state_dict(weights)
    scale(factor, "down.weight")(model, optimizer)
    with jacdiag.watch(model, optimizer, **options) as second:
        second.load_state_dict(state)
        go(second, 2)
        second.flush()
        alerts = [alert for alert in second.alerts if alert.code == "JD508"]
    if "weights" not in state or factor == 1.0:
        assert not alerts
        return
    assert [alert.where for alert in alerts] == [["down.weight"]]
    assert (
        "after its step 3 and before step 4, as samples of their elements show: down.weight"
        in alerts[0].what
    )
