"""The one way into checkpoint files: what is in the file, and where the weights are in it."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from jacdiag.errors import SourceError, clipped, printable
from jacdiag.sources.formats import safetensors_file, torch_file
from jacdiag.sources.formats.json_files import read_json
from jacdiag.sources.formats.refused_formats import check_format
from jacdiag.sources.lazy_tensors import StoredTensor, StoredWeights
from jacdiag.sources.lora_adapters import adapter_names, take_base_model
from jacdiag.sources.optimizer_state import optimizer_stepped
from jacdiag.sources.tensor_sets import Candidate, count_tensors, find_candidates, split_flat
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
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LARGEST_JSON = 1 << 26
# How the names of files with weights begin.
_USUAL_NAMES = ("model", "pytorch_model", "adapter_model", "consolidated")


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
        # A file of torch.save has its optimizers in the tree.
        if not self.stored:
            return optimizer_stepped(self.top)

        # Any other file has one level of names.
        flat: dict[str, Any] = {}
        for candidate in self.candidates:
            if candidate.is_optimizer:
                flat |= candidate.entries
        return optimizer_stepped(self.top, flat)

    def choose(self, key: str | None = None, model: nn.Module | None = None) -> Checkpoint:
        """Choose one set of tensors.

        Args:
            key: of `--key`.
            model: the module that they belong to, if it is known.

        Returns:
            The chosen weights, and what else the file says.

        Raises:
            SourceError: there are no weights, there are several and none stands out, or they cannot
                be used.
        """
        # 1. What may be chosen.
        check_contents(self.path, self.candidates, self.top)
        if not self.candidates:
            raise _no_weights(self.path, self.described)
        candidates, notes = self._base_models(model)

        # 2. Choose, by the model if it is known.
        if model is None:
            choice = choose_by_name(self.path, candidates, key)
            fitted = False
        else:
            choice = choose_by_model(self.path, candidates, model, key)
            fitted = choice.entries.keys() == model.state_dict(keep_vars=True).keys()
        choice.notes += notes

        # 3. Refuse what is no weights.
        check_chosen(self.path, choice.entries, fitted=fitted)
        _check_weights(self.path, choice.entries)
        if model is None:
            _check_real(self.path, choice.entries)
        return self._checkpoint(choice, fills_model=model is not None)

    def _base_models(self, model: nn.Module | None) -> tuple[list[Candidate], list[str]]:
        """Return the candidates without LoRA adapters, and notes.

        A model that has an adapter itself gets it.
        """
        if model is not None and adapter_names(model.state_dict(keep_vars=True)):
            return self.candidates, []

        candidates: list[Candidate] = []
        notes: dict[str, None] = {}  # a set that keeps its order
        for candidate in self.candidates:
            base, notes_on_base = take_base_model(candidate)
            candidates.append(base)
            # every set says the same of the adapter
            notes |= dict.fromkeys(notes_on_base)

        return candidates, list(notes)

    def _checkpoint(self, choice: Choice, *, fills_model: bool) -> Checkpoint:
        """Return the chosen weights with all that the file says about them.

        Args:
            choice: the weights.
            fills_model: whether they are put into a model that is known.
        """
        # 1. What the file says.
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

        # 2. Weights that can stay in their file.
        if self.stored:
            pieces: dict[str, StoredTensor] = choice.entries
            checkpoint.weights = StoredWeights(pieces)
            checkpoint.state = self._mapped(pieces)
            return checkpoint

        # 3. Weights in memory. A module has its own.
        if checkpoint.module is None or fills_model:
            _check_sizes(self.path, choice.entries)
            checkpoint.state = choice.entries
        return checkpoint

    def _mapped(self, pieces: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Return stored tensors as tensors that are mapped into memory; none if there are none."""
        if not self.tensors:
            return {}

        # 1. The names in the file: prefixes may have been taken off.
        names_in_file = {}
        for candidate in self.candidates:
            for name, entry in candidate.entries.items():
                names_in_file[id(entry)] = name

        # 2. The tensors under these names.
        return {name: self.tensors[names_in_file[id(piece)]] for name, piece in pieces.items()}


def open_checkpoint(
    path: Path, *, trust_pickle: bool = False, key: str | None = None
) -> Checkpoint:
    """Read the weights of a checkpoint file of any supported format, without a model.

    Args:
        path: the file.
        trust_pickle: let its pickle run code.
        key: which set of tensors to read, if the file holds several.

    Returns:
        The weights, and what else the file says.

    Raises:
        SourceError: missing, empty, truncated, unsafe, of an unknown format, or without weights.
    """
    return read_contents(path, trust_pickle=trust_pickle).choose(key)


def read_contents(path: Path, *, trust_pickle: bool = False) -> Contents:
    """Read what a checkpoint file of any supported format holds, and choose nothing.

    Args:
        path: the file.
        trust_pickle: let its pickle run code.

    Returns:
        All sets of tensors in the file.

    Raises:
        SourceError: missing, empty, truncated, unsafe or of an unknown format.
    """
    _check_file(path)
    if _is_safetensors(path):
        contents = _safetensors_contents(path)
    else:
        contents = _torch_contents(path, trust_pickle)
    if contents.step is None:
        contents.step = trainer_step(path.parent)
    return contents


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is in the format of safetensors, by its bytes or else its suffix."""
    if safetensors_file.is_safetensors(path):
        return True
    # A file of torch.save may be called so; a damaged file is what its suffix says.
    return path.suffix == ".safetensors" and not torch_file.is_torch_file(path)


def _safetensors_contents(path: Path) -> Contents:
    """Return what a safetensors file holds."""
    spans, metadata = safetensors_file.spans(path)
    tensors, _ = safetensors_file.read(path)
    return Contents(
        path,
        split_flat(spans),
        "safetensors",
        described=", ".join(spans) or "no tensors",
        step=_metadata_step(metadata),
        tensors=tensors,
    )


def _torch_contents(path: Path, trust_pickle: bool) -> Contents:
    """Return what a file of torch.save holds."""
    tree, unread = torch_file.read(path, trust_pickle=trust_pickle)
    if isinstance(tree, Mapping):
        top = tree
        described = ", ".join(map(str, tree)) or "an empty dict"
    else:
        top = {}
        described = f"one {type(tree).__name__}"
    candidates = find_candidates(tree)
    return Contents(path, candidates, "torch-save", top, described, _step(top), unread)


def trainer_step(folder: Path) -> int | None:
    """Return the step in the `trainer_state.json` of transformers in a folder, if there is one."""
    path = folder / "trainer_state.json"
    try:
        # a file that is larger is not of transformers
        if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
            return None
        state = read_json(path)
    except (OSError, SourceError):
        return None

    # It may be a file of another make.
    if not isinstance(state, dict):
        return None
    return _as_step(state.get("global_step"))


def _metadata_step(metadata: Mapping[str, str]) -> int | None:
    """Return the step in the metadata of a safetensors file, if it has one."""
    # All values of this metadata are text.
    step = str(metadata.get("step", metadata.get("global_step", "")))

    # A longer text is no number of steps.
    if not step.isdecimal() or len(step) >= 19:
        return None
    return int(step)


def _check_file(path: Path) -> None:
    """Raise unless a path is a file that can be read and is in a format that is known."""
    # 1. Its bytes say what it is, whatever its name.
    _check_readable(path)
    if safetensors_file.is_safetensors(path) or torch_file.is_torch_file(path):
        return

    # 2. If they do not, it may be of another format, or damaged.
    check_format(path)
    if path.suffix in SUFFIXES:
        return
    hints = {
        ".py": f"a factory in it: {path}:CALLABLE",
        ".json": f"a fresh model of a config: hf:{path}",
    }
    raise SourceError(
        f"'{path}' has no suffix that says what it is",
        got=path.suffix or "none",
        hint=hints.get(path.suffix, f"known: {', '.join(SUFFIXES)}"),
    )


def _check_readable(path: Path) -> None:
    """Raise unless a path is a plain file with something in it."""
    # 1. Something is there.
    try:
        status = path.stat()
    except FileNotFoundError:
        raise SourceError(f"no such file or folder: '{path}'", hint=_hint_if_absent(path)) from None
    except OSError as error:
        raise SourceError(f"cannot read '{path}'", got=error.strerror) from error

    # 2. It is a file. A pipe would be waited on for ever, and cannot be read twice.
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(
            f"'{path}' is no plain file", hint="save what comes out of it to a file first"
        )

    # 3. It may be read.
    if not os.access(path, os.R_OK):
        raise SourceError(f"cannot read '{path}'", got="no permission")

    # 4. It holds something.
    if status.st_size == 0:
        raise SourceError(f"'{path}' is empty", got="0 bytes", hint="copy or save it again")


def _hint_if_absent(path: Path) -> str:
    """Return what to try if nothing is at a path."""
    # 1. A link is there, as in a cache that was copied in part.
    if path.is_symlink():
        return f"it is a link to '{path.readlink()}', which is not there: copy or download it again"

    # 2. A name as models have them on the Hub, of which no part is here.
    is_hub_name = _HUB_NAME.fullmatch(str(path)) is not None
    if is_hub_name and not path.parent.exists():
        return (
            "nothing is downloaded; if it is a name on the Hugging Face Hub: "
            f"hf download {path} --local-dir DIR, then give DIR"
        )
    return "SOURCE is a checkpoint, a folder, module:callable or hf:CONFIG"


def _no_weights(path: Path, described: str) -> SourceError:
    """Return the error for a file without weights.

    Args:
        path: the file.
        described: what it holds.
    """
    neighbours = _weights_next_to(path)
    hint = "expected a state dict, or a dict that holds one"
    if neighbours:
        hint += f"; next to it: {clipped(', '.join(neighbours), 160)}"
    return SourceError(f"'{path}' holds no weights", got=clipped(described, 200), hint=hint)


def _weights_next_to(path: Path) -> list[str]:
    """Return the names of files in a file's folder that are called as weights usually are."""
    names = []
    try:
        for file in path.parent.iterdir():
            is_usual = file.name.startswith(_USUAL_NAMES)
            if is_usual and file.suffix in SUFFIXES:
                names.append(file.name)
    # The folder may be closed to this user.
    except OSError:
        return []
    return sorted(names)


def _check_real(path: Path, weights: Mapping[str, Any]) -> None:
    """Raise if all weights are complex numbers, which only their module says how to use."""
    if any(tensor.dtype.is_floating_point for tensor in weights.values()):
        return
    raise SourceError(
        f"'{path}' holds complex numbers, and nothing can be said of them without their module",
        got=count_tensors(len(weights)),
        hint="--model FACTORY builds the module",
    )


def _check_weights(path: Path, weights: Mapping[str, Any]) -> None:
    """Raise if chosen tensors hold no numbers of a network."""
    # 1. Integers alone are no weights.
    if not any(_is_inexact(tensor.dtype) for tensor in weights.values()):
        raise _only_integers(path, weights)

    # 2. Neither are shapes.
    empty = [name for name, tensor in weights.items() if _is_empty(tensor)]
    if empty:
        raise SourceError(
            f"'{path}' holds names and shapes, no numbers",
            got=(
                f"{len(empty)} of {len(weights)} tensors on the meta device: "
                f"{clipped(', '.join(empty), 120)}"
            ),
            hint="save the model from where its weights are",
        )


def _only_integers(path: Path, weights: Mapping[str, Any]) -> SourceError:
    """Return the error for tensors that hold integers and nothing else."""
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    described = f"{count_tensors(len(weights))} of {', '.join(sorted(types))}"
    error = _no_weights(path, described)
    # Random states and token ids are vectors.
    if any(len(tensor.shape) >= 2 for tensor in weights.values()):
        error = SourceError(
            f"'{path}' holds no weights in floating point",
            got=described,
            hint="if they are packed weights, audit the checkpoint that was quantised; token ids "
            "are given with --tokens",
        )
    return error


def _is_inexact(dtype: Any) -> bool:
    """Return whether numbers of a type are real or complex, as those of weights are."""
    return bool(dtype.is_floating_point or dtype.is_complex)


def _is_empty(tensor: Any) -> bool:
    """Return whether a tensor has a shape only. One that is still in its file has numbers."""
    return isinstance(tensor, Tensor) and tensor.is_meta


def _check_sizes(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise if a tensor claims more numbers than the file can hold.

    A view of few numbers may say that it is many.
    """
    size = path.stat().st_size
    # With some slack: a tensor that is small harms nobody.
    most = max(4 * size, _SMALL)
    for name, tensor in weights.items():
        if tensor.numel() * tensor.element_size() > most:
            raise SourceError(
                f"'{path}' holds a tensor that is larger than the file",
                got=f"{printable(name)}: {' x '.join(map(str, tensor.shape))} in {size:,} bytes",
                hint="save it again with tensor.contiguous()",
            )


def _step(top: Mapping[Any, Any]) -> int | None:
    """Return the training steps that a file says under a usual key, if it does."""
    for key in _STEP_KEYS:
        step = _as_step(top.get(key))
        # a file may have a key of another meaning, too
        if step is not None:
            return step

    # Most state dicts have none.
    return None


def _as_step(value: Any) -> int | None:
    """Return a value as a number of steps; None if it is none."""
    value = _as_number(value)
    # True is a number of Python, and no step.
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    # A larger one is damaged, or another thing.
    if not 0 <= value < 2**63:
        return None
    return value


def _as_number(value: Any) -> Any:
    """Return a scalar of torch or numpy as a number of Python, and 100.0 as 100.

    Any other value is returned as it is.
    """
    is_array = isinstance(value, Tensor | np.generic | np.ndarray)
    if is_array and math.prod(value.shape) == 1:
        value = value.item()

    # Some programs count steps in floating point.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
