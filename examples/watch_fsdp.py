"""Watches a model sharded with fully_shard (FSDP2), or with DDP: the norms are those of the whole,
rank 0 writes.

    torchrun --nproc-per-node 2 examples/watch_fsdp.py [STEPS] [ddp]
"""

from __future__ import annotations

import os
import shutil
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import jacdiag
from jacdiag.sources.gpt import build


def main(steps: int = 20, how: str = "fsdp", folder: str = "runs/fsdp") -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A DDP model must be gone before its process group is: if its reducer is the last to hold a
    # gloo group, torch ends
    # the group's threads without giving up Python's lock, and a thread that still wants it is
    # waited for for ever.
    train(steps, how, folder, "cuda" if cuda else "cpu")
    dist.destroy_process_group()


def train(steps: int, how: str, folder: str, device: str) -> None:
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    torch.manual_seed(0)
    model: nn.Module = build(
        "scaled-embed", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=32
    ).to(device)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for block in model.transformer["h"]:  # type: ignore[union-attr,operator,index]
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    torch.manual_seed(rank)
    # on every rank
    with jacdiag.watch(model, optimizer, log_dir=folder, every=10, stats_every=5) as w:
        for _ in range(steps):
            ids = torch.randint(64, (8, 33), device=device).cumsum(1) % 64
            _, loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss, grad_norm=norm)
    if rank == 0:
        print(f"{w.count} steps on {dist.get_world_size()} ranks; the log is {folder}/run.jsonl")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]), *sys.argv[2:3])
