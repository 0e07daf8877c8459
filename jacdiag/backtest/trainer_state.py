"""The `trainer_state.json` of a Hugging Face Trainer, which holds all that it logged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jacdiag.errors import SourceError

STATE_FILE = "trainer_state.json"

# What the Trainer calls the series of a run, in the order in which they are looked for.
NAMES = {"lr": ("learning_rate",)}

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class TrainerLog:
    """What a Trainer wrote of one run.

    Attributes:
        rows: one for each time that it logged.
        factors: what a search of hyperparameters varied, and `steps` if the run did not end.
    """

    rows: list[dict[str, Any]]
    factors: dict[str, Any]


def read_trainer_state(file: Path) -> TrainerLog:
    """Read a `trainer_state.json`.

    Args:
        file: of the output folder, or of a checkpoint in it.

    Raises:
        SourceError: the file cannot be read, or is something else.
    """
    # 1. What was logged.
    state = _read_json(file)
    rows = [row for row in state["log_history"] if isinstance(row, dict)]

    # 2. What a search varied.
    factors: dict[str, Any] = {}
    varied = state.get("trial_params")
    if isinstance(varied, dict):
        factors.update(varied)

    # 3. A run that was to have more steps is not at its end.
    if not _is_finished(state):
        factors["steps"] = state["max_steps"]
    return TrainerLog(rows, factors)


def is_trainer_state(file: Path) -> bool:
    """Return whether a file is the state of a Trainer, whatever its name is.

    Args:
        file: any file.
    """
    if file.suffix != ".json":
        return False
    try:
        _read_json(file)
    except SourceError:
        return file.name == STATE_FILE
    return True


def find_state(folder: Path) -> Path | None:
    """Return the state of the latest step in the output folder of a Trainer.

    It is in the folder itself, or in one of its checkpoints. A checkpoint holds all that was logged
    before it.

    Args:
        folder: that may be such a folder.

    Returns:
        None if there is no state in it.

    Raises:
        SourceError: a state cannot be read.
    """
    # 1. All that there are.
    files = [file for file in [folder / STATE_FILE] if file.is_file()]
    for file in sorted(folder.glob(f"checkpoint-*/{STATE_FILE}")):
        if _CHECKPOINT.fullmatch(file.parent.name):
            files.append(file)

    # 2. The latest. Of equal ones the first, which is that of the folder itself.
    latest = None
    latest_step = -1
    for file in files:
        step = _number(_read_json(file), "global_step")
        if step > latest_step:
            latest, latest_step = file, step
    return latest


def folder_of_run(file: Path) -> Path:
    """Return the output folder of the run that a state belongs to.

    Args:
        file: the state.
    """
    folder = file.absolute().parent
    if _CHECKPOINT.fullmatch(folder.name):
        return folder.parent
    return folder


def _is_finished(state: Mapping[str, Any]) -> bool:
    """Return whether the run made all of its steps, or was stopped by its own rules."""
    planned = _number(state, "max_steps")
    if _number(state, "global_step") >= planned:
        return True
    callbacks = state.get("stateful_callbacks")
    if not isinstance(callbacks, dict):
        return False

    # The Trainer's own control says so after early stopping.
    control = callbacks.get("TrainerControl")
    if not isinstance(control, dict):
        return False
    options = control.get("args")
    return isinstance(options, dict) and bool(options.get("should_training_stop"))


def _read_json(file: Path) -> dict[str, Any]:
    """Return the state that a file holds. NaN is a number there."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read the run '{file}'", got=str(error)) from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise SourceError(
            f"'{file}' is no state of a Trainer", hint="one has a list `log_history` in it"
        )
    return state


def _number(state: Mapping[str, Any], key: str) -> int:
    """Return a number of the state; 0 if it has none."""
    value = state.get(key)
    if isinstance(value, int):
        return value
    return 0
