"""Hugging Face folders and configs, through transformers (extra `[hf]`)."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError, printable
from jacdiag.sources.foreign_code import own_frames, seeded
from jacdiag.sources.formats import refused_folders, safetensors_file, torch_file, weight_files
from jacdiag.sources.formats.hf_config import (
    candidate_classes,
    default_class,
    named_class,
    read_config,
)
from jacdiag.sources.formats.hf_names import Naming, is_of_transformers, match_names
from jacdiag.sources.lazy_tensors import StoredTensor, StoredWeights
from jacdiag.sources.load_weights import TieConflict, attach, fit
from jacdiag.sources.meta_build import empty_parameters

_SHOWN = 5
_HINT = (
    "config.json must be that of the weights; or --model FACTORY builds the model that was saved"
)


def is_folder(path: Path) -> bool:
    """Return whether a folder has a config.json."""
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


@dataclass
class StoredState:
    """The weights of a checkpoint, by the names in its files.

    Attributes:
        tensors: weights in memory (.bin), or where they lie in their files (.safetensors).
        lazy: whether the weights stay in their files.
        where: the checkpoint, for messages.
        files: the files' names.
    """

    tensors: Mapping[str, Tensor | StoredTensor]
    lazy: bool
    where: Path
    files: list[str] = field(default_factory=list)

    def read(self) -> dict[str, Tensor]:
        """Return all weights in memory."""
        return {
            name: entry if isinstance(entry, Tensor) else entry.read()
            for name, entry in self.tensors.items()
        }

    def named(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return the entries under other names: new name -> name in the file."""
        return {new: self.tensors[old] for new, old in names.items()}


def read_files(path: Path, files: Sequence[Path], trust_pickle: bool = False) -> StoredState:
    """Read the weight files of a folder: the headers of .safetensors, the tensors of .bin.

    Raises:
        SourceError: a file is unsafe or broken, or holds quantised weights.
    """
    names = [file.name for file in files]
    entries: dict[str, Any] = {}
    lazy = files[0].suffix == ".safetensors"
    for file in files:
        if lazy:
            entries |= safetensors_file.spans(file)[0]
        else:
            entries |= _tensors_of(file, trust_pickle)
    return StoredState(entries, lazy, path, names)


def _tensors_of(file: Path, trust_pickle: bool) -> dict[str, Tensor]:
    content, _ = torch_file.read(file, trust_pickle=trust_pickle)
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise SourceError(
            f"'{file}' is no state dict of transformers",
            got=f"one {type(content).__name__} without tensors at its top",
            hint=f"{file} with --model FACTORY",
        )
    return tensors


def load(
    path: Path, *, trust_pickle: bool = False, overrides: Mapping[str, Any] | None = None
) -> Loaded:
    """Load a folder with config.json and weights (.safetensors or .bin, sharded or not).

    Weights that the model has no place for are left out, with a note. Every weight of the model
    must be there. Parameters in .safetensors stay in their files. Where transformers stacks or
    splits weights (experts), it loads them all.

    Args:
        path: the folder.
        trust_pickle: whether code that the folder brings may run.
        overrides: fields of the config to change.

    Raises:
        SourceError: transformers is missing, the folder has no weights, a file is unsafe or broken,
            weights are missing or quantised, or have other shapes.
    """
    _transformers(path)
    files = weight_files.weight_files(path)
    if not files:
        raise refused_folders.refuse_without_weights(path)
    stored = read_files(path, files, trust_pickle)
    loaded = load_stored(path, stored, trust_pickle=trust_pickle, overrides=overrides)
    if (path / "adapter_config.json").is_file():
        loaded.notes.append("the folder holds an adapter too, which was not applied")
    return loaded


def load_stored(
    config_path: Path,
    stored: StoredState,
    *,
    trust_pickle: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Build the model of a config and fill it with weights, wherever the two lie.

    Args:
        config_path: a folder with config.json, or a JSON file.
        stored: the weights.
        trust_pickle: whether code that the config names may run.
        overrides: fields of the config to change.

    Raises:
        SourceError: as `load`.
    """
    transformers = _transformers(config_path)
    config = read_config(transformers, config_path, trust_pickle, overrides, list(stored.tensors))
    notes = list(config.notes)

    # 1. Quantised weights mean nothing by themselves.
    quantised = weight_files.quantised_names(stored.tensors)
    if quantised:
        raise weight_files.refuse_quantised(stored.where, config.quantised, quantised)
    if config.quantised:
        notes.append(
            f"config.json has a {config.quantised}, but the weights are stored in floating point"
        )

    # 2. An empty model of the class that the config names, or that the weights fit.
    kind, model = _empty_of(transformers, config.value, stored, trust_pickle, config_path)
    facts: dict[str, Any] = {
        "format": "huggingface",
        "files": stored.files,
        "architecture": type(model).__name__,
    }
    if not is_of_transformers(model):
        weights, more = _place(model, stored, {name: name for name in stored.tensors})
        return Loaded(model, facts, weights, notes + more)

    # 3. Its weights, by the names of transformers.
    naming, more = _names_for(model, stored)
    notes += more
    _check_names(transformers, config.value, model, naming, stored, config.notes)
    if not naming.converted and not naming.initialised:
        with contextlib.suppress(TieConflict):
            weights, more = _place(model, stored, naming.stored)
            return Loaded(model, facts, weights, notes + more)

    # 4. Those that transformers converts, ties or sets in its own way.
    source = config_path if config_path.is_dir() else None
    model = _whole(kind, config.value, stored, naming, trust_pickle, source)
    if naming.converted and stored.lazy:
        notes.append("read whole: the names in the files are not those of the model's parameters")
    if naming.initialised:
        notes.append(f"not in the files, set by transformers: {_listed(naming.initialised)}")
    return Loaded(model, facts, None, notes)


def fill(model: nn.Module, stored: StoredState, hint: str | None = None) -> Loaded:
    """Fill a model that a factory built, by the names of transformers where it is one of theirs.

    Args:
        model: changed in place, unless transformers has to convert the weights: then another one is
            returned.
        stored: the weights.
        hint: what to try where they do not fit.

    Raises:
        SourceError: the weights do not fit, or are quantised.
    """
    own = model.state_dict(keep_vars=True)
    quantised = [name for name in weight_files.quantised_names(stored.tensors) if name not in own]
    if quantised:
        raise weight_files.refuse_quantised(stored.where, "", quantised)
    names = {name: name for name in stored.tensors}
    notes: list[str] = []
    if is_of_transformers(model):
        naming, notes = _names_for(model, stored)
        if naming.converted and not naming.missing:
            config = getattr(model, "config", None)
            return Loaded(_whole(type(model), config, stored, naming, False, None), {}, None, notes)
        if not naming.missing and not naming.layers_left_over:
            names = naming.stored
        else:
            notes = []
    weights, more = _place(model, stored, names, hint)
    return Loaded(model, {}, weights, notes + more)


def _place(
    model: nn.Module, stored: StoredState, names: Mapping[str, str], hint: str | None = None
) -> tuple[StoredWeights | None, list[str]]:
    entries = stored.named(names)
    hints = {} if hint is None else {"hint": hint}
    if stored.lazy:
        return attach(model, StoredWeights(entries), f"'{stored.where}'", **hints)
    return None, fit(model, entries, f"'{stored.where}'", **hints)


def _names_for(model: nn.Module, stored: StoredState) -> tuple[Naming, list[str]]:
    """Return the translation of the names, and a note on what is left over or taken off."""
    naming = match_names(model, stored.tensors)
    notes = []

    # One first name that a wrapper put before all others (Lightning's `model.`).
    heads = {name.partition(".")[0] for name in stored.tensors}
    if not naming.used and len(heads) == 1:
        head = f"{heads.pop()}."
        shorter = {name.removeprefix(head): entry for name, entry in stored.tensors.items()}
        naming_of_shorter = match_names(model, shorter)
        if naming_of_shorter.used:
            stored.tensors, naming = shorter, naming_of_shorter
            notes.append(f"the prefix '{head}' was taken off every name")

    if naming.unexpected:
        kind = type(model).__name__
        notes.append(f"left out, as {kind} has no place for them: {_listed(naming.unexpected)}")
    return naming, notes


def _empty_of(
    transformers: Any, config: Any, stored: StoredState, trust: bool, path: Path
) -> tuple[Any, nn.Module]:
    """Return a class and an empty model of it.

    That is the class that the config names, else the one that the weights fit.
    """
    kind = named_class(transformers, config)
    if kind is not None:
        return kind, _empty(kind, config, trust, path)
    best = _best_class(transformers, config, stored)
    if best is not None:
        return best, _empty(best, config, trust, path)
    kind = default_class(transformers, config)
    return kind, _empty(kind, config, trust, path)


def _best_class(transformers: Any, config: Any, stored: StoredState) -> Any:
    """Return the class that the weights fill, and that leaves the fewest of them over, or None."""
    fitting = []
    for candidate in candidate_classes(transformers, config):
        naming = _fitting(candidate, config, stored)
        if naming is not None:
            fitting.append((len(naming.unexpected), candidate))
    return min(fitting, key=lambda pair: pair[0])[1] if fitting else None


def _fitting(kind: Any, config: Any, stored: StoredState) -> Naming | None:
    """Return how the weights fill an empty model of the class, or None if they do not."""
    try:
        model = _empty(kind, config, False, stored.where)
    except SourceError:
        return None
    if not is_of_transformers(model):
        return None
    naming = match_names(model, stored.tensors)
    misfit = naming.missing or naming.layers_left_over or _other_shapes(model, naming, stored)
    return None if misfit else naming


def _other_shapes(model: nn.Module, naming: Naming, stored: StoredState) -> list[str]:
    expected = model.state_dict(keep_vars=True)
    pairs = [(name, stored.tensors[old], expected[name]) for name, old in naming.stored.items()]
    return [
        f"{name} {_size(entry.shape)}, the model has {_size(tensor.shape)}"
        for name, entry, tensor in pairs
        if tuple(entry.shape) != tuple(tensor.shape)
    ]


def _check_names(
    transformers: Any,
    config: Any,
    model: nn.Module,
    naming: Naming,
    stored: StoredState,
    inferred: Sequence[str],
) -> None:
    """Raise if weights are missing, have other shapes, or if entire layers are left over."""
    shapes = _other_shapes(model, naming, stored)
    left_over = naming.layers_left_over
    if naming.missing or shapes or left_over:
        parts = {
            "missing": naming.missing,
            "unexpected": left_over or naming.unexpected,
            "of another shape": shapes,
        }
        hint = _way_out(transformers, config, type(model), naming, stored)
        raise _misfit(stored.where, model, parts, hint, inferred)


def _misfit(
    where: Path,
    model: nn.Module,
    parts: Mapping[str, Sequence[str]],
    hint: str,
    inferred: Sequence[str] = (),
) -> SourceError:
    lines = list(inferred)
    lines += [f"{len(names)} {what}: {_first(names)}" for what, names in parts.items() if names]
    return SourceError(
        f"'{where}' does not fit {type(model).__name__}", got="\n".join(lines), hint=hint
    )


def _way_out(transformers: Any, config: Any, kind: Any, naming: Naming, stored: StoredState) -> str:
    """Return a hint that was tried.

    That is another class, or another number of layers, else the hint of the general case.
    """
    # 1. Another class of the same kind of model, which uses more of the weights.
    best = _best_class(transformers, config, stored)
    if best is not None and best is not kind:
        change = json.dumps({"architectures": [best.__name__]})
        return f"they fit {best.__name__}: --model-args '{change}'"

    # 2. Another number of layers.
    field_name = (getattr(config, "attribute_map", None) or {}).get(
        "num_hidden_layers", "num_hidden_layers"
    )
    layers = _layers_in(stored)
    before = getattr(config, field_name, None)
    if isinstance(before, int) and 0 < layers <= len(stored.tensors) and layers != before:
        setattr(config, field_name, layers)
        fits = _fitting(kind, config, stored) is not None
        setattr(config, field_name, before)
        if fits:
            return f"they have {layers} layers: --model-args '{json.dumps({field_name: layers})}'"

    # 3. A model without the pooler that the files lack.
    only_pooler = bool(naming.missing) and all("pooler" in name for name in naming.missing)
    if only_pooler and "add_pooling_layer" in inspect.signature(kind).parameters:
        return (
            f"--model FACTORY, with a factory that returns {kind.__name__}(config, "
            "add_pooling_layer=False)"
        )
    return _HINT


def _layers_in(stored: StoredState) -> int:
    """Return the number of layers: the highest number in the names, plus one."""
    parts = {part for name in stored.tensors for part in name.split(".")}
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) < 9]
    return max(numbers, default=-1) + 1


def _empty(kind: Any, config: Any, trust: bool, path: Path) -> nn.Module:
    """Return the model with parameters on the meta device, its buffers computed."""
    built = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    options = {"trust_remote_code": trust} if hasattr(kind, "from_config") else {}
    try:
        with _quiet(), seeded(0), empty_parameters():
            return built(config, attn_implementation="eager", **options).eval()
    except Exception as error:
        raise SourceError(
            f"transformers cannot build the model of '{path}' empty", got=own_frames(error)
        ) from error


def _whole(
    kind: Any,
    config: Any,
    stored: StoredState,
    naming: Naming,
    trust_pickle: bool,
    source: Path | None,
) -> nn.Module:
    """Load all weights through transformers, in the precision of the files."""
    options: dict[str, Any] = {"dtype": _precision(stored, naming), "config": config}
    # a class itself: weights that were read already are handed over
    if hasattr(kind, "_from_config"):
        source, options["state_dict"] = None, stored.read()
    try:
        with _quiet(), seeded(0):
            model, info = kind.from_pretrained(
                source,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                attn_implementation="eager",
                trust_remote_code=trust_pickle,
                **options,
            )
    except Exception as error:
        raise SourceError(
            f"transformers cannot load '{stored.where}'", got=own_frames(error)
        ) from error
    missing = [name for name in _keys(info, "missing_keys") if name not in naming.initialised]
    parts = {"missing": missing, "of another shape": _keys(info, "mismatched_keys")}
    if any(parts.values()):
        raise _misfit(stored.where, model, parts, _HINT)
    return model


def _keys(info: Mapping[str, Any], key: str) -> list[str]:
    return sorted(
        str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info.get(key, ())
    )


def _precision(stored: StoredState, naming: Naming) -> torch.dtype:
    """Return the widest floating-point type of the matrices that the model uses."""
    entries = [stored.tensors[name] for name in naming.used]
    floating = [entry for entry in entries if entry.dtype.is_floating_point]
    matrices = [entry.dtype for entry in floating if len(entry.shape) > 1] or [
        entry.dtype for entry in floating
    ]
    widest = matrices[0] if matrices else torch.float32
    for dtype in matrices:
        widest = torch.promote_types(widest, dtype)
    return widest


def from_config(spec: str, overrides: dict[str, Any], seed: int) -> nn.Module:
    """Build a randomly initialised model from a folder with config.json, or from a JSON file.

    Args:
        spec: the folder or the file.
        overrides: fields of the config to change.
        seed: of the initialisation.
    """
    path = config_path(spec)
    transformers = _transformers(path)
    config = read_config(transformers, path, False, overrides).value
    kind = named_class(transformers, config) or default_class(transformers, config)
    try:
        with seeded(seed), _quiet():
            built = kind.from_config if hasattr(kind, "from_config") else kind._from_config
            return built(config, attn_implementation="eager")
    except Exception as error:
        raise SourceError(
            f"transformers cannot build a model of '{path}'", got=own_frames(error)
        ) from error


def config_path(spec: str) -> Path:
    """Return the folder or file that `hf:CONFIG` names.

    Raises:
        SourceError: it is not there, or is a folder without config.json.
    """
    path = Path(spec.removeprefix("hf:"))
    if path.is_dir() and not is_folder(path):
        raise SourceError(f"'{path}' has no config.json", got=refused_folders.listing(path))
    if not path.exists():
        raise SourceError(
            f"no such config: '{path}'", hint="hf:FOLDER or hf:config.json, on this machine"
        )
    return path


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


def _listed(names: Sequence[str]) -> str:
    """Return the first names, with how many there are."""
    return f"{len(names)} {'weight' if len(names) == 1 else 'weights'} ({_first(names)})"


def _first(names: Sequence[str]) -> str:
    shown = printable(", ".join(names[:_SHOWN]))
    return f"{shown} ..." if len(names) > _SHOWN else shown


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log and the progress bars of transformers off the terminal, and restore both."""
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
