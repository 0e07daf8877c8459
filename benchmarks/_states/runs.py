"""Short training runs: after how many steps the weights show that they were trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from examples.spike_lab.text import batch
from jacdiag.measure.init_or_trained import judge_weights
from jacdiag.sources.gpt import build

LOOKS = (1, 3, 10, 30, 100, 300, 1000)  # steps after which the weights are judged
CONTEXT = 64
SIZES = [(64, 4), (192, 6)]  # width, layers

MakeOptimizer = Callable[[nn.Module], list[torch.optim.Optimizer]]


def adamw(rate: float) -> MakeOptimizer:
    return lambda model: [torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)]


def momentum(rate: float) -> MakeOptimizer:
    return lambda model: [torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)]


def muon(rate: float) -> MakeOptimizer:
    """Return Muon for the matrices of the blocks and AdamW for the rest, as its author advises."""

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in f".{name}"]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in inner)]
        return [torch.optim.Muon(inner, lr=rate), torch.optim.AdamW(others, lr=1e-3)]

    return make


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW, 3e-4": adamw(3e-4),
    "AdamW, 3e-3": adamw(3e-3),
    "SGD with momentum, 0.01": momentum(0.01),
    "SGD with momentum, 0.1": momentum(0.1),
    "Muon, 0.02, and AdamW": muon(0.02),
}


def training_runs() -> Iterator[dict[str, Any]]:
    """Yield a row for each optimizer and size."""
    for name, make in OPTIMIZERS.items():
        for width, layers in SIZES:
            yield {
                "optimizer": name,
                "width": width,
                "layers": layers,
                "looks": looks_at_run(make, width, layers),
            }


def looks_at_run(make: MakeOptimizer, width: int, layers: int) -> list[dict[str, Any]]:
    """Train a GPT on text of bytes and judge its weights now and then.

    Returns:
        For each of LOOKS: the step, the loss, how many matrices failed and of how many, and the
            verdict.
    """
    torch.manual_seed(0)
    model = build(
        "scaled-embed", n_layer=layers, n_head=4, n_embd=width, vocab_size=256, block_size=CONTEXT
    )
    optimizers = make(model)
    looks = []
    for step in range(1, LOOKS[-1] + 1):
        inputs, targets = batch(step, 0, 8, CONTEXT)
        _, loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step in LOOKS:
            evidence = judge_weights(dict(model.named_parameters()))
            looks.append(
                {
                    "step": step,
                    "loss": round(float(loss.detach()), 3),
                    "failed": len(evidence.failed),
                    "of": evidence.tested,
                    "trained": evidence.trained,
                }
            )
    return looks
