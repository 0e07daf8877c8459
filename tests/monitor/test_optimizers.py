"""Figures with sets and kinds of optimizers, each compared with figures taken by hand around the
loop's own step.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, small
from monitor.test_step_metrics import exact, homes_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.monitor.optimizers import optimizer_tree

OPTIONS: dict[str, Any] = {
    "every": None,
    "stats_every": None,
    "log_every": 3,
    "strict": True,
    "quiet": True,
}
Step = Callable[[int], None]


class ByHand:
    """Takes each step's figures from the tensors themselves, around a step of the loop."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.homes = model, homes_of(model)
        self.gradients: list[float] = []
        self.updates: list[dict[str, float]] = []

    def around(self, step: Callable[[], Any]) -> Any:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.gradients.append(exact(p.grad for p in self.model.parameters() if p.grad is not None))
        result = step()
        moved = {}
        for label in set(self.homes.values()):
            members = [(n, p) for n, p in self.model.named_parameters() if self.homes[n] == label]
            moved[label] = exact(p - before[n] for n, p in members)
        self.updates.append(moved)
        return result


def train(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    step: Step,
    steps: int = 14,
    *,
    micro: int = 1,
    **options: Any,
) -> ByHand:
    """Train with a watch; `step` steps the optimizers and clears the gradients of those that
    stepped.
    """
    hand = ByHand(model)
    with jacdiag.watch(model, optimizer, log_dir=folder, **OPTIONS | options) as w:
        for number in range(1, steps + 1):
            for part in range(micro):
                _, loss = model(*batch(micro * number + part))
                (loss / micro).backward()
            hand.around(lambda number=number: step(number))
            w.step(loss.detach())
    return hand


def assert_updates(folder: Path, hand: ByHand, *, least: int, missing: int = 0) -> None:
    """Every logged update norm is the one by hand, and the sub-layers take turns."""
    rows = lines(folder, "step")
    logged = [row for row in rows if row["update"]]
    assert len(rows) == len(hand.updates) and len(rows) - len(logged) <= missing
    for row in logged:
        wanted = hand.updates[row["step"] - 1][row["update"]["where"]]
        assert row["update"]["norm"] == pytest.approx(wanted, rel=1e-4, abs=1e-9), row["step"]
    assert len({row["update"]["where"] for row in logged}) >= least


def split(model: nn.Module, parts: int) -> list[list[Tensor]]:
    """Parameters by kind: every sub-layer has some of each part."""
    chosen: list[list[Tensor]] = [[] for _ in range(parts)]
    for name, p in model.named_parameters():
        place = 0 if p.dim() == 2 and ".h." in name else 1 if p.dim() == 2 else 2
        chosen[min(place, parts - 1)].append(p)
    return chosen


# -- several optimizers ----------------------------------------------------------------------------
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_three_optimizers_have_one_turn_a_step(order: tuple[int, ...], tmp_path: Path) -> None:
    model = small(dropout=0.0)
    first, second, third = split(model, 3)
    optimizers: list[Optimizer] = [
        SGD(first, lr=0.3),
        AdamW(second, lr=1e-3),
        torch.optim.RMSprop(third, lr=1e-3),
    ]

    def step(number: int) -> None:
        for place in order:
            optimizers[place].step()
            optimizers[place].zero_grad()

    hand = train(tmp_path, model, optimizers, step)
    assert_updates(tmp_path, hand, least=6)
    rows = lines(tmp_path, "step")
    assert [row["grad_norm_post"] for row in rows] == pytest.approx(hand.gradients, rel=1e-5)
    assert lines(tmp_path, "run")[0]["lr_groups"] == ["SGD 0", "AdamW 0", "RMSprop 0"]
    assert rows[0]["lrs"] == [0.3, 1e-3, 1e-3] and rows[0]["lr"] == 0.3


def test_an_optimizer_that_steps_at_every_second_step(tmp_path: Path) -> None:
    model = small(dropout=0.0)
    matrices = [p for n, p in model.named_parameters() if ".h.0." in n]
    known = {id(p) for p in matrices}
    optimizers = [
        AdamW([p for p in model.parameters() if id(p) not in known], lr=1e-3),
        SGD(matrices, lr=0.3),
    ]

    def step(number: int) -> None:
        for optimizer in optimizers[: 2 - number % 2]:
            optimizer.step()
            optimizer.zero_grad()

    hand = train(tmp_path, model, optimizers, step, 24)
    assert_updates(tmp_path, hand, least=6, missing=2)
    rows = lines(tmp_path, "step")
    assert [row["lrs"][1] for row in rows] == [None, 0.3] * 12
    assert {row["lr"] for row in rows} == {1e-3} and not any(row["skipped"] for row in rows)
    measured = [row for row in rows if row["update"] and ".h.0." in row["update"]["where"]]
    assert len(measured) >= 6 and all(row["step"] % 2 == 0 for row in measured)


def test_optimizer_that_never_steps_does_not_delay_the_others(tmp_path: Path) -> None:
    model = small(dropout=0.0)
    first, second = split(model, 2)
    used, idle = AdamW(first, lr=1e-3), SGD(second, lr=0.1)
    hand = train(tmp_path, model, [used, idle], lambda _: used.step(), 16)
    assert_updates(tmp_path, hand, least=4, missing=5)


def test_gradient_accumulation_with_two_optimizers(tmp_path: Path) -> None:
    model = small(dropout=0.0)
    optimizers = [SGD(split(model, 2)[0], lr=0.3), AdamW(split(model, 2)[1], lr=1e-3)]

    def step(number: int) -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    hand = train(tmp_path, model, optimizers, step, micro=3)
    assert_updates(tmp_path, hand, least=6)
    assert [row["grad_norm_post"] for row in lines(tmp_path, "step")] == pytest.approx(
        hand.gradients, rel=1e-5
    )


# -- kinds of optimizers ---------------------------------------------------------------------------
class EightBit(Optimizer):
    """Momentum in int8 with one scale a tensor."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                old = state["codes"].float() * state["scale"] if state else torch.zeros_like(p)
                momentum = 0.9 * old + p.grad
                state["scale"] = momentum.abs().max().clamp(min=1e-12) / 127
                state["codes"] = (momentum / state["scale"]).round().to(torch.int8)
                p.add_(momentum, alpha=-group["lr"])


class Lookahead(Optimizer):
    """Every third step goes half of the way from the weights of three steps ago; `super().__init__`
    is left out.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base_one, self.count = base, 0
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.base_one.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_one.step()
        self.count += 1
        if self.count % 3 == 0:
            for p, slow in zip(
                (p for group in self.param_groups for p in group["params"]), self.slow, strict=True
            ):
                slow.lerp_(p, 0.5)
                p.copy_(slow)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base_one.zero_grad(set_to_none)


class ScheduleFree(Lookahead):
    """The base steps on other weights than those that the gradients were taken at, which come back
    after it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        weights = [p for group in self.param_groups for p in group["params"]]
        shown = [p.clone() for p in weights]
        for p, z in zip(weights, self.slow, strict=True):
            p.copy_(z)
        self.base_one.step()
        for p, z, y in zip(weights, self.slow, shown, strict=True):
            z.copy_(p)
            p.copy_(y.lerp(z, 0.3))


class Plain:
    """No torch class: groups and a step."""

    def __init__(self, params: Any, lr: float) -> None:
        self.param_groups = [{"params": list(params), "lr": lr}]

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data = p.data - self.param_groups[0]["lr"] * p.grad

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


class Pair(Optimizer):
    """A container that is an initialised optimizer itself, and steps those inside."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.parts = {str(k): optimizer for k, optimizer in enumerate(optimizers)}
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.parts.values():
            optimizer.step()


class Late(Optimizer):
    """Holds an inner optimizer for some parameters, and updates the others itself."""

    def __init__(self, inner: Optimizer, params: Any) -> None:
        self.inner = inner
        super().__init__([*inner.param_groups[0]["params"], *params], {"lr": 0.1})
        self.own = list(params)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        for p in self.own:
            p.add_(p.grad, alpha=-0.1)


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "foreach": lambda m: adam(m, foreach=True),
    "fused": lambda m: adam(m, fused=True),
    "eight bit": lambda m: EightBit(m.parameters(), 0.1),
    "lookahead": lambda m: Lookahead(adam(m)),
    "schedule-free": lambda m: ScheduleFree(SGD(m.parameters(), lr=0.3)),
    "no torch class": lambda m: Plain(m.parameters(), 0.1),
    "container": lambda m: Pair(SGD(split(m, 2)[0], lr=0.3), AdamW(split(m, 2)[1], lr=1e-3)),
    "container of containers": lambda m: [
        Lookahead(Pair(SGD(split(m, 2)[0], lr=0.3), AdamW(split(m, 2)[1])))
    ],
    "partly its own": lambda m: Late(SGD(split(m, 2)[0], lr=0.3), split(m, 2)[1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_update_norms_are_right_for_each_kind_of_optimizer(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(dropout=0.0)
    optimizer = KINDS[kind](model)
    stepping = optimizer[0] if isinstance(optimizer, list) else optimizer

    def step(number: int) -> None:
        stepping.step()
        stepping.zero_grad()

    with caplog.at_level(logging.WARNING, "jacdiag.watch"):
        hand = train(tmp_path, model, optimizer, step)
    assert_updates(tmp_path, hand, least=6)
    rows = lines(tmp_path, "step")
    assert [row["grad_norm_post"] for row in rows] == pytest.approx(hand.gradients, rel=1e-5)
    assert {row["optimizer_step"] for row in rows} == {"seen"} and not caplog.records
    assert "step" not in vars(stepping)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_optimizers_give_the_same_bits(kind: str) -> None:
    def run(watched: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = small()
        optimizer = KINDS[kind](model)
        stepping = optimizer[0] if isinstance(optimizer, list) else optimizer
        w = jacdiag.watch(model, optimizer, **OPTIONS) if watched else None
        losses = []
        for number in range(12):
            _, loss = model(*batch(number))
            loss.backward()
            stepping.step()
            stepping.zero_grad()
            losses.append(loss.detach())
            if w is not None:
                w.step(loss.detach())
        if w is not None:
            w.close()
        return [*losses, *(p.detach().clone() for p in model.parameters()), torch.rand(())]

    for plain, watched in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, watched)


def test_a_covered_step_is_pickled_and_copied_as_the_objects_own() -> None:
    model = small()
    optimizer = Plain(model.parameters(), 0.1)
    with jacdiag.watch(model, optimizer, **OPTIONS):
        assert "step" in vars(optimizer)
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert other.step.__self__ is other and type(other.step).__name__ == "method"
        file = io.BytesIO()
        torch.save(optimizer, file)
        assert b"jacdiag" not in file.getvalue()
    assert "step" not in vars(optimizer)


def test_a_step_that_another_library_covers_in_turn_is_let_go(tmp_path: Path) -> None:
    model = small()
    optimizer = Plain(model.parameters(), 0.1)
    w = jacdiag.watch(model, optimizer, **OPTIONS)
    cover = optimizer.step
    optimizer.step = lambda: cover()  # type: ignore[method-assign]
    w.close()
    _, loss = model(*batch(1))
    loss.backward()
    optimizer.step()
    assert cover.before is cover.after  # type: ignore[attr-defined]


def test_optimizer_whose_step_cannot_be_wrapped_is_refused_with_a_hint() -> None:
    model = small()
    body = {"__slots__": ("param_groups",), "step": lambda self: None}
    closed: Any = type("Closed", (), body)()
    closed.param_groups = [{"params": list(model.parameters())}]
    with pytest.raises(UsageError, match=r"(?s)Closed.*super\(\).__init__"):
        jacdiag.watch(model, closed)
    assert not model._forward_pre_hooks

    class Opened(Optimizer):  # follows the hint
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            return

    jacdiag.watch(model, Opened(model.parameters(), {}), **OPTIONS).close()


def test_what_a_trainer_forwards_is_left_alone() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small()
    prepared = accelerate.Accelerator(cpu=True).prepare(adam(model))
    tree = optimizer_tree(prepared)
    assert tree.leaves == [prepared.optimizer] and not tree.shells


# -- closures, scalers, swaps ----------------------------------------------------------------------
def test_lbfgs_updates_by_hand(tmp_path: Path) -> None:
    model = small(dropout=0.0)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)
    hand = ByHand(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for number in range(1, 9):

            def closure(number: int = number) -> Tensor:
                optimizer.zero_grad()
                _, loss = model(*batch(number))
                loss.backward()
                return loss

            w.step(hand.around(lambda closure=closure: optimizer.step(closure)))
    assert_updates(tmp_path, hand, least=5, missing=1)
    assert all(row["lr"] == 0.05 for row in lines(tmp_path, "step"))


@pytest.mark.parametrize("clips", [False, True], ids=["no norm", "norm given"])
def test_a_scaler_that_skips_has_no_warning_about_use(
    clips: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The scale begins too high for the first steps, and one step later on overflows."""
    model = small(dropout=0.0)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for number in range(1, 41):
            _, loss = model(*batch(number))
            scaler.scale(loss).backward()
            if number <= 4 or number == 30:
                model.transformer["wte"].weight.grad[0, 0] = math.inf  # type: ignore[index]
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) if clips else None
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            w.step(loss.detach(), grad_norm=norm)
    rows = lines(tmp_path, "step")
    early = True if clips else None  # without a norm nobody knows why nothing has stepped so far
    assert [row["skipped"] for row in rows] == [early] * 4 + [False] * 25 + [True] + [False] * 10
    assert (
        rows[29]["skipped_for"] == ("inf" if clips else None)
        and rows[29]["optimizer_step"] == "none"
    )
    assert rows[29]["lr"] is None and rows[30]["lr"] == 3e-3
    assert not caplog.records and not lines(tmp_path, "alert")


def test_an_optimizer_that_is_replaced_during_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(dropout=0.0)
    optimizers = [SGD(model.parameters(), lr=0.3), AdamW(model.parameters(), lr=1e-3)]
    hand = ByHand(model)
    with jacdiag.watch(model, optimizers[0], log_dir=tmp_path, **OPTIONS) as w:
        for number in range(1, 21):
            place = int(number > 6)
            if number == 13:
                assert "w.set_optimizer(optimizer)" in caplog.text
                w.set_optimizer(optimizers[1])
            _, loss = model(*batch(number))
            loss.backward()
            hand.around(optimizers[place].step)
            optimizers[place].zero_grad()
            w.step(loss.detach())
    rows = lines(tmp_path, "step")
    assert [row["optimizer_step"] for row in rows] == ["seen"] * 6 + ["unseen"] * 6 + ["seen"] * 8
    assert not any(row["skipped"] for row in rows)
    seen = [row for row in rows if row["optimizer_step"] == "seen"]
    assert [row["grad_norm_post"] for row in seen] == pytest.approx(
        [hand.gradients[row["step"] - 1] for row in seen], rel=1e-5
    )
    for row in seen:
        assert row["update"]["norm"] == pytest.approx(
            hand.updates[row["step"] - 1][row["update"]["where"]], rel=1e-4
        )
        assert row["lr"] == (0.3 if row["step"] <= 6 else 1e-3)
    assert caplog.text.count("no optimizer step seen") == 1
    assert not optimizers[1]._optimizer_step_pre_hooks


class Climber(Optimizer):
    """Sharpness-aware by methods of its own, with or without an optimizer inside; `data` hides
    changes of weights.
    """

    def __init__(self, params: Any, *, inside: bool, data: bool = False) -> None:
        super().__init__(params, {"lr": 0.1})
        self.data = data
        self.base: Any = SGD(self.param_groups, lr=0.1) if inside else None

    @torch.no_grad()
    def move(self, share: float) -> None:
        for p in self.param_groups[0]["params"]:
            (p.data if self.data else p).add_(p.grad, alpha=share)

    def descend(self) -> None:
        if self.base is not None:
            self.base.step()
        else:
            self.move(-0.1)
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize("how", ["inside", "own", "own, on data"])
def test_an_optimizer_that_steps_by_methods_of_its_own(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(dropout=0.0)
    optimizer = Climber(model.parameters(), inside=how == "inside", data=how == "own, on data")
    hand = train(tmp_path, model, optimizer, lambda _: optimizer.descend(), 30)
    rows = lines(tmp_path, "step")
    assert not any(row["skipped"] for row in rows) and not lines(tmp_path, "alert")
    if how == "inside":
        assert_updates(tmp_path, hand, least=6)
        assert [row["grad_norm_post"] for row in rows] == pytest.approx(hand.gradients, rel=1e-5)
        assert not caplog.records
        return
    assert {row["grad_norm_post"] for row in rows} == {None} and {
        row["update"] for row in rows
    } == {None}
    assert caplog.text.count("no optimizer step seen") == 1 and "Climber" in caplog.text
    assert ("the weights change" in caplog.text) == (how == "own")
    assert (
        "skipped" not in caplog.text
        and "inf" not in caplog.text
        and "set_optimizer" not in caplog.text
    )


@pytest.mark.parametrize("cleared", ["none", "zero", "later"])
def test_gradients_after_a_step_that_was_not_seen(cleared: str, tmp_path: Path) -> None:
    """They are read if they are still there; zeros are no norm."""
    model = small(dropout=0.0)
    optimizer = Climber(model.parameters(), inside=False)
    wanted = []
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for number in range(1, 7):
            optimizer.zero_grad()
            _, loss = model(*batch(number))
            loss.backward()
            wanted.append(exact(p.grad for p in model.parameters()))
            optimizer.move(-0.1)
            if cleared != "later":
                optimizer.zero_grad(set_to_none=cleared == "none")
            w.step(loss.detach())
    norms = [row["grad_norm_post"] for row in lines(tmp_path, "step")]
    assert norms == (pytest.approx(wanted, rel=1e-5) if cleared == "later" else [None] * 6)


@pytest.mark.parametrize("micro", [2, 3])
def test_step_call_for_every_micro_batch_gets_a_warning(
    micro: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(dropout=0.0)
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for number in range(1, 12 * micro + 1):
            _, loss = model(*batch(number))
            loss.backward()
            if number % micro == 0:
                optimizer.step()
                optimizer.zero_grad()
            w.step(loss.detach())
    assert caplog.text.count(f"step was called {micro} times for each step of the optimizer") == 1


# -- learning rates --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_learning_rates_are_those_of_the_step(kind: str, tmp_path: Path) -> None:
    model = small(dropout=0.0)
    first, second = split(model, 2)
    rates: list[Any] = [torch.tensor(0.1), torch.tensor(0.2)] if kind == "tensor" else [0.1, 0.2]
    groups = [
        {"params": first, "lr": rates[0], "name": "matrices"},
        {"params": second, "lr": rates[1]},
    ]
    optimizer = SGD(groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 10)
    used = []

    def step(number: int) -> None:
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    train(tmp_path, model, optimizer, step, 8)
    rows = lines(tmp_path, "step")
    for row, wanted in zip(rows, used, strict=True):
        assert row["lrs"] == pytest.approx(wanted, rel=1e-6) and row["lr"] == pytest.approx(
            wanted[0], rel=1e-6
        )
    assert lines(tmp_path, "run")[0]["lr_groups"] == ["SGD matrices", "SGD 1"]


# -- torch.compile ---------------------------------------------------------------------------------
class Descent(Optimizer):
    """Gradient descent in one graph."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize("full", [False, True], ids=["", "fullgraph"])
def test_a_compiled_step_is_neither_broken_nor_compiled_again(full: bool, tmp_path: Path) -> None:
    """Also with fullgraph, in which a hook that is no part of the graph would be an error."""
    torch._dynamo.reset()
    model = small(dropout=0.0)
    # PyTorch's own optimizers break the graph themselves
    optimizer: Optimizer = (
        Descent(model.parameters()) if full else SGD(model.parameters(), lr=0.1, foreach=True)
    )
    compiled = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    step = torch.compile(optimizer.step, backend=backend, fullgraph=full)
    hand = ByHand(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for number in range(1, 15):
            optimizer.zero_grad()
            _, loss = model(*batch(number))
            loss.backward()
            hand.around(step)
            w.step(loss.detach())
    rows = lines(tmp_path, "step")
    assert compiled == 1
    assert {row["optimizer_step"] for row in rows} == {"compiled"} and not any(
        row["skipped"] for row in rows
    )
    assert [row["grad_norm_post"] for row in rows] == pytest.approx(hand.gradients, rel=1e-5)
    assert_updates(tmp_path, hand, least=6, missing=1)
    assert {row["lr"] for row in rows} == {0.1}
    assert lines(tmp_path, "note")[0]["text"].count("torch.compile") == 1


# -- what rules and logs make of it ----------------------------------------------------------------
@pytest.mark.parametrize("overflow", [True, False])
def test_ten_steps_without_a_step_name_a_cause_only_if_it_is_known(overflow: bool) -> None:
    from jacdiag.detectors.live_rules import LiveRules, StepFigures
    from jacdiag.rules.thresholds import load_thresholds

    live = LiveRules(load_thresholds())
    said = [
        alert.what
        for step in range(12)
        for alert in live.step(
            StepFigures(step, 2.0, math.nan, skipped=True, overflow=overflow)
        ).alerts
    ]
    assert len(said) == 1 and ("gradients that are not finite" in said[0]) == overflow
    assert ("made no step in 10 steps in a row" in said[0]) != overflow


def test_rows_of_older_logs_are_read() -> None:
    from jacdiag.detectors.live_rules import StepFigures

    row = {
        "step": 3,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": None,
        "grad_norm_post": None,
        "clip_ratio": None,
        "grad": None,
        "skipped": True,
        "nonfinite": [],
        "update": None,
    }
    figures = StepFigures.from_row(row)
    assert figures.skipped and not figures.overflow
