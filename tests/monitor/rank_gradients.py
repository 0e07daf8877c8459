"""What two ranks do in `test_rank_gradients.py`; a script: python rank_gradients.py RANK PORT
FOLDER.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from monitor.rig import batch, small

import jacdiag

MODES = ("ddp", "inside", "nobody", "other weights", "one rank")


class Averaging(torch.optim.SGD):
    """Averages the gradients of the ranks in its step, as sharded optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            dist.all_reduce(p.grad)
            p.grad.div_(dist.get_world_size())
        super().step()


class Messages(logging.Handler):
    """Keeps what the watch says."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def train(mode: str, rank: int, folder: Path) -> list[str]:
    """Train in one way; return the warnings of this rank."""
    model: nn.Module = small(dropout=0.0)
    if mode == "other weights" and rank:
        with torch.no_grad():
            next(model.parameters()).mul_(1.5)
    kind = Averaging if mode == "inside" else torch.optim.SGD
    wrapped = nn.parallel.DistributedDataParallel(model) if mode == "ddp" else model
    optimizer = kind(model.parameters(), lr=0.1)
    messages = Messages()
    logging.getLogger("jacdiag.watch").addHandler(messages)
    options: dict[str, Any] = {"every": None, "stats_every": None, "log_every": 3, "quiet": True}
    watches = mode != "one rank" or rank == 0
    w = (
        jacdiag.watch(wrapped, optimizer, log_dir=folder / mode, keep_batches=1, **options)
        if watches
        else None
    )
    for step in range(12):
        _, loss = wrapped(*batch(2 * step + rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if w is not None:
            w.step(loss.detach())
        if step < 3:
            dist.barrier()
    if w is not None:
        w.close()
    logging.getLogger("jacdiag.watch").removeHandler(messages)
    assert not optimizer._optimizer_step_pre_hooks
    dist.barrier()
    return messages.texts


def main(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    texts = {mode: train(mode, rank, folder) for mode in MODES}
    (folder / f"said-{rank}.json").write_text(json.dumps(texts), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
