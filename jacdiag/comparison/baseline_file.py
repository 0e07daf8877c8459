"""The file of a baseline: written whole, read with care, refused where it is of another model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jacdiag.errors import SourceError, UsageError
from jacdiag.records import SCHEMA_VERSION, FiguresRecord
from jacdiag.sources.python_source import path_text

_LARGEST = 256 * 2**20  # bytes


def read_baseline(path: str | os.PathLike[str]) -> FiguresRecord:
    """Reads a baseline.

    Raises:
        SourceError: missing, or no baseline; UsageError: of a newer version.
    """
    path = Path(path_text(path))
    try:
        if path.stat().st_size > _LARGEST:
            raise SourceError(f"'{path}' is no baseline", got=f"{path.stat().st_size:,} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "the same command with --write-baseline writes it"
        raise SourceError(f"no such baseline: '{path}'", hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"cannot read the baseline '{path}'", got=str(error)) from error
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), dict) for key in ("sublayers", "weights")
    ):
        hint = "--write-baseline writes one; a report is compared by `jacdiag diff`"
        raise SourceError(f"'{path}' is no baseline", hint=hint)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"the baseline '{path}' has another version",
            got=repr(data.get("schema_version")),
            hint="write it again with --write-baseline",
        )
    try:
        return FiguresRecord.from_dict(data)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise SourceError(f"'{path}' is no baseline", got=str(error)) from error


def write_baseline(path: str | os.PathLike[str], figures: FiguresRecord) -> None:
    """Writes a baseline, whole or not at all; stable, so that a change shows as a small diff. "-"
    is stdout.
    """
    from jacdiag.records.output_file import write_output

    text = json.dumps(figures.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_output(path, (text + "\n").encode())


def check_comparable(path: Path, now: FiguresRecord, before: FiguresRecord) -> None:
    """Refuses a baseline of another model.

    Raises:
        UsageError: no name of a sub-layer or weight is in both.
    """
    if not (now.weights.keys() & before.weights.keys()) and not (
        now.sublayers.keys() & before.sublayers.keys()
    ):
        raise UsageError(
            f"the baseline '{path}' is of another model",
            got=f"{before.model}, {before.layers} layers, beside {now.model}, {now.layers} layers",
            hint="--write-baseline writes one of this model",
        )
