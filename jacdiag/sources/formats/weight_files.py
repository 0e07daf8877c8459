"""The files of a folder that hold its weights, and whether those weights are quantised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, one_line, printable

_SHOWN = 5
# In the order in which transformers looks for them.
_ONE_FILE = ("model.safetensors", "pytorch_model.bin")
_SHARDS = (r"model-\d+-of-\d+\.safetensors", r"pytorch_model-\d+-of-\d+\.bin")
_SCALES = re.compile(
    r"\.(qweight|qzeros|SCB|weight_scale|weight_scale_inv|weight_packed|input_scale"
    r"|absmax|weight\.absmax|weight\.quant_map|weight\.quant_state\..+)$|_proj_(blocks|scales)$"
)
_QUANTISED = (
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a folder's weights, in the order of preference of transformers.

    Raises:
        SourceError: shards are missing, or an index cannot be read.
    """
    # 1. The first complete set: one file, or the shards that an index names.
    incomplete: SourceError | None = None
    for name in _ONE_FILE:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                return _indexed(path, index)
            except SourceError as error:
                incomplete = incomplete or error
    if incomplete is not None:
        raise incomplete

    # 2. Shards without an index, then a file of a variant (model.fp16.safetensors).
    for pattern in _SHARDS:
        files = sorted(file for file in path.glob("*") if re.fullmatch(pattern, file.name))
        if files:
            _check_count(path, files)
            return files
    return _variant(path)


def _variant(path: Path) -> list[Path]:
    for pattern in (r"model\.\w+\.safetensors", r"pytorch_model\.\w+\.bin"):
        files = sorted(file for file in path.glob("*") if re.fullmatch(pattern, file.name))
        if len(files) == 1:
            return files
    return []


def _check_count(path: Path, files: list[Path]) -> None:
    """Raise if fewer shards are there than their names say."""
    of = int(files[0].stem.rpartition("-")[2])
    if len(files) != of:
        raise SourceError(
            f"'{path}' is incomplete: {len(files)} of {of} shards are there",
            got=", ".join(file.name for file in files[:_SHOWN]),
            hint="download or copy the folder again",
        )


def _indexed(path: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"cannot read '{index}'", got=one_line(error)) from error
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd:  # a file elsewhere is none of this folder's
        raise SourceError(f"'{index}' names a file outside its folder", got=str(odd[0]))
    if not names:
        raise SourceError(f"'{index}' names no file", hint="download or copy the folder again")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise SourceError(
            f"'{path}' is incomplete: {len(missing)} of {len(names)} shards are missing",
            got=f"no {shown}, which {index.name} names",
            hint="download or copy the folder again",
        )
    return [path / name for name in names]


def quantised_names(pieces: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that are quantised weights or their scales.

    Args:
        pieces: tensors, or where they lie: anything with a dtype and a shape.
    """
    return [name for name, piece in pieces.items() if _SCALES.search(name) or _is_quantised(piece)]


def _is_quantised(piece: Any) -> bool:
    return piece.dtype in _QUANTISED and len(piece.shape) > 1


def refuse_quantised(path: Path, method: str, names: Iterable[str]) -> SourceError:
    """Return the error for weights that are stored quantised."""
    names = list(names)
    said = f"config.json says {method}" if method else "its tensors say so"
    return SourceError(
        f"the weights in '{path}' are quantised, and jacdiag reads only weights in floating point",
        got=f"{said}; {_listed(names)}" if names else said,
        hint=(
            "audit the model that was quantised, or save a dequantised copy in bfloat16 or float32"
        ),
    )


def _listed(names: list[str]) -> str:
    shown = printable(", ".join(names[:3]))
    tensors = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} such {tensors}: {shown}{' ...' if len(names) > 3 else ''}"
