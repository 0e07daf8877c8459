"""How much do branch norms grow between two checkpoints of a run, healthy or wrecked?

`jacdiag audit NOW --against EARLIER` has to tell the growth of ordinary training from damage. Small
GPTs of every placement of the norm are trained on bytes. At several steps each is audited on text,
always with the same probe. For every pair of steps the largest growth over the sub-layers is kept:
lower end later over upper end earlier, which is what lies beyond both intervals. A wrecked run is a
healthy one whose learning rate is multiplied by 100 half-way.

    python benchmarks/growth.py                 30 runs, about 20 minutes on one core
    python benchmarks/growth.py --quick         two runs; prints only
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import jacdiag
from examples.spike_lab.model import PLACEMENTS, Model, Shape
from examples.spike_lab.text import batch

RESULTS = Path(__file__).parent / "results" / "growth.json"
RECIPES = ("vanilla", "scaled-embed")
RATES = (1e-3, 8e-3)
STEPS, WARMUP, WRECKED_AT, FACTOR = 400, 20, 200, 100.0
CHECKPOINTS = (0, 50, 100, 200, 400)
WORSE = 0.4  # in nats: as in `jacdiag backtest`
END_TO_END = "end to end"
PROBE_STEP = 1_000_000  # a batch of the text that no run has trained on


def learning_rate(step: int, peak: float, *, wrecked: bool) -> float:
    """Linear warm-up, then a cosine to a tenth; times `FACTOR` from `WRECKED_AT` on in a wrecked
    run.
    """
    factor = FACTOR if wrecked and step > WRECKED_AT else 1.0
    if step <= WARMUP:
        return peak * step / WARMUP
    done = (step - WARMUP) / (STEPS - WARMUP)
    return factor * peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def audit(model: nn.Module) -> dict[str, list[float]]:
    """Lower and upper end of every branch norm, and of the end-to-end norm, on text."""
    ids, _ = batch(PROBE_STEP, 0, 1, 64)
    report = jacdiag.audit(model, ids, state="trained", tol=0.1)
    norms = {row.name: row.branch_norm for row in report.sublayers}
    if report.network is not None:
        norms[END_TO_END] = report.network.end_to_end
    return {name: [norm.lower, norm.upper] for name, norm in norms.items() if norm is not None}


def train(
    placement: str, recipe: str, peak: float, *, wrecked: bool = False, seed: int = 0
) -> dict[str, Any]:
    """One run with its norms at every checkpoint."""
    torch.manual_seed(seed)
    model = Model(Shape(placement=placement, recipe=recipe))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    norms, losses = {0: audit(model)}, []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak, wrecked=wrecked)
        ids, targets = batch(step, seed, 8, 64)
        loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        if step in CHECKPOINTS:
            norms[step] = audit(model)
    last = losses[-20:]
    return {
        "placement": placement,
        "recipe": recipe,
        "lr": peak,
        "wrecked": wrecked,
        "seed": seed,
        "loss": sum(last) / len(last) if math.isfinite(sum(last)) else None,
        "growth": growth(norms),
        "worst": {
            str(step): max(upper for name, (_, upper) in ends.items() if name != END_TO_END)
            for step, ends in norms.items()
        },
    }


def growth(norms: dict[int, dict[str, list[float]]]) -> dict[str, float]:
    """The largest growth of 1 + |J| over the sub-layers for each pair "earlier-later", beyond both
    intervals.
    """
    pairs = {}
    for earlier, later in itertools.combinations(sorted(norms), 2):
        before = norms[earlier]
        ratios = [
            (1 + lower) / (1 + before[name][1])
            for name, (lower, _) in norms[later].items()
            if name in before and name != END_TO_END
        ]
        pairs[f"{earlier}-{later}"] = float(f"{max(ratios):.4g}")
    return pairs


def calibrate(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The largest growth of healthy runs and the smallest of wrecked ones, by placement and state
    of the earlier one.

    A run is healthy if it ends within `WORSE` of the best of its placement. A wrecked run counts
    from a checkpoint before the rate rose to the last one. One that became NaN has none.
    """
    finite = [run for run in runs if run["loss"] is not None]
    best = {
        p: min(r["loss"] for r in finite if r["placement"] == p and not r["wrecked"])
        for p in PLACEMENTS
    }
    table: dict[str, dict[str, Any]] = {}
    for placement, from_init in itertools.product(PLACEMENTS, (False, True)):
        healthy, wrecked = [], []
        for run in (run for run in finite if run["placement"] == placement):
            for pair, value in run["growth"].items():
                earlier, later = map(int, pair.split("-"))
                if (earlier == 0) != from_init:
                    continue
                if run["wrecked"] and earlier <= WRECKED_AT and later == STEPS:
                    wrecked.append(value)
                elif not run["wrecked"] and run["loss"] <= best[placement] + WORSE:
                    healthy.append(value)
        name = f"{placement}, earlier {'at init' if from_init else 'trained'}"
        table[name] = {
            "healthy_max": max(healthy),
            "healthy_pairs": len(healthy),
            "wrecked_min": min(wrecked, default=None),
            "wrecked_pairs": len(wrecked),
        }
    return table


def settings(quick: bool) -> list[dict[str, Any]]:
    """Every healthy setting, then the wrecked ones."""
    if quick:
        one = {"placement": "pre", "recipe": "vanilla", "peak": 8e-3}
        return [one, {**one, "wrecked": True}]
    healthy = [
        {"placement": placement, "recipe": recipe, "peak": peak}
        for placement, recipe, peak in itertools.product(PLACEMENTS, RECIPES, RATES)
    ]
    wrecked = [
        {"placement": placement, "recipe": "vanilla", "peak": peak, "wrecked": True}
        for placement, peak in itertools.product(PLACEMENTS, RATES)
    ]
    return healthy + wrecked


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    runs = []
    for setting in settings(quick):
        begun = time.perf_counter()
        run = train(**setting)
        runs.append(run)
        seconds = time.perf_counter() - begun
        print(
            setting,
            f"loss {run['loss']}",
            run["growth"].get("100-400"),
            f"{seconds:.0f} s",
            flush=True,
        )
    if not quick:
        data = {"torch": torch.__version__, "calibration": calibrate(runs), "runs": runs}
        RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
