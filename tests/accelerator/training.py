"""A training loop on any device, with or without a watch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monitor.rig import adam, batch, small
from torch import Tensor, nn

import jacdiag


def train(
    device: str,
    folder: Path | None,
    *,
    steps: int = 12,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
    micro: int = 1,
    autocast: bool = False,
    scaler: bool = False,
    watch: dict[str, Any] | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """Train a small model on a device; return its weights, on the CPU.

    Args:
        device: its name.
        folder: of the run log; None trains without a watch.
        steps: of the optimizer.
        optimizer: made of the model.
        micro: batches of a step.
        autocast: run the forward in bfloat16.
        scaler: scale the loss, as for float16.
        watch: further options of the watch.
        after: is called after each step.
    """
    # 1. The parts.
    torch.manual_seed(1)
    kind = torch.device(device).type
    model = small(n_layer=1, dropout=0.0).to(device)
    stepper = optimizer(model)
    grad_scaler = torch.amp.GradScaler(kind, init_scale=16.0, enabled=scaler)
    batches = [[x.to(device) for x in batch(number)] for number in range(4 * micro)]
    watched = None
    if folder is not None:
        options = {"quiet": True, "strict": True, **(watch or {})}
        watched = jacdiag.watch(model, stepper, log_dir=folder, **options)

    # 2. The loop.
    for step in range(1, steps + 1):
        for part in range(micro):
            ids, targets = batches[(step * micro + part) % len(batches)]
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=autocast):
                _, loss = model(ids, targets)
            grad_scaler.scale(loss / micro).backward()
        grad_scaler.unscale_(stepper)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        grad_scaler.step(stepper)
        grad_scaler.update()
        stepper.zero_grad()
        if watched is not None:
            watched.step(loss, grad_norm=norm)
        after(step)

    if watched is not None:
        watched.close()
    return [p.detach().cpu() for p in model.parameters()]
