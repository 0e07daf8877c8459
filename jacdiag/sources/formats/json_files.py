"""JSON that other programs wrote: configs, indices, states of trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jacdiag.errors import SourceError, one_line
from jacdiag.sources.formats.refused_formats import check_downloaded

_LARGEST = 1 << 28  # bytes; the largest index of a published model has a few million


def read_json(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8, with or without a byte order mark.

    Args:
        path: of the file.

    Returns:
        What the file holds: an object, a list, or a single value.

    Raises:
        SourceError: it cannot be read, or is no JSON; the message says why.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST)
    except OSError as error:
        raise SourceError(f"cannot read '{path}'", got=error.strerror) from error
    check_downloaded(path, data[:64])

    # Brackets in brackets without end are JSON too.
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"cannot read '{path}' as JSON",
            got=one_line(error),
            hint="download or copy the file again",
        ) from error
