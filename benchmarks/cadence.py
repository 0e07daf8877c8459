"""Does `every="1%"` keep its share of the time, and what does it find, beside `every=200`? At four
durations of a step.

A small GPT is trained; each step is padded by a sleep to the duration that is asked for. So one
model stands for many: its probe costs the same at every duration. Halfway the attention weights are
multiplied by 8.

    python benchmarks/cadence.py            about 4 minutes; writes benchmarks/results/cadence.json
    python benchmarks/cadence.py --quick    a few seconds each; prints only
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _faults.trials import Target, scale_attention
from detect import Run, Training, text

import jacdiag
from jacdiag.records.run_log import read_run

RESULTS = Path(__file__).parent / "results" / "cadence.json"
# Seconds of a step, sub-layers' width, and how long the run is watched.
DURATIONS = ((0.005, 16, 20.0), (0.014, 16, 20.0), (0.060, 48, 30.0), (1.0, 48, 45.0))
CADENCES: tuple[int | str, ...] = (200, "1%")


def measure(
    every: int | str, step_seconds: float, width: int, seconds: float, data: torch.Tensor
) -> dict[str, Any]:
    """Train for some time under a watch and return what the probe cost and found."""
    run = Run("padded", layers=1 if width < 32 else 3, width=width)
    training = Training(run, 100_000, data)
    steps = max(int(seconds / step_seconds), 20)
    with tempfile.TemporaryDirectory() as folder:
        watch = jacdiag.watch(
            training.model, training.optimizer, every=every, log_dir=folder, quiet=True
        )
        begun = time.perf_counter()
        first = 0.0
        for step in range(1, steps + 1):
            started = time.perf_counter()
            ids = training.batch()
            if step == steps // 2:
                ids = scale_attention(Target(training.model, lambda factor: None), ids)
            loss, norm = training.step(step, ids)
            watch.step(loss, grad_norm=norm)
            if step == 1:
                first = time.perf_counter() - begun
            time.sleep(max(step_seconds - (time.perf_counter() - started), 0.0))
        passed = time.perf_counter() - begun - first
        spent = dict(watch.clock.spent)
        own = watch.clock.step_seconds
        watch.close()
        log = read_run(folder)
    at = [row["step"] for row in log.probes]
    alerts = [row["step"] for row in log.alerts if row["step"] >= steps // 2]
    return {
        "every": every,
        "step_seconds": step_seconds,
        "measured_step_seconds": own,
        "steps": steps,
        "probe_seconds": [row["seconds"] for row in log.probes],
        "probe_share_after_the_first": spent.get("probe", 0.0) / passed,
        "probes": len(at),
        "steps_between": [later - earlier for earlier, later in pairwise(at)],
        "found_after_steps": min(alerts) - steps // 2 if alerts else None,
        "codes": sorted({row["code"] for row in log.alerts if row["step"] >= steps // 2}),
        "alerts_before": len(log.alerts) - len(alerts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    logging.getLogger("jacdiag.watch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = text()
    rows = []
    for step_seconds, width, seconds in DURATIONS:
        for every in CADENCES:
            row = measure(
                every, step_seconds, width, seconds / 6 if options.quick else seconds, data
            )
            rows.append(row)
            print(
                f"step {step_seconds:g} s ({row['measured_step_seconds'] or 0:.3g}), "
                f"every={every}: "
                f"{row['probe_share_after_the_first']:.2%} of the time, {row['probes']} probes of "
                f"{max(row['probe_seconds'], default=0):.2g} s, at most every "
                f"{max(row['steps_between'], default=0)} "
                f"steps; found after {row['found_after_steps']} ({', '.join(row['codes'])})",
                flush=True,
            )
    if not options.quick:
        RESULTS.write_text(
            json.dumps({"load": os.getloadavg(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
