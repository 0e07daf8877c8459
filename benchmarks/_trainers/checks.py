"""What is checked of a watch in every trainer: six cells of the table."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _trainers.model import ByHand

CELLS = ("bit_identical", "figures", "no_false_message", "faults", "resume", "crash")
HEALTHY, SPIKE, NAN, SAVED, CRASH = 14, 90, 8, 8, 8  # lengths of runs, and steps of faults
WITHIN = 10  # steps in which a corrupted batch has to be found
OPTIONS: dict[str, Any] = {"every": 6, "stats_every": 3, "log_every": 4, "quiet": True}
TOLERANCE = 2e-3  # a norm that a library sums in float32 is off by so much


class CrashError(Exception):
    """What the harness raises in the middle of a run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run that a trainer is asked for.

    Attributes:
        steps: of the optimizer.
        log_dir: of the watch; None trains without it.
        fault: "", "nan" (in one weight before the step), "batch" (a corrupted one) or "crash" (an
            exception after it).
        at: step of the fault.
        save_at: step after which the state is saved into `checkpoint`; 0 for never.
        checkpoint: folder for the state.
        resume: go on from `checkpoint`.
    """

    steps: int
    log_dir: Path | None = None
    fault: str = ""
    at: int = 0
    save_at: int = 0
    checkpoint: Path = Path()
    resume: bool = False

    @property
    def options(self) -> dict[str, Any]:
        cadence = {"every": 50, "stats_every": 25} if self.steps > HEALTHY else {}
        return {**OPTIONS, **cadence, "log_dir": self.log_dir, "resume": self.resume}

    def is_broken(self, step: int) -> bool:
        return self.fault == "batch" and step == self.at

    def after_step(self, step: int) -> None:
        """Call when a step and the watch's own are done."""
        if self.fault == "crash" and step == self.at:
            raise CrashError

    def put_nan(self, weight: Tensor, step: int) -> None:
        """Call before the forward of a step."""
        if self.fault == "nan" and step == self.at:
            with torch.no_grad():  # a sharded weight gets it in the piece of each rank
                piece = weight.to_local() if hasattr(weight, "to_local") else weight
                piece.view(-1)[0] = math.nan


@dataclass
class Result:
    """What a run gave.

    Attributes:
        losses: of the steps.
        weights: at the end.
        by_hand: figures of each step.
        clips: the trainer clips and tells the norm from before.
        said: messages of processes other than this one.
    """

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    by_hand: ByHand | None = None
    clips: bool = True
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A row of the table.

    Attributes:
        name: shown in the table.
        library: what has to be importable, with its version in the results.
        run: trains as a plan says.
        cells: those that apply.
        parts: parameters of a sub-layer, by its name in the log.
    """

    name: str
    library: str
    run: Callable[[Plan], Result]
    cells: tuple[str, ...] = CELLS
    parts: Callable[[str, list[str]], list[str]] = lambda where, names: [
        n for n in names if n.startswith(where + ".")
    ]


@contextmanager
def folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="trainers-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collect what the watch says at level warning or above."""
    said: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("jacdiag.watch"), Collector(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def rows(log_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the lines of one type of a run's log."""
    lines = (log_dir / "run.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["type"] == kind]


def check(trainer: Trainer) -> dict[str, Any]:
    """Return a row of the table: per cell true, false or None, and what was wrong."""
    wrong: dict[str, list[str]] = {}
    for group in (check_healthy, check_faults, check_resume, check_crash):
        try:
            wrong |= group(trainer)
        except Exception as error:
            cell = {"check_healthy": CELLS[0], "check_faults": CELLS[3], "check_resume": CELLS[4]}
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            wrong[cell.get(group.__name__, CELLS[5])] = [
                f"{text} ({Path(frame.filename).name}:{frame.lineno})"
            ]
    cells = {cell: (not wrong[cell] if cell in wrong else None) for cell in CELLS}
    return {**cells, "wrong": {cell: texts for cell, texts in wrong.items() if texts}}


def check_healthy(trainer: Trainer) -> dict[str, list[str]]:
    """A healthy run with and without the watch."""
    torch.use_deterministic_algorithms(True)
    plain = trainer.run(Plan(steps=HEALTHY))
    with folder() as place, messages() as said:
        watched = trainer.run(Plan(steps=HEALTHY, log_dir=place / "log"))
        steps, faults = rows(place / "log", "step"), rows(place / "log", "fault")
        probes = rows(place / "log", "probe")
    found: dict[str, list[str]] = {"bit_identical": [], "figures": [], "no_false_message": []}
    same = plain.losses == watched.losses and plain.weights.keys() == watched.weights.keys()
    if not same or not all(
        torch.equal(plain.weights[name], value) for name, value in watched.weights.items()
    ):
        found["bit_identical"].append("losses or weights differ")
    found["figures"] = wrong_figures(trainer, watched, steps)
    if not probes:
        found["figures"].append("no probe ran")
    said += watched.said
    # reports on the model, not on the run
    of_the_init = [text for text in said if ": JD1" in text or ": JD2" in text]
    found["no_false_message"] = [text for text in said if text not in of_the_init]
    found["no_false_message"] += [f"fault: {row['error']}" for row in faults]
    return {cell: texts for cell, texts in found.items() if cell in trainer.cells}


def wrong_figures(trainer: Trainer, result: Result, steps: list[dict[str, Any]]) -> list[str]:
    """Compare the rows of the log with the figures by hand."""
    by_hand = result.by_hand
    if by_hand is None:
        return ["no figures by hand"]
    if [row["step"] for row in steps] != list(range(1, len(result.losses) + 1)):
        return [f"steps {[row['step'] for row in steps]}"]
    wrong: list[str] = []
    compared = 0
    names = [name for name, _ in by_hand.model.named_parameters()]
    for row in steps:
        step = row["step"]
        wanted = {"loss": result.losses[step - 1], "lr": by_hand.rates[step - 1]}
        if by_hand.used:
            wanted["grad_norm_post"] = by_hand.used[step - 1]
        if by_hand.before_clipping and result.clips:
            wanted["grad_norm"] = by_hand.before_clipping[step - 1]
        wrong += [
            f"step {step}: {key} {row[key]}, by hand {value}"
            for key, value in wanted.items()
            if not is_close(row[key], value)
        ]
        update = row["update"]
        belongs = trainer.parts(update["where"], names) if update else []
        if belongs:
            compared += 1
            value = by_hand.move_of(step, belongs)
            if not is_close(update["norm"], value):
                wrong.append(
                    f"step {step}: update of {update['where']} {update['norm']}, by hand {value}"
                )
    if compared < len(steps) // 3:
        wrong.append(f"update norms of {compared} of {len(steps)} steps could be compared")
    return wrong[:4]


def is_close(value: Any, wanted: float) -> bool:
    return isinstance(value, int | float) and math.isclose(
        value, wanted, rel_tol=TOLERANCE, abs_tol=1e-9
    )


def check_faults(trainer: Trainer) -> dict[str, list[str]]:
    """A NaN in one weight, and a corrupted batch in a young run."""
    if "faults" not in trainer.cells:
        return {}
    wrong: list[str] = []
    with folder() as place, messages():
        trainer.run(Plan(steps=NAN + 3, log_dir=place / "log", fault="nan", at=NAN))
        alerts = rows(place / "log", "alert")
    named = [
        alert for alert in alerts if alert["code"] == "JD505" and NAN <= alert["step"] <= NAN + 1
    ]
    if not named:
        wrong.append(f"NaN in a weight at step {NAN}: {[(a['step'], a['code']) for a in alerts]}")
    with folder() as place, messages():
        trainer.run(Plan(steps=SPIKE + WITHIN, log_dir=place / "log", fault="batch", at=SPIKE))
        alerts = [
            alert for alert in rows(place / "log", "alert") if alert["code"].startswith("JD50")
        ]
    if not any(SPIKE <= alert["step"] <= SPIKE + WITHIN for alert in alerts):
        wrong.append(f"corrupted batch at step {SPIKE}: {[(a['step'], a['code']) for a in alerts]}")
    early = [(alert["step"], alert["code"]) for alert in alerts if alert["step"] < SPIKE]
    if early:
        wrong.append(f"alerts before the corrupted batch: {early}")
    return {"faults": wrong}


def check_resume(trainer: Trainer) -> dict[str, list[str]]:
    """Go on from a checkpoint at step 8 of a run that had gone to step 11."""
    if "resume" not in trainer.cells:
        return {}
    wrong: list[str] = []
    with folder() as place, messages() as said:
        plan = Plan(
            steps=SAVED + 3, log_dir=place / "log", save_at=SAVED, checkpoint=place / "checkpoint"
        )
        trainer.run(plan)
        trainer.run(replace(plan, steps=HEALTHY, save_at=0, resume=True))
        from jacdiag.records.run_log import read_run

        run = read_run(place / "log")
        faults = run.faults
    if [row["step"] for row in run.steps] != list(range(1, HEALTHY + 1)) or run.resumes != [SAVED]:
        wrong.append(f"steps {[row['step'] for row in run.steps]}, resumed at {run.resumes}")
    wrong += [text for text in said if ": JD1" not in text and ": JD2" not in text]
    wrong += [str(fault) for fault in faults]
    return {"resume": wrong[:3]}


def check_crash(trainer: Trainer) -> dict[str, list[str]]:
    """An exception in the loop leaves a flight with the batch of the step."""
    if "crash" not in trainer.cells:
        return {}
    wrong: list[str] = []
    with folder() as place, messages():
        try:
            trainer.run(Plan(steps=HEALTHY, log_dir=place / "log", fault="crash", at=CRASH))
            wrong.append("the exception did not come out")
        except CrashError:
            pass
        flight = place / "log" / f"flight-{CRASH}"
        if not (flight / "batch.pt").is_file():
            wrong.append(
                f"no batch in {[p.name for p in (place / 'log').glob('flight-*')] or 'any flight'}"
            )
        else:
            about = json.loads((flight / "about.json").read_text(encoding="utf-8"))
            if about.get("batch_step") != CRASH or about.get("why") != "CrashError":
                wrong.append(f"the flight is about {about}")
    return {"crash": wrong}
