"""Who stands beside jacdiag in `watch.py`: trainscope and wandb.watch at their defaults, and a hook
on every module.

Each is a function that takes (model, optimizer, folder) and returns (step, close): what a loop
calls once per step, and what takes it off again. `before` says that the step is called between
backward and optimiser, as trainscope asks.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import jacdiag

Step = Callable[[Any, Any], None]


@dataclass(frozen=True)
class Watcher:
    """A contestant. `of` is missing where its library is not installed."""

    name: str
    attach: Callable[[nn.Module, Any, Path], tuple[Step, Callable[[], None]]]
    before: bool = False


def _jacdiag(**options: Any) -> Callable[[nn.Module, Any, Path], tuple[Step, Callable[[], None]]]:
    def attach(model: nn.Module, optimizer: Any, folder: Path) -> tuple[Step, Callable[[], None]]:
        w = jacdiag.watch(model, optimizer, log_dir=folder, quiet=True, strict=True, **options)
        return lambda loss, norm: w.step(loss, grad_norm=norm), w.close

    return attach


def _trainscope(model: nn.Module, optimizer: Any, folder: Path) -> tuple[Step, Callable[[], None]]:
    from trainscope import TrainScope
    from trainscope.core.config import TrainScopeConfig

    with contextlib.redirect_stdout(io.StringIO()):
        scope = TrainScope(model, optimizer, config=TrainScopeConfig(run_dir=str(folder))).attach()
    return lambda loss, norm: scope.step(loss.item()), scope.detach  # type: ignore[return-value]


def _wandb(log_freq: int) -> Callable[[nn.Module, Any, Path], tuple[Step, Callable[[], None]]]:
    def attach(model: nn.Module, optimizer: Any, folder: Path) -> tuple[Step, Callable[[], None]]:
        import wandb

        os.environ["WANDB_SILENT"] = "true"
        run = wandb.init(project="bench", dir=str(folder), mode="offline")
        run.watch(model, log="all", log_freq=log_freq)

        def close() -> None:
            run.unwatch(model)
            run.finish()

        return lambda loss, norm: run.log({"loss": loss.item()}), close

    return attach


def _items(model: nn.Module, optimizer: Any, folder: Path) -> tuple[Step, Callable[[], None]]:
    """What a first version looks like: the norm of every module's output, read at once; and of
    every gradient.
    """
    seen: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen[name] = output.detach().norm().item()

        return note

    handles = [
        m.register_forward_hook(hook(name))
        for name, m in model.named_modules()
        if not list(m.children())
    ]

    def step(loss: Any, norm: Any) -> None:
        for name, p in model.named_parameters():
            if p.grad is not None:
                seen[f"grad/{name}"] = p.grad.norm().item()

    def close() -> None:
        for handle in handles:
            handle.remove()

    return step, close


_BARE = {"every": None, "stats_every": None}
WATCHERS = [
    Watcher("watch: per-step figures", _jacdiag(**_BARE, updates=False)),
    Watcher("watch: and update norms", _jacdiag(**_BARE)),
    Watcher("trainscope, defaults", _trainscope, before=True),
    Watcher("wandb.watch(log='all'), every step", _wandb(1)),
    Watcher("hook per module with .item()", _items, before=True),
]
# The library that each needs, and what stands beside a watch on small steps.
SMALL_STEPS: list[tuple[str | None, Watcher]] = [
    ("trainscope", Watcher("trainscope, defaults", _trainscope, before=True)),
    ("wandb", Watcher("wandb.watch(log='all'), every step", _wandb(1))),
]
