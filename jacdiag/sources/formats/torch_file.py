"""What torch.save wrote: the zip format, memory-mapped, and the old pickle format."""

from __future__ import annotations

import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, one_line
from jacdiag.sources.formats.guard import GuardedPickle, Unsafe, refusal
from jacdiag.sources.formats.refused_formats import torchscript

_ZIP = b"PK\x03\x04"


def read(path: Path, *, trust_pickle: bool = False) -> tuple[Any, list[str]]:
    """Read a file of torch.save.

    Args:
        path: the file.
        trust_pickle: let the file's pickle run code, as plain torch.load would.

    Returns:
        What was saved, tensors on the CPU and memory-mapped where the format allows, and the names
        of classes that were left unread (stubs in their place).

    Raises:
        SourceError: not a file of torch.save, truncated, or unsafe.
    """
    zipped = _check(path)
    guard = GuardedPickle()
    try:
        return _load(path, zipped, guard, trust_pickle)
    except Unsafe as unsafe:
        raise refusal(path, unsafe) from None
    # a stranger's bytes in the readers of others: they may raise anything
    except Exception as error:
        got = (
            "it asks for more memory than there is"
            if isinstance(error, MemoryError)
            else one_line(error)
        )
        raise SourceError(
            f"cannot read '{path}'", got=got, hint=_hint(error, trust_pickle)
        ) from error


def is_torch_zip(path: Path) -> bool:
    """Return whether a file, whatever its name, is a zip that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # damaged bytes may raise anything
        return False


def _load(
    path: Path, zipped: bool, guard: GuardedPickle, trust_pickle: bool
) -> tuple[Any, list[str]]:
    with warnings.catch_warnings():
        # of source code that torch could not find for a stub, of old storages
        warnings.simplefilter("ignore")
        if trust_pickle:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped), []
        found = torch.load(
            path, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=guard.module
        )
        return found, guard.unread


def _hint(error: Exception, trust_pickle: bool) -> str | None:
    """Return what to do, by torch's own words.

    Nothing else distinguishes an old file that was cut from one of another kind.
    """
    said = str(error).lower()
    if isinstance(error, EOFError) or any(
        word in said for word in ("truncated", "eof", "ran out of input")
    ):
        return "it is truncated: copy or save it again"
    if "magic number" in said:
        return "it is a pickle, but not one of torch.save: save it again with torch.save"
    if trust_pickle:
        return _where_its_code_is(error)
    return "if its classes need their own code, add --trust-pickle (only for a file that you trust)"


def _where_its_code_is(error: Exception) -> str | None:
    """Return how to let Python find the code of the classes in a trusted pickle."""
    way = "or leave --trust-pickle out: its weights are read, and --model FACTORY builds the module"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (
            f"PYTHONPATH=. (or the folder that holds {error.name.partition('.')[0]}) lets its "
            f"code be found; {way}"
        )
    if isinstance(error, AttributeError) and "get attribute" in str(error):
        return f"its classes must have the names and modules of when it was saved; {way}"
    return None


def _entries(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:
        raise SourceError(
            f"the zip '{path}' is broken", got=str(error), hint="copy or save it again"
        ) from error


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one that says to go on, on another disk
        return False


def _check(path: Path) -> bool:
    """Check the first bytes and the zip's directory; return whether it is the zip format."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise SourceError(
            f"'{path}' is a Git LFS pointer, not the file itself", hint="git lfs pull"
        )
    if head.startswith(_ZIP):
        if not _is_zip(path):
            raise SourceError(
                f"'{path}' is truncated",
                got=f"a zip of {path.stat().st_size:,} bytes without its directory at the end",
                hint="copy or save it again",
            )
        names = _entries(path)
        if any(name.endswith("/constants.pkl") for name in names):
            raise torchscript(path)
        if not any(name.endswith("data.pkl") for name in names):
            raise SourceError(
                f"'{path}' is a zip, but not one of torch.save",
                got=f"{len(names)} entries, none of them data.pkl",
            )
        return True
    if tarfile.is_tarfile(path):  # torch would unpack it to the disk before it reads a pickle
        raise SourceError(
            f"'{path}' is a tar archive", hint="save it again with a torch of this decade"
        )
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return False
    raise SourceError(
        f"'{path}' is no file of torch.save",
        got=f"it begins with {head[:16]!r}",
        hint=(
            "expected a zip or a pickle of torch.save; for safetensors, name the file .safetensors"
        ),
    )
