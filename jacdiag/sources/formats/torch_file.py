"""What torch.save wrote: the zip format, memory-mapped, and the old pickle format."""

from __future__ import annotations

import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError, one_line
from jacdiag.sources.formats.file_names import name_in_utf8
from jacdiag.sources.formats.guard import GuardedPickle, Unsafe, refusal
from jacdiag.sources.formats.refused_formats import check_downloaded, exported_program, torchscript

# First bytes: of a zip, and of pickles with protocol 2 to 5.
_ZIP = b"PK\x03\x04"
# The number at the start of the old format: torch.serialization.MAGIC_NUMBER, in a pickle.
_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# In errors of torch about a file that ends too early.
_WORDS_FOR_CUT = ("truncated", "eof", "ran out of input")


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
    except MemoryError as error:
        got = "it asks for more memory than there is"
        hint = _hint(error, trust_pickle)
        raise SourceError(f"cannot read '{path}'", got=got, hint=hint) from error
    # a stranger's bytes in the readers of others: they may raise anything
    except Exception as error:
        hint = _hint(error, trust_pickle)
        raise SourceError(f"cannot read '{path}'", got=one_line(error), hint=hint) from error


def is_torch_file(path: Path) -> bool:
    """Return whether torch.save wrote a file, whatever its name: as a zip, or in its old format."""
    # 1. The old format begins with a number that torch knows it by.
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return False
    if head.startswith(_PICKLES):
        return _MAGIC in head

    # 2. A zip has the pickle of torch.
    return head.startswith(_ZIP) and _is_torch_zip(path)


def _is_torch_zip(path: Path) -> bool:
    """Return whether a zip is one that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # damaged bytes may raise anything
    except Exception:
        return False
    return _has_entry(names, "/data.pkl")


def _has_entry(names: list[str], ending: str) -> bool:
    """Return whether one of the entries of a zip has a name with this ending."""
    return any(name.endswith(ending) for name in names)


def _load(
    path: Path, zipped: bool, guard: GuardedPickle, trust_pickle: bool
) -> tuple[Any, list[str]]:
    """Return what a file holds, and the names of the classes that became stubs."""
    # torch reads a file called .safetensors as one, whatever it holds
    is_misnamed = path.suffix == ".safetensors"
    naming = name_in_utf8(path, without_suffix=is_misnamed)
    with warnings.catch_warnings(), naming as name:
        # of source code that torch could not find for a stub, of old storages
        warnings.simplefilter("ignore")
        if trust_pickle:
            return torch.load(name, map_location="cpu", weights_only=False, mmap=zipped), []
        content = torch.load(
            name, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=guard.module
        )
        return content, guard.unread


def _hint(error: Exception, trust_pickle: bool) -> str | None:
    """Return what to do, by torch's own words.

    Nothing else distinguishes an old file that was cut from one of another kind.
    """
    # 1. Damaged, or of another kind.
    said = str(error).lower()
    names_end = any(word in said for word in _WORDS_FOR_CUT)
    if names_end or isinstance(error, EOFError):
        return "it is truncated: copy or save it again"
    if "magic number" in said:
        return "it is a pickle, but not one of torch.save: save it again with torch.save"

    # 2. Intact, but its pickle needs code.
    if trust_pickle:
        return _where_its_code_is(error)
    return "if its classes need their own code, add --trust-pickle (only for a file that you trust)"


def _where_its_code_is(error: Exception) -> str | None:
    """Return how to let Python find the code of the classes in a trusted pickle."""
    way = "or leave --trust-pickle out: its weights are read, and --model FACTORY builds the module"
    # 1. A module that is not on the path.
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"PYTHONPATH=. (or the folder that holds {package}) lets its code be found; {way}"

    # 2. A class that has moved: Python says "Can't get attribute 'Net' on ...".
    if isinstance(error, AttributeError) and "get attribute" in str(error):
        return f"its classes must have the names and modules of when it was saved; {way}"
    return None


def _entries(path: Path) -> list[str]:
    """Return the names of the entries of a zip.

    Raises:
        SourceError: its directory is broken.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:
        raise SourceError(
            f"the zip '{path}' is broken", got=str(error), hint="copy or save it again"
        ) from error


def _is_zip(path: Path) -> bool:
    """Return whether a file has the directory of a zip at its end."""
    try:
        return zipfile.is_zipfile(path)
    # one that says to go on, on another disk
    except zipfile.BadZipFile:
        return False


def _check(path: Path) -> bool:
    """Check the first bytes and the zip's directory; return whether it is the zip format.

    Raises:
        SourceError: it is no file of torch.save.
    """
    with path.open("rb") as file:
        head = file.read(64)

    check_downloaded(path, head)

    # 1. The zip format.
    if head.startswith(_ZIP):
        _check_zip(path)
        return True

    # 2. The old format. torch would unpack a tar to the disk before it reads a pickle.
    if tarfile.is_tarfile(path):
        raise SourceError(
            f"'{path}' is a tar archive", hint="save it again with a torch of this decade"
        )
    if head.startswith(_PICKLES):
        return False
    raise SourceError(
        f"'{path}' is no file of torch.save",
        got=f"it begins with {head[:16]!r}",
        hint=(
            "expected a zip or a pickle of torch.save; for safetensors, name the file .safetensors"
        ),
    )


def _check_zip(path: Path) -> None:
    """Raise unless a file that begins as a zip is one of torch.save."""
    # 1. The end of a zip holds its directory.
    if not _is_zip(path):
        raise SourceError(
            f"'{path}' is truncated",
            got=f"a zip of {path.stat().st_size:,} bytes without its directory at the end",
            hint="copy or save it again",
        )

    # 2. Zips that other functions of torch write.
    names = _entries(path)
    if _has_entry(names, "/constants.pkl"):
        raise torchscript(path)
    if _has_entry(names, "/archive_format"):
        raise exported_program(path)

    # 3. Zips of anything else.
    if not _has_entry(names, "data.pkl"):
        raise SourceError(
            f"'{path}' is a zip, but not one of torch.save",
            got=f"{len(names)} entries, none of them data.pkl",
        )
