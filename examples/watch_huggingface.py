"""Watches a Hugging Face Trainer by a callback, or a loop of accelerate.

python examples/watch_huggingface.py [STEPS] [accelerate]
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import jacdiag
from jacdiag.monitor.integrations.huggingface import WatchCallback

SIZES = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "vocab_size": 64,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def data() -> list[dict[str, Any]]:
    ids = torch.randint(64, (256, 32)).cumsum(1) % 64
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: Any, steps: int, folder: str) -> None:
    args = TrainingArguments(
        f"{folder}/out",
        max_steps=steps,
        per_device_train_batch_size=8,
        report_to=[],
        disable_tqdm=True,
        logging_steps=10,
    )
    Trainer(
        model, args, train_dataset=data(), callbacks=[WatchCallback(log_dir=folder, every=10)]
    ).train()


def accelerate(model: Any, steps: int, folder: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(data(), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with jacdiag.watch(model, optimizer, log_dir=folder, every=10) as w:
        while w.count < steps:
            for rows in loader:
                with accelerator.accumulate(model):
                    loss = model(**rows).loss
                    accelerator.backward(loss)
                    norm = (
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                        if accelerator.sync_gradients
                        else None
                    )
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    w.step(loss, grad_norm=norm)


def main(steps: int = 20, how: str = "trainer", folder: str = "runs/hf") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    {"trainer": trainer, "accelerate": accelerate}[how](
        GPT2LMHeadModel(GPT2Config(**SIZES)), steps, folder
    )
    print(f"the log is {folder}/run.jsonl")


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:2]), *sys.argv[2:3])
