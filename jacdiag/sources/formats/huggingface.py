"""Hugging Face folders and configs, through transformers (extra `[hf]`)."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from jacdiag.errors import SourceError, one_line
from jacdiag.sources.empty import empty_parameters
from jacdiag.sources.factory import own_frames, seeded
from jacdiag.sources.fit import Misfit, attach
from jacdiag.sources.formats import safetensors_file, torch_file
from jacdiag.sources.stored import Piece, StoredWeights

_SHOWN = 5
_HINT = "config.json must be that of the weights"


def is_folder(path: Path) -> bool:
    """Whether a folder has a config.json."""
    return (path / "config.json").is_file()


@dataclass
class Loaded:
    """A model out of a folder.

    Attributes:
        model: in the precision of its files.
        facts: what the report says about it.
        weights: the values of its parameters, where they stay in their files.
        notes: how it was read, where that is not as usual.
    """

    model: nn.Module
    facts: dict[str, Any]
    weights: StoredWeights | None = None
    notes: list[str] = field(default_factory=list)


def load(path: Path, *, trust_pickle: bool = False) -> Loaded:
    """Loads a folder with config.json and weights (.safetensors or .bin, sharded or not), strictly.

    Parameters in .safetensors stay in their files. Where their names there are not those of the model's parameters
    (experts that transformers stacks while it loads), transformers loads them all.

    Raises:
        SourceError: transformers is missing, the folder has no weights, a file is unsafe or broken, keys do not fit.
    """
    transformers = _transformers(path)
    files = _weight_files(path)
    config = _config(transformers, path, trust_pickle)
    kind = _class_of(transformers, config)
    facts: dict[str, Any] = {"format": "huggingface", "files": [f.name for f in files]}
    notes: list[str] = []
    if files[0].suffix == ".safetensors":
        pieces = {name: span for file in files for name, span in safetensors_file.spans(file)[0].items()}
        try:
            model = _empty(kind, config, trust_pickle, path)
            weights, notes = attach(model, StoredWeights(_named_as(model, pieces)), f"'{path}'", _HINT)
            return Loaded(model, {**facts, "architecture": type(model).__name__}, weights, notes)
        except Misfit as misfit:
            if not misfit.unexpected:
                raise
            notes = ["read whole: the names in the files are not those of the model's parameters"]
    else:
        for file in files:  # with our own reader first: a broken or unsafe one is then told as such
            torch_file.read(file, trust_pickle=trust_pickle)
    model = _whole(kind, path, config, trust_pickle)
    return Loaded(model, {**facts, "architecture": type(model).__name__}, None, notes)


def _empty(kind: Any, config: Any, trust: bool, path: Path) -> nn.Module:
    """The model with parameters on the meta device, its buffers computed."""
    built = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    options = {"trust_remote_code": trust} if hasattr(kind, "from_config") else {}
    try:
        with _quiet(), seeded(0), empty_parameters():
            return built(config, attn_implementation="eager", **options).eval()  # type: ignore[no-any-return]
    except Exception as error:
        raise SourceError(f"transformers cannot build the model of '{path}' empty", got=own_frames(error)) from error


def _named_as(model: Any, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Pieces by the model's own names: the prefix of the base model put on or taken off, leftovers left out."""
    wanted = set(model.state_dict(keep_vars=True))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if len(prefix) > 1 and not wanted & set(pieces):
        longer = {f"{prefix}{name}": piece for name, piece in pieces.items()}
        shorter = {name.removeprefix(prefix): piece for name, piece in pieces.items() if name.startswith(prefix)}
        pieces = max(pieces, longer, shorter, key=lambda named: len(wanted & set(named)))
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq$"]
    return {name: piece for name, piece in pieces.items()
            if name in wanted or not any(re.search(pattern, name) for pattern in ignored)}  # fmt: skip


def _whole(kind: Any, path: Path, config: Any, trust_pickle: bool) -> nn.Module:
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                path, config=config, dtype="auto", local_files_only=True, output_loading_info=True,
                ignore_mismatched_sizes=True, attn_implementation="eager", trust_remote_code=trust_pickle,
            )  # fmt: skip
    except Exception as error:
        raise SourceError(f"transformers cannot load '{path}'", got=own_frames(error)) from error
    _check_fit(path, model, info)
    return model  # type: ignore[no-any-return]


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
    """The files with weights: those that an index names, else the ones with canonical names."""
    for index in sorted(path.glob("*.index.json")):
        return _indexed(path, index)
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(f for f in path.glob(pattern) if f.stem.startswith(("model", "pytorch_model")))
        if files:
            return files
    raise SourceError(
        f"'{path}' has a config.json but no weights",
        got=_listing(path),
        hint=f"a fresh model of this config: hf:{path}",
    )


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"cannot read '{index}'", got=one_line(error)) from error
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd:  # a file elsewhere is none of this folder's
        raise SourceError(f"'{index}' names a file outside its folder", got=str(odd[0]))
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise SourceError(
            f"'{path}' is incomplete: {len(missing)} of {len(names)} shards are missing",
            got=f"no {shown}, which {index.name} names",
            hint="download or copy the folder again",
        )
    return [path / name for name in names]


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
            hint=_HINT,
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
