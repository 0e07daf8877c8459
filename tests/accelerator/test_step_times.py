"""Times of steps on a device that is behind the host: the training's work is not the watch's.

The clock of the test goes on only if the training works, if the host waits for it, and if the watch
writes its log.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor.rig import adam, batch, lines, small

import jacdiag
from accelerator.machine import Machine
from accelerator.pretended import NAME, pretended_device
from jacdiag.devices.accelerators import wait_for_stream
from jacdiag.monitor.log.events import RunEvents
from jacdiag.monitor.schedule import Clock

STEP_SECONDS = 0.1  # that the device needs for a step
LAUNCH_SECONDS = 0.01  # that the host needs for it
MOST_AHEAD = 2 * STEP_SECONDS  # of work that the queue of the device holds
LOG_SECONDS = 0.03
LOG_EVERY = 5
STEPS = 23


class WorkQueue:
    """The clock of the host, and the work that the device has still to do."""

    def __init__(self) -> None:
        self.now = 100.0
        self.done_at = 100.0
        self.logs = 0

    def read(self) -> float:
        """Stand in for `time.perf_counter`."""
        return self.now

    def launch_step(self) -> None:
        """Give the device a step; the host waits only if the queue is full."""
        self.now += LAUNCH_SECONDS
        self.done_at = max(self.done_at, self.now) + STEP_SECONDS
        self.now = max(self.now, self.done_at - MOST_AHEAD)

    def drain(self) -> None:
        """Let the host wait until the device has done everything."""
        self.now = max(self.now, self.done_at)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> WorkQueue:
    queue = WorkQueue()
    wait, write = Machine.wait, RunEvents.steps

    def wait_for_work(self: Machine, kind: str, **options: Any) -> None:
        queue.drain()
        wait(self, kind, **options)

    def write_slowly(self: RunEvents, rows: Any) -> None:
        queue.now += LOG_SECONDS
        queue.logs += 1
        write(self, rows)

    monkeypatch.setattr(time, "perf_counter", queue.read)
    monkeypatch.setattr(Machine, "wait", wait_for_work)
    monkeypatch.setattr(RunEvents, "steps", write_slowly)
    return queue


def train(folder: Path, queue: WorkQueue, **options: Any) -> float:
    """Train on the device; return the seconds from the end of the first step to the last log."""
    model = small(n_layer=1, dropout=0.0).to(NAME)
    optimizer = adam(model)
    ids, targets = (tensor.to(NAME) for tensor in batch(0))
    begun = 0.0
    watch = jacdiag.watch(
        model, optimizer, log_dir=folder, log_every=LOG_EVERY, quiet=True, strict=True, **options
    )
    for step in range(1, STEPS + 1):
        _, loss = model(ids, targets)
        loss.backward()
        queue.launch_step()
        optimizer.step()
        optimizer.zero_grad()
        watch.step(loss.detach())
        if step == 1:
            begun = queue.now
        if step % 7 == 0:  # between two steps
            watch.flush()
    watch.close()
    return queue.now - begun


@pytest.mark.parametrize("stats_every", [None, 3])
def test_the_times_of_the_steps_add_up_to_the_real_time(
    stats_every: int | None, queue: WorkQueue, tmp_path: Path
) -> None:
    with pretended_device():
        seconds = train(tmp_path, queue, every=None, stats_every=stats_every)
    rows = lines(tmp_path, "step")
    times = [row["step_seconds"] for row in rows if row["step_seconds"] is not None]
    (end,) = lines(tmp_path, "end")

    # 1. The watch has taken what it took to write, and nothing else.
    assert queue.logs > STEPS // LOG_EVERY
    assert end["spent"].pop("log") == pytest.approx(queue.logs * LOG_SECONDS)
    assert sum(end["spent"].values()) == pytest.approx(0.0)

    # 2. The rest is the training's.
    assert len(times) == STEPS - 1
    assert sum(times) + queue.logs * LOG_SECONDS == pytest.approx(seconds)


def test_the_usual_time_of_a_step_is_that_of_the_device(queue: WorkQueue, tmp_path: Path) -> None:
    """The share of the time that a probe may take is reckoned with it."""
    model = small(n_layer=1, dropout=0.0)
    with pretended_device():
        model.to(NAME)
        optimizer = adam(model)
        ids, targets = (tensor.to(NAME) for tensor in batch(0))
        with jacdiag.watch(
            model, optimizer, every=None, stats_every=None, log_every=LOG_EVERY, quiet=True
        ) as watch:
            for _ in range(20):
                _, loss = model(ids, targets)
                loss.backward()
                queue.launch_step()
                optimizer.step()
                optimizer.zero_grad()
                watch.step(loss.detach())
            assert watch.clock.step_seconds == pytest.approx(STEP_SECONDS, rel=0.3)


def test_a_wait_is_shared_among_the_steps_that_were_waited_for() -> None:
    clock = Clock()
    clock.steps.extend([1.0, 1.0, 1.0])
    clock.share_wait(1.0, 2)
    assert list(clock.steps) == [1.0, 1.5, 1.5]
    assert (clock.waited, clock.own, clock.spent) == (1.0, 1.0, {})


def test_a_wait_for_more_steps_than_are_kept_keeps_its_share() -> None:
    clock = Clock()
    clock.steps.extend([1.0, 1.0])
    clock.share_wait(1.0, 4)
    assert list(clock.steps) == [1.25, 1.25]


def test_a_wait_for_no_known_step_is_left_out() -> None:
    """As after the first step of a process, whose time is not known."""
    clock = Clock()
    clock.begin(0.0)
    clock.share_wait(1.0, 0)
    assert clock.step_ended(3.0) == 2.0 and math.isfinite(clock.waited)


def test_other_streams_are_not_waited_for() -> None:
    with pretended_device() as counts:
        device = torch.device(NAME, 0)
        target = torch.zeros(2).pin_memory()
        with torch.Stream(device):
            target.copy_(torch.ones(2).to(NAME), non_blocking=True)
        counts.clear()
        wait_for_stream(device)
        assert counts.synchronizations == 1 and torch.isnan(target).all()
        wait_for_stream(torch.device("cpu"))
        assert counts.synchronizations == 1
