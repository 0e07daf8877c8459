"""Hugging Face folders and configs, through transformers (extra `[hf]`)."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.errors import SourceError
from jacdiag.sources.factory import own_frames, seeded
from jacdiag.sources.formats import safetensors_file, torch_file

_SHOWN = 5


def is_folder(path: Path) -> bool:
    """Whether a folder has a config.json."""
    return (path / "config.json").is_file()


def load(path: Path, *, trust_pickle: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a folder with config.json and weights (.safetensors or .bin, sharded or not), strictly.

    Returns:
        The model in the precision of its file, and what the report says about it.

    Raises:
        SourceError: transformers is missing, the folder has no weights, a file is unsafe or broken, keys do not fit.
    """
    transformers = _transformers(path)
    files = _weight_files(path)
    _check_files(files, trust_pickle)
    config = _config(transformers, path, trust_pickle)
    kind = _class_of(transformers, config)
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                path, config=config, dtype="auto", local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, attn_implementation="eager", trust_remote_code=trust_pickle,
            )  # fmt: skip
    except Exception as error:
        raise SourceError(f"transformers cannot load '{path}'", got=own_frames(error)) from error
    _check_fit(path, model, info)
    facts = {"format": "huggingface", "architecture": type(model).__name__, "files": [f.name for f in files]}
    return model, facts


def from_config(spec: str, overrides: dict[str, Any], seed: int) -> nn.Module:
    """Builds a randomly initialised model from a folder with config.json or from a JSON file of a config.

    Args:
        overrides: fields of the config to change.
    """
    path = Path(spec)
    transformers = _transformers(path)
    if path.is_dir() and not is_folder(path):
        raise SourceError(f"'{path}' has no config.json", got=_listing(path))
    if not path.exists():
        raise SourceError(f"no such config: '{path}'", hint="hf:FOLDER or hf:config.json, on this machine")
    config = _config(transformers, path, False)
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise SourceError(
                f"{type(config).__name__} has no '{key}'", hint="--model-args changes fields of the config"
            )
        setattr(config, key, value)
    kind = _class_of(transformers, config)
    try:
        with seeded(seed), _quiet():
            built = kind.from_config if hasattr(kind, "from_config") else kind._from_config
            return built(config, attn_implementation="eager")  # type: ignore[no-any-return]
    except Exception as error:
        raise SourceError(f"transformers cannot build a model of '{path}'", got=own_frames(error)) from error


def _transformers(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise SourceError(
            f"'{path}' is a Hugging Face model, and transformers is not installed",
            got=str(error),
            hint="pip install 'jacdiag[hf]'",
        ) from error
    return transformers


def _config(transformers: Any, path: Path, trust: bool) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise SourceError(f"cannot read '{file}'", got=str(error)) from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise SourceError(f"'{file}' is no config of transformers", got="it has no model_type")
    if "auto_map" in data and not trust and data["model_type"] not in transformers.CONFIG_MAPPING:
        raise SourceError(
            f"the model in '{path}' brings its own code",
            hint="--trust-pickle lets it run; or give --model FACTORY and the weights file",
        )
    if data["model_type"] not in transformers.CONFIG_MAPPING and not trust:
        raise SourceError(
            f"transformers {transformers.__version__} does not know model_type '{data['model_type']}'",
            hint="a newer transformers, or --model FACTORY",
        )
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust)
    except Exception as error:
        raise SourceError(f"transformers cannot read the config '{file}'", got=own_frames(error)) from error


def _class_of(transformers: Any, config: Any) -> Any:
    """The class that the config names, else the causal language model of its type, else the bare model."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if type(config) in causal else transformers.AutoModel


def _weight_files(path: Path) -> list[Path]:
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(f for f in path.glob(pattern) if f.stem.startswith(("model", "pytorch_model")))
        if files:
            return files
    raise SourceError(
        f"'{path}' has a config.json but no weights",
        got=_listing(path),
        hint=f"a fresh model of this config: hf:{path}",
    )


def _check_files(files: list[Path], trust_pickle: bool) -> None:
    """Opens each file with our own reader first: a broken or unsafe one is then told as such."""
    for file in files:
        if file.suffix == ".safetensors":
            safetensors_file.check(file)
        else:
            torch_file.read(file, trust_pickle=trust_pickle)


def _check_fit(path: Path, model: nn.Module, info: dict[str, Any]) -> None:
    parts = []
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "of another shape"),
    ):
        names = sorted(str(k[0]) if isinstance(k, tuple) else str(k) for k in info.get(key, ()))
        if names:
            parts.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}")
    if parts:
        raise SourceError(
            f"the weights in '{path}' do not fit {type(model).__name__}",
            got="\n".join(parts),
            hint="config.json must be that of the weights",
        )


def _listing(path: Path) -> str:
    names = sorted(f.name for f in path.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "an empty folder"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' log and progress bars off the terminal while it loads, and gives the settings back."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
