"""Training runs of the spike lab's small GPTs, several at once, and what became of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from examples.spike_lab.model import Model
from examples.spike_lab.run import Setting, train
from examples.spike_lab.text import batch
from jacdiag.backtest import label, read_runs
from jacdiag.pipeline.audit import audit
from jacdiag.records import Report
from jacdiag.records.run_log import RUN_FILE, RunLog, number, read_run

from .part import Data, Options, in_parallel

_TRIED = 6


@dataclass(frozen=True)
class Trial:
    """A setting, and what no factor of it says.

    Attributes:
        name: of the run's folder; the seed and the learning rate are added.
        scales: (layer, factor) on the output matrices of that layer's attention and FFN, before the
            first step.
    """

    name: str
    setting: Setting
    scales: tuple[tuple[int, float], ...] = ()

    @property
    def folder(self) -> str:
        setting = self.setting
        return f"{self.name}_lr={setting.lr:g}_seed={setting.seed}_steps={setting.steps}"

    @torch.no_grad()
    def prepare(self, model: Model) -> None:
        """Scales the branches; a branch is linear in its output matrix."""
        for layer, factor in self.scales:
            for sublayer in model.sublayers[2 * layer : 2 * layer + 2]:
                sublayer.core.out.weight.mul_(factor)  # type: ignore[union-attr,operator]

    def model(self) -> Model:
        """The untrained model."""
        torch.manual_seed(self.setting.seed)
        model = Model(self.setting.shape)
        self.prepare(model)
        return model


def untrained(trial: Trial, *, tol: float = 0.1) -> Report:
    """jacdiag's audit of a trial's model before its first step."""
    ids, _ = batch(0, trial.setting.seed, 2, trial.setting.shape.length)
    return audit(trial.model(), ids, state="init", tol=tol, seed=trial.setting.seed)


def outcomes(trials: Sequence[Trial], options: Options) -> list[Data]:
    """Runs all trials and reads their logs: loss and gradient norm of every step, label, gradient
    of the branches.
    """
    asked = [(trial, options.runs / trial.folder) for trial in trials]
    found = []
    for done, (trial, outcome) in enumerate(
        zip(trials, in_parallel(_run, asked, options.jobs), strict=True), 1
    ):
        print(
            f"  {done} of {len(trials)}: {trial.folder}, {outcome['outcome']}, "
            f"{outcome['final']:.3f}",
            flush=True,
        )
        found.append(outcome)
    return found


def _run(asked: tuple[Trial, Path]) -> Data:
    trial, folder = asked
    setting = replace(trial.setting, every=0)
    train(setting, folder, stats_every=setting.steps, audit=False, prepare=trial.prepare)
    (run,) = read_runs([folder])
    log = read_run(folder / RUN_FILE)
    said = label(run.loss)
    final = said.final if math.isfinite(said.final) else math.nan
    return {
        "name": trial.name,
        "lr": trial.setting.lr,
        "seed": trial.setting.seed,
        "outcome": said.outcome,
        "final": final,
        "spike_rate": said.spike_rate,
        "loss": list(map(float, run.loss)),
        "grad_norm": list(map(float, run.grad_norm)),
        "shares": [_share(row["figures"]) for row in log.stats],
        "branch_gradient": _branch_gradient(log),
    }


def _share(figures: Data) -> float:
    """Std of a branch over that of its shortcut, the mean over sub-layers: what a sub-layer adds to
    the stream.
    """
    branch, shortcut = figures["branch_std"], figures["shortcut_std"]
    return math.fsum(branch[name] / shortcut[name] for name in branch) / len(branch)


def _branch_gradient(log: RunLog) -> float:
    """Norm of the gradient of all matrices in the sub-layers at the first step."""
    inside = (
        g
        for name, g in zip(log.groups, log.steps[0]["grad"], strict=False)
        if name.startswith("sublayers.")
    )
    return math.hypot(*map(number, inside))


def seconds_of(trials: Sequence[Trial], options: Options) -> float:
    """What runs that are not whole yet will take on one core: a few steps, and so many times
    that.
    """
    left = [trial for trial in trials if not (options.runs / trial.folder / "done").exists()]
    if not left:
        return 0.0
    model, setting = left[0].model(), left[0].setting
    optimizer = torch.optim.AdamW(model.parameters())
    begun = 0.0
    for step in range(_TRIED + 2):
        if step == 2:
            begun = time.process_time()
        model(*batch(step, 0, setting.rows, setting.shape.length)).backward()
        optimizer.step()
        optimizer.zero_grad()
    each = (time.process_time() - begun) / _TRIED
    # the watch's share, and the start
    return sum(1.3 * each * trial.setting.steps + 1.0 for trial in left)


def thinned(values: Sequence[float], parts: int = 100) -> list[float]:
    """Medians of equal parts, the last one shorter: curves for the record, without every step."""
    size = max(1, -(-len(values) // parts))
    chunks = [sorted(values[k : k + size]) for k in range(0, len(values), size)]
    return [chunk[len(chunk) // 2] for chunk in chunks]


def by(runs: Sequence[Data], **wanted: Any) -> list[Data]:
    """The runs that have these values."""
    return [run for run in runs if all(run[key] == value for key, value in wanted.items())]


def listed(runs: Sequence[Data], key: str) -> list[Any]:
    """The values that runs have, ascending."""
    return sorted({run[key] for run in runs})


def gaps(runs: Sequence[Data], others: Sequence[Data]) -> list[float]:
    """Final losses less those of other runs, seed by seed: runs of one seed see the same
    batches.
    """
    theirs = {run["seed"]: float(run["final"]) for run in others}
    return [float(run["final"]) - theirs[run["seed"]] for run in runs if run["seed"] in theirs]


def agreed(differences: Sequence[float]) -> bool:
    """Whether several seeds all say which of two is better."""
    return len(differences) > 1 and (
        all(d > 0 for d in differences) or all(d < 0 for d in differences)
    )
