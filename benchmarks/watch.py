"""What a watch costs in a training step, beside others. GPT-2 124M's shape cut to 6 layers, B 4, T
128, AdamW.

Contestants take turns within a round, each with plain steps of its own right before and after it,
and what is given is the median over rounds of (with / without - 1). The watch also keeps its own
account (the time inside its hooks), which does not drown in the noise of a machine that is shared.

    python benchmarks/watch.py            about 30 minutes; prints, and writes results/watch.json
    python benchmarks/watch.py --quick    a small shape, seconds; prints only
    python benchmarks/watch.py --steps    steps of about 14 ms and 60 ms only, about 20 minutes;
                                          see _step_sizes.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _step_sizes import BLOCK, SIZES, measure_size
from _watchers import WATCHERS, Watcher
from torch import Tensor, nn

import jacdiag
from jacdiag.records.run_log import read_run
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

RESULTS = Path(__file__).parent / "results" / "watch.json"
SHAPES: dict[str, Any] = {
    "full": {"n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50304, "block_size": 128},
    "quick": {"n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": 512, "block_size": 32},
}
EVERY, STATS_EVERY = 200, 100
TURNS, QUICK_TURNS = 80, 2  # of 20 steps each, for every contestant on small steps
NEEDS = {"trainscope, defaults": "trainscope", "wandb.watch(log='all'), every step": "wandb"}


class Loop:
    """A training loop whose steps are timed."""

    def __init__(self, shape: str) -> None:
        sizes = SHAPES[shape]
        with seeded(0):
            self.model = gpt.build("gpt2", **sizes).train()
            self.ids = torch.randint(sizes["vocab_size"], (4, sizes["block_size"] + 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, call: Any = None, before: bool = False) -> float:
        begun = time.perf_counter()
        _, loss = self.model(self.ids[:, :-1], self.ids[:, 1:])
        loss.backward()
        norm: Tensor = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if call is not None and before:
            call(loss, norm)
        self.optimizer.step()
        if call is not None and not before:
            call(loss, norm)
        self.optimizer.zero_grad()
        return time.perf_counter() - begun


def contest(loop: Loop, watcher: Watcher, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """Overhead of one contestant: plain steps, its steps, plain steps, in every round."""
    shares, times = [], []
    step, close = watcher.attach(loop.model, loop.optimizer, folder)
    loop.step(step, watcher.before)
    loop.step(step, watcher.before)
    close()
    for turn in range(rounds):
        before = [loop.step() for _ in range(steps)]
        step, close = watcher.attach(loop.model, loop.optimizer, folder / str(turn))
        loop.step(step, watcher.before)  # attaching has a price of its own, once per run
        mine = [loop.step(step, watcher.before) for _ in range(steps)]
        close()
        after = [loop.step() for _ in range(steps)]
        shares.append(statistics.median(mine) / statistics.median(before + after) - 1)
        times.append(statistics.median(mine))
    return {
        "overhead": round(statistics.median(shares), 4),
        "all": [round(s, 4) for s in shares],
        "step_seconds": round(statistics.median(times), 4),
    }


def own_account(loop: Loop, steps: int, folder: Path) -> dict[str, Any]:
    """The watch's own account of per-step figures and update norms, over a whole turn of all
    sub-layers.
    """
    with jacdiag.watch(
        loop.model, loop.optimizer, log_dir=folder, every=None, stats_every=None, quiet=True
    ) as w:
        loop.step(lambda loss, norm: w.step(loss, grad_norm=norm))
        w.clock.spent.clear()
        metrics = w.measurements.metrics
        assert metrics is not None
        labels = len(metrics.groups.labels)
        turns = -(-max(steps, labels) // labels) * labels
        opened = [loop.step(lambda loss, norm: w.step(loss, grad_norm=norm)) for _ in range(turns)]
        spent, plain = dict(w.clock.spent), w.clock.step_seconds
    syncs = read_run(folder).ended or {}
    return {
        "steps": turns,
        "seconds_per_step": {k: round(v / turns, 5) for k, v in spent.items()},
        "share": {k: round(v / turns / plain, 5) for k, v in spent.items()},
        "step_seconds": round(plain, 4),
        "host_syncs": syncs.get("host_syncs"),
        "wall": round(statistics.median(opened), 4),
    }


def reading(loop: Loop, steps: int) -> dict[str, Any]:
    """The floor of per-step figures: every gradient read once, by `torch.sum`, where the watch
    would read it.
    """
    spent: list[float] = []

    def read(loss: Tensor, norm: Tensor) -> None:
        begun = time.perf_counter()
        for p in loop.model.parameters():
            if p.grad is not None:
                p.grad.sum()
        spent.append(time.perf_counter() - begun)

    whole = [loop.step(read, before=True) for _ in range(steps)]
    seconds, plain = statistics.mean(spent), statistics.median(whole) - statistics.mean(spent)
    return {"seconds_per_step": round(seconds, 5), "share": round(seconds / plain, 5)}


def probes(loop: Loop, folder: Path, times: int) -> dict[str, Any]:
    """Statistics and probes as a run pays for them: announced, and measured on every other step."""
    with jacdiag.watch(
        loop.model, loop.optimizer, log_dir=folder, every=2, stats_every=1, quiet=True
    ) as w:
        for _ in range(2 * times):
            loop.step(lambda loss, norm: w.step(loss, grad_norm=norm))
        plain = w.clock.step_seconds
    run = read_run(folder)
    announced = run.prices[0]["probe_seconds"]
    spent = [row["seconds"] for row in run.probes]
    stats = [row["seconds"] for row in run.stats if row["step"] % 2]
    probe, stat = statistics.median(spent), statistics.median(stats)
    widths = [
        s["core_norm"]["upper"] / s["core_norm"]["lower"] - 1
        for row in run.probes
        for s in row["report"]["sublayers"]
        if s["core_norm"]
    ]
    return {
        "step_seconds": round(plain, 4),
        "probe_seconds": [round(s, 3) for s in spent],
        "announced_seconds": round(announced, 3),
        "announced_over_median": round(announced / probe, 3),
        "probe_share_at_default": round(probe / (EVERY * plain), 4),
        "statistics_seconds": round(stat, 3),
        "statistics_share_at_default": round(stat / (STATS_EVERY * plain), 4),
        "announced_peak_mb": round(run.prices[0]["probe_peak_bytes"] / 2**20),
        "interval_width_median": round(statistics.median(widths), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--steps", action="store_true", help="measure small steps only, and keep the other results"
    )
    options = parser.parse_args()
    quick = options.quick
    if options.steps:
        _write_step_sizes(TURNS)
        return
    loop = Loop("quick" if quick else "full")
    rounds, steps = (2, 4) if quick else (5, 4)
    for _ in range(2):
        loop.step()
    found: dict[str, Any] = {
        "shape": SHAPES["quick" if quick else "full"],
        "batch": 4,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["own_account"] = own_account(loop, 2 if quick else 8, folder / "own")
        found["reading_gradients_once"] = reading(loop, 2 if quick else 14)
        found["probe"] = probes(loop, folder / "probe", 3)
        found["contests"] = {}
        for k, watcher in enumerate(WATCHERS):
            library = NEEDS.get(watcher.name)
            there = library is None or importlib.util.find_spec(library) is not None
            made = contest(loop, watcher, rounds, steps, folder / str(k)) if there else None
            found["contests"][watcher.name] = made
            print(
                f"{watcher.name:40}",
                "not installed" if made is None else f"{made['overhead']:+.1%} of a step",
            )
    _print(found)
    if not quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        _write_step_sizes(TURNS)
    else:
        measure_step_sizes(QUICK_TURNS)


def measure_step_sizes(turns: int) -> dict[str, Any]:
    """Measure every step size, and print it."""
    found: dict[str, Any] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            found[size.name] = sizes = measure_size(size, turns, Path(name))
        print(
            f"{size.name}: plain {sizes['plain_step_seconds']:.4f} s, own account "
            f"{sizes['own_account_total']:.1%}",
            {part: f"{share:.2%}" for part, share in sizes["own_account"].items()},
        )
        for contestant, shares in sizes["paired"].items():
            low, high = shares["interval"]
            print(
                f"  {contestant:40} {shares['median']:+.1%} [{low:+.1%}, {high:+.1%}], mean "
                f"{shares['mean']:+.1%}"
            )
    return found


def _write_step_sizes(turns: int) -> None:
    """Put the step sizes into the results, next to what is there."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    about = {
        "threads": torch.get_num_threads(),
        "block": BLOCK,
        "load_at_start": os.getloadavg()[0],
    }
    results["step_sizes"] = about | measure_step_sizes(turns)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _print(found: dict[str, Any]) -> None:
    own, probe = found["own_account"], found["probe"]
    print(
        "own account:",
        ", ".join(f"{k} {v:.2%}" for k, v in own["share"].items()),
        f"of {own['step_seconds']} s;",
        f"reading all gradients once {found['reading_gradients_once']['share']:.2%}",
    )
    print(
        f"statistics {probe['statistics_share_at_default']:.2%} at every {STATS_EVERY} steps, "
        f"probe {probe['probe_share_at_default']:.2%} at every {EVERY}; announced / measured "
        f"{probe['announced_over_median']}, intervals {probe['interval_width_median']:.1%} wide"
    )


if __name__ == "__main__":
    main()
