"""What a SOURCE string turned out to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError, UsageError, clipped
from jacdiag.sources import factory, gpt
from jacdiag.sources.checkpoint import Checkpoint, Contents, read_contents, trainer_step
from jacdiag.sources.formats import dcp, huggingface, refused_folders
from jacdiag.sources.formats.weight_files import weight_files
from jacdiag.sources.input_facts import longest_sequence, vocabulary
from jacdiag.sources.lazy_tensors import StoredWeights
from jacdiag.sources.load_weights import fit
from jacdiag.sources.offloaded_weights import placeholders_of
from jacdiag.sources.tensor_sets import split_flat


@dataclass
class Source:
    """A model, or the weights of one that could not be built.

    Attributes:
        model: None in the weights-only tier; `state` then holds the weights, `why_weights` says
            why.
        info: what the report says about the source: path or factory, format, step, unread classes.
        name: short name for a header.
        fresh: randomly initialised just now, for certain: `hf:CONFIG`, and every model that a gate
            builds.
        step: training steps so far, where the source says so.
        stepped: the file holds the state of an optimizer that has taken a step.
        rebuild: builds the model once more, with another seed; None where it holds one set of
            weights.
        owned: loaded here, so that it may be moved to a device; a module that was handed in may
            not.
        folder: a Hugging Face folder, which may have a tokenizer.
        weights: the values of the model's parameters, where these are on the meta device and stay
            in their files.
        notes: what a reader of the report should know about how it was read.
    """

    model: nn.Module | None
    info: dict[str, Any]
    name: str
    state: dict[str, Tensor] = field(default_factory=dict)
    fresh: bool = False
    step: int | None = None
    stepped: bool = False
    rebuild: Callable[[int], nn.Module] | None = None
    owned: bool = True
    why_weights: str = ""
    folder: Path | None = None
    weights: StoredWeights | None = None
    notes: list[str] = field(default_factory=list)
    _device: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        if self._device is not None:
            return self._device

        # Weights that stay in their files are read into main memory.
        if self.model is None or self.weights is not None:
            return torch.device("cpu")

        # A model in memory is where its first parameter is used.
        parameter = next(self.model.parameters(), None)
        if parameter is None:
            return torch.device("cpu")
        offloaded = placeholders_of(self.model).get(id(parameter))
        return parameter.device if offloaded is None else offloaded.device

    def to(self, device: torch.device) -> None:
        """Move the model; of one whose parameters stay in their files, move the buffers.

        Args:
            device: where it goes.
        """
        assert self.model is not None
        if self.weights is None:
            self.model.to(device)
            return

        # The parameters take no memory.
        self._device = device
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(device)

    def value_of(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's values, from its file if need be; None if it has a shape only.

        Args:
            parameter: of the model.
        """
        # 1. In memory, or where accelerate keeps it.
        if not parameter.is_meta:
            return parameter.detach()
        if self.model is None:
            return None
        offloaded = placeholders_of(self.model).get(id(parameter))
        if offloaded is not None:
            return offloaded.read()
        if self.weights is None:
            return None

        # 2. The file knows it by its name.
        names = {id(own): name for name, own in self.model.named_parameters()}
        return self.weights[names[id(parameter)]]

    @property
    def vocab_size(self) -> int | None:
        """The number of token ids that the model takes; None if it takes none."""
        if self.model is not None:
            return vocabulary(self.model)
        # weights alone take no input
        return None

    @property
    def max_seq(self) -> int | None:
        """The longest sequence that the model says it takes."""
        if self.model is not None:
            return longest_sequence(self.model)
        # weights alone take no input
        return None

    @classmethod
    def of_module(cls, module: nn.Module) -> Source:
        """Return the source of a module that is already in memory."""
        kind = type(module)
        info = {"format": "module", "factory": f"{kind.__module__}.{kind.__qualname__}"}
        return cls(module, info, kind.__name__, owned=False)


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """How a source is opened.

    Attributes:
        model: a factory of the module that the weights belong to, or "hf:CONFIG".
        model_args: keyword arguments of the factory, or fields of a config.
        trust_pickle: whether a pickle may run code.
        seed: of random initializations.
        key: the place of the weights in a file with several sets.
    """

    model: factory.Factory | None
    model_args: dict[str, Any] | None
    trust_pickle: bool
    seed: int
    key: str | None

    def check_no_model(self, source: str) -> None:
        """Raise if a model is given for a source that builds itself."""
        if self.model is not None:
            raise UsageError(
                "--model belongs to a checkpoint file or a folder",
                got=f"--model {self.model} with {source}",
            )

    def check_no_key(self, source: str) -> None:
        """Raise if a key is given for a source that is no file."""
        if self.key is not None:
            raise UsageError(
                "--key belongs to a checkpoint file", got=f"--key {self.key} with {source}"
            )

    def described(self) -> dict[str, Any]:
        """Return what the report says about the factory."""
        info: dict[str, Any] = {"factory": factory.name_of(self.model)}
        if self.model_args:
            info["model_args"] = self.model_args
        return info


def load(
    source: str | bytes | os.PathLike[str],
    *,
    model: factory.Factory | None = None,
    model_args: dict[str, Any] | None = None,
    trust_pickle: bool = False,
    seed: int = 0,
    key: str | None = None,
) -> Source:
    """Open whatever SOURCE names.

    Args:
        source: a checkpoint file, a Hugging Face folder, "package.module:callable",
            "file.py:callable", "hf:CONFIG".
        model: a factory, or "hf:CONFIG", of the module that the weights of a file or a folder
            belong to.
        model_args: keyword arguments for a factory, or fields of the config of a folder or of
            `hf:`.
        trust_pickle: let a pickle that holds more than tensors run code.
        seed: of random initialisations.
        key: the dotted path of the weights in a checkpoint file that holds several sets, such as
            "ema" or "state_dict.model".

    Returns:
        The model, or the weights of one that could not be built.

    Raises:
        SourceError: it cannot be read, is unsafe, or does not fit; the message says what, got, try.

    Example:
        >>> load("jacdiag.sources.gpt:build", model_args={"n_layer": 1, "n_embd": 12}).vocab_size
        50304
    """
    name = _source_text(source)
    opening = _Opening(
        model=model, model_args=model_args, trust_pickle=trust_pickle, seed=seed, key=key
    )

    # 1. Models that are built.
    if name.startswith("hf:"):
        return _from_config(name, opening)
    if factory.is_factory(name):
        return _from_factory(name, opening)

    # 2. Weights that are read.
    path = Path(name)
    if factory.there(path) and path.is_dir():
        return _from_folder(path, opening)
    return _from_file(read_contents(path, trust_pickle=trust_pickle), opening)


def _source_text(source: Any) -> str:
    """Return a SOURCE as text.

    Raises:
        SourceError: it is neither text nor a path, or names nothing.
    """
    if not isinstance(source, str | bytes | os.PathLike):
        hint = "a path or a SOURCE string; jacdiag.audit takes modules and functions too"
        raise SourceError("this names no source", got=f"type {type(source).__name__}", hint=hint)

    try:
        name = os.fsdecode(source)
    # a PathLike of somebody else's
    except TypeError as error:
        raise SourceError("this names no source", got=str(error), hint="a path as text") from error

    # no file can have such a name
    is_no_name = "\0" in name or not name.strip()
    if is_no_name:
        hint = "SOURCE is a checkpoint, a folder, module:callable or hf:CONFIG"
        raise SourceError(f"no such file or folder: {name!r}", hint=hint)
    return name


def _from_config(name: str, opening: _Opening) -> Source:
    """Return a fresh model of `hf:CONFIG`."""
    opening.check_no_model(name)
    opening.check_no_key(name)
    config = name.removeprefix("hf:")
    model = huggingface.from_config(config, opening.model_args or {}, opening.seed)
    info = {"format": "hf-config", "factory": name}
    return Source(model, info, name, fresh=True, notes=huggingface.describe_config(config))


def _from_factory(name: str, opening: _Opening) -> Source:
    """Return the model that a factory builds."""
    opening.check_no_model(name)
    opening.check_no_key(name)
    info: dict[str, Any] = {"format": "factory", "factory": name}
    if opening.model_args:
        info["model_args"] = opening.model_args
    rebuild = partial(factory.build, name, opening.model_args)
    return Source(rebuild(opening.seed), info, name, rebuild=rebuild)


def _from_folder(path: Path, opening: _Opening) -> Source:
    """Return the model of a folder, or its weights in the model that is given."""
    # 1. A distributed checkpoint holds weights by name, as a file does.
    is_distributed = dcp.is_folder(path) and not huggingface.is_folder(path)
    if is_distributed:
        return _from_file(_open_chunked(path, opening.model), opening)

    # 2. Weights for another model than that of the folder.
    opening.check_no_key("a folder")
    if opening.model is not None:
        return _folder_into(path, opening.model, opening)

    # 3. A folder of transformers.
    if not huggingface.is_folder(path):
        raise refused_folders.refuse_without_config(path)

    # 4. Its config, perhaps with other fields.
    overrides = opening.model_args
    loaded = huggingface.load(path, trust_pickle=opening.trust_pickle, overrides=overrides)
    info = {"path": str(path), **loaded.facts}
    if overrides is not None:
        info["model_args"] = overrides
    return _of_folder(path, loaded, info)


def _of_folder(path: Path, loaded: huggingface.Loaded, info: dict[str, Any]) -> Source:
    """Return the source of a model out of a folder, with the step that a trainer wrote there."""
    step = trainer_step(path)
    if step is not None:
        info["step"] = step
    return Source(
        loaded.model,
        info,
        path.resolve().name,
        step=step,
        folder=path,
        weights=loaded.weights,
        notes=loaded.notes,
    )


def _folder_into(path: Path, model: factory.Factory, opening: _Opening) -> Source:
    """Return the weights of a folder in a model that a factory or another config builds."""
    files = weight_files(path)
    if not files:
        raise refused_folders.refuse_without_files(path)
    info: dict[str, Any] = {
        "path": str(path),
        "format": "folder",
        "files": [file.name for file in files],
        **opening.described(),
    }

    # 1. One .bin file may hold more than a state dict: it is opened like any checkpoint file.
    is_single_pickle = len(files) == 1 and files[0].suffix == ".bin"
    if is_single_pickle:
        return _single_file_into(path, files[0], opening, info)

    # 2. Any other files hold one state dict together.
    stored = huggingface.read_files(path, files, opening.trust_pickle)
    return _of_folder(path, _into_model(model, opening, stored), info)


def _single_file_into(path: Path, file: Path, opening: _Opening, info: dict[str, Any]) -> Source:
    """Return the weights of a folder's only file in the model that is given.

    Args:
        path: the folder.
        file: in it.
        opening: how it is opened.
        info: what the report says about the folder.
    """
    # 1. The file.
    contents = read_contents(file, trust_pickle=opening.trust_pickle)
    of_file = _from_file(contents, replace(opening, key=None))

    # 2. The folder around it, which may say more.
    loaded = huggingface.Loaded(of_file.model or nn.Module(), {}, of_file.weights, of_file.notes)
    source = _of_folder(path, loaded, of_file.info | info)
    if source.step is None:
        source.step = of_file.step
    source.stepped = of_file.stepped
    return source


def _into_model(
    model: factory.Factory,
    opening: _Opening,
    stored: huggingface.StoredState,
    built: nn.Module | None = None,
) -> huggingface.Loaded:
    """Build what --model names, unless it is built already, and fill it with weights."""
    # The weights say which class it is, if the config does not.
    if isinstance(model, str) and model.startswith("hf:"):
        config = huggingface.config_path(model)
        return huggingface.load_stored(config, stored, overrides=opening.model_args)
    if built is None:
        built = _build(model, opening, empty=stored.lazy)
    return huggingface.fill(built, stored)


def _build(model: factory.Factory, opening: _Opening, *, empty: bool) -> nn.Module:
    """Return the module that weights are put into; an empty one takes no memory."""
    if empty:
        return factory.build_empty(model, opening.model_args, opening.seed)
    # its numbers are replaced, so that none need be drawn
    return factory.build(model, opening.model_args, opening.seed, init=False)


def _open_chunked(path: Path, model: factory.Factory | None) -> Contents:
    """Return a folder of torch.distributed.checkpoint as a checkpoint file.

    Its tensors stay in their files.
    """
    pieces = dcp.chunked(path)
    if not pieces:
        raise SourceError(
            f"'{path}' holds no weights", hint="expected a state dict, or a dict that holds one"
        )
    if model is None:
        raise SourceError(
            f"'{path}' holds weights only",
            got=f"{len(pieces)} tensors: {clipped(', '.join(pieces), 200)}",
            hint="--model FACTORY builds the module that they belong to",
        )
    return Contents(path, split_flat(pieces), "torch-distributed", described=", ".join(pieces))


def _from_file(contents: Contents, opening: _Opening) -> Source:
    """Choose the weights of a file, and put them into their module if it is known."""
    model = opening.model
    if model is None and opening.model_args is not None:
        raise UsageError("--model-args needs --model", hint="--model package.module:callable")

    # 1. Build the module first: the weights are chosen by whether they fit it.
    built = None if model is None else _build(model, opening, empty=contents.stored)
    checkpoint = contents.choose(opening.key, built)

    # 2. Say what was read, and what else is in the file.
    source = _described(checkpoint, stepped=contents.optimizer_stepped)

    # 3. Fill the module.
    if model is not None:
        source.info |= opening.described()
        loaded = _into_model(model, opening, _stored(checkpoint), built)
        source.model, source.weights = loaded.model, loaded.weights
        source.notes += loaded.notes
    elif checkpoint.module is not None:
        source.model = checkpoint.module
    # A layout that is known needs no factory.
    else:
        source.model, source.why_weights = _rebuild_gpt(checkpoint, source.info)
        if source.model is None:
            source.state = checkpoint.state

    if source.why_weights:
        source.info["why_weights"] = source.why_weights
    return source


def _described(checkpoint: Checkpoint, *, stepped: bool) -> Source:
    """Return the source of a checkpoint with all that a report says, and without its model.

    Args:
        checkpoint: as it was read.
        stepped: whether the file holds the state of an optimizer that has taken a step.
    """
    path, step = checkpoint.path, checkpoint.step
    info: dict[str, Any] = {"path": str(path), "format": checkpoint.format, "step": step}
    source = Source(None, info, path.name, step=step, stepped=stepped)
    if checkpoint.unread:
        info["unread"] = checkpoint.unread
        shown = clipped(", ".join(checkpoint.unread), 200)
        source.notes.append(f"left unread in the file, as it is no tensor: {shown}")
    if checkpoint.where:
        info["key"] = checkpoint.where
    if checkpoint.others:
        info["others"] = checkpoint.others
    source.notes += checkpoint.notes
    return source


def _stored(checkpoint: Checkpoint) -> huggingface.StoredState:
    """Return the weights of a checkpoint: where they lie in their file, if they can stay there."""
    if checkpoint.weights is not None:
        return huggingface.StoredState(checkpoint.weights.pieces, True, checkpoint.path)
    # files of torch.save are mapped into memory
    return huggingface.StoredState(checkpoint.state, False, checkpoint.path)


def _rebuild_gpt(checkpoint: Checkpoint, info: dict[str, Any]) -> tuple[nn.Module | None, str]:
    """Return the reference GPT with the weights of a checkpoint in nanoGPT's layout.

    For any other checkpoint return None and why the weights have no model.

    Args:
        checkpoint: as it was read.
        info: of the source; is given the format and the sizes.
    """
    # 1. The sizes.
    if checkpoint.model_args is None:
        return None, _why_no_model(checkpoint)
    try:
        config = gpt.config_of(checkpoint.model_args)
    except (UsageError, TypeError) as error:
        return None, (
            f"its model_args are not nanoGPT's ({_reason(error)}); --model FACTORY builds the "
            "module"
        )

    # 2. The model.
    with factory.seeded(0):
        model = gpt.GPT(config)
    state = _without_masks(checkpoint.state)
    hint = "its model_args are nanoGPT's, its weights are not: --model FACTORY"
    fit(model, state, f"'{checkpoint.path}'", hint=hint)
    info |= {"format": "nanogpt", "model_args": _plain(checkpoint.model_args)}
    return model, ""


def _why_no_model(checkpoint: Checkpoint) -> str:
    """Return why the weights of a checkpoint without sizes have no model."""
    if checkpoint.whole_module:
        return (
            "the file holds a whole module, of which only the weights were read; "
            "--trust-pickle lets its code run, or --model FACTORY builds the module"
        )
    return (
        "the file holds weights only, and not in a layout that is known; --model FACTORY "
        "builds their module"
    )


def _without_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the causal masks that older nanoGPT files hold for every layer."""
    weights = {}
    for name, tensor in state.items():
        is_mask = name.endswith(".attn.bias") and tensor.dim() == 4
        if not is_mask:
            weights[name] = tensor
    return weights


def _reason(error: Exception) -> str:
    """Return what an error says in one line."""
    # 1. An error of Python.
    if not isinstance(error, UsageError):
        return str(error)

    # 2. One of jacdiag, without its hint.
    if not error.got:
        return error.what

    return f"{error.what}: {error.got}"


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as JSON takes them: other values as text."""
    plain = {}
    for name, value in args.items():
        # None is plain too
        if not isinstance(value, str | int | float | None):
            value = str(value)

        plain[str(name)] = value
    return plain
