"""Watches loops and models of other libraries: Fabric, litgpt's GPT, x-transformers, torchtitan's
optimizers.

    python examples/watch_others.py [STEPS] [fabric | litgpt | x-transformers | torchtitan]
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import jacdiag
from jacdiag.sources.gpt import build


def tokens() -> torch.Tensor:
    return torch.randint(64, (8, 33)).cumsum(1) % 64


def fabric(steps: int, folder: str) -> None:
    """The wrapped model and optimizer are watched as Fabric returns them."""
    from lightning.fabric import Fabric

    api = Fabric(accelerator="cpu", devices=1)
    model = build("scaled-embed", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=32)
    wrapped, optimizer = api.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    with jacdiag.watch(wrapped, optimizer, log_dir=folder, every=10, stats_every=5) as w:
        for _ in range(steps):
            ids = tokens()
            _, loss = wrapped(ids[:, :-1], ids[:, 1:])
            api.backward(loss)
            norm = api.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss, grad_norm=norm)


def litgpt(steps: int, folder: str) -> None:
    from litgpt import GPT, Config

    sizes = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "block_size": 32,
        "vocab_size": 64,
        "padded_vocab_size": 64,
    }
    model = GPT(Config.from_name("pythia-14m", **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, steps, folder)


def x_transformers(steps: int, folder: str) -> None:
    from x_transformers import Decoder, TransformerWrapper

    model = TransformerWrapper(
        num_tokens=64, max_seq_len=32, attn_layers=Decoder(dim=64, depth=2, heads=4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, steps, folder)


def torchtitan(steps: int, folder: str) -> None:
    """The container is watched as it is: the figures are summed over its optimizers."""
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    model = build("scaled-embed", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=32)
    groups = [
        ParamGroupConfig(pattern=r"ln_", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-3}),
        ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 3e-3}),
    ]
    config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    container = OptimizersContainer(config, model_parts=[model])
    train(model, container, steps, folder)


def train(model: nn.Module, optimizer: Any, steps: int, folder: str) -> None:
    with jacdiag.watch(model, optimizer, log_dir=folder, every=10, stats_every=5) as w:
        for _ in range(steps):
            ids = tokens()
            logits = model(ids[:, :-1])
            logits = logits[0] if isinstance(logits, tuple) else logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            w.step(loss, grad_norm=norm)


def main(steps: int = 20, how: str = "fabric", folder: str = "runs/others") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    ways = {
        "fabric": fabric,
        "litgpt": litgpt,
        "x-transformers": x_transformers,
        "torchtitan": torchtitan,
    }
    ways[how](steps, folder)
    print(f"the log is {folder}/run.jsonl")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]), *sys.argv[2:3])
