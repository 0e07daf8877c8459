"""What a watch at its default options costs on steps of about 14 ms and 60 ms, in pairs and by its
own account.

A process trains two identical models, a plain one and one that a contestant watches. They take
turns in blocks of steps, and each block is compared with the plain block of the same turn. Each
contestant has processes of its own: a run trains one model, and with five others in the process the
caches are cold at every turn, which charges a contestant for them. Probes and statistics fall into
few blocks: the mean over all blocks pays for them, the median does not. The watch's own account has
both.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import subprocess
import sys
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
PROCESSES = 4  # of each contestant, one after the other
DEFAULTS = "watch, defaults"


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
        turns: how often each contestant has a block, over all of its processes.
        folder: for logs.
    """
    # 1. The contestants take turns in processes of their own.
    batch = find_batch(size)
    contestants = installed_contestants()
    pairs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for repeat in range(min(PROCESSES, turns)):
        for name in contestants:
            answer = folder / f"{repeat} {list(contestants).index(name)}"
            answer.mkdir(parents=True)
            pairs[name].append(_run_pair(name, size, batch, turns // PROCESSES or 1, answer))

    # 2. Sum up.
    watched = pairs[DEFAULTS]
    own = {
        part: round(statistics.fmean(pair["own"].get(part, 0.0) for pair in watched), 5)
        for part in watched[0]["own"]
    }
    everything = [pair for of_contestant in pairs.values() for pair in of_contestant]
    plain = statistics.median(second for pair in everything for second in pair["plain"])
    return {
        "layers": size.layers,
        "width": size.width,
        "length": size.length,
        "batch": batch,
        "processes": len(watched),
        "steps": sum(len(pair["ratios"]) for pair in watched) * BLOCK,
        "plain_step_seconds": round(plain, 5),
        "watched_step_seconds": round(statistics.median(p["step_seconds"] for p in watched), 5),
        "own_account": own,
        "own_account_total": round(sum(own.values()), 5),
        "paired": {
            name: _summary([ratio for pair in of_contestant for ratio in pair["ratios"]])
            for name, of_contestant in pairs.items()
        },
    }


def installed_contestants() -> dict[str, Watcher | None]:
    """Return the contestants that can run here by their names; None for jacdiag's watch."""
    contestants: dict[str, Watcher | None] = {DEFAULTS: None}
    for library, watcher in SMALL_STEPS:
        if library is None or importlib.util.find_spec(library) is not None:
            contestants[watcher.name] = watcher
    return contestants


def _run_pair(name: str, size: StepSize, batch: int, turns: int, folder: Path) -> dict[str, Any]:
    """Compare one contestant with plain steps in a process of its own."""
    answer = folder / "pair.json"
    arguments = [name, size.name, str(batch), str(turns), str(folder), str(answer)]
    subprocess.run([sys.executable, __file__, *arguments], check=True)
    pair: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return pair


def compare_pair(name: str, size: StepSize, batch: int, turns: int, folder: Path) -> dict[str, Any]:
    """Train a plain and a watched model in turns, in this process.

    Args:
        name: of the contestant.
        size: of the step.
        batch: sequences in a step.
        turns: how often each of the two has a block.
        folder: for logs.

    Returns:
        The ratios of watched to plain blocks less 1, the seconds of plain steps, and for jacdiag's
        watch its own account as shares of a step.
    """
    # 1. Two loops that are equal but for the watch.
    plain = SmallLoop(size, batch)
    watched = SmallLoop(size, batch)
    watcher = installed_contestants()[name]
    watch: Any = None
    if watcher is None:
        watch = jacdiag.watch(
            watched.model, watched.optimizer, log_dir=folder / "run", quiet=True, strict=True
        )
        watched.call = lambda loss, norm: watch.step(loss, grad_norm=norm)
        close = watch.close
    else:
        close = _attach(watched, watcher, folder / "run")
    for loop in (plain, watched):
        loop.block()
    if watch is not None:
        watch.clock.spent.clear()

    # 2. Take turns, in another order each time.
    order = random.Random(0)
    loops = [plain, watched]
    ratios: list[float] = []
    of_plain: list[float] = []
    for _ in range(turns):
        order.shuffle(loops)
        seconds = {id(loop): loop.block() for loop in loops}
        of_plain.append(seconds[id(plain)] / BLOCK)
        ratios.append(seconds[id(watched)] / seconds[id(plain)] - 1)

    # 3. The watch's own account.
    pair: dict[str, Any] = {"ratios": ratios, "plain": of_plain, "own": {}, "step_seconds": None}
    if watch is not None:
        step_seconds = watch.clock.step_seconds or float("nan")
        steps = turns * BLOCK
        pair["step_seconds"] = step_seconds
        pair["own"] = {
            part: spent / steps / step_seconds for part, spent in watch.clock.spent.items()
        }
    close()
    return pair


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


def _main() -> None:
    """Compare one pair, and write its figures; see `_run_pair`."""
    name, size_name, batch, turns, folder, answer = sys.argv[1:]
    size = next(size for size in SIZES if size.name == size_name)
    pair = compare_pair(name, size, int(batch), int(turns), Path(folder))
    Path(answer).write_text(json.dumps(pair), encoding="utf-8")


if __name__ == "__main__":
    _main()
