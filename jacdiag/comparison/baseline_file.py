"""The file of a baseline: written in full or not at all, and checked when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jacdiag.comparison.baseline_coverage import ModelSize, describe_size, differs_in_size
from jacdiag.errors import SourceError, UsageError
from jacdiag.records import SCHEMA_VERSION, FiguresRecord
from jacdiag.sources.python_source import path_text

_LARGEST = 256 * 2**20  # bytes


def read_baseline(path: str | os.PathLike[str]) -> FiguresRecord:
    """Read a baseline.

    Args:
        path: of a file that `--write-baseline` wrote.

    Raises:
        SourceError: there is no such file, or it is no baseline.
        UsageError: it is of another version.
    """
    path = Path(path_text(path))
    data = _read_json(path)

    # 1. Check what it is before it is read as a record.
    if not _has_tables(data):
        hint = "--write-baseline writes one; a report is compared by `jacdiag diff`"
        raise SourceError(f"'{path}' is no baseline", hint=hint)
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"the baseline '{path}' has another version",
            got=repr(data.get("schema_version")),
            hint="write it again with --write-baseline",
        )

    # 2. Read the record. A file that was edited by hand may still hold anything.
    try:
        return FiguresRecord.from_dict(data)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise SourceError(f"'{path}' is no baseline", got=str(error)) from error


def _read_json(path: Path) -> Any:
    """Return the JSON of a file, unless the file is far too large for a baseline."""
    try:
        if path.stat().st_size > _LARGEST:
            raise SourceError(f"'{path}' is no baseline", got=f"{path.stat().st_size:,} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "the same command with --write-baseline writes it"
        raise SourceError(f"no such baseline: '{path}'", hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"cannot read the baseline '{path}'", got=str(error)) from error


def _has_tables(data: Any) -> bool:
    """Return whether JSON holds the two tables that every baseline has."""
    if not isinstance(data, dict):
        return False

    sublayers, weights = data.get("sublayers"), data.get("weights")
    return isinstance(sublayers, dict) and isinstance(weights, dict)


def write_baseline(path: str | os.PathLike[str], figures: FiguresRecord) -> None:
    """Write a baseline, in full or not at all.

    The text is stable, so that a change shows as a small diff.

    Args:
        path: of the file; "-" is stdout.
        figures: to write.
    """
    from jacdiag.records.output_file import write_output

    text = json.dumps(figures.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_output(path, (text + "\n").encode(errors="backslashreplace"))


def check_comparable(path: Path, now: FiguresRecord, before: FiguresRecord) -> None:
    """Raise if a baseline is of another model.

    Args:
        path: of the file of the baseline.
        now: the figures of the model that is checked.
        before: those of the baseline.

    Raises:
        UsageError: no name of a sub-layer or weight is in both.
    """
    same_weights = now.weights.keys() & before.weights.keys()
    same_sublayers = now.sublayers.keys() & before.sublayers.keys()
    if same_weights or same_sublayers:
        return

    raise UsageError(
        f"the baseline '{path}' is of another model",
        got=f"{before.model}, {before.layers} layers; now {now.model}, {now.layers} layers",
        hint="--write-baseline writes one of this model",
    )


def check_same_size(now: ModelSize, before: ModelSize) -> None:
    """Raise if a baseline is of a model of another depth or width.

    Args:
        now: the size of the model that is checked.
        before: that of the baseline.

    Raises:
        UsageError: no figure of one size says anything about the other.
    """
    if not differs_in_size(now, before):
        return

    raise UsageError(
        "the baseline is of another model size",
        got=f"{describe_size(before)}; now {describe_size(now)}",
        hint="build the model in the size of the baseline (--model-args), or write a baseline of "
        "this size with --write-baseline",
    )
