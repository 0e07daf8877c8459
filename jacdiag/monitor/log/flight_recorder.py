"""The flight recorder: the last steps, the last batches and their random states, in a folder once
something happens.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jacdiag.errors import SourceError
from jacdiag.monitor.batches import Batches
from jacdiag.records.run_log import to_line
from jacdiag.trace.execution.precision import map_leaves
from jacdiag.trace.execution.rng_state import RandomState

STEPS_FILE, BATCH_FILE, RANDOM_FILE, ABOUT_FILE = (
    "steps.jsonl",
    "batch.pt",
    "random.pt",
    "about.json",
)
RUNNING_RANDOM_FILE = "running-random.pt"


class Recorder:
    """Keeps the last steps and dumps them.

    Args:
        folder: of the run.
        steps: how many to keep.
        most: how many dumps to write at most; a run in trouble alerts more than once.
    """

    def __init__(self, folder: Path, steps: int = 200, most: int = 5) -> None:
        self.folder, self.most, self.dumps = folder, most, 0
        self.rows: deque[Mapping[str, Any]] = deque(maxlen=max(steps, 1))

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def dump(
        self,
        step: int,
        why: str,
        batches: Batches | None,
        header: Mapping[str, Any],
        ended: str = "",
    ) -> Path | None:
        """Write `flight-STEP`.

        Args:
            step: that the flight is about; at the end of a run the last one that was finished.
            why: in one line.
            batches: what the model was called with.
            header: the first line of the run log.
            ended: how the loop was left, as `Ending.how` says it; empty if it goes on. The batches
                of a step that was running then are written as well.

        Returns:
            The folder; None if enough was written, or if it is there already.

        Raises:
            OSError: it cannot be written.
        """
        kept = batches.kept if batches is not None else None
        running = kept.after(step) if kept is not None and ended else []
        # 1. Choose the folder. An alert may have written that of the step, without the batch that
        # was running.
        target = self.folder / f"flight-{step}"
        if target.exists() and running:
            target = self.folder / f"flight-{running[-1].step}"
        is_enough = self.dumps >= self.most and not running
        if is_enough or target.exists():
            return None
        self.dumps += 1
        target.mkdir(parents=True)
        # 2. Write the steps and the batches that they had.
        (target / STEPS_FILE).write_bytes(b"".join(to_line("step", row) for row in self.rows))
        about: dict[str, Any] = {
            "schema_version": 1,
            "step": step,
            "why": why,
            "groups": header.get("groups", []),
        }
        chosen = kept.chosen(step) if kept is not None else []
        finished = [batch for batch in chosen if batch.step <= step]
        if running and finished:
            chosen = finished
        if chosen:
            last = chosen[-1]
            about["batch_step"] = last.step
            torch.save(map_leaves(_on_cpu, last.arguments), target / BATCH_FILE)
            torch.save(_plain_state(last.random_state), target / RANDOM_FILE)
            for number, earlier in enumerate(reversed(chosen[:-1]), start=1):
                file = target / f"batch-{number}-before-at-{earlier.step}.pt"
                torch.save(map_leaves(_on_cpu, earlier.arguments), file)
        # 3. Write the batches of the step that was running.
        if running:
            about |= {"running_step": running[-1].step, "ended": ended}
            torch.save(_plain_state(running[-1].random_state), target / RUNNING_RANDOM_FILE)
            for number, batch in enumerate(running, start=1):
                file = target / f"running-batch-{number}-at-{batch.step}.pt"
                torch.save(map_leaves(_on_cpu, batch.arguments), file)
        (target / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        return target


def read_batch(
    folder: str | Path, sequences: int | None = None
) -> dict[str, Any] | tuple[Any, ...]:
    """The batch that a flight recorder kept: keyword arguments of the model's forward, or a tuple
    of its arguments.

    Args:
        folder: `flight-STEP` of a run.
        sequences: how many of the batch to take; all if not given.

    Raises:
        SourceError: the folder holds none.
    """
    file = Path(folder) / BATCH_FILE
    if not file.is_file():
        there = (Path(folder) / ABOUT_FILE).is_file()
        raise SourceError(
            f"'{folder}' holds no batch"
            if there
            else f"'{folder}' is no folder of a flight recorder",
            hint="jacdiag.watch(..., keep_batches=10) keeps those of the last 10 forwards"
            if there
            else "it is flight-STEP in the log_dir",
        )
    try:
        batch = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SourceError(f"cannot read '{file}'", got=str(error).splitlines()[0]) from error
    if sequences is not None:
        rows = {t.shape[0] for t in batch.values() if isinstance(t, torch.Tensor) and t.dim()}
        if len(rows) == 1:  # the tensors share one batch dimension
            batch = {
                n: t[:sequences] if isinstance(t, torch.Tensor) and t.dim() else t
                for n, t in batch.items()
            }
    unnamed = sorted((name for name in batch if name.isdigit()), key=int)
    return tuple(batch[name] for name in unnamed) if unnamed else batch


def told_of(folder: str | Path) -> dict[str, int]:
    """Return what `about.json` says: the `step` it is about, and the steps of its latest and its
    running batch.
    """
    try:
        about = json.loads((Path(folder) / ABOUT_FILE).read_text(encoding="utf-8"))
        return {
            key: about[key]
            for key in ("step", "batch_step", "running_step")
            if isinstance(about.get(key), int)
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.cpu()
    return leaf if leaf is None or isinstance(leaf, bool | int | float | str) else repr(leaf)


def _plain_state(state: RandomState) -> dict[str, Any]:
    numpy = [state.numpy[0], torch.from_numpy(state.numpy[1].astype("int64")), *state.numpy[2:]]
    return {
        "cpu": state.cpu,
        "cuda": list(state.cuda),
        "numpy": numpy,
        "python": _tuples_as_lists(state.python),
    }


def _tuples_as_lists(value: Any) -> Any:
    return [_tuples_as_lists(item) for item in value] if isinstance(value, tuple) else value
