"""Keep the last steps, batches and random states, and write them once something happens."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError
from jacdiag.monitor.batches import Batches
from jacdiag.monitor.kept_batches import KeptBatch, KeptBatches
from jacdiag.records.run_log import to_line
from jacdiag.trace.execution.precision import map_leaves
from jacdiag.trace.execution.rng_state import RandomState

STEPS_FILE = "steps.jsonl"
BATCH_FILE = "batch.pt"
RANDOM_FILE = "random.pt"
RUNNING_RANDOM_FILE = "running-random.pt"
ABOUT_FILE = "about.json"


class FlightRecorder:
    """Keeps the last steps, and writes them with the last batches as a flight.

    Args:
        folder: of the run.
        steps: how many to keep.
        most: how many flights to write at most; a run in trouble alerts more than once. As many
            again are written for rules that stand out again in their quiet time.

    Attributes:
        rows: the steps that are kept.
        dumps: flights so far, without those of repeats.
        repeats: flights of repeats so far.
    """

    def __init__(self, folder: Path, steps: int = 200, most: int = 5) -> None:
        """Begin without a step; see the class for the arguments."""
        self.folder = folder
        self.most = most
        self.dumps = 0
        self.repeats = 0
        self.rows: deque[Mapping[str, Any]] = deque(maxlen=max(steps, 1))

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a step."""
        self.rows.append(row)

    def dump(
        self,
        step: int,
        why: str,
        batches: Batches | None,
        header: Mapping[str, Any],
        ended: str = "",
        *,
        is_repeat: bool = False,
    ) -> Path | None:
        """Write `flight-STEP`.

        Args:
            step: that the flight is about; at the end of a run the last one that was finished.
            why: in one line.
            batches: what the model was called with.
            header: the first line of the run log.
            ended: how the loop was left, as `Ending.how` says it; empty if it goes on. The batches
                of a step that was running then are written as well.
            is_repeat: it is about a rule that stands out again in its quiet time.

        Returns:
            The folder; None if enough was written, or if it is there already.

        Raises:
            OSError: it cannot be written.
        """
        # 1. Choose the batches: those up to the step, and those of a step that was running.
        chosen: list[KeptBatch] = []
        running: list[KeptBatch] = []
        if batches is not None and batches.kept is not None:
            running = batches.kept.after(step) if ended else []
            chosen = _choose_batches(batches.kept, step, bool(running))

        # 2. Choose the folder.
        written = self.repeats if is_repeat else self.dumps
        folder = self._choose_folder(step, running, written)
        if folder is None:
            return None
        if is_repeat:
            self.repeats += 1
        else:
            self.dumps += 1
        folder.mkdir(parents=True)

        # 3. Write the steps and the batches, and last what the flight is about.
        (folder / STEPS_FILE).write_bytes(b"".join(to_line("step", row) for row in self.rows))
        about: dict[str, Any] = {
            "schema_version": 1,
            "step": step,
            "why": why,
            "groups": header.get("groups", []),
        }
        if chosen:
            about["batch_step"] = chosen[-1].step
            _write_batches(folder, chosen)
        if running:
            about["running_step"] = running[-1].step
            about["ended"] = ended
            _write_running_batches(folder, running)
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return folder

    def _choose_folder(self, step: int, running: Sequence[KeptBatch], written: int) -> Path | None:
        """Return a folder that is not there yet; None if no flight is to be written.

        Args:
            step: that the flight is about.
            running: batches of a step that was running.
            written: flights of the same kind so far.
        """
        # 1. An alert may have written that of the step, without the batch that was running.
        folder = self.folder / f"flight-{step}"
        if running and folder.exists():
            folder = self.folder / f"flight-{running[-1].step}"

        # 2. A batch that was running is written even if there are enough flights.
        is_enough = written >= self.most and not running
        if is_enough:
            return None

        # 3. A flight that is there stays as it is.
        if folder.exists():
            return None
        return folder


def _write_batches(folder: Path, batches: Sequence[KeptBatch]) -> None:
    """Write the latest batch with its random states, and those before it."""
    latest = batches[-1]
    _write_arguments(folder / BATCH_FILE, latest)
    torch.save(_plain_state(latest.random_state), folder / RANDOM_FILE)
    for number, batch in enumerate(reversed(batches[:-1]), start=1):
        _write_arguments(folder / f"batch-{number}-before-at-{batch.step}.pt", batch)


def _choose_batches(kept: KeptBatches, step: int, has_running: bool) -> list[KeptBatch]:
    """Return the batches up to a step, without those of a step that was running."""
    chosen = kept.chosen(step)
    if not has_running:
        return chosen

    # If no earlier batch is left, those that were running are all that there is.
    finished = [batch for batch in chosen if batch.step <= step]
    if not finished:
        return chosen
    return finished


def _write_running_batches(folder: Path, batches: Sequence[KeptBatch]) -> None:
    """Write the batches of the step that was running, and the random states of its last one."""
    torch.save(_plain_state(batches[-1].random_state), folder / RUNNING_RANDOM_FILE)
    for number, batch in enumerate(batches, start=1):
        _write_arguments(folder / f"running-batch-{number}-at-{batch.step}.pt", batch)


def _write_arguments(file: Path, batch: KeptBatch) -> None:
    torch.save(map_leaves(_on_cpu, batch.arguments), file)


# -- reading ---------------------------------------------------------------------------------------
def read_batch(
    folder: str | Path, sequences: int | None = None
) -> dict[str, Any] | tuple[Any, ...]:
    """Return the batch that a flight recorder kept.

    Args:
        folder: `flight-STEP` of a run.
        sequences: how many of the batch to take; all if not given.

    Returns:
        Keyword arguments of the model's forward, or a tuple of its arguments.

    Raises:
        SourceError: the folder holds none.
    """
    # 1. Read the file.
    file = Path(folder) / BATCH_FILE
    if not file.is_file():
        raise _no_batch_error(Path(folder))
    try:
        batch = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SourceError(f"cannot read '{file}'", got=str(error).splitlines()[0]) from error
    if sequences is not None:
        batch = _first_sequences(batch, sequences)

    # 2. Arguments without a name are kept under their places.
    places = sorted(filter(str.isdigit, batch), key=int)
    if places:
        return tuple(batch[place] for place in places)
    return batch


def _no_batch_error(folder: Path) -> SourceError:
    """Return the error of a folder without a batch: none was kept, or it is another folder."""
    if (folder / ABOUT_FILE).is_file():
        return SourceError(
            f"'{folder}' holds no batch",
            hint="jacdiag.watch(..., keep_batches=10) keeps those of the last 10 forwards",
        )
    return SourceError(
        f"'{folder}' is no folder of a flight recorder", hint="it is flight-STEP in the log_dir"
    )


def _first_sequences(batch: dict[str, Any], sequences: int) -> dict[str, Any]:
    """Return the first sequences of a batch, if its tensors share one batch dimension."""
    # 1. The tensors, and their batch dimension.
    tensors: dict[str, torch.Tensor] = {}
    for name, value in batch.items():
        has_rows = isinstance(value, torch.Tensor) and value.dim() > 0
        if has_rows:
            tensors[name] = value
    sizes = {tensor.shape[0] for tensor in tensors.values()}
    if len(sizes) != 1:
        return batch

    # 2. Cut them.
    shortened = dict(batch)
    for name, tensor in tensors.items():
        shortened[name] = tensor[:sequences]
    return shortened


def read_about(folder: str | Path) -> dict[str, int]:
    """Return which steps a flight is about, as far as its `about.json` says it.

    Args:
        folder: `flight-STEP` of a run.

    Returns:
        "step", "batch_step" (of its latest batch) and "running_step" -> the step.
    """
    try:
        about = json.loads((Path(folder) / ABOUT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(about, dict):
        return {}
    keys = ("step", "batch_step", "running_step")
    return {key: about[key] for key in keys if isinstance(about.get(key), int)}


# -- what torch.load reads without pickle ----------------------------------------------------------
def _on_cpu(leaf: Any) -> Any:
    """Return a leaf of a batch as it can be written: a tensor on the CPU, a constant, or a text."""
    if isinstance(leaf, torch.Tensor):
        return leaf.cpu()
    is_constant = leaf is None or isinstance(leaf, bool | int | float | str)
    if is_constant:
        return leaf
    return repr(leaf)


def _plain_state(state: RandomState) -> dict[str, Any]:
    """Return random states as tensors and lists."""
    numpy = [state.numpy[0], torch.from_numpy(state.numpy[1].astype("int64")), *state.numpy[2:]]
    return {
        "cpu": state.cpu,
        "cuda": list(state.accelerators.get("cuda", ())),
        "accelerators": {kind: list(states) for kind, states in state.accelerators.items()},
        "numpy": numpy,
        "python": _tuples_as_lists(state.python),
    }


def _tuples_as_lists(value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return list(map(_tuples_as_lists, value))
