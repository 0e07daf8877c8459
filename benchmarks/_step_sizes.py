"""What a watch at its default options costs on steps of about 14 ms and 60 ms, in pairs and by its
own account.

Identical models train in one process, one of them plain, and take turns in blocks of steps. Each
block is compared with the plain block of the same turn. Probes and statistics fall into few blocks:
the mean over all blocks pays for them, the median does not. The watch's own account has both.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _watchers import SMALL_STEPS, Watcher
from torch import Tensor, nn

import jacdiag
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

BLOCK = 20  # steps
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """A shape, and the duration that the batch is chosen for."""

    name: str
    seconds: float
    layers: int
    width: int
    length: int = 64


SIZES = (
    StepSize(name="about 14 ms", seconds=0.014, layers=3, width=64),
    StepSize(name="about 60 ms", seconds=0.060, layers=4, width=128, length=128),
)


class SmallLoop:
    """A training loop of a small GPT."""

    def __init__(self, size: StepSize, batch: int) -> None:
        with seeded(0):
            self.model = gpt.build(
                "gpt2",
                n_layer=size.layers,
                n_embd=size.width,
                n_head=4,
                vocab_size=256,
                block_size=size.length,
            ).train()
            self.ids = torch.randint(256, (batch, size.length + 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.call: Callable[[Any, Any], None] | None = None
        self.before = False

    def step(self) -> float:
        """Make a step; return its seconds."""
        begun = time.perf_counter()
        _, loss = self.model(self.ids[:, :-1], self.ids[:, 1:])
        loss.backward()
        norm: Tensor = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.call is not None and self.before:
            self.call(loss, norm)
        self.optimizer.step()
        if self.call is not None and not self.before:
            self.call(loss, norm)
        self.optimizer.zero_grad()
        return time.perf_counter() - begun

    def block(self) -> float:
        """Make some steps; return the seconds of all."""
        return sum(self.step() for _ in range(BLOCK))


def find_batch(size: StepSize) -> int:
    """Return the number of sequences at which a plain step takes about as long as asked for."""
    batch = 1
    while batch < 64:
        loop = SmallLoop(size, batch)
        loop.block()
        if statistics.median(loop.step() for _ in range(BLOCK)) >= size.seconds:
            return batch
        batch += 1 + batch // 4
    return batch


def measure_size(size: StepSize, turns: int, folder: Path) -> dict[str, Any]:
    """Compare the watch, and what else is installed, with plain steps of one size.

    Args:
        size: of the step.
        turns: how often each contestant has a block.
        folder: for logs.
    """
    # 1. One loop for each contestant, and a plain one.
    batch = find_batch(size)
    plain = SmallLoop(size, batch)
    watched = SmallLoop(size, batch)
    loops: dict[str, SmallLoop] = {}
    closers: list[Callable[[], None]] = []
    for place, (library, watcher) in enumerate(SMALL_STEPS):
        if library is None or importlib.util.find_spec(library) is not None:
            loops[watcher.name] = loop = SmallLoop(size, batch)
            closers.append(_attach(loop, watcher, folder / f"{size.name} {place}"))
    watch = jacdiag.watch(
        watched.model, watched.optimizer, log_dir=folder / size.name, quiet=True, strict=True
    )
    watched.call = lambda loss, norm: watch.step(loss, grad_norm=norm)
    loops = {"watch, defaults": watched, **loops}
    for loop in (plain, *loops.values()):
        loop.block()
    watch.clock.spent.clear()

    # 2. Take turns, in another order each time.
    order = random.Random(0)
    ratios: dict[str, list[float]] = {name: [] for name in loops}
    of_plain: list[float] = []
    for _ in range(turns):
        blocks = {"plain": plain, **loops}
        names = list(blocks)
        order.shuffle(names)
        seconds = {name: blocks[name].block() for name in names}
        of_plain.append(seconds["plain"])
        for name in loops:
            ratios[name].append(seconds[name] / seconds["plain"] - 1)

    # 3. Sum up.
    steps = turns * BLOCK
    step_seconds = watch.clock.step_seconds or float("nan")
    own = {
        part: round(spent / steps / step_seconds, 5) for part, spent in watch.clock.spent.items()
    }
    watch.close()
    for close in closers:
        close()
    return {
        "layers": size.layers,
        "width": size.width,
        "length": size.length,
        "batch": batch,
        "steps": steps,
        "plain_step_seconds": round(statistics.median(of_plain) / BLOCK, 5),
        "watched_step_seconds": round(step_seconds, 5),
        "own_account": own,
        "own_account_total": round(sum(own.values()), 5),
        "paired": {name: _summary(shares) for name, shares in ratios.items()},
    }


def _attach(loop: SmallLoop, watcher: Watcher, folder: Path) -> Callable[[], None]:
    loop.call, close = watcher.attach(loop.model, loop.optimizer, folder)
    loop.before = watcher.before
    return close


def _summary(shares: list[float]) -> dict[str, Any]:
    """The median over blocks with a bootstrap interval at 95%, and the mean."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(shares, k=len(shares))) for _ in range(DRAWS))
    low, high = medians[round(0.025 * DRAWS)], medians[round(0.975 * DRAWS) - 1]
    return {
        "median": round(statistics.median(shares), 4),
        "interval": [round(low, 4), round(high, 4)],
        "mean": round(statistics.fmean(shares), 4),
        "blocks": len(shares),
    }
