"""Watches a plain training loop: gradient accumulation, clipping, a checkpoint that the log goes on
from.

    python examples/watch_plain.py [STEPS]

Then: `jacdiag live runs/plain`, `jacdiag plot runs/plain`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

import jacdiag
from jacdiag.sources.gpt import build

ACCUMULATE = 2


def main(steps: int = 60, folder: str = "runs/plain") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = build(
        "scaled-embed", n_layer=4, n_head=4, n_embd=64, vocab_size=64, block_size=32, dropout=0.1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # One line before the loop, one line in it. A crash, SIGTERM or Ctrl-C leaves a flight in the
    # folder.
    # Alerts are noticed every log_every=10 steps: so many steps' batches are kept, for `jacdiag
    # audit --replay`.
    kept = 10 * ACCUMULATE
    w = jacdiag.watch(model, optimizer, log_dir=folder, every=20, stats_every=10, keep_batches=kept)
    for step in range(1, steps + 1):
        total = torch.zeros(())
        for _ in range(ACCUMULATE):
            ids = torch.randint(64, (8, 33)).cumsum(1) % 64
            _, loss = model(ids[:, :-1], ids[:, 1:])
            (loss / ACCUMULATE).backward()
            total += loss.detach() / ACCUMULATE
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        w.step(total, grad_norm=norm, step=step)
        if step == steps // 2:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "watch": w.state_dict(),
            }
            torch.save(state, Path(folder) / "checkpoint.pt")
    w.close()
    print(f"{w.count} steps, {len(w.alerts)} alerts; the log is {folder}/run.jsonl")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]))
