"""What a watch costs in a training step on the device, and what others cost."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jacdiag
from benchmarks._gpu.bench import NotHereError, Row
from benchmarks._gpu.shapes import Shape, build
from benchmarks._gpu.waits import check_counted, counted_waits
from benchmarks._watchers import WATCHERS, Watcher
from jacdiag.devices.accelerators import wait_for

# The libraries that some of them need.
NEEDS = {"trainscope, defaults": "trainscope", "wandb.watch(log='all'), every step": "wandb"}


class Loop:
    """A training loop whose steps are timed: AdamW, on accelerators with autocast to bfloat16."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        model, ids = build(shape, device)
        self.model: nn.Module = model.train()
        self.ids: Tensor = ids
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, call: Any = None, before: bool = False) -> float:
        """Make a step and return its seconds; `call` is what a watcher does in it."""
        wait_for(self.device)
        begun = time.perf_counter()
        with self._precision():
            _, loss = self.model(self.ids[:, :-1], self.ids[:, 1:])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if call is not None and before:
            call(loss, norm)
        self.optimizer.step()
        if call is not None and not before:
            call(loss, norm)
        self.optimizer.zero_grad()
        wait_for(self.device)
        return time.perf_counter() - begun

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def overhead(shape: Shape, device: torch.device, watcher: Watcher, rounds: int, steps: int) -> Row:
    """Compare steps with a watcher with the plain steps right before and after them.

    Raises:
        NotHereError: the watcher's library is not installed.
    """
    # 1. Its library.
    library = NEEDS.get(watcher.name)
    if library is not None and importlib.util.find_spec(library) is None:
        raise NotHereError(f"{library} is not installed")

    # 2. Plain steps, its own, plain ones. To attach it has a price that is paid once in a run.
    loop = Loop(shape, device)
    shares = []
    with tempfile.TemporaryDirectory() as name:
        for turn in range(rounds + 1):
            plain = [loop.step() for _ in range(steps)]
            step, close = watcher.attach(loop.model, loop.optimizer, Path(name) / str(turn))
            loop.step(step, watcher.before)
            own = [loop.step(step, watcher.before) for _ in range(steps)]
            close()
            plain += [loop.step() for _ in range(steps)]
            shares.append(statistics.median(own) / statistics.median(plain) - 1)

    # 3. The first round warms up.
    share = statistics.median(shares[1:])
    return Row(
        part="watch",
        what=f"{shape.name}: {watcher.name}",
        figure=f"{share:+.1%} of a step of {statistics.median(plain):.4f} s",
        numbers={"overhead": share, "of_each_round": shares[1:], "plain": statistics.median(plain)},
    )


def waits_between_logs(shape: Shape, device: torch.device) -> Row:
    """Count how often the watch makes the host wait in the steps between two logs.

    Raises:
        NotHereError: nothing counts the waits for this kind of device.
    """
    check_counted(device)
    loop = Loop(shape, device)
    waits = 0
    with tempfile.TemporaryDirectory() as name:
        watch = jacdiag.watch(
            loop.model, loop.optimizer, log_dir=name, quiet=True, every=None, stats_every=None
        )
        for number in range(1, watch.log_every):
            # Only what the watch does is counted. Its hooks in the optimizer's step are part of it.
            with loop._precision():
                _, loss = loop.model(loop.ids[:, :-1], loop.ids[:, 1:])
            loss.backward()
            with counted_waits(device) as counted:
                loop.optimizer.step()
                watch.step(loss)
            loop.optimizer.zero_grad()
            # The first steps set the watch up.
            if number > 2:
                waits += counted.count
        steps = watch.log_every - 3
        watch.close()
    return Row(
        part="waits",
        what="watch: waits of the host between logs",
        figure=f"{waits} in {steps} steps",
        passes=waits == 0,
        numbers={"waits": waits, "steps": steps},
    )


def watchers() -> list[Watcher]:
    """Return the contestants: the watch, and what others attach."""
    return list(WATCHERS)
