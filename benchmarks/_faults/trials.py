"""Five faults, and the copies of a run that get them.

A healthy run goes on in this process. Before the forward of a step at a wanted position it is
forked once per fault. The copy gets the fault, goes on in the very same trainer, and reports what
its watchers said. So every fault meets the same run, whatever the trainer is.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import select
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from detect import FAR, LEFT, MEAN, VOCABULARY
from torch import Tensor, nn

STATISTICS, PROBE = 25, 50  # steps between two rounds
LONGEST = 2 * STATISTICS + 1  # steps that a copy may take
WITHIN = 10  # steps in which a fault that loss or gradients show is to be found
NAN_WEIGHT = "transformer.h.1.mlp.c_fc.weight"
LAYERS = 3
CODE_OF_WRITES = "JD508"
_PATIENCE = 300  # seconds that a copy may take


@dataclass
class Target:
    """What a fault is put into.

    Attributes:
        model: with GPT-2's names of parameters.
        raise_rate: multiplies the learning rate of this step and all later ones.
    """

    model: nn.Module
    raise_rate: Callable[[float], None]


# -- the faults ------------------------------------------------------------------------------------
def corrupt_batch(target: Target, ids: Tensor) -> Tensor:
    """One batch of random bytes."""
    return torch.randint(VOCABULARY, ids.shape)


def raise_rate(target: Target, ids: Tensor) -> Tensor:
    """The learning rate times 30 from now on."""
    target.raise_rate(30.0)
    return ids


@torch.no_grad()
def break_weight(target: Target, ids: Tensor) -> Tensor:
    """A NaN in one element of one weight."""
    target.model.get_parameter(NAN_WEIGHT)[3, 5] = math.nan
    return ids


def scale_attention(target: Target, ids: Tensor) -> Tensor:
    """The weights of queries, keys and values times 8, in every layer."""
    _scale(target.model, "c_attn.weight", 8.0)
    return ids


def lose_scaling(target: Target, ids: Tensor) -> Tensor:
    """W_O and W_2 times sqrt(2N): the scaling with depth is gone."""
    _scale(target.model, "c_proj.weight", math.sqrt(2 * LAYERS))
    return ids


@torch.no_grad()
def _scale(model: nn.Module, ending: str, factor: float) -> None:
    for name, weight in model.named_parameters():
        if name.endswith(ending):
            weight.mul_(factor)


FAULTS: dict[str, Callable[[Target, Tensor], Tensor]] = {
    "corrupted batch": corrupt_batch,
    "learning rate x 30": raise_rate,
    "NaN in one weight": break_weight,
    "attention weights x 8": scale_attention,
    "lost residual scaling": lose_scaling,
}


# -- who looks on ----------------------------------------------------------------------------------
class Losses:
    """When the loss itself shows a fault."""

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=201)
        self.last: deque[float] = deque(maxlen=MEAN)

    def shows(self, value: float) -> bool:
        """Take a loss in; return whether it stands out."""
        self.last.append(value)
        middle = median(self.window) if self.window else math.inf
        out = not (value < middle + FAR and fmean(self.last) < middle + LEFT)
        self.window.append(value)
        return out


class Trainscope:
    """trainscope at its defaults; what counts is a spike that it returns, or a warning in its log.

    Args:
        model: the model.
        optimizer: its optimizer.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        from trainscope import TrainScope
        from trainscope.core.config import TrainScopeConfig

        self.warnings = 0
        self.step_at_hand = 0
        self.alerts: list[int] = []
        logger = logging.getLogger("trainscope")
        logger.propagate = False
        logger.handlers = [_Count(self)]
        with contextlib.redirect_stdout(io.StringIO()):
            config = TrainScopeConfig(run_dir=tempfile.mkdtemp(prefix="trainscope-"))
            self.scope = TrainScope(model, optimizer, config=config).attach()

    def step(self, step: int, loss: float) -> None:
        """Call between backward and optimizer, as trainscope asks."""
        self.step_at_hand = step
        if self.scope.step(loss) is not None:
            self.alerts.append(step)

    def part_from_parent(self) -> None:
        """In a copy: write to a folder of its own, not into the files of the run that goes on."""
        writer = type(self.scope._writer)
        self.scope._writer = writer(
            Path(tempfile.mkdtemp(prefix="trainscope-")), self.scope._config
        )


class _Count(logging.Handler):
    """Take a warning of trainscope for an alert at the step at hand."""

    def __init__(self, owner: Trainscope) -> None:
        super().__init__(logging.WARNING)
        self.owner = owner

    def emit(self, record: logging.LogRecord) -> None:
        if "loss" in record.getMessage():
            self.owner.alerts.append(self.owner.step_at_hand)


# -- the copies ------------------------------------------------------------------------------------
@dataclass
class Trial:
    """One fault at one position, in a copy of the process."""

    fault: str
    at: int
    pipe: int
    shown: int | None = None

    @property
    def last(self) -> int:
        """The last step at which an alert counts as in time."""
        return max(self.at + WITHIN, second_round(self.at))


def second_round(at: int) -> int:
    """Return the step of the second round of statistics that a fault has; the first may be at its
    own step.
    """
    return -(-at // STATISTICS) * STATISTICS + STATISTICS


@dataclass
class Trials:
    """The run that is forked.

    Args:
        name: of the run, for the screen.
        positions: steps at which a fault strikes.
        target: what it strikes.
        watch: returns the watch, once there is one.
        scope: trainscope beside it; None where it is not installed.

    Attributes:
        results: one a fault and position.
    """

    name: str
    positions: frozenset[int]
    target: Target
    watch: Callable[[], Any]
    scope: Trainscope | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    trial: Trial | None = None

    def begin_step(self, step: int, ids: Tensor) -> Tensor:
        """Call with the batch, before the forward. Returns the batch to train on; returns once more
        in each copy.
        """
        if self.trial is not None or step not in self.positions:
            return ids
        for fault, put in FAULTS.items():
            copy = self._fork(fault, step)
            if copy is not None:
                self.trial = copy
                if self.scope is not None:
                    self.scope.part_from_parent()
                torch.manual_seed(step)
                return put(self.target, ids)
        print(f"{self.name}: step {step}, {len(self.watch().alerts)} alerts so far", flush=True)
        return ids

    def end_step(self, step: int, loss: float) -> None:
        """Call when the step is done and the watch has been told. In a copy that has seen enough it
        does not return.
        """
        shows = self.losses.shows(loss)
        trial = self.trial
        if trial is None:
            return
        if shows and trial.shown is None:
            trial.shown = step - trial.at
        if step >= trial.last or self._all_said():
            self._end(trial)

    def _all_said(self) -> bool:
        assert self.trial is not None
        since = [alert for alert in self.watch().alerts if alert.step >= self.trial.at]
        peer = self.scope is None or any(step >= self.trial.at for step in self.scope.alerts)
        return peer and any(alert.code != CODE_OF_WRITES for alert in since)

    def _fork(self, fault: str, step: int) -> Trial | None:
        """Return the trial in the copy; in the parent wait for what the copy reports, and return
        None.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            return Trial(fault, step, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            ready, _, _ = select.select([pipe], [], [], _PATIENCE)
            text = pipe.read() if ready else ""
        if not ready:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        result = json.loads(text) if text else {"error": "the copy ended without a report"}
        self.results.append({"fault": fault, "at": step, **result})
        return None

    def _end(self, trial: Trial) -> None:
        """Report, and end the copy."""
        watch = self.watch()
        watch.flush()
        alerts = [alert for alert in watch.alerts if alert.step >= trial.at]
        others = [alert for alert in alerts if alert.code != CODE_OF_WRITES]
        result: dict[str, Any] = {"shown": trial.shown, "delay": None}
        if alerts:
            first = min(alerts, key=lambda alert: alert.step)
            result |= {
                "delay": first.step - trial.at,
                "code": first.code,
                "where": first.where[:1],
                "what": first.what,
            }
        result["without_writes"] = min((alert.step for alert in others), default=None)
        if self.scope is not None:
            result["trainscope"] = min(
                (step for step in self.scope.alerts if step >= trial.at), default=None
            )
        for key in ("without_writes", "trainscope"):
            if result.get(key) is not None:
                result[key] -= trial.at
        with os.fdopen(trial.pipe, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)


# -- judgement -------------------------------------------------------------------------------------
def is_in_time(trial: dict[str, Any], delay: int | None) -> bool:
    """Return whether a delay is short enough: ten steps if the loss shows the fault by then, else
    two rounds.
    """
    if delay is None:
        return False
    if trial.get("shown") is not None and trial["shown"] <= WITHIN:
        return delay <= WITHIN
    return bool(trial["at"] + delay <= second_round(trial["at"]))


def count_found(trials: Iterable[dict[str, Any]], key: str = "delay") -> int:
    """Return how many trials were found in time, by the delays under a key."""
    return sum(is_in_time(trial, trial.get(key)) for trial in trials)
