"""Names of files for libraries that take text in UTF-8 only. A name on Linux may be any bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def name_in_utf8(path: Path, *, without_suffix: bool = False) -> Iterator[str]:
    """Yield a name in UTF-8 under which a file can be opened meanwhile.

    Args:
        path: of a file that can be read.
        without_suffix: whether the name must not have the suffix of the file.

    Yields:
        The path as it is, if it will do; else the name that Linux gives to the open file.
    """
    name = os.fspath(path)
    if _is_utf8(name) and not without_suffix:
        yield name
        return

    with path.open("rb") as file:
        yield f"/proc/self/fd/{file.fileno()}"


def _is_utf8(name: str) -> bool:
    """Return whether a name can be written in UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
