"""What the pages take as there: a user's files, and the names of a training loop."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jacdiag.sources.gpt import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 256, "block_size": 32}
_BUILD = """
from jacdiag.sources.gpt import GPT, GPTConfig

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 256, "block_size": 32}

def build(**sizes):
    return GPT(GPTConfig(**{**SIZES, **sizes}))

model = trained = build

def like_hf():
    from transformers import AutoConfig, AutoModelForCausalLM
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("hf-folder"))
"""


class TinyGPT(GPT):
    """A GPT that returns its loss if it is given targets."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return logits, or the mean cross entropy."""
        logits = super().forward(x)
        if y is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def build_model() -> nn.Module:
    """Return a small model."""
    return TinyGPT(GPTConfig(**SIZES))


def names(text: str = "") -> dict[str, Any]:
    """Return the names that the Python blocks of a page take as given.

    Args:
        text: the page.
    """
    torch.manual_seed(0)
    model = build_model()
    batches = [torch.randint(256, (2, 17)) for _ in range(8)]
    of_nanogpt = _names_of_nanogpt() if "gradient_accumulation_steps" in text else {}
    return {
        "torch": torch,
        "build_model": build_model,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "input_ids": torch.randint(256, (2, 16)),
        "loader": [(batch[:, :-1], batch[:, 1:]) for batch in batches],
        "steps": 4,
        "epochs": 2,
        "loss": torch.tensor(5.5),
        "norm": torch.tensor(1.0),
        **of_nanogpt,
    }


def _names_of_nanogpt() -> dict[str, Any]:
    """Return the names of nanoGPT's training script, whose model returns logits and loss."""
    model = GPT(GPTConfig(**SIZES))
    x, y = torch.randint(256, (2, 2, 16))
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "ctx": nullcontext(),
        "get_batch": lambda _split: (x, y),
        "X": x,
        "Y": y,
        "grad_clip": 1.0,
        "gradient_accumulation_steps": 3,
        "max_iters": 4,
    }


def write_files(folder: Path, text: str) -> None:
    """Write the files that a page names.

    Args:
        folder: the working directory of its blocks.
        text: the page.
    """
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "build.py").write_text(_BUILD)
    if "my_package" in text:
        (folder / "my_package").mkdir()
        (folder / "my_package" / "models.py").write_text(_BUILD)
    for name in ("checkpoint.pt", "step-10000.pt", "step-20000.pt"):
        if name in text:
            step = int(name.partition("-")[2].partition(".")[0] or 0)
            saved = {"model": _weights(), "model_args": SIZES, "iter_num": step}
            torch.save(saved, folder / name)
    if "text.txt" in text:
        shutil.copy(ROOT / "examples" / "checkpoints" / "sample.txt", folder / "text.txt")
    if "run.ckpt" in text:
        torch.save({"ema": _weights(), "model": _weights()}, folder / "run.ckpt")
    if "model.safetensors" in text:
        from safetensors.torch import save_file

        tensors = {name: tensor.clone() for name, tensor in _weights().items()}
        save_file(tensors, folder / "model.safetensors")
    if "hf-folder" in text or "config.json" in text:
        _write_hugging_face_folder(folder)
    if "a.csv" in text:
        _write_csv_logs(folder)


@cache
def _weights() -> dict[str, Tensor]:
    """Return the weights of a small model."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZES)).state_dict()


def _write_hugging_face_folder(folder: Path) -> None:
    """Write a folder, the config alone, and the weights alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 256, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder / "hf-folder")
    shutil.copy(folder / "hf-folder" / "config.json", folder / "config.json")
    torch.save(model.state_dict(), folder / "weights.bin")


def _write_csv_logs(folder: Path) -> None:
    """Write logs of another tool: some runs end well, and some do not."""
    for name, end in (("a", 2.0), ("b", 9.0)):
        rows = ["step,train/loss,gain,model"]
        for step in range(100):
            loss = 5 + (end - 5) * step / 99
            rows.append(f"{step},{loss},{end},small")
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    (folder / "factors.json").write_text(json.dumps({}))
