"""Are the live rules quiet on healthy runs, and do they see what is broken? Small GPTs on bytes of
Python's library.

Healthy: six runs of 10,000 steps, of different recipes, sizes, learning rates and seeds; every
alert is counted.
Broken: the same runs with one fault each, put in at a known step (or from the start); the first
alert after it is held against the step at which the loss itself shows it: the mean of ten losses
stands 0.3 above their rolling median of 201 steps (a batch of 256 tokens scatters by 0.23, such a
mean by 0.07), or one loss by 2. Each fault is put into runs of three seeds.

    python benchmarks/detect.py            about 45 minutes; prints, and writes results/detect.json
    python benchmarks/detect.py --quick    a healthy run of 600 steps, every fault once; prints only
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import jacdiag
from jacdiag.records.run_log import Alert
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

RESULTS = Path(__file__).parent / "results" / "detect.json"
LEFT, FAR, MEAN, ROWS, LENGTH, VOCABULARY = 0.3, 2.0, 10, 8, 32, 256
AT = 1200  # the step of a fault that comes later


@dataclass(frozen=True)
class Run:
    """A training run. `embed` scales the embedding, `residual` the std of W_O and W_2, both at
    init.
    """

    name: str
    recipe: str = "scaled-embed"
    layers: int = 4
    width: int = 64
    lr: float = 1e-3
    seed: int = 0
    embed: float = 1.0
    residual: float = 1.0


HEALTHY = [
    Run("scaled-embed"),
    Run("scaled-embed, another seed", seed=1),
    Run("embed-ln", "embed-ln"),
    Run("deeper", layers=8, width=32),
    Run("wider", layers=2, width=128, seed=2),
    Run("careful", lr=2e-4, seed=3),
]


def text() -> Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]
    return torch.frombuffer(
        bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8
    ).long()


class Training:
    """A run step by step, with warm-up over 100 steps, clipping at 1 and a cosine decay to a
    tenth.
    """

    def __init__(self, run: Run, steps: int, data: Tensor) -> None:
        self.run, self.steps, self.data = run, steps, data
        sizes = {"n_layer": run.layers, "n_head": 4, "n_embd": run.width, "vocab_size": VOCABULARY}
        with seeded(run.seed):
            self.model = gpt.build(run.recipe, block_size=LENGTH, **sizes).train()
        with torch.no_grad():
            self.model.transformer["wte"].weight.mul_(run.embed)  # type: ignore[operator,union-attr]
            for name, p in self.model.named_parameters():
                if name.endswith("c_proj.weight"):
                    p.mul_(run.residual)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=run.lr, betas=(0.9, 0.95))
        self.generator = torch.Generator().manual_seed(run.seed)
        self.factor = 1.0
        # called with the loss, after the backward
        self.before_update: Callable[[Tensor], None] | None = None

    def rate(self, step: int) -> float:
        decay = 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        return self.run.lr * self.factor * min(step / 100, 1.0) * decay

    def batch(self) -> Tensor:
        starts = torch.randint(len(self.data) - LENGTH - 1, (ROWS,), generator=self.generator)
        return torch.stack([self.data[s : s + LENGTH + 1] for s in starts.tolist()])

    def step(self, step: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        _, loss = self.model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.before_update is not None:
            self.before_update(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm


# -- faults ----------------------------------------------------------------------------------------
def rate_times_30(training: Training, step: int, ids: Tensor) -> Tensor:
    training.factor = 30.0
    return ids


def unscaled_residuals(training: Training, step: int, ids: Tensor) -> Tensor:
    """W_O and W_2 lose their 1 / sqrt(2N), as a conversion between two code bases has done."""
    if step == AT:
        with torch.no_grad():
            for name, p in training.model.named_parameters():
                if name.endswith("c_proj.weight"):
                    p.mul_(math.sqrt(2 * training.run.layers))
    return ids


def corrupted_batch(training: Training, step: int, ids: Tensor) -> Tensor:
    return torch.randint(VOCABULARY, ids.shape, generator=training.generator) if step == AT else ids


def biased_softmax(training: Training, step: int, ids: Tensor) -> Tensor:
    """Attention weights in bf16, cut off instead of rounded: a bias to one side, in every layer
    from now on.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        T = q.shape[-2]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        weights = scores.softmax(-1)
        cut = (weights.detach().view(torch.int32) & ~0xFFFF).view(torch.float32)
        return (weights + (cut - weights).detach()) @ v

    if step == AT:
        F.scaled_dot_product_attention = attention
    return ids


Fault = Callable[[Training, int, Tensor], Tensor]
FAULTS: dict[str, tuple[Run, Fault | None]] = {
    "learning rate x 30": (Run("x"), rate_times_30),
    "residual scaling removed in the run": (Run("x"), unscaled_residuals),
    "one corrupted batch": (Run("x"), corrupted_batch),
    "bf16 softmax, cut off": (Run("x"), biased_softmax),
    "residual scaling missing from the start": (Run("x", residual=math.sqrt(8)), None),
    "tiny embedding from the start": (Run("x", embed=0.01), None),
}


def watched(run: Run, steps: int, data: Tensor, fault: Fault | None, every: int) -> dict[str, Any]:
    """Trains under a watch; returns the alerts, and where the loss left its median."""
    training = Training(run, steps, data)
    window: deque[float] = deque(maxlen=201)
    last: deque[float] = deque(maxlen=MEAN)
    left: int | None = None
    real = F.scaled_dot_product_attention
    begun = time.perf_counter()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            jacdiag.watch(
                training.model,
                training.optimizer,
                log_dir=folder,
                every=every,
                stats_every=None,
                quiet=True,
                strict=True,
            ) as w,
        ):
            for step in range(1, steps + 1):
                ids = training.batch()
                if fault is not None and step >= AT:
                    ids = fault(training, step, ids)
                loss, norm = training.step(step, ids)
                w.step(loss, grad_norm=norm)
                value = float(loss)
                last.append(value)
                if left is None and step >= AT:
                    middle = median(window)
                    left = (
                        step if not (value < middle + FAR and fmean(last) < middle + LEFT) else None
                    )
                window.append(value)
            w.flush()
            alerts, findings = _rows_of(w.alerts), _rows_of(w.findings)
    finally:
        F.scaled_dot_product_attention = real
    return {
        "alerts": alerts,
        "findings": findings,
        "loss_left_its_median": left,
        "last_loss": round(value, 3),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _rows_of(alerts: Sequence[Alert]) -> list[dict[str, Any]]:
    return [{"step": a.step, "code": a.code, "what": a.what, "where": a.where[:1]} for a in alerts]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    logging.getLogger("jacdiag.watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    data = text()
    found: dict[str, Any] = {"torch": torch.__version__, "healthy": {}, "faults": {}}
    for run in HEALTHY[: 1 if quick else None]:
        made = watched(run, 600 if quick else 10_000, data, None, every=200)
        found["healthy"][run.name] = made
        print(
            f"healthy: {run.name:28} loss {made['last_loss']:.2f}, {len(made['alerts'])} alerts, "
            f"{made['seconds']} s",
            *(f"\n    {a['step']} {a['code']} {a['what']}" for a in made["alerts"]),
            flush=True,
        )
    for name, (run, fault) in FAULTS.items():
        for seed in range(1 if quick else 3):
            made = watched(replace(run, seed=seed), AT + 800, data, fault, every=100)
            start = AT if fault is not None else 0
            told = made["alerts"] if fault is not None else [*made["findings"], *made["alerts"]]
            first = next((a for a in told if a["step"] >= start), None)
            left = made["loss_left_its_median"]
            made["first"] = first
            made["lead"] = left - first["step"] if first is not None and left is not None else None
            made["early"] = [a for a in made["alerts"] if a["step"] < start]
            found["faults"].setdefault(name, []).append(made)
            told = f"{first['code']} after {first['step'] - start} steps" if first else "NOT FOUND"
            shown = (
                f"the loss shows it after {left - start}"
                if left is not None
                else "the loss never shows it"
            )
            print(
                f"{name:40} {told}; {shown}; lead {made['lead']}; before the fault "
                f"{len(made['early'])}",
                flush=True,
            )
    if not quick:
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
