"""Folders that hold no model that can be read: each kind is recognised, with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from jacdiag.errors import SourceError, printable
from jacdiag.sources.formats.json_files import read_json
from jacdiag.sources.formats.weight_files import weight_files

_SHOWN = 5
# Suffix -> the format, and what to do.
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
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# How the names of files without weights begin that a trainer saves.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "sampler")
# What a training run saves next to its weights.
_STATE_FILES = ("optimizer.bin", "optimizer.pt", "random_states_0.pkl")

# The error for one kind of folder; None for a folder of another kind.
_ErrorOf = Callable[[Path], SourceError | None]


# -- by what was expected --------------------------------------------------------------------------
def refuse_without_weights(path: Path) -> SourceError:
    """Return the error for a folder that has a config.json but no weights of PyTorch."""
    special = _first_error(path, _adapter, _parent, _absent_weights, _named_weights, _other_format)
    if special is not None:
        return special
    return SourceError(
        f"'{path}' has a config.json but no weights",
        got=listing(path),
        hint=f"a fresh model of this config: hf:{path}",
    )


def refuse_without_config(path: Path) -> SourceError:
    """Return the error for a folder without config.json that was given without a model."""
    # Weights alone come before exports: a folder may hold both.
    special = _first_error(
        path,
        _adapter,
        _parent,
        _deepspeed,
        _fsdp,
        _bare_weights,
        _other_format,
        _original_llama,
        _subfolder,
    )
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
    special = _first_error(path, _adapter, _parent, _deepspeed, _fsdp, _other_format)
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


def listing(path: Path) -> str:
    """Return the first names in a folder, in one line."""
    names = sorted(printable(file.name) for file in path.iterdir())
    if not names:
        return "an empty folder"

    shown = ", ".join(names[:8])
    if len(names) > 8:
        shown += " ..."
    return shown


def _first_error(path: Path, *kinds: _ErrorOf) -> SourceError | None:
    """Return the error of the first kind of folder that this one is; None if it is none of them."""
    # A folder may be of several kinds: the first one says most.
    for error_of in kinds:
        error = error_of(path)
        if error is not None:
            return error

    return None


# -- kinds of folders ------------------------------------------------------------------------------
def _adapter(path: Path) -> SourceError | None:
    """Return the error for a folder of PEFT."""
    if not (path / "adapter_config.json").is_file():
        return None
    return SourceError(
        f"'{path}' holds a LoRA or other PEFT adapter, not a whole model",
        got=f"its base model: {_base_of(path)}",
        hint="merge it first: PeftModel.from_pretrained(base, "
        "FOLDER).merge_and_unload().save_pretrained(MERGED), "
        "then jacdiag audit MERGED",
    )


def _absent_weights(path: Path) -> SourceError | None:
    """Return the error for a folder in which the weights are a link that leads nowhere."""
    broken = list(filter(_is_broken_link, _entries_named_as_weights(path)))
    if not broken:
        return None

    first = broken[0]
    return SourceError(
        f"the weights of '{path}' are a link to a file that is not there",
        got=f"{printable(first.name)} leads to {printable(str(first.readlink()))}",
        hint="download the folder again, or copy it with its links followed (cp -rL)",
    )


def _entries_named_as_weights(path: Path) -> list[Path]:
    """Return what lies in a folder under a suffix of weights, in the order of names."""
    return [entry for entry in sorted(path.iterdir()) if entry.suffix in _WEIGHT_SUFFIXES]


def _is_broken_link(path: Path) -> bool:
    """Return whether a path is a link that leads nowhere."""
    return path.is_symlink() and not path.exists()


def _named_weights(path: Path) -> SourceError | None:
    """Return the error for a folder whose weights have a name that transformers does not use."""
    files = list(filter(_may_hold_weights, _entries_named_as_weights(path)))
    if not files:
        return None

    names = ", ".join(printable(file.name) for file in files[:_SHOWN])
    return SourceError(
        f"'{path}' has a config.json, and its weights are not under a usual name",
        got=names,
        hint=f"{files[0]} --model hf:{path}",
    )


def _may_hold_weights(path: Path) -> bool:
    """Return whether a path is a file, and not one that a trainer saves next to the weights."""
    return path.is_file() and not path.name.startswith(_NO_WEIGHTS)


def _base_of(path: Path) -> str:
    """Return the name of the model that an adapter changes, as its config has it."""
    try:
        data = read_json(path / "adapter_config.json")
        return printable(str(data["base_model_name_or_path"]))[:200]
    except (SourceError, KeyError, TypeError):
        return "not named"


def _parent(path: Path) -> SourceError | None:
    """Return the error for a trainer's output folder, whose checkpoints are folders in it."""
    # 1. The checkpoints by their steps: as text, "1000" would come before "500".
    numbered: list[tuple[int, str]] = []
    for child in path.iterdir():
        match = re.fullmatch(r"checkpoint[-_](\d+)", child.name)
        if match is not None and child.is_dir():
            numbered.append((int(match[1]), child.name))
    if not numbered:
        return None

    # 2. Name the newest one.
    names = [name for _, name in sorted(numbered)]
    return SourceError(
        f"'{path}' is a folder of checkpoints, not one of them",
        got=f"{len(names)} checkpoints: {', '.join(names[-_SHOWN:])}",
        hint=f"the newest one: {path / names[-1]}",
    )


def _deepspeed(path: Path) -> SourceError | None:
    """Return the error for a checkpoint of DeepSpeed, or a folder of one step in it."""
    holds_steps = any(re.fullmatch(r"global_step\d+", child.name) for child in path.iterdir())
    holds_shards = any(path.glob("*_optim_states.pt"))
    holds_script = (path / "zero_to_fp32.py").is_file()
    if not (holds_steps or holds_shards or holds_script):
        return None

    # The script stands next to the folders of the steps.
    is_step = holds_shards and not holds_steps
    folder = path.parent if is_step else path
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
    inner = sorted(child for child in path.iterdir() if (child / ".metadata").is_file())
    if not inner:
        return None
    # The state of the optimizer stands in a folder of its own.
    models = [child for child in inner if "optim" not in child.name]
    model = (models or inner)[0]
    return SourceError(
        f"'{path}' holds sharded weights in a folder inside of it",
        got=listing(path),
        hint=f"{model} with --model FACTORY or --model hf:CONFIG",
    )


def _bare_weights(path: Path) -> SourceError | None:
    """Return the error for a folder with weights and nothing that says what they belong to."""
    files = weight_files(path)
    if not files:
        return None

    # Some files show who saved them.
    what = "is a folder without a model"
    if any((path / name).is_file() for name in _STATE_FILES):
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
    """Return the error for a folder whose weights are in the format of another library."""
    # Exports stand in a folder of their own, too: FOLDER/onnx/model.onnx.
    files = [file for file in (*path.glob("*"), *path.glob("onnx/*")) if file.is_file()]
    for suffix, (what, hint) in _OTHER_FORMATS.items():
        named = [file for file in files if file.suffix == suffix]
        if not named:
            continue
        names = sorted(file.relative_to(path).as_posix() for file in named)
        return SourceError(
            f"the weights in '{path}' are in {what}, which jacdiag does not read",
            got=", ".join(names[:_SHOWN]),
            hint=hint,
        )
    return None


def _original_llama(path: Path) -> SourceError | None:
    """Return the error for a model as the authors of Llama or Mistral publish theirs."""
    if not (path / "params.json").is_file():
        return None
    files = sorted([*path.glob("consolidated*.pth"), *path.glob("consolidated*.safetensors")])
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
    configs = [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")]
    if not configs:
        return None
    folders = sorted(config.parent for config in configs)
    return SourceError(
        f"'{path}' has no config.json, the folders inside of it have",
        got=", ".join(folder.relative_to(path).as_posix() for folder in folders[:_SHOWN]),
        hint=f"for instance {folders[0]}",
    )
