"""One door for checkpoint files: what is in the file, where in it the weights are, and what it says about itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jacdiag.errors import SourceError, clipped, printable
from jacdiag.sources.formats import safetensors_file, torch_file
from jacdiag.sources.formats.guard import Stub
from jacdiag.sources.stored import StoredWeights
from jacdiag.sources.wrapped import plain_name

Entry = TypeVar("Entry")  # a tensor, or where it lies
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_MODEL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
_SMALL = 1 << 20  # bytes that need no file
_STEP_KEYS = ("iter_num", "global_step", "step", "iteration", "num_steps", "steps", "iter")
_NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "loss", "ema_decay")


@dataclass
class Checkpoint:
    """A file that was read.

    Attributes:
        state: the weights by name, prefixes of wrappers taken off; empty where `module` holds them.
        module: a whole module, where the file held one and its pickle is trusted.
        model_args: nanoGPT's sizes, where the file has them.
        step: training steps so far, where the file says so.
        format: "torch-save" or "safetensors".
        where: the key under which the weights stood ("" at the top).
        whole_module: the file held a module, of which only the weights were read.
        unread: classes in the file that were not imported.
        weights: the same as `state`, read tensor by tensor, where the format allows.
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


def open_checkpoint(path: Path, *, trust_pickle: bool = False) -> Checkpoint:
    """Reads a checkpoint file of any supported format.

    Raises:
        SourceError: missing, empty, truncated, unsafe, of an unknown format, or without weights.
    """
    _check_file(path)
    if path.suffix == ".safetensors":
        tensors, metadata = safetensors_file.read(path)
        step = metadata.get("step", metadata.get("global_step", ""))
        return Checkpoint(
            path, strip_wrappers(tensors), "safetensors", step=int(step) if step.isdecimal() else None,
            weights=StoredWeights(strip_wrappers(safetensors_file.spans(path)[0])),
        )  # fmt: skip
    found, unread = torch_file.read(path, trust_pickle=trust_pickle)
    return _unpacked(path, found, unread)


def _check_file(path: Path) -> None:
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
    except FileNotFoundError:
        hint = "SOURCE is a checkpoint, a folder, module:callable or hf:CONFIG"
        raise SourceError(f"no such file or folder: '{path}'", hint=hint) from None
    except OSError as error:
        raise SourceError(f"cannot read '{path}'", got=error.strerror) from error
    if not stat.S_ISREG(mode):  # a pipe would be waited on for ever, and cannot be read twice
        raise SourceError(f"'{path}' is no plain file", hint="save what comes out of it to a file first")
    if not os.access(path, os.R_OK):
        raise SourceError(f"cannot read '{path}'", got="no permission")
    if size == 0:
        raise SourceError(f"'{path}' is empty", got="0 bytes", hint="copy or save it again")
    if path.suffix not in SUFFIXES:
        known = f"known: {', '.join(SUFFIXES)}"
        raise SourceError(
            f"'{path}' has no suffix that says what it is",
            got=path.suffix or "none",
            hint={".py": f"a factory in it: {path}:CALLABLE", ".json": f"a fresh model of a config: hf:{path}"}.get(
                path.suffix, known
            ),
        )


def _unpacked(path: Path, found: Any, unread: list[str]) -> Checkpoint:
    kind = "torch-save"
    if isinstance(found, nn.Module):
        return Checkpoint(path, {}, kind, module=found)
    top: Mapping[Any, Any] = found if isinstance(found, Mapping) else {}
    where, weights = _weights_in(found)
    if not weights:
        whole = next(((str(key), value) for key, value in top.items() if isinstance(value, nn.Module)), None)
        if whole is not None:
            return Checkpoint(path, {}, kind, where=whole[0], module=whole[1], step=_step(top))
    _check_weights(path, found, weights)
    _check_sizes(path, weights)
    args = top.get("model_args")
    return Checkpoint(
        path,
        strip_wrappers(weights),
        kind,
        where=where,
        model_args=dict(args) if isinstance(args, Mapping) else None,
        step=_step(top),
        whole_module=_pickled_module(found) or _pickled_module(top.get(where)),
        unread=unread,
    )


def _check_weights(path: Path, found: Any, weights: Mapping[str, Tensor]) -> None:
    if not any(t.is_floating_point() for t in weights.values()):
        keys = ", ".join(map(str, found)) if isinstance(found, Mapping) else f"one {type(found).__name__}"
        raise SourceError(
            f"'{path}' holds no weights",
            got=clipped(keys, 200) or "an empty dict",
            hint="expected a state dict, or a dict that holds one",
        )
    empty = [name for name, t in weights.items() if t.is_meta]
    if empty:
        raise SourceError(
            f"'{path}' holds names and shapes, no numbers",
            got=f"{len(empty)} of {len(weights)} tensors on the meta device: {clipped(', '.join(empty), 120)}",
            hint="save the model from where its weights are",
        )


def _check_sizes(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuses tensors that claim more numbers than the file can hold: a view of few may say that it is many."""
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
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def _weights_in(found: Any) -> tuple[str, dict[str, Tensor]]:
    """The mapping that holds the weights: the file itself, one of the usual keys, or else the one with most numbers."""
    own = _tensors(found)
    if isinstance(found, Stub):
        return "", own
    if not isinstance(found, Mapping):
        return "", {}
    if sum(isinstance(v, Tensor) for v in found.values()) > len(found) / 2:
        return "", {k: v for k, v in own.items() if "." not in k or k in found}
    for key in _MODEL_KEYS:
        inside = _tensors(found.get(key))
        if inside:
            return key, inside
    best = max(
        ((str(key), _tensors(value)) for key, value in found.items() if not _foreign(key)),
        key=lambda pair: sum(t.numel() for t in pair[1].values()),
        default=("", {}),
    )
    return best


def _foreign(key: Any) -> bool:
    return any(part in str(key).lower() for part in _NOT_WEIGHTS)


def _tensors(value: Any) -> dict[str, Tensor]:
    """All tensors below a mapping with string keys, or below the stub of a whole module, by dotted name."""
    return dict(_walk(value, ""))


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        plain = value.detach()
        yield prefix, plain if plain.layout == torch.strided else plain.to_dense()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and not _foreign(key):
                yield from _walk(item, f"{prefix}.{key}" if prefix else key)
    elif _pickled_module(value):
        for part in ("_parameters", "_buffers", "_modules"):  # an nn.Module that was pickled whole
            for key, item in (value.state.get(part) or {}).items():
                yield from _walk(item, f"{prefix}.{key}" if prefix else key)


def _pickled_module(value: Any) -> bool:
    """Whether a stub stands for an nn.Module that was pickled whole."""
    return isinstance(value, Stub) and isinstance(value.state, Mapping) and "_parameters" in value.state


def weights_below(pieces: Mapping[str, Entry]) -> dict[str, Entry]:
    """Of flattened names, the weights of the model: not an optimiser's, and without the keys that stand above them."""
    found = {name: piece for name, piece in pieces.items() if not any(map(_foreign, name.split(".")[:2]))}
    while found:
        heads = {name.partition(".")[0] for name in found}
        inner = {name.partition(".")[2] for name in found}
        # `model.` may be the model's own first name: it is taken off where the usual key, or nothing else, is above it.
        if len(heads) > 1 or "" in inner or not heads <= {*_MODEL_KEYS, "app"}:
            break
        found = {name.partition(".")[2]: piece for name, piece in found.items()}
    return strip_wrappers(found)


def strip_wrappers(state: Mapping[str, Entry]) -> dict[str, Entry]:
    """Takes the names that wrappers add off every key; `module.` only where all keys begin with it.

    A name is shown on terminals: what is not printable in it is written as an escape.
    """
    names = [plain_name(printable(name)) for name in state]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names, state.values(), strict=True))
