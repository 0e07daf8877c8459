"""Watches a Lightning Trainer by a callback; TensorBoard gets the figures too, where it is
installed.

    python examples/watch_lightning.py [STEPS]
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from jacdiag.monitor.integrations.lightning import WatchCallback
from jacdiag.sources.gpt import build


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build(
            "scaled-embed", n_layer=2, n_head=4, n_embd=64, vocab_size=64, block_size=32
        )

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(ids[:, :-1], ids[:, 1:])[1]
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 20, folder: str = "runs/lightning") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(
        list(torch.randint(64, (256, 33)).cumsum(1) % 64), batch_size=8
    )
    sinks = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    callback = WatchCallback("model", log_dir=folder, every=10, stats_every=5, sinks=sinks)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        accelerator="cpu",
    )
    trainer.fit(Module(), data)
    print(f"the log is {folder}/run.jsonl")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]))
