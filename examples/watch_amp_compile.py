"""Watches a compiled model in mixed precision with a loss scaler and activation checkpointing.

python examples/watch_amp_compile.py [STEPS]
"""

from __future__ import annotations

import shutil
import sys

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import jacdiag
from jacdiag.sources.gpt import build


def main(steps: int = 20, folder: str = "runs/amp") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low = torch.float16 if device == "cuda" else torch.bfloat16
    model = build("scaled-embed", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=32).to(
        device
    )
    blocks = model.transformer["h"]
    for k, block in enumerate(blocks):  # type: ignore[arg-type,var-annotated]
        blocks[k] = checkpoint_wrapper(block)  # type: ignore[index,operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")

    with jacdiag.watch(compiled, optimizer, log_dir=folder, every=10, stats_every=5) as w:
        for _ in range(steps):
            ids = torch.randint(64, (8, 33), device=device).cumsum(1) % 64
            with torch.autocast(device, dtype=low):
                _, loss = compiled(ids[:, :-1], ids[:, 1:])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)  # a step that it skips is logged as one
            scaler.update()
            optimizer.zero_grad()
            w.step(loss, grad_norm=norm)
    print(f"{w.count} steps; the log is {folder}/run.jsonl")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]))
