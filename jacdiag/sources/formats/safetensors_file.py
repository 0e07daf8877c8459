"""Safetensors: one file, memory-mapped."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from jacdiag.errors import SourceError


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors by name (memory-mapped) and the file's own metadata.

    Raises:
        SourceError: truncated, or not in this format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _broken(path, error) from error


def check(path: Path) -> None:
    """Reads the header and the length only. Raises SourceError like `read`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"cannot read '{path}' as safetensors",
        got=f"{path.stat().st_size:,} bytes: {error}",
        hint="it may be truncated: copy or save it again",
    )
