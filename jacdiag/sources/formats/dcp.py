"""Folders of torch.distributed.checkpoint: each tensor in pieces inside larger files.

The file `.metadata` in the folder is a pickle. The guarded reader reads it, so that nothing in it
runs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jacdiag.errors import SourceError, one_line
from jacdiag.sources.formats.guard import GuardedPickle, Stub, Unsafe, refusal
from jacdiag.sources.lazy_tensors import failed


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: where it begins in the tensor, its sizes, and its bytes in a file."""

    at: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    offset: int
    length: int

    @property
    def block(self) -> tuple[slice, ...]:
        """Its place in the tensor, as an index."""
        bounds = zip(self.at, self.sizes, strict=True)
        return tuple(slice(start, start + size) for start, size in bounds)

    def read(self) -> Tensor:
        """Read the block.

        Raises:
            SourceError: its file cannot be read, or does not hold it.
        """
        # 1. Parse the bytes. A stranger's bytes in the readers of others may raise anything.
        data = self._read_bytes()
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise failed(
                self.path, f"the {self.length:,} bytes at {self.offset:,} are no tensor"
            ) from error

        # 2. Check that it is the tensor of the index.
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != self.sizes:
            raise failed(
                self.path, f"at byte {self.offset:,} is no tensor of the size that .metadata tells"
            )
        return tensor.detach()

    def _read_bytes(self) -> bytes:
        """Read the bytes of the block.

        Raises:
            SourceError: its file cannot be read, or ends before them.
        """
        try:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), self.length, self.offset)
        except OSError as error:
            raise failed(self.path, error.strerror or str(error)) from error

        if len(data) < self.length:
            raise failed(self.path, f"{self.path.stat().st_size:,} bytes: it has become shorter")
        return data


@dataclass(frozen=True, eq=False)
class Chunked:
    """One tensor, in chunks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def read(self) -> Tensor:
        """Read the tensor.

        Raises:
            SourceError: a file cannot be read, or does not hold its block.
        """
        # One chunk that is the entire tensor need not be copied.
        if len(self.chunks) == 1 and self.chunks[0].sizes == self.shape:
            return self.chunks[0].read()
        tensor = torch.empty(self.shape, dtype=self.dtype)

        for chunk in self.chunks:
            tensor[chunk.block] = chunk.read()
        return tensor


def is_folder(path: Path) -> bool:
    """Return whether a folder has a `.metadata`."""
    return (path / ".metadata").is_file()


def chunked(path: Path) -> dict[str, Chunked]:
    """Return where each tensor of a folder lies, by its flattened name.

    Raises:
        SourceError: `.metadata` is broken, unsafe, or of another make; a file that it names is
            missing or too short.
    """
    metadata = _metadata(path)
    # a stranger's bytes in the readers of others: they may raise anything
    try:
        tensors = _tensors(path, metadata)
    except Exception as error:
        raise _foreign(path, one_line(error)) from error
    _check_files(path, tensors)
    return tensors


def _tensors(path: Path, metadata: Mapping[str, Any]) -> dict[str, Chunked]:
    """Return where each tensor lies, by its flattened name, as the attributes of `.metadata` say.

    They may raise anything if they are of another make.
    """
    places = {_place(index): info.state for index, info in metadata["storage_data"].items()}
    tensors = {}
    for name, stub in metadata["state_dict_metadata"].items():
        # Other entries are bytes: step counts and random states.
        if "chunks" in stub.state:
            tensors[str(name)] = _tensor(path, str(name), stub.state, places)
    return tensors


def _metadata(path: Path) -> Mapping[str, Any]:
    """Return the attributes of the object in `.metadata`."""
    # 1. Read it, and run nothing.
    guard = GuardedPickle()
    file = path / ".metadata"
    try:
        with file.open("rb") as data:
            content = guard.module.load(data)
    except Unsafe as unsafe:
        raise refusal(file, unsafe) from None
    # a stranger's bytes in the readers of others: they may raise anything
    except Exception as error:
        raise SourceError(
            f"cannot read '{file}'", got=one_line(error), hint="copy or save the folder again"
        ) from error

    # 2. Its class is not imported, so that it comes as a stub.
    if not isinstance(content, Stub) or not isinstance(content.state, Mapping):
        raise _foreign(path, f"a {type(content).__name__}")
    return content.state


def _place(index: Stub) -> tuple[str, tuple[int, ...]]:
    """Return what identifies a chunk: the tensor's name and the chunk's offset."""
    return str(index.state["fqn"]), tuple(index.state.get("offset") or ())


def _tensor(
    path: Path, name: str, state: Mapping[str, Any], places: Mapping[Any, Mapping[str, Any]]
) -> Chunked:
    """Return where the chunks of one tensor lie; raise ValueError if they cannot be read."""
    # Versions of torch store the properties as a tuple or by name.
    properties = state["properties"].state
    if isinstance(properties, tuple):
        dtype = properties[0]
    else:
        dtype = properties["dtype"]

    chunks = [_chunk(path, name, chunk.state, places) for chunk in state["chunks"]]
    return Chunked(tuple(state["size"]), dtype, tuple(chunks))


def _chunk(
    path: Path, name: str, state: Mapping[str, Any], places: Mapping[Any, Mapping[str, Any]]
) -> Chunk:
    """Return where one chunk of a tensor lies; raise ValueError if it cannot be read."""
    at, sizes = tuple(state["offsets"]), tuple(state["sizes"])
    place = places[name, at]
    file = place["relative_path"]
    if Path(file).name != file:
        raise ValueError(f"'{name}' lies in a file outside the folder: {file}")
    if place.get("transform_descriptors"):
        raise ValueError(f"'{name}' is stored transformed (compressed or encrypted)")
    return Chunk(at, sizes, path / file, int(place["offset"]), int(place["length"]))


def _check_files(path: Path, tensors: Mapping[str, Chunked]) -> None:
    """Raise if a file of a folder is missing or too short."""
    # 1. How long each file must be.
    ends: dict[Path, int] = {}
    for tensor in tensors.values():
        for chunk in tensor.chunks:
            ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.offset + chunk.length)

    # 2. How long it is.
    missing = []
    short = []
    for file in sorted(ends):
        if not file.is_file():
            missing.append(file.name)
        elif file.stat().st_size < ends[file]:
            short.append(file.name)

    # 3. Name the files that are missing before those that are short.
    if missing:
        raise _incomplete(path, missing, len(ends), "missing")
    if short:
        raise _incomplete(path, short, len(ends), "shorter than .metadata says")


def _incomplete(path: Path, names: list[str], count: int, what: str) -> SourceError:
    """Return the error for a folder without all bytes of its tensors.

    Args:
        path: the folder.
        names: of the files that are concerned.
        count: how many files there should be.
        what: is the matter with them.
    """
    return SourceError(
        f"'{path}' is incomplete: {len(names)} of {count} files are {what}",
        got=", ".join(names[:5]),
        hint="copy the folder again, from every machine that wrote to it",
    )


def _foreign(path: Path, got: str) -> SourceError:
    """Return the error for a folder of another make or version."""
    return SourceError(
        f"'{path / '.metadata'}' is not that of torch.distributed.checkpoint, or of a version "
        "that is not known",
        got=got,
        hint=(
            "to one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            "FOLDER checkpoint.pt"
        ),
    )
