"""The files of a folder that hold its weights, and whether those weights are quantised."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, one_line, printable
from jacdiag.sources.formats.json_files import read_json

_SHOWN = 5
# In the order in which transformers looks for them.
_ONE_FILE = ("model.safetensors", "pytorch_model.bin")
_SHARDS = (r"model-\d+-of-\d+\.safetensors", r"pytorch_model-\d+-of-\d+\.bin")
_VARIANTS = (r"model\.\w+\.safetensors", r"pytorch_model\.\w+\.bin")
# Names of what quantisation methods store next to their packed weights.
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

    Args:
        path: the folder.

    Returns:
        One file, or all shards; none if the folder has no weights of PyTorch.

    Raises:
        SourceError: shards are missing, or an index cannot be read.
    """
    # 1. One file, or the shards that an index names.
    files = _named_files(path)
    if files:
        return files

    # 2. Shards without an index.
    for pattern in _SHARDS:
        files = _matching(path, pattern)
        if files:
            _check_count(path, files)
            return files

    # 3. A file of a variant (model.fp16.safetensors).
    return _variant(path)


def _named_files(path: Path) -> list[Path]:
    """Return the first complete set under a usual name; none if there is no set.

    Raises:
        SourceError: there are sets, and all are incomplete.
    """
    incomplete: list[SourceError] = []
    for name in _ONE_FILE:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            return _indexed(path, index)
        except SourceError as error:
            # the other format may be complete
            incomplete.append(error)
    if incomplete:
        raise incomplete[0]
    return []


def _matching(path: Path, pattern: str) -> list[Path]:
    """Return the files of a folder whose names match a pattern, in order."""
    return sorted(file for file in path.glob("*") if re.fullmatch(pattern, file.name))


def _variant(path: Path) -> list[Path]:
    """Return the only file of a variant; none if there are several."""
    for pattern in _VARIANTS:
        files = _matching(path, pattern)
        # of several, none is meant more than another
        if len(files) == 1:
            return files

    return []


def _check_count(path: Path, files: list[Path]) -> None:
    """Raise if fewer shards are there than their names say."""
    # "model-00001-of-00003"
    count = int(files[0].stem.rpartition("-")[2])
    if len(files) == count:
        return
    raise SourceError(
        f"'{path}' is incomplete: {len(files)} of {count} shards are there",
        got=", ".join(file.name for file in files[:_SHOWN]),
        hint="download or copy the folder again",
    )


def _indexed(path: Path, index: Path) -> list[Path]:
    """Return the shards that an index names.

    Raises:
        SourceError: the index cannot be read, or a shard is missing.
    """
    # 1. The names, which somebody else wrote.
    names = _names_in_index(index)
    if not names:
        raise SourceError(f"'{index}' names no file", hint="download or copy the folder again")

    # 2. The files.
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN])
        if len(missing) > _SHOWN:
            shown += " ..."
        raise SourceError(
            f"'{path}' is incomplete: {len(missing)} of {len(names)} shards are missing",
            got=f"no {shown}, which {index.name} names",
            hint="download or copy the folder again",
        )
    return [path / name for name in names]


def _names_in_index(index: Path) -> list[str]:
    """Return the file names in an index, in order.

    Raises:
        SourceError: it cannot be read, or names a file outside its folder.
    """
    content = read_json(index)
    try:
        names = sorted(set(content["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"cannot read '{index}'", got=one_line(error)) from error
    for name in names:
        # a file elsewhere is none of this folder's
        is_in_folder = isinstance(name, str) and Path(name).name == name
        if not is_in_folder:
            raise SourceError(f"'{index}' names a file outside its folder", got=str(name))
    return names


def quantised_names(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that are quantised weights or their scales.

    Args:
        tensors: tensors, or where they lie: anything with a dtype and a shape.
    """
    names = []
    for name, tensor in tensors.items():
        is_scale = _SCALES.search(name) is not None
        if is_scale or _is_quantised(tensor):
            names.append(name)
    return names


def _is_quantised(tensor: Any) -> bool:
    """Return whether a tensor holds 8-bit numbers: a matrix of integers, or floating point."""
    if tensor.dtype not in _QUANTISED:
        return False
    # vectors of integers may be counts
    least = 1 if tensor.dtype.is_floating_point else 2
    return len(tensor.shape) >= least


def refuse_quantised(path: Path, method: str, names: Sequence[str]) -> SourceError:
    """Return the error for weights that are stored quantised.

    Args:
        path: where they lie.
        method: what the config says about it; empty if nothing.
        names: of the quantised tensors.
    """
    reason = f"config.json says {method}" if method else "its tensors say so"
    if names:
        reason += f"; {_listed(names)}"
    return SourceError(
        f"the weights in '{path}' are quantised, and jacdiag reads only weights in floating point",
        got=reason,
        hint=(
            "audit the model that was quantised, or save a dequantised copy in bfloat16 or float32"
        ),
    )


def _listed(names: Sequence[str]) -> str:
    """Return the number of tensors, and the first names."""
    tensors = "tensor" if len(names) == 1 else "tensors"

    shown = printable(", ".join(names[:3]))
    if len(names) > 3:
        shown += " ..."
    return f"{len(names)} such {tensors}: {shown}"
