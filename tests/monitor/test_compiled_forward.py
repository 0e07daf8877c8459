"""A model that is compiled after the watch began: its batches are seen, and nothing is compiled
again for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, assert_same_state, batch, lines, small, state_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import jacdiag
from jacdiag.monitor.batch_fingerprints import fingerprint
from jacdiag.monitor.log.flight_recorder import read_batch

OPTIONS: dict[str, Any] = {
    "every": 6,
    "stats_every": 3,
    "log_every": 4,
    "quiet": True,
    "strict": True,
}
STEPS = 7

Forward = Callable[[Tensor, Tensor], Tensor]


def compiled_outside(model: nn.Module, counter: CompileCounter) -> Forward:
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    return lambda x, y: compiled(x, y)[1]


def compiled_in_place(model: nn.Module, counter: CompileCounter) -> Forward:
    model.compile(backend=counter, fullgraph=True)
    return lambda x, y: model(x, y)[1]


def compiled_function(model: nn.Module, counter: CompileCounter) -> Forward:
    """The forward is a part of what is compiled; its arguments are made inside."""

    @torch.compile(backend=counter, fullgraph=True)
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = model(x + 0, y + 0)[1]
        return loss

    return loss_of


HOW = [compiled_outside, compiled_in_place, compiled_function]


def run(
    how: Any, folder: Path | None, *, first: str = "watch", **more: Any
) -> tuple[Any, list[float], int]:
    """Train; return the state, the losses and how often something was compiled."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, counter = small(dropout=0.0), CompileCounter()
    optimizer = adam(model)
    options = {**OPTIONS, "log_dir": folder, **more}
    forward: Forward | None = how(model, counter) if first == "compile" else None
    w = jacdiag.watch(model, optimizer, **options) if folder is not None else None
    forward = forward or how(model, counter)
    losses = []
    for step in range(1, STEPS + 1):
        loss = forward(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if w is not None:
            w.step(loss)
    if w is not None:
        w.close()
    return state_of(model, optimizer), losses, counter.frame_count


@cache
def plain_run(how: Any) -> tuple[Any, list[float], int]:
    return run(how, None)


CASES = [
    *((how, "watch") for how in HOW),
    (compiled_outside, "compile"),
    (compiled_in_place, "compile"),
    # A function is compiled when it is first called: after the watch began in both cases.
    pytest.param(compiled_function, "compile", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("how", "first"), CASES)
def test_batches_are_seen_and_nothing_is_compiled_again(
    how: Any, first: str, tmp_path: Path
) -> None:
    plain = plain_run(how)
    watched = run(how, tmp_path, first=first)
    assert plain[1] == watched[1]
    assert_same_state(plain[0], watched[0])
    assert watched[2] == plain[2] == 1
    steps = lines(tmp_path, "step")
    expected = [f"{fingerprint((batch(step), {})):016x}" for step in range(1, STEPS + 1)]
    assert [row["batches"] for row in steps] == [[print_] for print_ in expected]
    probes = lines(tmp_path, "probe")
    assert len(probes) == 2 and probes[0]["report"]["probe"]["tokens"] == "stream"
    (note,) = [row["text"] for row in lines(tmp_path, "note")]
    assert "compiled together with the hook" in note


def test_a_module_that_was_compiled_before_shows_every_batch(tmp_path: Path) -> None:
    """The hook is then outside of what is compiled, and there is nothing to say."""
    torch._dynamo.reset()
    model, counter = small(dropout=0.0), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = adam(model)
    with jacdiag.watch(compiled, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        for step in range(1, STEPS + 1):
            for part in (0, 1):
                loss = compiled(*batch(2 * step + part))[1]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    assert all(len(row["batches"]) == 2 for row in lines(tmp_path, "step"))
    assert not lines(tmp_path, "note") and counter.frame_count == 1


def test_an_evaluation_in_compiled_code_is_no_batch(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = small(dropout=0.0)
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w:
        compiled = torch.compile(model, backend="eager")
        for step in range(1, 8):
            loss = compiled(*batch(step))[1]
            loss.backward()
            with torch.no_grad():
                compiled(*batch(100 + step))
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    expected = [f"{fingerprint((batch(step), {})):016x}" for step in range(1, 8)]
    assert [row["batches"] for row in lines(tmp_path, "step")] == [[print_] for print_ in expected]


def test_a_batch_of_compiled_code_is_kept_for_the_replay(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = small(dropout=0.0)
    optimizer = adam(model)
    with (
        pytest.raises(ZeroDivisionError),
        jacdiag.watch(model, optimizer, log_dir=tmp_path, **OPTIONS) as w,
    ):
        compiled = torch.compile(model, backend="eager")
        for step in range(1, 8):
            loss = compiled(*batch(step))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
        _ = 1 / 0
    kept = read_batch(tmp_path / "flight-7")
    assert torch.equal(kept["idx"], batch(7)[0]) and torch.equal(kept["targets"], batch(7)[1])  # type: ignore[call-overload]


def test_many_watches_of_one_compiled_function_compile_nothing_again(tmp_path: Path) -> None:
    """A guard on the watch would make each of them a new compilation, and fullgraph would fail at
    the eighth.
    """
    torch._dynamo.reset()
    model, counter = small(dropout=0.0), CompileCounter()
    optimizer = adam(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for number in range(9):
        options = {**OPTIONS, "every": None, "log_dir": tmp_path / str(number)}
        with jacdiag.watch(model, optimizer, **options) as w:
            for step in range(1, 3):
                loss = compiled(*batch(step))[1]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                w.step(loss)
        assert all(row["batches"] for row in lines(tmp_path / str(number), "step"))
    assert counter.frame_count <= 2


def test_a_watch_that_writes_nothing_compiles_nothing_again() -> None:
    """It needs the first batch only, but compiled code holds its hook."""
    torch._dynamo.reset()
    model, counter = small(dropout=0.0), CompileCounter()
    optimizer = adam(model)
    with jacdiag.watch(model, optimizer, **OPTIONS) as w:
        model.compile(backend=counter)
        for step in range(1, 8):
            loss = model(*batch(step))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss)
    assert counter.frame_count == 1
