"""Folders that hold no model that can be read: each kind is recognised, with what to do instead."""

from __future__ import annotations

import json
import re
from pathlib import Path

from jacdiag.errors import SourceError, UsageError, printable
from jacdiag.sources.formats.weight_files import weight_files

_SHOWN = 5
_OTHER_FORMATS = {
    ".gguf": (
        "GGUF, the format of llama.cpp",
        "audit the folder that it was converted from, or transformers' own",
    ),
    ".onnx": ("ONNX, an exported graph", "audit the PyTorch model that it was exported from"),
    ".h5": ("the format of TensorFlow", "save it from PyTorch: model.save_pretrained(FOLDER)"),
    ".msgpack": ("the format of Flax", "save it from PyTorch: model.save_pretrained(FOLDER)"),
    ".mlmodel": ("Core ML, an exported graph", "audit the PyTorch model that it was exported from"),
    ".tflite": (
        "TensorFlow Lite, an exported graph",
        "audit the PyTorch model that it was exported from",
    ),
}


def refuse_without_weights(path: Path) -> SourceError:
    """Return the error for a folder that has a config.json but no weights of PyTorch."""
    special = _adapter(path) or _parent(path) or _other_format(path)
    if special is not None:
        return special
    return SourceError(
        f"'{path}' has a config.json but no weights",
        got=listing(path),
        hint=f"a fresh model of this config: hf:{path}",
    )


def refuse_without_config(path: Path) -> SourceError | UsageError:
    """Return the error for a folder without config.json that was given without a model."""
    special = (
        _adapter(path) or _parent(path) or _deepspeed(path) or _fsdp(path) or _bare_weights(path)
    )
    special = special or _other_format(path) or _original_llama(path) or _subfolder(path)
    if special is not None:
        return special
    return SourceError(
        f"'{path}' is a folder without a model",
        got=listing(path),
        hint=(
            "a Hugging Face folder has a config.json, one of torch.distributed.checkpoint a "
            ".metadata"
        ),
    )


def refuse_without_files(path: Path) -> SourceError:
    """Return the error for a folder that was given with --model and holds no weights to fill it."""
    special = (
        _adapter(path) or _parent(path) or _deepspeed(path) or _fsdp(path) or _other_format(path)
    )
    if special is not None:
        return special
    return SourceError(
        f"'{path}' holds no weights for the model",
        got=listing(path),
        hint=(
            "expected model.safetensors or pytorch_model.bin (or their shards); or name the file "
            "itself"
        ),
    )


def _adapter(path: Path) -> SourceError | None:
    if not (path / "adapter_config.json").is_file():
        return None
    return SourceError(
        f"'{path}' holds a LoRA or other PEFT adapter, not a whole model",
        got=f"its base model: {_base_of(path)}",
        hint="merge it first: PeftModel.from_pretrained(base, "
        "FOLDER).merge_and_unload().save_pretrained(MERGED), "
        "then jacdiag audit MERGED",
    )


def _base_of(path: Path) -> str:
    try:
        data = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        return printable(str(data["base_model_name_or_path"]))[:200]
    except (OSError, ValueError, KeyError, TypeError):
        return "not named"


def _parent(path: Path) -> SourceError | None:
    """Return the error for a trainer's output folder, whose checkpoints are folders in it."""
    numbered: list[tuple[int, str]] = []
    for child in path.iterdir():
        match = re.fullmatch(r"checkpoint[-_](\d+)", child.name)
        if match is not None and child.is_dir():
            numbered.append((int(match[1]), child.name))
    if not numbered:
        return None
    numbered.sort()
    newest = path / numbered[-1][1]
    return SourceError(
        f"'{path}' is a folder of checkpoints, not one of them",
        got=f"{len(numbered)} checkpoints: {', '.join(name for _, name in numbered[-_SHOWN:])}",
        hint=f"the newest one: {newest}",
    )


def _deepspeed(path: Path) -> SourceError | None:
    steps = sorted(
        child.name for child in path.iterdir() if re.fullmatch(r"global_step\d+", child.name)
    )
    shards = sorted(child.name for child in path.glob("*_optim_states.pt"))
    if not steps and not shards and not (path / "zero_to_fp32.py").is_file():
        return None
    folder = path.parent if shards and not steps else path
    return SourceError(
        f"'{path}' is a checkpoint of DeepSpeed, in parts",
        got=listing(path),
        hint=(
            f"join them: cd {folder} && python zero_to_fp32.py . OUT, then give OUT and --model "
            "FACTORY"
        ),
    )


def _fsdp(path: Path) -> SourceError | None:
    """Return the error for a folder of accelerate or a trainer around a distributed checkpoint."""
    inner = sorted(
        child for child in path.iterdir() if child.is_dir() and (child / ".metadata").is_file()
    )
    if not inner:
        return None
    model = next((child for child in inner if "optim" not in child.name), inner[0])
    return SourceError(
        f"'{path}' holds sharded weights in a folder inside of it",
        got=listing(path),
        hint=f"{model} with --model FACTORY or --model hf:CONFIG",
    )


def _bare_weights(path: Path) -> SourceError | None:
    files = weight_files(path)
    if not files:
        return None
    is_state = any(
        (path / name).is_file() for name in ("optimizer.bin", "optimizer.pt", "random_states_0.pkl")
    )
    what = "is a folder without a model"
    if is_state:
        what = "is a state that accelerate or a trainer saved, without a model"
    return SourceError(
        f"'{path}' {what}: no config.json says what its weights belong to",
        got=listing(path),
        hint=(
            f"{path} with --model FACTORY or --model hf:CONFIG; or {files[0]} alone, for its "
            "weights only"
        ),
    )


def _other_format(path: Path) -> SourceError | None:
    # Exports stand in a folder of their own, too: FOLDER/onnx/model.onnx.
    files = [file for file in (*path.glob("*"), *path.glob("onnx/*")) if file.is_file()]
    for suffix, (what, hint) in _OTHER_FORMATS.items():
        names = sorted(file.relative_to(path).as_posix() for file in files if file.suffix == suffix)
        if names:
            return SourceError(
                f"the weights in '{path}' are in {what}, which jacdiag does not read",
                got=", ".join(names[:_SHOWN]),
                hint=hint,
            )
    return None


def _original_llama(path: Path) -> SourceError | None:
    if not (path / "params.json").is_file():
        return None
    files = sorted(
        file for file in path.glob("consolidated*") if file.suffix in (".pth", ".safetensors")
    )
    if not files:
        return None
    return SourceError(
        f"'{path}' holds a model in its authors' own layout (params.json), not in that of "
        "transformers",
        got=listing(path),
        hint=f"{files[0]} with --model FACTORY; or the folder in the layout of transformers",
    )


def _subfolder(path: Path) -> SourceError | None:
    """Return the error for a folder with models in folders in it: a hub cache, a pipeline."""
    inner = sorted(
        file.parent
        for pattern in ("*/config.json", "snapshots/*/config.json")
        for file in path.glob(pattern)
    )
    if not inner:
        return None
    return SourceError(
        f"'{path}' has no config.json, the folders inside of it have",
        got=", ".join(folder.relative_to(path).as_posix() for folder in inner[:_SHOWN]),
        hint=f"for instance {inner[0]}",
    )


def listing(path: Path) -> str:
    """Return the first names in a folder, in one line."""
    names = sorted(printable(file.name) for file in path.iterdir())
    if not names:
        return "an empty folder"
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
