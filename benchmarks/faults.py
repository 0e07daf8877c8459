"""Which faults do the live rules find, how late, and at which age of a run? Five faults at 20 positions each.

One healthy run of a small GPT goes on under a watch. At each position it is forked once per fault: the copy gets the
fault and trains on until an alert or for 75 steps. So every fault meets the very same run, and the run itself counts
the false alarms.

A fault counts as found in time within 10 steps if the loss shows it by then: a loss stands 2 above the median of the
last 201, or the mean of ten losses 0.3 above it. A fault that the loss does not show has two rounds of statistics, the
first one after it and the next.

    python benchmarks/faults.py              about 10 minutes on one core; writes benchmarks/results/faults.json
    python benchmarks/faults.py --quick      two positions; prints only
    python benchmarks/faults.py --recorded   the recorded runs of the lab, their young parts too: false alarms only
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from detect import FAR, LEFT, MEAN, VOCABULARY, Run, Training, text
from torch import Tensor

import jacdiag
from jacdiag.backtest.labels import label
from jacdiag.backtest.packed import read_packed
from jacdiag.report.runlog import Alert
from jacdiag.report.thresholds import load_thresholds
from jacdiag.rules.live import LiveRules, StepFigures

RESULTS = Path(__file__).parent / "results" / "faults.json"
LAB = Path(__file__).parents[1] / "examples" / "spike_lab" / "results"
POSITIONS = (80, 90, 100, 115, 130, 150, 170, 190, 220, 250, 290, 330, 380, 440, 500, 580, 660, 760, 880, 1000)
STATISTICS, PROBE = 25, 50  # steps between two rounds
WITHIN, LONGEST = 10, 3 * STATISTICS
YOUNG = 200
NAN_WEIGHT = "transformer.h.1.mlp.c_fc.weight"
RUNS = (Run("nanoGPT-like", layers=3, width=48), Run("nanoGPT-like, another seed", layers=3, width=48, seed=1))


# -- the faults --------------------------------------------------------------------------------------------------------
def corrupt_batch(training: Training, ids: Tensor, first: bool) -> Tensor:
    """One batch of random bytes."""
    return torch.randint(VOCABULARY, ids.shape, generator=training.generator) if first else ids


def raise_rate(training: Training, ids: Tensor, first: bool) -> Tensor:
    """The learning rate times 30 from now on."""
    training.factor = 30.0
    return ids


@torch.no_grad()
def break_weight(training: Training, ids: Tensor, first: bool) -> Tensor:
    """A NaN in one element of one weight."""
    if first:
        training.model.get_parameter(NAN_WEIGHT)[3, 5] = math.nan
    return ids


@torch.no_grad()
def scale_attention(training: Training, ids: Tensor, first: bool) -> Tensor:
    """The weights of queries, keys and values times 8, in every layer."""
    if first:
        _scale(training, "c_attn.weight", 8.0)
    return ids


@torch.no_grad()
def lose_scaling(training: Training, ids: Tensor, first: bool) -> Tensor:
    """W_O and W_2 times sqrt(2N): the scaling with depth is gone."""
    if first:
        _scale(training, "c_proj.weight", math.sqrt(2 * training.run.layers))
    return ids


def _scale(training: Training, ending: str, factor: float) -> None:
    for name, weight in training.model.named_parameters():
        if name.endswith(ending):
            weight.mul_(factor)


Fault = Callable[[Training, Tensor, bool], Tensor]
FAULTS: dict[str, Fault] = {
    "corrupted batch": corrupt_batch,
    "learning rate x 30": raise_rate,
    "NaN in one weight": break_weight,
    "attention weights x 8": scale_attention,
    "lost residual scaling": lose_scaling,
}


# -- one run and its copies --------------------------------------------------------------------------------------------
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


def train_to(last: int, run: Run, data: Tensor, positions: Iterable[int]) -> dict[str, Any]:
    """Train under a watch, and fork a copy for every fault at every position."""
    wanted = set(positions)
    training = Training(run, 10_000, data)
    alerts: list[Alert] = []
    losses = Losses()
    trials: list[dict[str, Any]] = []
    with jacdiag.watch(
        training.model, training.optimizer, every=PROBE, stats_every=STATISTICS, log_every=5, on_alert=alerts.append,
        quiet=True, strict=True,
    ) as watch:  # fmt: skip
        for step in range(1, last + 1):
            if step in wanted:
                for name, fault in FAULTS.items():
                    trial = _forked(partial(_try, training, watch, losses, step, fault))
                    trials.append({"fault": name, "at": step, **trial})
                print(f"{run.name}: step {step}, {len(alerts)} alerts so far", flush=True)
            loss, norm = training.step(step, training.batch())
            watch.step(loss, grad_norm=norm)
            losses.shows(float(loss))
        watch.flush()
    return {"steps": last, "false": [str(alert) for alert in alerts], "trials": trials}


def _forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a function in a copy of this process and return what it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            result = work()
        except Exception as error:
            result = {"error": repr(error)}
        with os.fdopen(writing, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = json.load(pipe)
    os.waitpid(child, 0)
    return result


def _try(training: Training, watch: Any, losses: Losses, at: int, fault: Fault) -> dict[str, Any]:
    """Put a fault in, and train on until an alert."""
    before = len(watch.alerts)
    shown = None
    for step in range(at, at + LONGEST):
        ids = fault(training, training.batch(), step == at)
        loss, norm = training.step(step, ids)
        watch.step(loss, grad_norm=norm)
        if losses.shows(float(loss)) and shown is None:
            shown = step - at
        if len(watch.alerts) > before:
            break
    watch.flush()
    found = watch.alerts[before:]
    if not found:
        return {"shown": shown, "delay": None}
    first = found[0]
    return {
        "shown": shown, "delay": first.step - at, "code": first.code, "where": first.where[:1], "what": first.what,
    }  # fmt: skip


def judge(trial: dict[str, Any]) -> bool:
    """Return whether a fault was found in time."""
    if trial["delay"] is None:
        return False
    if trial["shown"] is not None and trial["shown"] <= WITHIN:
        return bool(trial["delay"] <= WITHIN)
    first_round = -(-trial["at"] // STATISTICS) * STATISTICS
    return bool(trial["at"] + trial["delay"] <= first_round + STATISTICS)


def summed(runs: dict[str, Any]) -> dict[str, Any]:
    """Return per fault how many were found in time, the delays, and which rule fired first."""
    table: dict[str, Any] = {}
    for name in FAULTS:
        trials = [trial for run in runs.values() for trial in run["trials"] if trial["fault"] == name]
        delays = sorted(trial["delay"] for trial in trials if trial["delay"] is not None)
        table[name] = {
            "trials": len(trials),
            "found": sum(map(judge, trials)),
            "within_10": sum(delay <= WITHIN for delay in delays),
            "median_delay": median(delays) if delays else None,
            "largest_delay": max(delays, default=None),
            "codes": dict(Counter(trial["code"] for trial in trials if trial["delay"] is not None)),
        }
    nans = [t for run in runs.values() for t in run["trials"] if t["fault"] == "NaN in one weight"]
    table["NaN in one weight"]["named"] = sum(trial.get("where") == [NAN_WEIGHT] for trial in nans)
    return table


# -- recorded runs -----------------------------------------------------------------------------------------------------
def recorded() -> dict[str, Any]:
    """Play the lab's recorded runs: alerts of the step rules in those that are labelled healthy."""
    counts: Counter[str] = Counter()
    young: Counter[str] = Counter()
    steps = young_steps = runs = 0
    for file in sorted(LAB.glob("*.runs.gz")):
        for run in read_packed(file):
            if label(run.loss).outcome != "healthy":
                continue
            runs += 1
            live = LiveRules(load_thresholds())
            steps += len(run.loss)
            young_steps += min(len(run.loss), YOUNG)
            for step, loss, gradient in zip(run.steps, run.loss, run.grad_norm, strict=True):
                for alert in live.step(StepFigures(int(step), float(loss), float(gradient))).alerts:
                    counts[alert.code] += 1
                    young[alert.code] += alert.step <= YOUNG
        print(file.name, runs, dict(counts), flush=True)
    total, early = sum(counts.values()), sum(young.values())
    return {
        "runs": runs, "steps": steps, "alerts": dict(counts), "per_10000": 1e4 * total / steps,
        "young_steps": young_steps, "young_alerts": {code: n for code, n in young.items() if n},
        "young_per_10000": 1e4 * early / young_steps,
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds")
    options = parser.parse_args()
    logging.getLogger("jacdiag.watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.recorded:
        found["recorded"] = recorded()
        print(found["recorded"])
    else:
        begun = time.perf_counter()
        positions = (80, 150) if options.quick else POSITIONS
        data = text()
        runs = {run.name: train_to(max(positions) + 1, run, data, positions) for run in RUNS[: options.runs]}
        found |= {"torch": torch.__version__, "runs": runs, "table": summed(runs)}
        found["seconds"] = round(time.perf_counter() - begun)
        for name, row in found["table"].items():
            print(f"{name:24} {row}")
        print("false alarms:", [alert for run in runs.values() for alert in run["false"]])
    if not options.quick:
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
