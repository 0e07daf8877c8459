"""One training run: deterministic from its setting, resumable, an audit before its first step, a
watch beside it.

A run is a folder: `factors.json` (the setting), `audit.json` (jacdiag's report of the untrained
model), `run.jsonl` (the watch's log), `state.pt` (to resume from; gone when the run has ended),
`done` (the run is whole).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jacdiag
from jacdiag.records.run_log import RUN_FILE

from .model import Model, Shape
from .text import VOCABULARY, batch

SAVE_EVERY = 200


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that a run depends on.

    Attributes:
        shape: of the model.
        lr, warmup, beta2, clip: AdamW with a linear warm-up and a cosine to a tenth; clip 0 for no
            clipping.
        every: steps between two probes of the watch; 0 for none.
        fault: "" for none, or one of FAULTS; it strikes at step `at`.
    """

    shape: Shape = field(default_factory=Shape)
    steps: int = 400
    rows: int = 8
    lr: float = 3e-3
    warmup: int = 20
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    every: int = 100
    fault: str = ""
    at: int = 0

    def factors(self) -> dict[str, Any]:
        """All fields, flat, for `factors.json`."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "shape"}
        return {**dataclasses.asdict(self.shape), **own}

    @classmethod
    def of(cls, factors: dict[str, Any]) -> Setting:
        """Rebuilds a setting from its factors; raises TypeError for an unknown one."""
        sizes = {f.name for f in dataclasses.fields(Shape)}
        shape = Shape(
            vocabulary=VOCABULARY,
            **{k: v for k, v in factors.items() if k in sizes and k != "vocabulary"},
        )
        return cls(shape=shape, **{k: v for k, v in factors.items() if k not in sizes})

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first is 1."""
        if step <= self.warmup:
            return self.lr * step / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


# -- faults ----------------------------------------------------------------------------------------
def _rate_up(setting: Setting, model: Model, step: int) -> float:
    return 30.0 if step >= setting.at else 1.0


def _residual_up(setting: Setting, model: Model, step: int) -> float:
    if step == setting.at:
        _scale(model, "out.weight", math.sqrt(2 * setting.shape.layers))
    return 1.0


def _embedding_down(setting: Setting, model: Model, step: int) -> float:
    if step == setting.at:
        _scale(model, "embedding.weight", 0.05)
    return 1.0


@torch.no_grad()
def _scale(model: nn.Module, ending: str, factor: float) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(ending):
            weight.mul_(factor)


FAULTS = {
    "rate x 30": _rate_up,
    "residual scaling removed": _residual_up,
    "tiny embedding": _embedding_down,
    "corrupted batch": lambda setting, model, step: 1.0,
}


def _batch(setting: Setting, step: int) -> tuple[Tensor, Tensor]:
    ids, targets = batch(step, setting.seed, setting.rows, setting.shape.length)
    if setting.fault == "corrupted batch" and step == setting.at:
        generator = torch.Generator().manual_seed(step)
        targets = torch.randint(VOCABULARY, targets.shape, generator=generator)
    return ids, targets


# -- the run ---------------------------------------------------------------------------------------
def train(
    setting: Setting,
    folder: Path,
    *,
    device: str = "cpu",
    limit_s: float = math.inf,
    stats_every: int | None = None,
    audit: bool = True,
    prepare: Callable[[Model], Any] | None = None,
) -> bool:
    """Runs, or goes on with, one setting. Returns whether it is whole; False where `limit_s`
    seconds were not enough.

    Args:
        folder: of this run; made if need be.
        stats_every: steps between two rounds of the watch's statistics; its own choice if None.
        audit: measure the untrained model first.
        prepare: changes the untrained model, where no factor of the setting says what is wanted.
    """
    if (folder / "done").exists():
        return True
    begun = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "factors.json").write_text(
        json.dumps(setting.factors(), indent=1) + "\n", encoding="utf-8"
    )
    torch.manual_seed(setting.seed)
    model = Model(setting.shape).to(device)
    if prepare is not None:
        prepare(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, betas=(0.9, setting.beta2), weight_decay=0.1
    )
    if audit and not (folder / "audit.json").exists():
        ids, _ = batch(0, setting.seed, 2, setting.shape.length)
        report = jacdiag.audit(
            model,
            ids.to(device),
            seed=setting.seed,
            lr=setting.lr,
            warmup=setting.warmup,
            beta2=setting.beta2,
            state="init",
            tol=0.1,
        )
        (folder / "audit.json").write_text(report.to_json() + "\n", encoding="utf-8")
    first, held = 1, _load(folder)
    if held is None:
        # cut short before its first state: there is nothing to go on from
        (folder / RUN_FILE).unlink(missing_ok=True)
    else:
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first = held["step"] + 1
    with jacdiag.watch(
        model,
        optimizer,
        log_dir=folder,
        every=setting.every or None,
        stats_every=stats_every,
        quiet=True,
        resume=held is not None,
    ) as w:
        if held is not None:
            w.load_state_dict(held["watch"])
        for step in range(first, setting.steps + 1):
            loss, norm = _step(setting, model, optimizer, step, device)
            w.step(loss, grad_norm=norm)
            late = time.perf_counter() - begun > limit_s
            if step < setting.steps and (late or step % SAVE_EVERY == 0):
                _save(
                    folder,
                    {
                        "step": step,
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "watch": w.state_dict(),
                    },
                )
            if late and step < setting.steps:
                return False
            if not math.isfinite(float(loss.detach())):
                break
    (folder / "done").write_text("", encoding="utf-8")
    (folder / "state.pt").unlink(missing_ok=True)
    return True


def _step(
    setting: Setting, model: Model, optimizer: torch.optim.Optimizer, step: int, device: str
) -> tuple[Tensor, Any]:
    factor = FAULTS[setting.fault](setting, model, step) if setting.fault else 1.0
    for group in optimizer.param_groups:
        group["lr"] = setting.rate(step) * factor
    ids, targets = _batch(setting, step)
    loss = model(ids.to(device), targets.to(device))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), setting.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def _load(folder: Path) -> dict[str, Any] | None:
    path = folder / "state.pt"
    return torch.load(path, weights_only=True) if path.exists() else None


def _save(folder: Path, state: dict[str, Any]) -> None:
    torch.save(state, folder / "state.tmp")
    (folder / "state.tmp").replace(folder / "state.pt")
