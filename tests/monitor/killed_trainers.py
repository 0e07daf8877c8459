"""A training that goes on until it is killed: killed_trainers.py KIND FOLDER; FOLDER/ready is there
once it runs.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from monitor.rig import T, V, adam, plain_step, small

import jacdiag

OPTIONS: dict[str, Any] = {"every": None, "stats_every": None, "quiet": True}
READY, ENDLESS = 12, 100_000


def announce(folder: Path, step: int) -> None:
    if step == READY:
        (folder / "ready").touch()
    time.sleep(0.02)


def rows() -> list[torch.Tensor]:
    return list(torch.randint(V, (64, T), generator=torch.Generator().manual_seed(0)))


def hugging_face(folder: Path) -> None:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from jacdiag.monitor.integrations.huggingface import WatchCallback

    class Ready(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            announce(folder, state.global_step)

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": V, "n_positions": T}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=ENDLESS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in rows()]
    callbacks = [WatchCallback(log_dir=folder / "log", **OPTIONS), Ready()]
    Trainer(model, args, train_dataset=data, callbacks=callbacks).train()


def lightning(folder: Path) -> None:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from jacdiag.monitor.integrations.lightning import WatchCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small()

        def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
            logits = self.model(ids[:, :-1])[0]
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

        def configure_optimizers(self) -> Any:
            return adam(self)

    class Ready(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            announce(folder, trainer.global_step)

    trainer = Trainer(
        max_steps=ENDLESS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        enable_model_summary=False,
        devices=1,
        default_root_dir=folder,
        callbacks=[WatchCallback(log_dir=folder / "log", **OPTIONS), Ready()],
    )
    trainer.fit(Module(), DataLoader(rows(), batch_size=4))  # type: ignore[arg-type]


def ranks(folder: Path) -> None:
    """One of two processes of torchrun."""
    torch.distributed.init_process_group("gloo")
    model: nn.Module = nn.parallel.DistributedDataParallel(small())
    optimizer = adam(model)
    w = jacdiag.watch(model, optimizer, log_dir=folder / "log", **OPTIONS)
    for step in range(1, ENDLESS):
        loss, norm = plain_step(model, optimizer, step)
        w.step(loss, grad_norm=norm, step=step)
        if os.environ["RANK"] == "0":
            announce(folder, step)


if __name__ == "__main__":
    {"hugging_face": hugging_face, "lightning": lightning, "ranks": ranks}[sys.argv[1]](
        Path(sys.argv[2])
    )
