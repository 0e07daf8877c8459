"""Trains the two small GPTs whose checkpoints ship in examples/checkpoints/: `vanilla` and
`scaled-embed`.

Bytes of the Python standard library, 6 layers, width 112, nanoGPT's checkpoint layout, bfloat16
weights. Each is saved at step 0 and after training; the log of each run is written beside them, one
JSON object per line.

    python examples/make_checkpoints.py [FOLDER]        about 4 minutes on 2 cores
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacdiag.sources.gpt import GPT, build

RECIPES = ("vanilla", "scaled-embed")
SIZES = {"n_layer": 6, "n_head": 7, "n_embd": 112, "vocab_size": 256, "block_size": 64}
STEPS, WARMUP, BATCH, LR, CLIP, SEED = 1200, 60, 24, 1e-2, 1.0, 1337
LOG_EVERY, VALIDATION_BATCHES = 20, 20


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's top-level modules in the order of their names; the last
    twentieth validates.
    """
    folder = Path(os.__file__).parent
    data = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    cut = len(tokens) * 19 // 20
    return tokens[:cut], tokens[cut:]


def batches(tokens: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows and their next bytes, each (BATCH, block_size)."""
    length = SIZES["block_size"]
    while True:
        starts = torch.randint(len(tokens) - length - 1, (BATCH, 1), generator=generator)
        window = tokens[starts + torch.arange(length + 1)]
        yield window[:, :-1], window[:, 1:]


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return LR * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def validate(model: GPT, tokens: Tensor) -> float:
    """Mean loss over windows that are the same at every call."""
    stream = batches(tokens, torch.Generator().manual_seed(SEED))
    losses = [model(*next(stream))[1] for _ in range(VALIDATION_BATCHES)]
    return float(torch.stack(losses).mean())


def save(model: GPT, step: int, recipe: str, path: Path) -> None:
    """nanoGPT's layout: `model`, `model_args`, `iter_num`, `config`."""
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]  # tied: stored once
    config = {
        "recipe": recipe,
        "steps": STEPS,
        "batch": BATCH,
        "lr": LR,
        "warmup": WARMUP,
        "clip": CLIP,
        "seed": SEED,
    }
    torch.save(
        {
            "model": state,
            "model_args": dataclasses.asdict(model.config),
            "iter_num": step,
            "config": config,
        },
        path,
    )


def train(recipe: str, folder: Path) -> None:
    """Trains one model and writes its two checkpoints and its log."""
    torch.manual_seed(SEED)
    model = build(recipe, **SIZES)
    training, validation = corpus()
    save(model, 0, recipe, folder / f"{recipe}-step0.pt")
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    stream = batches(training, torch.Generator().manual_seed(SEED))
    with (folder / f"{recipe}.jsonl").open("w", encoding="utf-8") as log:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            loss = model(*next(stream))[1]
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % LOG_EVERY == 0 or step == STEPS - 1:
                entry: dict[str, Any] = {
                    "step": step,
                    "loss": round(loss.item(), 4),
                    "grad_norm": round(norm.item(), 4),
                    "lr": round(learning_rate(step), 6),
                }
                if step % 200 == 0 or step == STEPS - 1:
                    entry["validation"] = round(validate(model, validation), 4)
                    print(recipe, entry, flush=True)
                log.write(json.dumps(entry) + "\n")
    save(model, STEPS, recipe, folder / f"{recipe}-trained.pt")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sample.txt").write_bytes(bytes(corpus()[1][:4096].tolist()))
    for recipe in RECIPES:
        train(recipe, folder)


if __name__ == "__main__":
    main()
