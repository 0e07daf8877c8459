"""Hugging Face folders and configs, through transformers (extra `[hf]`)."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.devices.host_memory import free_host_memory
from jacdiag.errors import SourceError, printable
from jacdiag.sources.foreign_code import own_frames, seeded
from jacdiag.sources.formats import safetensors_file, torch_file
from jacdiag.sources.formats.hf_config import (
    candidate_classes,
    default_class,
    is_kind,
    named_class,
    read_config,
)
from jacdiag.sources.formats.hf_names import Naming, is_of_transformers, match_names
from jacdiag.sources.formats.refused_folders import listing, refuse_without_weights
from jacdiag.sources.formats.weight_files import quantised_names, refuse_quantised, weight_files
from jacdiag.sources.lazy_tensors import StoredTensor, StoredWeights
from jacdiag.sources.load_weights import TieConflict, attach, fit
from jacdiag.sources.meta_build import empty_parameters

_SHOWN = 5
_MOST_LAYERS = 1000  # that may share their weights
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
        return {name: _in_memory(entry) for name, entry in self.tensors.items()}

    def named(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Return the entries under other names.

        Args:
            names: new name -> name in the file.
        """
        return {new: self.tensors[old] for new, old in names.items()}


def _in_memory(entry: Tensor | StoredTensor) -> Tensor:
    """Return a tensor, from its file if it is not in memory."""
    if isinstance(entry, Tensor):
        return entry
    # those of .safetensors are still in their file
    return entry.read()


def read_files(path: Path, files: Sequence[Path], trust_pickle: bool = False) -> StoredState:
    """Read the weight files of a folder: the headers of .safetensors, the tensors of .bin.

    Args:
        path: the folder.
        files: all of one format.
        trust_pickle: whether a pickle may run code.

    Returns:
        The weights of all files together.

    Raises:
        SourceError: a file is unsafe or broken, or holds quantised weights.
    """
    names = [file.name for file in files]
    entries: dict[str, Any] = {}
    lazy = files[0].suffix == ".safetensors"

    # Shards have different names in them.
    for file in files:
        if lazy:
            spans, _ = safetensors_file.spans(file)
            entries |= spans
        else:
            entries |= _tensors_of(file, trust_pickle)
    return StoredState(entries, lazy, path, names)


def _tensors_of(file: Path, trust_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors at the top of a .bin file, by name.

    Raises:
        SourceError: there are none.
    """
    content, _ = torch_file.read(file, trust_pickle=trust_pickle)
    entries = content if isinstance(content, Mapping) else {}
    tensors = {}
    for name, value in entries.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
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

    Returns:
        The model, and what the report says about it.

    Raises:
        SourceError: transformers is missing, the folder has no weights, a file is unsafe or broken,
            weights are missing or quantised, or have other shapes.
    """
    _transformers(path)
    files = weight_files(path)
    if not files:
        raise refuse_without_weights(path)
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

    Returns:
        The model, and what the report says about it.

    Raises:
        SourceError: as `load`.
    """
    transformers = _transformers(config_path)
    config = read_config(transformers, config_path, trust_pickle, overrides, list(stored.tensors))

    # 1. Quantised weights mean nothing by themselves.
    quantised = quantised_names(stored.tensors)
    if quantised:
        raise refuse_quantised(stored.where, config.quantised, quantised)
    notes = list(config.notes)
    if config.quantised:
        notes.append(
            f"config.json has a {config.quantised}, but the weights are stored in floating point"
        )

    _check_depth(config.value, stored)

    # 2. An empty model of the class that the config names, or that the weights fit.
    kind = _class_for(transformers, config.value, stored)
    model = _empty(kind, config.value, trust_pickle, config_path)
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
    needs_transformers = naming.converted or bool(naming.initialised)
    if not needs_transformers:
        # A config that ties what differs in the files is left to transformers, too.
        with contextlib.suppress(TieConflict):
            weights, more = _place(model, stored, naming.stored)
            return Loaded(model, facts, weights, notes + more)

    # 4. Those that transformers converts, ties or sets in its own way.
    source = config_path if config_path.is_dir() else None
    model = _load_all(kind, config.value, stored, naming, trust_pickle, source)
    if naming.converted and stored.lazy:
        notes.append("read whole: the names in the files are not those of the model's parameters")
    if naming.initialised:
        notes.append(f"not in the files, set by transformers: {_listed(naming.initialised)}")
    return Loaded(model, facts, None, notes)


def _check_depth(config: Any, stored: StoredState) -> None:
    """Raise if a config has so many layers that to build them would take minutes or more.

    A layer has weights of its own, or shares those of another one, as in ALBERT.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= _MOST_LAYERS + len(stored.tensors):
        return
    raise SourceError(
        f"the config of '{stored.where}' is not that of its weights",
        got=f"{layers:,} layers, and {len(stored.tensors):,} tensors in the files",
        hint=_HINT,
    )


def fill(model: nn.Module, stored: StoredState, hint: str | None = None) -> Loaded:
    """Fill a model that a factory built, by the names of transformers where it is one of theirs.

    Args:
        model: changed in place, unless transformers has to convert the weights: then another one is
            returned.
        stored: the weights.
        hint: what to try where they do not fit.

    Returns:
        The filled model, without facts about it.

    Raises:
        SourceError: the weights do not fit, or are quantised.
    """
    # 1. A model may have quantised weights of its own.
    own = model.state_dict(keep_vars=True)
    quantised = [name for name in quantised_names(stored.tensors) if name not in own]
    if quantised:
        raise refuse_quantised(stored.where, "", quantised)

    # 2. A model of transformers, if the names of the files are those that it knows.
    names = {name: name for name in stored.tensors}
    notes: list[str] = []
    if is_of_transformers(model):
        naming, notes_on_names = _names_for(model, stored)
        if naming.converted and not naming.missing:
            config = getattr(model, "config", None)
            converted = _load_all(type(model), config, stored, naming, False, None)
            return Loaded(converted, {}, None, notes_on_names)
        if not naming.missing and not naming.layers_left_over:
            names, notes = naming.stored, notes_on_names

    # 3. Any other model, by the names as they are.
    weights, more = _place(model, stored, names, hint)
    return Loaded(model, {}, weights, notes + more)


def _place(
    model: nn.Module, stored: StoredState, names: Mapping[str, str], hint: str | None = None
) -> tuple[StoredWeights | None, list[str]]:
    """Put weights into a model.

    Args:
        model: changed in place.
        stored: the weights.
        names: name in the model -> name in the file.
        hint: what to try where they do not fit.

    Returns:
        The weights that stay in their files, if they do, and notes.
    """
    entries = stored.named(names)
    where = f"'{stored.where}'"
    hints = {} if hint is None else {"hint": hint}
    if stored.lazy:
        return attach(model, StoredWeights(entries), where, **hints)
    return None, fit(model, entries, where, **hints)


def _names_for(model: nn.Module, stored: StoredState) -> tuple[Naming, list[str]]:
    """Return the translation of the names, and a note on what is left over or taken off."""
    naming = match_names(model, stored.tensors)
    notes = []

    # 1. One first name that a wrapper put before all others (Lightning's `model.`).
    heads = {name.partition(".")[0] for name in stored.tensors}
    if not naming.used and len(heads) == 1:
        head = f"{heads.pop()}."
        shorter = {name.removeprefix(head): entry for name, entry in stored.tensors.items()}
        naming_of_shorter = match_names(model, shorter)
        if naming_of_shorter.used:
            stored.tensors, naming = shorter, naming_of_shorter
            notes.append(f"the prefix '{head}' was taken off every name")

    # 2. Names that the model has no place for.
    if naming.unexpected:
        kind = type(model).__name__
        notes.append(f"left out, as {kind} has no place for them: {_listed(naming.unexpected)}")
    return naming, notes


def _class_for(transformers: Any, config: Any, stored: StoredState) -> Any:
    """Return the class that a config names, else the one that the weights fit, else the default."""
    named = named_class(transformers, config)
    if named is not None:
        return named

    best = _best_class(transformers, config, stored)
    if best is not None:
        return best
    # The message then says what is missing.
    return default_class(transformers, config)


def _best_class(transformers: Any, config: Any, stored: StoredState) -> Any:
    """Return the class that the weights fill, and that leaves the fewest of them over, or None."""
    best, fewest = None, -1
    for candidate in candidate_classes(transformers, config):
        naming = _fitting(candidate, config, stored)
        if naming is None:
            continue
        left_over = len(naming.unexpected)
        # The first one of several that are as good.
        if best is None or left_over < fewest:
            best, fewest = candidate, left_over
    return best


def _fitting(kind: Any, config: Any, stored: StoredState) -> Naming | None:
    """Return how the weights fill an empty model of the class, or None if they do not."""
    # 1. An empty model.
    try:
        model = _empty(kind, config, False, stored.where)
    except SourceError:
        return None
    if not is_of_transformers(model):
        return None

    # 2. The weights, by name and by shape.
    naming = match_names(model, stored.tensors)
    if naming.missing or naming.layers_left_over:
        return None
    if _other_shapes(model, naming, stored):
        return None
    return naming


def _other_shapes(model: nn.Module, naming: Naming, stored: StoredState) -> list[str]:
    """Return the names whose weights have another shape than in the model, with both shapes."""
    expected = model.state_dict(keep_vars=True)
    differing = []
    for name, old in naming.stored.items():
        shape = tuple(stored.tensors[old].shape)
        shape_in_model = tuple(expected[name].shape)
        if shape != shape_in_model:
            differing.append(f"{name} {_size(shape)}, the model has {_size(shape_in_model)}")
    return differing


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
    if not (naming.missing or shapes or left_over):
        return
    problems = {
        "missing": naming.missing,
        "unexpected": left_over or naming.unexpected,
        "of another shape": shapes,
    }
    hint = _way_out(transformers, config, type(model), naming, stored)
    raise _misfit(stored.where, model, problems, hint, inferred)


def _misfit(
    where: Path,
    model: nn.Module,
    problems: Mapping[str, Sequence[str]],
    hint: str,
    inferred: Sequence[str] = (),
) -> SourceError:
    """Return the error for weights that do not fit a model.

    Args:
        where: the checkpoint.
        model: that they do not fit.
        problems: what is the matter -> the names that are concerned.
        hint: what to try.
        inferred: notes on the config.
    """
    # What was inferred comes first: it may be the reason.
    lines = list(inferred)
    for what, names in problems.items():
        if names:
            lines.append(f"{len(names)} {what}: {_first(names)}")

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
    layers = _fitting_layers(config, kind, stored)
    if layers is not None:
        change = json.dumps({_layers_field(config): layers})
        return f"they have {layers} layers: --model-args '{change}'"

    # 3. A model without the pooler that the files lack.
    only_pooler = bool(naming.missing) and all("pooler" in name for name in naming.missing)
    if only_pooler and "add_pooling_layer" in inspect.signature(kind).parameters:
        return (
            f"--model FACTORY, with a factory that returns {kind.__name__}(config, "
            "add_pooling_layer=False)"
        )
    return _HINT


def _layers_field(config: Any) -> str:
    """Return the name of the field with the number of layers, which kinds of models call theirs."""
    names = getattr(config, "attribute_map", None) or {}
    return names.get("num_hidden_layers", "num_hidden_layers")


def _fitting_layers(config: Any, kind: Any, stored: StoredState) -> int | None:
    """Return the number of layers in the files, if a model with as many fits; else None.

    Args:
        config: of the model, with another number.
        kind: the class of the model.
        stored: the weights.
    """
    # 1. A number to try. One that is larger than the number of tensors is none of layers.
    field_name = _layers_field(config)
    before = getattr(config, field_name, None)
    layers = _layers_in(stored)
    if not isinstance(before, int) or layers == before:
        return None
    if not 0 < layers <= len(stored.tensors):
        return None

    # 2. Build such a model.
    setattr(config, field_name, layers)
    naming = _fitting(kind, config, stored)
    setattr(config, field_name, before)
    return None if naming is None else layers


def _layers_in(stored: StoredState) -> int:
    """Return the number of layers: the highest number in the names, plus one."""
    highest = -1
    for name in stored.tensors:
        for part in filter(str.isdecimal, name.split(".")):
            # a longer one is no number of a layer
            if len(part) < 9:
                highest = max(highest, int(part))

    return highest + 1


def _empty(kind: Any, config: Any, trust: bool, path: Path) -> nn.Module:
    """Return the model with parameters on the meta device, its buffers computed."""
    # Only automatic classes may find code in a folder.
    options = {"trust_remote_code": trust} if hasattr(kind, "from_config") else {}
    try:
        with _quiet(), seeded(0), empty_parameters():
            return _builder_of(kind)(config, attn_implementation="eager", **options).eval()
    except Exception as error:
        raise SourceError(
            f"transformers cannot build the model of '{path}' empty", got=own_frames(error)
        ) from error


def _builder_of(kind: Any) -> Any:
    """Return what builds a model from a config: of an automatic class, or of a model class."""
    if hasattr(kind, "from_config"):
        return kind.from_config
    # only an automatic class has the public method
    return kind._from_config


def _load_all(
    kind: Any,
    config: Any,
    stored: StoredState,
    naming: Naming,
    trust_pickle: bool,
    source: Path | None,
) -> nn.Module:
    """Load all weights through transformers, in the precision of the files.

    Args:
        kind: the class of the model.
        config: of the model.
        stored: the weights.
        naming: their names in the model.
        trust_pickle: whether code that the folder brings may run.
        source: the folder, for a class that reads the files itself.
    """
    options: dict[str, Any] = {"dtype": _precision(stored, naming), "config": config}
    # a class itself: weights that were read already are handed over
    if hasattr(kind, "_from_config"):
        source, options["state_dict"] = None, stored.read()

    # 1. Load.
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

    # 2. What transformers only warns about.
    missing = [name for name in _keys(info, "missing_keys") if name not in naming.initialised]
    mismatched = _keys(info, "mismatched_keys")
    if missing or mismatched:
        problems = {"missing": missing, "of another shape": mismatched}
        raise _misfit(stored.where, model, problems, _HINT)
    return model


def _keys(info: Mapping[str, Any], key: str) -> list[str]:
    """Return the names in a part of the loading info of transformers, in order."""
    names = []
    for entry in info.get(key, ()):
        # A mismatched key comes with its shapes.
        name = entry[0] if isinstance(entry, tuple) else entry
        names.append(str(name))
    return sorted(names)


def _precision(stored: StoredState, naming: Naming) -> torch.dtype:
    """Return the widest floating-point type of the matrices that the model uses.

    Vectors count only if there are no matrices: norms are often stored in a wider type.
    """
    vectors: list[torch.dtype] = []
    matrices: list[torch.dtype] = []
    for name in naming.used:
        entry = stored.tensors[name]
        if entry.dtype.is_floating_point:
            group = matrices if len(entry.shape) > 1 else vectors
            group.append(entry.dtype)
    return _widest(matrices or vectors)


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the type that holds the numbers of all types; float32 if there are none."""
    if not dtypes:
        return torch.float32
    # float16 and bfloat16 together need float32
    return functools.reduce(torch.promote_types, dtypes)


def from_config(spec: str, overrides: dict[str, Any], seed: int) -> nn.Module:
    """Build a randomly initialised model of a config.

    Args:
        spec: a folder with config.json, a JSON file, a model of the local Hub cache, or a kind of
            model that transformers knows.
        overrides: fields of the config to change.
        seed: of the initialisation.

    Returns:
        The model.

    Raises:
        SourceError: there is no such config, transformers cannot build its model, or the model does
            not fit into memory.
    """
    path = config_path(spec)
    transformers = _transformers(path)
    config = read_config(transformers, path, False, overrides).value
    kind = named_class(transformers, config) or default_class(transformers, config)
    _check_fits(kind, config, path)
    try:
        with seeded(seed), _quiet():
            return _builder_of(kind)(config, attn_implementation="eager")
    except Exception as error:
        raise SourceError(
            f"transformers cannot build a model of '{path}'", got=own_frames(error)
        ) from error


def config_path(spec: str) -> Path:
    """Return the folder or file that `hf:CONFIG` names, or the kind of model that it names.

    The Hub is not asked. A config that was downloaded before is found in its cache.

    Args:
        spec: with or without `hf:`.

    Returns:
        A path that exists, or one that is the name of a kind of model of transformers.

    Raises:
        SourceError: there is no such config, or it is a folder without config.json.
    """
    name = spec.removeprefix("hf:")
    path = Path(name)
    if not path.exists():
        return _known_config(name)

    # A folder with weights alone.
    if path.is_dir() and not is_folder(path):
        raise SourceError(f"'{path}' has no config.json", got=listing(path))
    return path


def describe_config(spec: str) -> list[str]:
    """Return a note on a config that is no file of the user's, else nothing.

    Args:
        spec: as for `config_path`.
    """
    name = spec.removeprefix("hf:")
    if Path(name).exists():
        return []

    # The same order as in `_known_config`.
    path = config_path(spec)
    if path.exists():
        return [f"hf:{name}: the config in the local Hub cache, with a fresh init"]
    version = _transformers(path).__version__
    return [f"hf:{name}: the default config of this kind of model in transformers {version}"]


def _known_config(name: str) -> Path:
    """Return the config of a name that is no file: one in the Hub's cache, or a kind of model.

    Raises:
        SourceError: it is neither.
    """
    hint = "hf:FOLDER or hf:config.json on this machine, or a kind of model, as in hf:gpt2"
    error = SourceError(f"no such config: '{name}'", hint=hint)
    if not name:
        raise error
    try:
        transformers = _transformers(Path(name))
    except SourceError as missing:
        raise error from missing

    # 1. A model that was downloaded before.
    with contextlib.suppress(ValueError, ImportError):  # no name that the Hub could have
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)

    # 2. A kind of model.
    if is_kind(transformers, name):
        return Path(name)
    near = get_close_matches(name, list(transformers.CONFIG_MAPPING.keys()), n=3)
    if near:
        hint = f"did you mean {' or '.join('hf:' + kind for kind in near)}? {hint}"
        raise SourceError(f"no such config: '{name}'", hint=hint)
    raise error


def _check_fits(kind: Any, config: Any, path: Path) -> None:
    """Raise SourceError if a fresh model of a config is larger than the free memory."""
    free = free_host_memory()
    if free is None:
        return

    # A model without memory says how large it is. Where it cannot be built, the real one says why.
    try:
        empty = _empty(kind, config, False, path)
    except SourceError:
        return
    parameters = list(empty.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if size <= free:
        return
    count = sum(parameter.numel() for parameter in parameters)
    raise SourceError(
        f"the model of '{path}' does not fit into memory",
        got=f"{count / 1e9:.3g}B parameters, {size / 1e9:.3g} GB; {free / 1e9:.3g} GB are free",
        hint="""fewer layers, as in --model-args '{"num_hidden_layers": 2}' """
        "(the name of the field differs between kinds)",
    )


def _transformers(path: Path) -> Any:
    """Return the module of transformers.

    Raises:
        SourceError: it is not installed.
    """
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
    weights = "weight" if len(names) == 1 else "weights"
    return f"{len(names)} {weights} ({_first(names)})"


def _first(names: Sequence[str]) -> str:
    """Return the first names."""
    shown = printable(", ".join(names[:_SHOWN]))
    if len(names) > _SHOWN:
        shown += " ..."
    return shown


def _size(shape: Sequence[int]) -> str:
    """Return a shape in words, such as "4x8"."""
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
