"""Does a replay tell a bad batch from bad weights? Small GPTs on bytes of Python's library, one
fault each.

Each run has one fault, and checkpoints around it. A flight is written a few steps after the fault,
whether or not a live rule fires, so that the replay is measured and not the rules. Then every
checkpoint is replayed, and the verdict is counted by fault and by where the checkpoint is: long
before the fault, right before it, after it.

    python benchmarks/replay.py              about 20 minutes; writes results/replay.json
    python benchmarks/replay.py --quick      one seed; prints only
    python benchmarks/replay.py --default    the batches that a watch keeps by itself, log_every=10;
                                             prints only
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import sysconfig
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jacdiag
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

RESULTS = Path(__file__).parent / "results" / "replay.json"
ROWS, LENGTH, VOCABULARY, KEPT = 8, 32, 256, 12
SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 48, "vocab_size": VOCABULARY, "block_size": LENGTH}
SEEDS = 5
LATE = 2  # steps after the fault at which the flight is written


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and the verdict that would be false.

    Attributes:
        name: of the fault.
        false: the verdict that names the wrong one.
    """

    name: str
    false: str


FAULTS = [
    Fault("batch of random bytes", "weights"),
    Fault("shuffled targets", "weights"),
    Fault("one sequence of random bytes", "weights"),
    Fault("learning rate x 30", "batch"),
    Fault("attention weights x 8", "batch"),
    Fault("none", "weights"),  # a batch may be unusual by nature: naming it is true then
]


def corpus() -> Tensor:
    """The source of Python's own library, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    return torch.frombuffer(
        bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8
    ).long()


def batch_of(data: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    starts = torch.randint(len(data) - LENGTH - 1, (ROWS,), generator=generator)
    ids = torch.stack([data[start : start + LENGTH + 1] for start in starts])
    return ids[:, :-1], ids[:, 1:]


def spoilt(name: str, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The batch of the fault."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    if name == "batch of random bytes":
        return noise[:, :-1], noise[:, 1:]
    if name == "shuffled targets":
        return x, y.flatten()[torch.randperm(y.numel(), generator=generator)].view_as(y)
    if name == "one sequence of random bytes":
        return torch.cat([noise[:1, :-1], x[1:]]), torch.cat([noise[:1, 1:], y[1:]])
    return x, y


def train(
    data: Tensor, fault: Fault, at: int, seed: int, folder: Path, keep: int | None
) -> dict[str, Path]:
    """Train with one fault; return the checkpoints by where they are."""
    with seeded(seed):
        model = gpt.build("scaled-embed", **SIZES, dropout=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    places = {
        at // 10: "long before",
        at - 20: "before",
        at - 1: "right before",
        at: "right after",
        at + 2: "after",
    }
    saved: dict[str, Path] = {}
    options: dict[str, Any] = {
        "every": None,
        "stats_every": None,
        "quiet": True,
        "keep_batches": keep,
    }
    with jacdiag.watch(model, optimizer, log_dir=folder, **options) as w:
        for step in range(1, at + LATE + 1):
            x, y = batch_of(data, step, seed)
            if step == at:
                x, y = spoilt(fault.name, x, y, seed)
            if fault.name == "attention weights x 8" and step == at:
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "attn" in name and parameter.dim() == 2:
                            parameter.mul_(8)
            if fault.name == "learning rate x 30" and step == at - 1:
                optimizer.param_groups[0]["lr"] *= 30
            _, loss = model(x, y)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss.detach(), grad_norm=norm)
            if step in places:
                # Weights that a fault changes at the beginning of a step are saved as the batch of
                # that step met them.
                path = folder / f"{places[step].replace(' ', '-')}.pt"
                arguments = {**SIZES, "embed_scale": SIZES["n_embd"] ** 0.5}
                torch.save(
                    {"model": model.state_dict(), "model_args": arguments, "step": step}, path
                )
                saved[places[step]] = path
        w.flush()
        assert w.record.recorder is not None
        w.record.recorder.dumps = 0  # each place gets its flight, however many alerts wrote one
        w.record.dump(at, fault.name)
    return saved


def verdicts(
    data: Tensor, seeds: range, keep: int | None = KEPT
) -> dict[str, dict[str, Counter[str]]]:
    """Count the verdicts by fault and by place of the checkpoint."""
    counts: dict[str, dict[str, Counter[str]]] = {fault.name: {} for fault in FAULTS}
    for fault in FAULTS:
        for seed in seeds:
            at = random.Random(f"{fault.name} {seed}").randint(100, 500)
            with tempfile.TemporaryDirectory() as folder:
                saved = train(data, fault, at, seed, Path(folder), keep)
                flight = next(Path(folder).glob("flight-*"))
                for place, path in saved.items():
                    report = jacdiag.audit(str(path), replay=flight, products=False)
                    assert report.replay is not None
                    counts[fault.name].setdefault(place, Counter())[report.replay.verdict] += 1
        print(
            fault.name,
            {place: dict(count) for place, count in counts[fault.name].items()},
            flush=True,
        )
    return counts


def false_ones(counts: dict[str, dict[str, Counter[str]]]) -> int:
    """How many verdicts named the wrong one."""
    total = 0
    for fault in FAULTS:
        for count in counts[fault.name].values():
            total += count[fault.false]
    return total


def cost() -> dict[str, float]:
    """Seconds and memory of a replay: GPT-2's shape cut to 6 layers, 10 batches of 4 sequences of
    128 tokens.
    """
    from jacdiag.measure.sequence_losses import find_loss, measure_batch, ready_for_gradients

    with seeded(0):
        sizes = {"n_layer": 6, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 128}
        model = gpt.build("scaled-embed", **sizes, dropout=0.0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(50304, (4, 129), generator=torch.Generator().manual_seed(0))
    arguments = ((), {"idx": ids[:, :-1], "targets": ids[:, 1:]})

    begun = time.process_time()
    model.train()
    for _ in range(3):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        model.zero_grad()
    step = (time.process_time() - begun) / 3

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with ready_for_gradients(model) as (used, parameters, _):
        reader = find_loss(used, arguments)
        begun = time.process_time()
        for _ in range(3):
            measure_batch(used, arguments, reader, parameters)
        seconds = (time.process_time() - begun) / 3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "weights_mb": weights / 2**20,
        "forward_and_backward_of_a_batch_seconds": step,
        "replay_of_a_batch_seconds": seconds,
        "ratio": seconds / step,
        "memory_over_a_training_step_mb": (peak - before) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--default", action="store_true")
    options = parser.parse_args()
    quick = options.quick or options.default
    logging.getLogger("jacdiag.watch").setLevel(logging.ERROR)
    seeds = range(1 if options.quick else SEEDS)
    counts = verdicts(corpus(), seeds, None if options.default else KEPT)
    table = {
        fault: {place: dict(count) for place, count in places.items()}
        for fault, places in counts.items()
    }
    results = {"verdicts": table, "false": false_ones(counts), "cost": {} if quick else cost()}
    print(json.dumps(results["cost"], indent=1), "false verdicts:", results["false"])
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
