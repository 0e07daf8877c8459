"""What a SOURCE string turned out to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError, UsageError, clipped
from jacdiag.sources import factory, gpt
from jacdiag.sources.checkpoint import Checkpoint, Contents, read_contents, trainer_step
from jacdiag.sources.formats import dcp, folders, huggingface
from jacdiag.sources.input_facts import longest_sequence, vocabulary
from jacdiag.sources.lazy_tensors import StoredWeights
from jacdiag.sources.load_weights import fit
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
        held = (
            next(self.model.parameters(), None)
            if self.model is not None and self.weights is None
            else None
        )
        return self._device or (torch.device("cpu") if held is None else held.device)

    def to(self, device: torch.device) -> None:
        """Moves the model; of one whose parameters stay in their files, the buffers."""
        assert self.model is not None
        if self.weights is None:
            self.model.to(device)
            return
        self._device = device
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)

    def value_of(self, parameter: Tensor) -> Tensor | None:
        """A parameter's values: the parameter itself, or what its file holds; None where it has a
        shape only.
        """
        if not parameter.is_meta:
            return parameter.detach()
        if self.model is None or self.weights is None:
            return None
        name = next(name for name, p in self.model.named_parameters() if p is parameter)
        return self.weights[name]

    @property
    def vocab_size(self) -> int | None:
        return vocabulary(self.model) if self.model is not None else None

    @property
    def max_seq(self) -> int | None:
        return longest_sequence(self.model) if self.model is not None else None

    @classmethod
    def of_module(cls, module: nn.Module) -> Source:
        """A module that is already in memory."""
        kind = type(module)
        return cls(
            module,
            {"format": "module", "factory": f"{kind.__module__}.{kind.__qualname__}"},
            kind.__name__,
            owned=False,
        )


def load(
    source: str | bytes | os.PathLike[str],
    *,
    model: factory.Factory | None = None,
    model_args: dict[str, Any] | None = None,
    trust_pickle: bool = False,
    seed: int = 0,
    key: str | None = None,
) -> Source:
    """Opens whatever SOURCE names.

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

    Raises:
        SourceError: it cannot be read, is unsafe, or does not fit; the message says what, got, try.

    Example:
        >>> load("jacdiag.sources.gpt:build", model_args={"n_layer": 1, "n_embd": 12}).vocab_size
        50304
    """
    if not isinstance(source, str | bytes | os.PathLike):
        hint = "a path or a SOURCE string; jacdiag.audit takes modules and functions too"
        raise SourceError("this names no source", got=f"type {type(source).__name__}", hint=hint)
    source = os.fsdecode(source)
    if "\0" in source or not source.strip():
        hint = "SOURCE is a checkpoint, a folder, module:callable or hf:CONFIG"
        raise SourceError(f"no such file or folder: {source!r}", hint=hint)
    if source.startswith("hf:"):
        _no_model(model, source)
        _no_key(key, source)
        built = huggingface.from_config(source.removeprefix("hf:"), model_args or {}, seed)
        return Source(built, {"format": "hf-config", "factory": source}, source, fresh=True)
    if factory.is_factory(source):
        _no_model(model, source)
        _no_key(key, source)
        info = {
            "format": "factory",
            "factory": source,
            **({"model_args": model_args} if model_args else {}),
        }
        rebuild = partial(factory.build, source, model_args)
        return Source(rebuild(seed), info, source, rebuild=rebuild)
    path = Path(source)
    if factory.there(path) and path.is_dir():
        if dcp.is_folder(path) and not huggingface.is_folder(path):
            return _from_file(_open_chunked(path, model), model, model_args, seed, key)
        _no_key(key, "a folder")
        return _from_folder(path, model, model_args, trust_pickle, seed)
    return _from_file(read_contents(path, trust_pickle=trust_pickle), model, model_args, seed, key)


def _no_model(model: factory.Factory | None, source: str) -> None:
    if model is not None:
        raise UsageError(
            "--model belongs to a checkpoint file or a folder",
            got=f"--model {model} beside {source}",
        )


def _no_key(key: str | None, source: str) -> None:
    if key is not None:
        raise UsageError("--key belongs to a checkpoint file", got=f"--key {key} with {source}")


def _from_folder(
    path: Path,
    model: factory.Factory | None,
    model_args: dict[str, Any] | None,
    trust_pickle: bool,
    seed: int,
) -> Source:
    if model is not None:
        return _folder_into(path, model, model_args, trust_pickle, seed)
    if not huggingface.is_folder(path):
        raise folders.refuse_without_config(path)
    loaded = huggingface.load(path, trust_pickle=trust_pickle, overrides=model_args)
    info = {"path": str(path), **loaded.facts}
    if model_args is not None:
        info["model_args"] = model_args
    return _of_folder(path, loaded, info)


def _of_folder(path: Path, loaded: huggingface.Loaded, info: dict[str, Any]) -> Source:
    """The source of a model out of a folder, with the step that a trainer wrote there."""
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


def _folder_into(
    path: Path,
    model: factory.Factory,
    model_args: dict[str, Any] | None,
    trust_pickle: bool,
    seed: int,
) -> Source:
    """The weights of a folder, in a model that a factory or a config elsewhere builds."""
    files = folders.weight_files(path)
    if not files:
        raise folders.refuse_without_files(path)
    info: dict[str, Any] = {
        "path": str(path),
        "format": "folder",
        "files": [file.name for file in files],
        "factory": factory.name_of(model),
    }
    if model_args:
        info["model_args"] = model_args

    # One .bin file may hold more than a state dict: it is opened like any checkpoint file.
    if len(files) == 1 and files[0].suffix == ".bin":
        found = _from_file(
            read_contents(files[0], trust_pickle=trust_pickle), model, model_args, seed, None
        )
        loaded = huggingface.Loaded(found.model or nn.Module(), {}, found.weights, found.notes)
        source = _of_folder(path, loaded, found.info | info)
        source.step = found.step if source.step is None else source.step
        source.stepped = found.stepped
        return source

    stored = huggingface.read_files(path, files, trust_pickle)
    return _of_folder(path, _into_model(model, model_args, seed, stored), info)


def _into_model(
    model: factory.Factory,
    model_args: dict[str, Any] | None,
    seed: int,
    stored: huggingface.StoredState,
    built: nn.Module | None = None,
) -> huggingface.Loaded:
    """Build what --model names, unless it is built already, and fill it with weights."""
    # the weights say which class, where the config does not
    if isinstance(model, str) and model.startswith("hf:"):
        return huggingface.load_stored(huggingface.config_path(model), stored, overrides=model_args)
    if built is None and stored.lazy:
        built = factory.build_empty(model, model_args, seed)
    elif built is None:
        built = factory.build(model, model_args, seed, init=False)
    return huggingface.fill(built, stored)


def _open_chunked(path: Path, model: factory.Factory | None) -> Contents:
    """A folder of torch.distributed.checkpoint, like a checkpoint file whose tensors stay where
    they are.
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


def _from_file(
    contents: Contents,
    model: factory.Factory | None,
    model_args: dict[str, Any] | None,
    seed: int,
    key: str | None,
) -> Source:
    """Choose the weights of a file, and put them into their module if it is known."""
    if model is None and model_args is not None:
        raise UsageError("--model-args needs --model", hint="--model package.module:callable")

    # 1. Build the module first: the weights are chosen by whether they fit it.
    built: nn.Module | None = None
    if model is not None and contents.stored:
        built = factory.build_empty(model, model_args, seed)
    elif model is not None:
        built = factory.build(model, model_args, seed, init=False)
    found = contents.choose(key, built)

    # 2. Say what was read, and what else is in the file.
    info: dict[str, Any] = {"path": str(found.path), "format": found.format, "step": found.step}
    made = Source(None, info, found.path.name, step=found.step, stepped=contents.optimizer_stepped)
    if found.unread:
        info["unread"] = found.unread
        shown = clipped(", ".join(found.unread), 200)
        made.notes.append(f"left unread in the file, as it is no tensor: {shown}")
    if found.where:
        info["key"] = found.where
    if found.others:
        info["others"] = found.others
    made.notes += found.notes

    # 3. Fill the module.
    if built is not None:
        info |= {
            "factory": factory.name_of(model),
            **({"model_args": model_args} if model_args else {}),
        }
        made.model = built
        if found.weights is not None:
            stored = huggingface.StoredState(found.weights.pieces, True, found.path)
        else:
            stored = huggingface.StoredState(found.state, False, found.path)
        assert model is not None
        loaded = _into_model(model, model_args, seed, stored, built)
        made.model, made.weights = loaded.model, loaded.weights
        made.notes += loaded.notes
    elif found.module is not None:
        made.model = found.module
    else:
        made.model, made.why_weights = _rebuilt(found, info)
        made.state = {} if made.model is not None else found.state
    if made.why_weights:
        info["why_weights"] = made.why_weights
    return made


def _rebuilt(found: Checkpoint, info: dict[str, Any]) -> tuple[nn.Module | None, str]:
    """A checkpoint in nanoGPT's layout becomes the reference GPT; anything else stays a heap of
    weights.
    """
    if found.model_args is None:
        if found.whole_module:
            return None, (
                "the file holds a whole module, of which only the weights were read; "
                "--trust-pickle lets its code run, "
                "or --model FACTORY builds the module"
            )
        return None, (
            "the file holds weights only, and not in a layout that is known; --model FACTORY "
            "builds their module"
        )
    try:
        config = gpt.config_of(found.model_args)
    except (UsageError, TypeError) as error:
        return (
            None,
            f"its model_args are not nanoGPT's ({_reason(error)}); --model FACTORY builds the "
            "module",
        )
    with factory.seeded(0):
        model = gpt.GPT(config)
    # Older nanoGPT files carry the causal mask of every layer as a buffer.
    state = {
        k: t for k, t in found.state.items() if not (k.endswith(".attn.bias") and t.dim() == 4)
    }
    fit(
        model,
        state,
        f"'{found.path}'",
        hint="its model_args are nanoGPT's, its weights are not: --model FACTORY",
    )
    info |= {"format": "nanogpt", "model_args": _plain(found.model_args)}
    return model, ""


def _reason(error: Exception) -> str:
    parts = (error.what, error.got) if isinstance(error, UsageError) else (str(error),)
    return ": ".join(part for part in parts if part)


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(k): v if isinstance(v, str | int | float | bool) or v is None else str(v)
        for k, v in args.items()
    }
