"""The one way into checkpoint files: what is in the file, and where the weights are in it."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from jacdiag.errors import SourceError, clipped, printable
from jacdiag.sources.formats import safetensors_file, torch_file
from jacdiag.sources.formats.refused_formats import check_format
from jacdiag.sources.lazy_tensors import StoredTensor, StoredWeights
from jacdiag.sources.lora_adapters import adapter_names, take_base_model
from jacdiag.sources.optimizer_state import optimizer_stepped
from jacdiag.sources.tensor_sets import Candidate, TensorSetKind, find_candidates, split_flat
from jacdiag.sources.unusable_tensors import check_chosen, check_contents
from jacdiag.sources.weights_choice import Choice, choose_by_model, choose_by_name, strip_wrappers

__all__ = ["Checkpoint", "Contents", "open_checkpoint", "read_contents", "strip_wrappers"]

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_SMALL = 1 << 20  # bytes that need no file
_STEP_KEYS = (
    "iter_num",
    "global_step",
    "global_steps",
    "step",
    "iteration",
    "num_steps",
    "steps",
    "iter",
)
_LARGEST_JSON = 1 << 26


@dataclass
class Checkpoint:
    """A file that was read.

    Attributes:
        state: the weights by name, prefixes of wrappers taken off; empty where `module` holds them.
        module: an entire module, where the file held one and its pickle is trusted.
        model_args: nanoGPT's sizes, where the file has them.
        step: training steps so far, where the file says so.
        format: "torch-save" or "safetensors".
        where: the key under which the weights stood ("" at the top).
        whole_module: the file held a module, of which only the weights were read.
        unread: classes in the file that were not imported.
        weights: the same as `state`, read tensor by tensor, where the format allows.
        others: what else the file holds, in words.
    """

    path: Path
    state: dict[str, Tensor]
    format: str
    where: str = ""
    module: nn.Module | None = None
    model_args: dict[str, Any] | None = None
    step: int | None = None
    whole_module: bool = False
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weights: StoredWeights | None = None
    others: list[str] = field(default_factory=list)


@dataclass
class Contents:
    """All that a file holds, before one set of tensors is chosen.

    Attributes:
        path: the file, or a folder of torch.distributed.checkpoint.
        candidates: the sets of tensors in it.
        format: "torch-save", "safetensors" or "torch-distributed".
        top: the outermost mapping of a file of torch.save.
        described: what it holds in a few words, for messages.
        step: training steps so far, if it says so.
        unread: classes that were not imported.
        tensors: of a safetensors file, the tensors by name, mapped into memory.
    """

    path: Path
    candidates: list[Candidate]
    format: str
    top: Mapping[Any, Any] = field(default_factory=dict)
    described: str = ""
    step: int | None = None
    unread: list[str] = field(default_factory=list)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def stored(self) -> bool:
        """Whether tensors can be read one by one."""
        return self.format != "torch-save"

    @property
    def optimizer_stepped(self) -> bool:
        """Whether the file holds the state of an optimizer that has taken a step."""
        flat = (
            [c.entries for c in self.candidates if c.kind is TensorSetKind.OPTIMIZER]
            if self.stored
            else []
        )
        return optimizer_stepped(
            self.top, {name: entry for entries in flat for name, entry in entries.items()}
        )

    def choose(self, key: str | None = None, model: nn.Module | None = None) -> Checkpoint:
        """Choose one set of tensors.

        Args:
            key: of `--key`.
            model: the module that they belong to, if it is known.

        Raises:
            SourceError: there are no weights, there are several and none stands out, or they cannot
                be used.
        """
        check_contents(self.path, self.candidates, self.top)
        if not self.candidates:
            raise _no_weights(self.path, self.described)
        candidates, notes = self._base_models(model)
        if model is None:
            choice = choose_by_name(self.path, candidates, key)
        else:
            choice = choose_by_model(self.path, candidates, model, key)
        choice.notes += notes
        fitted = model is not None and set(choice.entries) == set(model.state_dict(keep_vars=True))
        check_chosen(self.path, choice.entries, fitted=fitted)
        _check_weights(self.path, self.described, choice.entries)
        return self._checkpoint(choice, fills_model=model is not None)

    def _base_models(self, model: nn.Module | None) -> tuple[list[Candidate], list[str]]:
        """Return the candidates without LoRA adapters, and notes.

        A model that has an adapter itself gets it.
        """
        if model is not None and adapter_names(model.state_dict(keep_vars=True)):
            return self.candidates, []
        candidates: list[Candidate] = []
        notes: dict[str, None] = {}
        for candidate in self.candidates:
            base, said = take_base_model(candidate)
            candidates.append(base)
            notes |= dict.fromkeys(said)
        return candidates, list(notes)

    def _checkpoint(self, choice: Choice, *, fills_model: bool) -> Checkpoint:
        args = self.top.get("model_args")
        checkpoint = Checkpoint(
            self.path,
            {},
            self.format,
            where=choice.key,
            module=choice.candidate.module,
            model_args=dict(args) if isinstance(args, Mapping) else None,
            step=self.step,
            whole_module=choice.candidate.whole_module,
            unread=self.unread,
            notes=choice.notes,
            others=choice.others,
        )
        if self.stored:
            pieces: dict[str, StoredTensor] = choice.entries
            checkpoint.weights = StoredWeights(pieces)
            if self.tensors:
                names = {
                    id(entry): name for c in self.candidates for name, entry in c.entries.items()
                }
                checkpoint.state = {
                    name: self.tensors[names[id(piece)]] for name, piece in pieces.items()
                }
        elif checkpoint.module is None or fills_model:
            _check_sizes(self.path, choice.entries)
            checkpoint.state = choice.entries
        return checkpoint


def open_checkpoint(
    path: Path, *, trust_pickle: bool = False, key: str | None = None
) -> Checkpoint:
    """Read the weights of a checkpoint file of any supported format, without a model.

    Args:
        path: the file.
        trust_pickle: let its pickle run code.
        key: which set of tensors to read, if the file holds several.

    Raises:
        SourceError: missing, empty, truncated, unsafe, of an unknown format, or without weights.
    """
    return read_contents(path, trust_pickle=trust_pickle).choose(key)


def read_contents(path: Path, *, trust_pickle: bool = False) -> Contents:
    """Read what a checkpoint file of any supported format holds, and choose nothing.

    Args:
        path: the file.
        trust_pickle: let its pickle run code.

    Raises:
        SourceError: missing, empty, truncated, unsafe or of an unknown format.
    """
    _check_file(path)
    if path.suffix == ".safetensors" or (
        path.suffix not in SUFFIXES and safetensors_file.is_safetensors(path)
    ):
        spans, metadata = safetensors_file.spans(path)
        tensors, _ = safetensors_file.read(path)
        candidates = split_flat(spans)
        step = _metadata_step(metadata)
        held = ", ".join(spans) or "no tensors"
        contents = Contents(
            path, candidates, "safetensors", described=held, step=step, tensors=tensors
        )
    else:
        tree, unread = torch_file.read(path, trust_pickle=trust_pickle)
        top: Mapping[Any, Any] = tree if isinstance(tree, Mapping) else {}
        described = (
            ", ".join(map(str, top)) if isinstance(tree, Mapping) else f"one {type(tree).__name__}"
        )
        candidates = find_candidates(tree)
        contents = Contents(
            path, candidates, "torch-save", top, described or "an empty dict", _step(top), unread
        )
    if contents.step is None:
        contents.step = trainer_step(path.parent)
    return contents


def trainer_step(folder: Path) -> int | None:
    """Return the step in the `trainer_state.json` of transformers in a folder, if there is one."""
    path = folder / "trainer_state.json"
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
            return None
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return _step({"global_step": state.get("global_step")}) if isinstance(state, dict) else None


def _metadata_step(metadata: Mapping[str, str]) -> int | None:
    step = str(metadata.get("step", metadata.get("global_step", "")))
    return int(step) if step.isdecimal() and len(step) < 19 else None


def _check_file(path: Path) -> None:
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
    except FileNotFoundError:
        hint = "SOURCE is a checkpoint, a folder, module:callable or hf:CONFIG"
        raise SourceError(f"no such file or folder: '{path}'", hint=hint) from None
    except OSError as error:
        raise SourceError(f"cannot read '{path}'", got=error.strerror) from error
    if not stat.S_ISREG(mode):  # a pipe would be waited on for ever, and cannot be read twice
        raise SourceError(
            f"'{path}' is no plain file", hint="save what comes out of it to a file first"
        )
    if not os.access(path, os.R_OK):
        raise SourceError(f"cannot read '{path}'", got="no permission")
    if size == 0:
        raise SourceError(f"'{path}' is empty", got="0 bytes", hint="copy or save it again")
    check_format(path)
    known_by_content = torch_file.is_torch_zip(path) or safetensors_file.is_safetensors(path)
    if path.suffix not in SUFFIXES and not known_by_content:
        known = f"known: {', '.join(SUFFIXES)}"
        raise SourceError(
            f"'{path}' has no suffix that says what it is",
            got=path.suffix or "none",
            hint={
                ".py": f"a factory in it: {path}:CALLABLE",
                ".json": f"a fresh model of a config: hf:{path}",
            }.get(path.suffix, known),
        )


def _no_weights(path: Path, described: str) -> SourceError:
    neighbours = _weights_next_to(path.parent)
    hint = "expected a state dict, or a dict that holds one"
    if neighbours:
        hint += f"; next to it: {clipped(', '.join(neighbours), 160)}"
    return SourceError(f"'{path}' holds no weights", got=clipped(described, 200), hint=hint)


def _weights_next_to(folder: Path) -> list[str]:
    """Return the names of files in a folder that are called as weights usually are."""
    usual = ("model", "pytorch_model", "adapter_model", "consolidated")
    try:
        names = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    except OSError:
        return []
    return [name for name in names if name.startswith(usual)]


def _check_weights(path: Path, described: str, weights: Mapping[str, Any]) -> None:
    if not any(t.dtype.is_floating_point or t.dtype.is_complex for t in weights.values()):
        raise _no_weights(path, described)
    empty = [name for name, t in weights.items() if isinstance(t, Tensor) and t.is_meta]
    if empty:
        raise SourceError(
            f"'{path}' holds names and shapes, no numbers",
            got=(
                f"{len(empty)} of {len(weights)} tensors on the meta device: "
                f"{clipped(', '.join(empty), 120)}"
            ),
            hint="save the model from where its weights are",
        )


def _check_sizes(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise if a tensor claims more numbers than the file can hold.

    A view of few numbers may say that it is many.
    """
    honest = path.stat().st_size
    for name, t in weights.items():
        if t.numel() * t.element_size() > max(4 * honest, _SMALL):
            raise SourceError(
                f"'{path}' holds a tensor that is larger than the file",
                got=f"{printable(name)}: {' x '.join(map(str, t.shape))} in {honest:,} bytes",
                hint="save it again with tensor.contiguous()",
            )


def _step(top: Mapping[Any, Any]) -> int | None:
    for key in _STEP_KEYS:
        value = top.get(key)
        if isinstance(value, Tensor | np.generic | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
            return value
    return None
