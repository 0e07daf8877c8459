"""Small training loops, run with and without a watch, and what has to be the same in both."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.sources.gpt import GPT, build

V, T = 32, 8
# Of the loops in which not one bit may differ: steps, and how often the watch measures.
LONG = bool(os.environ.get("JACDIAG_LONG"))
STEPS = 200 if LONG else 20
PROBE_EVERY, STATS_EVERY = (50, 25) if LONG else (10, 5)


def small(recipe: str = "scaled-embed", **sizes: Any) -> GPT:
    torch.manual_seed(0)
    given = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "vocab_size": V,
        "block_size": T,
        "dropout": 0.1,
        **sizes,
    }
    return build(recipe, **given).train()


def batch(step: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, **options})


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> tuple[Tensor, Tensor]:
    """One step with clipping; returns loss and gradient norm before clipping."""
    _, loss = model(*batch(step))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


class Streams:
    """Draws from every generator, so that one that was moved is found out."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def draw(self) -> None:
        self.seen.append((float(torch.rand(())), float(np.random.rand()), random.random()))  # noqa: NPY002


def seed_all() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Everything that training has made: parameters, buffers, optimiser state."""
    found = {f"model/{name}": t.detach().clone() for name, t in model.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        found |= {
            f"optimizer/{index}/{k}": v.clone() if isinstance(v, Tensor) else v
            for k, v in entry.items()
        }
    return found


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, name


Loop = Callable[[Any], tuple[list[float], dict[str, Any]]]


def trained(
    steps: int,
    watched: dict[str, Any] | None,
    *,
    make: Callable[[], nn.Module] = small,
    one: Any = plain_step,
    inside: Callable[[int], None] | None = None,
) -> tuple[list[float], dict[str, Any], list[Any], Any]:
    """Trains for some steps; returns losses, state, draws of the generators, and the watch
    (closed).
    """
    seed_all()
    model = make()
    optimizer = adam(model)
    watch = None if watched is None else jacdiag.watch(model, optimizer, quiet=True, **watched)
    losses, streams = [], Streams()
    for step in range(1, steps + 1):
        loss, norm = one(model, optimizer, step)
        if watch is not None:
            watch.step(loss, grad_norm=norm)
        losses.append(float(loss))
        streams.draw()
        if inside is not None:
            inside(step)
    if watch is not None:
        watch.close()
    return losses, state_of(model, optimizer), streams.seen, watch


def lines(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run log, raw."""
    rows = [
        json.loads(line) for line in (folder / "run.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [row for row in rows if kind is None or row["type"] == kind]
