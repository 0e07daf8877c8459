"""Weights that stay in their files: each tensor is read on request, and cached while there is room.

They are read, not memory-mapped: a disk that fails, or a file that shrinks under a mapping, ends
the process with a SIGBUS that nobody can name; and mapped pages would count as the process's own
memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from jacdiag.errors import SourceError

ROOM = 1 << 29  # a block of a 7B model in bf16


class StoredTensor(Protocol):
    """One tensor in a file: known by shape and dtype, read on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements in the file."""

    def read(self) -> Tensor:
        """Read the tensor.

        Raises:
            SourceError: the file cannot be read, or is shorter than it was.
        """


class StoredWeights(Mapping[str, Tensor]):
    """Tensors by name, read on request; the last ones are cached while they fit into `room`.

    Args:
        pieces: name -> where its tensor lies. Two names may share a tensor.
        room: bytes of tensors that are kept.

    Attributes:
        read_bytes: how much was read so far.
    """

    def __init__(self, pieces: Mapping[str, StoredTensor], room: int = ROOM) -> None:
        self.pieces = dict(pieces)
        self.room = room
        self.read_bytes = 0
        # by the id of the stored tensor, the one that was used last at the end
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        self._cached_bytes = 0

    def __getitem__(self, name: str) -> Tensor:
        # 1. From the cache.
        piece = self.pieces[name]
        key = id(piece)
        cached = self._cache.get(key)
        if cached is not None:
            self._cache.move_to_end(key)
            return cached

        # 2. From its file. Make room before it is read: both would not fit.
        size = outline(piece).nbytes
        while self._cache and self._cached_bytes + size > self.room:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        tensor = piece.read()
        self.read_bytes += size

        # 3. Keep it, unless it is too large for any room.
        if size <= self.room:
            self._cache[key] = tensor
            self._cached_bytes += size
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def outlines(self) -> dict[str, Tensor]:
        """Return an empty meta tensor of the same shape and dtype for each name."""
        return {name: outline(piece) for name, piece in self.pieces.items()}

    def renamed(self, names: Mapping[str, str]) -> StoredWeights:
        """Return the same tensors under other names.

        Args:
            names: new name -> old name.
        """
        return StoredWeights({new: self.pieces[old] for new, old in names.items()}, self.room)


def outline(piece: StoredTensor) -> Tensor:
    """Return an empty meta tensor of the shape and dtype of a stored tensor."""
    return torch.empty(piece.shape, dtype=piece.dtype, device="meta")


def failed(path: Path, what: str) -> SourceError:
    """Return the error for a file that was good when it was opened."""
    hint = "the disk, or somebody who wrote to the file meanwhile"
    return SourceError(f"reading '{path}' failed", got=what, hint=hint)
