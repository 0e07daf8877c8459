"""TensorBoard event files: the scalars of a run (extra `tensorboard`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jacdiag.errors import SourceError, UsageError

# What programs call the series of a run, in the order in which they are looked for.
NAMES = {
    "loss": ("loss", "train/loss", "train_loss", "loss/train", "Loss/train"),
    "grad_norm": ("grad_norm", "train/grad_norm", "grad_norm_post"),
    "lr": ("lr", "train/learning_rate", "learning_rate", "train/lr"),
}
STEP = "step"

_MARK = "tfevents"  # in the name of every event file


def is_event_file(path: Path) -> bool:
    """Return whether a file is named like an event file.

    Args:
        path: of the file.
    """
    return _MARK in path.name


def has_event_files(folder: Path) -> bool:
    """Return whether a folder holds event files itself.

    Args:
        folder: of a run, or of several.
    """
    return any(path.is_file() for path in folder.glob(f"*{_MARK}*"))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return one row for each step that has a scalar, with the step under `step`.

    Args:
        path: an event file, or a folder whose event files are one run.

    Raises:
        UsageError: TensorBoard is not installed.
        SourceError: the file cannot be read.
    """
    # 1. All events. TensorBoard reports damage at the end of a file to its log, and stops there.
    accumulator = _accumulator(path)
    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        accumulator.Reload()
    except Exception as error:
        raise SourceError(f"cannot read the run '{path}'", got=str(error)) from error
    finally:
        logger.setLevel(level)

    # 2. The scalars by step.
    rows: dict[int, dict[str, Any]] = {}
    for tag, step, value in _scalars(accumulator):
        rows.setdefault(step, {})[tag] = value
    return [{**rows[step], STEP: step} for step in sorted(rows)]


def _accumulator(path: Path) -> Any:
    """Return TensorBoard's reader of a path, which keeps every scalar."""
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError as error:
        raise UsageError(
            f"'{path}' is a run of TensorBoard, and reading it needs tensorboard",
            hint="pip install 'jacdiag[tensorboard]'",
        ) from error

    # 0 keeps all, and 1 as little as there can be.
    kept = {
        event_accumulator.SCALARS: 0,
        event_accumulator.TENSORS: 0,
        event_accumulator.IMAGES: 1,
        event_accumulator.AUDIO: 1,
        event_accumulator.HISTOGRAMS: 1,
        event_accumulator.COMPRESSED_HISTOGRAMS: 1,
    }
    return event_accumulator.EventAccumulator(str(path), size_guidance=kept)


def _scalars(accumulator: Any) -> Iterator[tuple[str, int, float]]:
    """Yield tag, step and value of every scalar, in both forms that files have them in."""
    # 1. Plain numbers, as PyTorch writes them.
    tags = accumulator.Tags()
    for tag in tags["scalars"]:
        for event in accumulator.Scalars(tag):
            yield tag, int(event.step), float(event.value)

    # 2. Tensors without a dimension, as TensorFlow writes them. Others are texts and histograms.
    for tag in tags["tensors"]:
        if accumulator.SummaryMetadata(tag).plugin_data.plugin_name != "scalars":
            continue
        for event in accumulator.Tensors(tag):
            yield tag, int(event.step), _number_of(event.tensor_proto)


def _number_of(proto: Any) -> float:
    """Return the number that a tensor of one element holds."""
    from tensorboard.util import tensor_util

    return float(tensor_util.make_ndarray(proto).item())
