"""Which faults do the live rules find, how late, and at which age of a run? Five faults at 20
positions each.

A healthy run goes on under a watch: a plain loop, the Hugging Face Trainer, and Lightning, each
with a small GPT. At each position it is forked once per fault: the copy gets the fault and trains
on. So every fault meets the very same run, and the run itself counts the false alarms. trainscope
looks on in the same runs, where it is installed.

A fault counts as found in time within 10 steps if the loss shows it by then: a loss stands 2 above
the median of the last 201, or the mean of ten losses 0.3 above it. A fault that the loss does not
show has two rounds of statistics, the first one after it and the next.

    python benchmarks/faults.py                     half an hour; writes results/faults.json
    python benchmarks/faults.py --only Lightning    one of the runs; the results of others stay
    python benchmarks/faults.py --quick             two positions; prints only
    python benchmarks/faults.py --recorded          recorded runs of the lab: false alarms only
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from _faults.runs import hugging_face, lightning, plain_loop
from _faults.trials import FAULTS, NAN_WEIGHT, WITHIN, count_found
from detect import text

from jacdiag.backtest.archive import read_packed
from jacdiag.backtest.outcomes import label
from jacdiag.detectors.live_rules import LiveRules, StepFigures
from jacdiag.rules.thresholds import load_thresholds

RESULTS = Path(__file__).parent / "results" / "faults.json"
LAB = Path(__file__).parents[1] / "examples" / "spike_lab" / "results"
POSITIONS = (
    80,
    90,
    100,
    115,
    130,
    150,
    170,
    190,
    220,
    250,
    290,
    330,
    380,
    440,
    500,
    580,
    660,
    760,
    880,
    1000,
)
YOUNG = 200
RUNS: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {
    "nanoGPT-like": (plain_loop, 0),
    "nanoGPT-like, another seed": (plain_loop, 1),
    "Hugging Face Trainer": (hugging_face, 0),
    "Lightning": (lightning, 0),
}


def summed(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return per fault how many were found in time, by whom, the delays, and which rule fired
    first.
    """
    every = [trial for run in runs for trial in run["trials"]]
    table: dict[str, Any] = {}
    for name in FAULTS:
        trials = [trial for trial in every if trial["fault"] == name]
        delays = sorted(trial["delay"] for trial in trials if trial.get("delay") is not None)
        peer = any("trainscope" in trial for trial in trials)
        shown = [
            trial for trial in trials if trial.get("shown") is not None and trial["shown"] <= WITHIN
        ]
        table[name] = {
            "trials": len(trials),
            "loss_shows": len(shown),
            "found": count_found(trials),
            "found_without_JD508": count_found(trials, "without_writes"),
            "found_by_trainscope": count_found(trials, "trainscope") if peer else None,
            "within_10": sum(delay <= WITHIN for delay in delays),
            "median_delay": median(delays) if delays else None,
            "largest_delay": max(delays, default=None),
            "codes": dict(
                Counter(trial["code"] for trial in trials if trial.get("delay") is not None)
            ),
        }
    nans = [trial for trial in every if trial["fault"] == "NaN in one weight"]
    table["NaN in one weight"]["named"] = sum(_names_the_weight(trial) for trial in nans)
    return table


def _names_the_weight(trial: dict[str, Any]) -> bool:
    """Whether the alert names the weight, whose name begins with that of a wrapper where there is
    one.
    """
    return len(trial.get("where", ())) == 1 and trial["where"][0].endswith(NAN_WEIGHT)


# -- recorded runs ---------------------------------------------------------------------------------
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
        "runs": runs,
        "steps": steps,
        "alerts": dict(counts),
        "per_10000": 1e4 * total / steps,
        "young_steps": young_steps,
        "young_alerts": {code: n for code, n in young.items() if n},
        "young_per_10000": 1e4 * early / young_steps,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help=", ".join(RUNS))
    options = parser.parse_args()
    logging.getLogger("jacdiag.watch").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    found: dict[str, Any] = (
        json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    )
    if options.recorded:
        found["recorded"] = recorded()
        print(found["recorded"])
    else:
        positions = frozenset((80, 150) if options.quick else POSITIONS)
        data = text()
        runs: dict[str, Any] = {} if options.quick else found.get("runs", {})
        for name, (train, seed) in RUNS.items():
            if options.only and name not in options.only:
                continue
            begun = time.perf_counter()
            runs[name] = train(name, seed, data, positions)
            runs[name]["seconds"] = round(time.perf_counter() - begun)
            if not options.quick:  # a benchmark that is interrupted loses one run
                _write(found, runs)
        show(runs)
    if not options.quick:
        _write(found, found["runs"])


def _write(found: dict[str, Any], runs: dict[str, Any]) -> None:
    found |= {"torch": torch.__version__, "runs": runs, "table": summed(runs.values())}
    found.pop("seconds", None)
    found["by_run"] = {name: summed([run]) for name, run in runs.items()}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def show(runs: dict[str, Any]) -> None:
    """Print the table of each run and of all."""
    for name, run in runs.items():
        print(
            f"{name}, false alarms: {run['false']}; of trainscope: "
            f"{len(run.get('trainscope_false', ()))}"
        )
        for fault, row in summed([run]).items():
            print(f"    {fault:24} {row}")
    for fault, row in summed(runs.values()).items():
        print(f"{fault:24} {row}")


if __name__ == "__main__":
    main()
