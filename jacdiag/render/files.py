"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jacdiag.errors import UsageError

written: list[str] = []  # files that this process has written: Ctrl-C names them


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: an interruption leaves no half-written file.

    Raises:
        UsageError: the folder is missing or cannot be written to.
    """
    target = Path(path)
    check_writable(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(_mode(target))
        Path(name).replace(target)
        written.append(str(target))
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises UsageError where a file could not be written; to be called before long work, not after it."""
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"cannot write '{target}'", got="a folder of that name", hint="name a file in it")
    if not target.parent.is_dir():
        raise UsageError(f"cannot write '{target}'", got="its folder does not exist", hint=f"mkdir -p {target.parent}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write '{target}'", got=f"no permission to write in {target.parent.resolve()}")


def _mode(target: Path) -> int:
    """The mode that a plain open() would give: what is there, else 0666 less the umask."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
