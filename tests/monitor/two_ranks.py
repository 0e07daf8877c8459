"""What two processes do in `test_ranks.py`; a script: python two_ranks.py RANK PORT FOLDER MODE
FAULT,FAULT.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from monitor.rig import PROBE_EVERY, STATS_EVERY, STEPS, adam, batch, small, state_of

import jacdiag
from jacdiag.distributed import training_group as together_room
from jacdiag.monitor import jacobian_probe as probe_room
from jacdiag.monitor import measurements as measurements_room
from jacdiag.monitor import sharded_weights as blocks_room

SHORT, CLIP = 12, 0.2  # steps with a fault
OPTIONS: dict[str, Any] = {
    "every": 6,
    "stats_every": 4,
    "log_every": 4,
    "quiet": True,
    "timeout": 4.0,
}
TRUTHFUL = {"every": PROBE_EVERY, "stats_every": STATS_EVERY}


def wrapped(mode: str) -> nn.Module:
    model = small()
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.transformer["h"]:
            fully_shard(block)
        fully_shard(model)
    return model


def broken(fault: str, rank: int) -> contextlib.AbstractContextManager[Any]:
    """One phase of the probe fails on one rank while this is entered."""
    phase, _, where = fault.partition("@")
    if not phase or rank != int(where):
        return contextlib.nullcontext()

    def failing(*_: Any, **__: Any) -> Any:
        if phase.startswith("memory"):
            raise torch.OutOfMemoryError("no memory left, said the test")
        raise RuntimeError("broken by the test")

    in_step = measurements_room.Measurements._trace_in_step

    def late(*args: Any) -> Any:
        # longer than the watch waits, not so long as the training does
        time.sleep(3 * OPTIONS["timeout"])
        return in_step(*args)

    return {
        "missing": lambda: mock.patch.object(
            measurements_room.Measurements, "_trace_in_step", late
        ),
        "copy": lambda: mock.patch.object(blocks_room, "local_copy", failing),
        "gather": lambda: mock.patch.object(together_room, "_all_gather", failing),
        "assemble": lambda: mock.patch.object(blocks_room.GatheredWeights, "_assembled", failing),
        "full": lambda: mock.patch.object(probe_room.LiveProbe, "fits", lambda *_: "said the test"),
        "series": lambda: mock.patch.object(probe_room.LiveProbe, "series", failing),
        "record": lambda: mock.patch.object(probe_room, "sites", failing),
        "measure": lambda: mock.patch.object(probe_room, "measure_group", failing),
    }[phase.removeprefix("memory-")]()


class Alive:
    """Bytes of whole weights that are alive at once, and how often a block was gathered."""

    def __init__(self) -> None:
        self.now = self.most = self.largest = self.whole = self.blocks = 0
        assemble, block = blocks_room.GatheredWeights._assembled, blocks_room.GatheredWeights._ready

        def counted(blocks: Any, *args: Any) -> Any:
            made = assemble(blocks, *args)
            self.now += made.nbytes
            self.most, self.largest = max(self.most, self.now), blocks.largest
            self.whole = sum(blocks.sizes.values())
            weakref.finalize(made.untyped_storage(), self._gone, made.nbytes)
            return made

        def ready(blocks: Any, *args: Any) -> Any:
            self.blocks += 1
            return block(blocks, *args)

        self.patches = [
            mock.patch.object(blocks_room.GatheredWeights, "_assembled", counted),
            mock.patch.object(blocks_room.GatheredWeights, "_ready", ready),
        ]

    def _gone(self, size: int) -> None:
        self.now -= size

    def __enter__(self) -> Alive:
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self.patches:
            patch.stop()


def train(
    mode: str, rank: int, watched: dict[str, Any] | None, truthful: bool
) -> tuple[list[float], dict[str, Any], list[Any]]:
    torch.manual_seed(1)
    model = wrapped(mode)
    optimizer = adam(model)
    truth: list[Any] = []
    losses = []
    options = OPTIONS | (TRUTHFUL if truthful else {})
    w = None if watched is None else jacdiag.watch(model, optimizer, **options, **watched)
    for step in range(1, (STEPS if truthful else SHORT) + 1):
        _, loss = model(*batch(10 * step + rank))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        truth.append(_squares(model) if truthful else None)
        optimizer.step()
        optimizer.zero_grad()
        if w is not None:
            w.step(loss, grad_norm=norm)
        losses.append(float(loss.detach()))
    if w is not None:
        w.close()
    state = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v
        for k, v in state_of(model, optimizer).items()
    }
    return losses, state, [*truth, torch.get_rng_state()]


def _squares(model: nn.Module) -> dict[str, float]:
    """The sum of squares of each gradient, in float64, over all shards: one collective."""
    grads = {name: p.grad for name, p in model.named_parameters()}
    shards = [g.to_local() if hasattr(g, "to_local") else g for g in grads.values()]
    squares = torch.stack([shard.double().square().sum() for shard in shards])
    if any(hasattr(g, "to_local") for g in grads.values()):
        dist.all_reduce(squares)
    return dict(zip(grads, squares.tolist(), strict=True))


def main(rank: int, port: int, folder: Path, mode: str, faults: list[str]) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    truthful = faults == [""]
    plain = train(mode, rank, None, truthful)
    for fault in faults:
        with Alive() as alive, broken(fault, rank):
            begun = time.perf_counter()
            watched = train(mode, rank, {"log_dir": folder / fault}, truthful)
            seconds = time.perf_counter() - begun
        same = {
            "losses": plain[0] == watched[0],
            "state": all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(watched[1][k]))
                for k, v in plain[1].items()
            ),
            "random": torch.equal(plain[2][-1], watched[2][-1]),
        }
        if truthful and rank == 0:
            state = {k.split("/")[1]: v for k, v in watched[1].items() if k.startswith("model/")}
            torch.save(state, folder / "state.pt")
        weights = {
            "now": alive.now,
            "most": alive.most,
            "largest": alive.largest,
            "whole": alive.whole,
            "gathered": alive.blocks,
        }
        told = {
            "weights": weights,
            "same": same,
            "seconds": seconds,
            "truth": watched[2][:-1],
            "losses": watched[0],
        }
        (folder / fault / f"told-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5].split(","))
