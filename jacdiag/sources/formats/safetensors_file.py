"""Safetensors: one file, read at once (memory-mapped) or tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacdiag.errors import SourceError, printable
from jacdiag.sources.formats.file_names import name_in_utf8
from jacdiag.sources.formats.refused_formats import check_downloaded
from jacdiag.sources.lazy_tensors import failed

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}

# Dtypes of the format that hold a part of a quantised weight: packed values of less than 8 bits,
# and powers of two as scales of blocks.
_QUANTISED = ("F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
_BLOCK = 1 << 28  # one call of the system reads no more than 2 GiB


@dataclass(frozen=True, eq=False)
class Span:
    """One tensor's bytes in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def read(self) -> Tensor:
        """Read the tensor.

        Raises:
            SourceError: the file cannot be read, or has become shorter.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype)
        # a view of no bytes cannot be read into
        if tensor.numel() == 0:
            return tensor

        target = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            self._read_into(target)
        except OSError as error:
            raise failed(self.path, error.strerror or str(error)) from error

        return tensor

    def _read_into(self, target: memoryview) -> None:
        """Read the tensor's bytes into memory, block by block."""
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, len(target), _BLOCK):
                block = target[start : start + _BLOCK]
                count = os.preadv(file.fileno(), [block], self.offset + start)
                # the length was right when the header was read
                if count < len(block):
                    size = self.path.stat().st_size
                    raise failed(self.path, f"{size:,} bytes: it has become shorter")


def is_safetensors(path: Path) -> bool:
    """Return whether a file of any name begins as this format does: a length, then JSON."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except OSError:
        return False
    # The length counts the bytes of the JSON, without those of the length itself.
    length = int.from_bytes(start[:8], "little")
    is_json = start[8:] == b"{"
    return is_json and 2 <= length <= size - 8


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name (memory-mapped) and the file's own metadata.

    Raises:
        SourceError: truncated, not in this format, or of a dtype that torch does not have.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # names a tensor whose dtype torch does not have
        _header(path)
        with name_in_utf8(path) as name, safe_open(name, framework="pt", device="cpu") as file:
            names = file.keys()  # the handle is no mapping
            tensors = {key: file.get_tensor(key) for key in names}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _broken(path, error) from error
    return tensors, dict(metadata)


def spans(path: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """Return where each tensor lies, by name, and the file's own metadata.

    Only the header is read.

    Raises:
        SourceError: truncated, not in this format, or of a dtype that torch does not have.
    """
    from safetensors import SafetensorError

    # 1. The header, as the library checks it.
    try:
        length, header = _header(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _broken(path, error) from error
    metadata = header.pop("__metadata__", None) or {}

    # 2. Offsets count from the end of the header, which follows 8 bytes with its length.
    spans_by_name = {}
    for name, entry in header.items():
        dtype = _DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(entry["shape"]) * dtype.itemsize:
            raise _broken(path, ValueError(f"the size of '{name}' does not fit its shape"))
        spans_by_name[name] = Span(path, tuple(entry["shape"]), dtype, 8 + length + begin)
    return spans_by_name, metadata


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the length of a file's header and the header.

    Raises:
        SourceError: a tensor has a dtype that torch does not have.
    """
    from safetensors import safe_open

    # 1. The library's own check of the header: sizes, order, overlap, the file's length.
    with path.open("rb") as file:
        check_downloaded(path, file.read(64))
    with name_in_utf8(path) as name, safe_open(name, framework="pt", device="cpu"):
        pass

    # 2. The header itself, which the library does not hand out.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise _unreadable(path, key, entry["dtype"])
    return length, header


def _unreadable(path: Path, name: str, dtype: str) -> SourceError:
    """Return the error for a tensor of a dtype that is not read."""
    got = f"'{printable(name)}' has the dtype {printable(dtype)}"
    if dtype not in _QUANTISED:
        return SourceError(
            f"'{path}' holds a tensor that jacdiag cannot read",
            got=got,
            hint="save it in bfloat16 or float32",
        )
    return SourceError(
        f"the weights in '{path}' are quantised, and jacdiag reads only weights in floating point",
        got=got,
        hint=(
            "audit the model that was quantised, or save a dequantised copy in bfloat16 or float32"
        ),
    )


def _broken(path: Path, error: Exception) -> SourceError:
    """Return the error for a file that the library cannot read."""
    hint = "it may be truncated: copy or save it again"
    # The library says so of a dtype that it does not know.
    if "unknown variant" in str(error):
        hint = "update safetensors, or copy the file again"
    return SourceError(
        f"cannot read '{path}' as safetensors",
        got=f"{path.stat().st_size:,} bytes: {error}",
        hint=hint,
    )
