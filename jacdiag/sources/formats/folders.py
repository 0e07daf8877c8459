"""Folders as trainers and hubs leave them: which files hold the weights, and what else they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, UsageError, one_line, printable

_SHOWN = 5
# In the order in which transformers looks for them.
_ONE_FILE = ("model.safetensors", "pytorch_model.bin")
_SHARDS = (r"model-\d+-of-\d+\.safetensors", r"pytorch_model-\d+-of-\d+\.bin")
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
_SCALES = re.compile(
    r"\.(qweight|qzeros|SCB|weight_scale|weight_scale_inv|weight_packed|input_scale"
    r"|absmax|weight\.absmax|weight\.quant_map|weight\.quant_state\..+)$|_proj_(blocks|scales)$"
)
_QUANTISED = (
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a folder's weights, in the order of preference of transformers.

    Raises:
        SourceError: shards are missing, or an index cannot be read.
    """
    # 1. The first complete set: one file, or the shards that an index names.
    incomplete: SourceError | None = None
    for name in _ONE_FILE:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                return _indexed(path, index)
            except SourceError as error:
                incomplete = incomplete or error
    if incomplete is not None:
        raise incomplete

    # 2. Shards without an index, then a file of a variant (model.fp16.safetensors).
    for pattern in _SHARDS:
        files = sorted(file for file in path.glob("*") if re.fullmatch(pattern, file.name))
        if files:
            _check_count(path, files)
            return files
    return _variant(path)


def _variant(path: Path) -> list[Path]:
    for pattern in (r"model\.\w+\.safetensors", r"pytorch_model\.\w+\.bin"):
        files = sorted(file for file in path.glob("*") if re.fullmatch(pattern, file.name))
        if len(files) == 1:
            return files
    return []


def _check_count(path: Path, files: list[Path]) -> None:
    """Raise if fewer shards are there than their names say."""
    of = int(files[0].stem.rpartition("-")[2])
    if len(files) != of:
        raise SourceError(
            f"'{path}' is incomplete: {len(files)} of {of} shards are there",
            got=", ".join(file.name for file in files[:_SHOWN]),
            hint="download or copy the folder again",
        )


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"cannot read '{index}'", got=one_line(error)) from error
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd:  # a file elsewhere is none of this folder's
        raise SourceError(f"'{index}' names a file outside its folder", got=str(odd[0]))
    if not names:
        raise SourceError(f"'{index}' names no file", hint="download or copy the folder again")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise SourceError(
            f"'{path}' is incomplete: {len(missing)} of {len(names)} shards are missing",
            got=f"no {shown}, which {index.name} names",
            hint="download or copy the folder again",
        )
    return [path / name for name in names]


def quantised_names(pieces: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that are quantised weights or their scales.

    Args:
        pieces: tensors, or where they lie: anything with a dtype and a shape.
    """
    return [name for name, piece in pieces.items() if _SCALES.search(name) or _is_quantised(piece)]


def _is_quantised(piece: Any) -> bool:
    return piece.dtype in _QUANTISED and len(piece.shape) > 1


def refuse_quantised(path: Path, method: str, names: Iterable[str]) -> SourceError:
    """Return the error for weights that are stored quantised."""
    names = list(names)
    said = f"config.json says {method}" if method else "its tensors say so"
    return SourceError(
        f"the weights in '{path}' are quantised, and jacdiag reads only weights in floating point",
        got=f"{said}; {_listed(names)}" if names else said,
        hint=(
            "audit the model that was quantised, or save a dequantised copy in bfloat16 or float32"
        ),
    )


def _listed(names: list[str]) -> str:
    shown = printable(", ".join(names[:3]))
    tensors = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} such {tensors}: {shown}{' ...' if len(names) > 3 else ''}"


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
