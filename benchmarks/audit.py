"""How the cost of a whole audit grows with depth, width, length and batch, and what it is made of,
per norm.

Counts (products, and forwards of a sub-layer, which a product costs one of) depend on the seed
alone. Seconds depend on the machine; every shape is timed in rounds that take turns.

    python benchmarks/audit.py            minutes; prints, and writes benchmarks/results/audit.json
    python benchmarks/audit.py --quick    small shapes, seconds; prints only
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import jacdiag
from jacdiag.records import Report
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

RESULTS = Path(__file__).parent / "results" / "audit.json"
NORMS = ("core_norm", "branch_norm", "residual_norm")
BASE = {"n_layer": 4, "n_embd": 256, "block_size": 64, "batch": 2}
GROWTH = {
    "n_layer": (2, 4, 8),
    "n_embd": (128, 256, 512),
    "block_size": (32, 64, 128),
    "batch": (1, 2, 4, 8),
}
QUICK = {"n_layer": (1, 2), "batch": (1, 2)}


def audited(shape: dict[str, int], **options: Any) -> tuple[Report, float]:
    """An audit of a fresh GPT-2 of this shape, and its seconds."""
    sizes = {k: v for k, v in shape.items() if k != "batch"} | {
        "n_head": shape["n_embd"] // 64,
        "vocab_size": 512,
    }
    with seeded(0):
        model = gpt.build("gpt2", **sizes).eval()
        ids = torch.randint(512, (shape["batch"], shape["block_size"]))
    begun = time.perf_counter()
    report = jacdiag.audit(model, ids, state="init", **options)
    return report, time.perf_counter() - begun


def counts(report: Report) -> dict[str, Any]:
    """Products per norm and forwards per sub-layer: medians over sub-layers.

    What all norms cost beside the dearest is counted here as if they shared nothing; `spectral.py`
    has it by the clock.
    """
    assert report.cost is not None and report.network is not None
    rows = report.sublayers
    found = {
        name: [getattr(row, name).products for row in rows if getattr(row, name) is not None]
        for name in NORMS
    }
    ratios = [sum(spent) / max(spent) for spent in zip(*found.values(), strict=True)]
    through = report.network.end_to_end
    return {
        **{f"{name}_products": statistics.median(products) for name, products in found.items()},
        "sub_layer_forwards": statistics.median(row.cost or 0.0 for row in rows),
        "all_norms_over_the_dearest": round(statistics.median(ratios), 2),
        "end_to_end_products": None if through is None else through.products,
        "products": report.cost.products,
    }


def growth(
    axis: str, values: tuple[int, ...], base: dict[str, int], rounds: int
) -> list[dict[str, Any]]:
    """One axis: the audit at every value, all else as in `base`. Seconds per sub-layer and 1,000
    tokens.
    """
    seconds: dict[int, list[float]] = {value: [] for value in values}
    reports = {}
    for _ in range(rounds):
        for value in values:
            reports[value], spent = audited({**base, axis: value})
            seconds[value].append(spent)
    rows = []
    for value in values:
        shape, report = {**base, axis: value}, reports[value]
        assert report.cost is not None
        tokens = shape["batch"] * shape["block_size"]
        typical = statistics.median(seconds[value])
        rows.append(
            {
                axis: value,
                **counts(report),
                "seconds": round(typical, 3),
                "sub_layer_ms_per_1000_tokens": round(
                    1e6 * typical / len(report.sublayers) / tokens, 1
                ),
                "phases": {k: round(v, 3) for k, v in report.cost.phases.items()},
            }
        )
    return rows


def decided(base: dict[str, int]) -> dict[str, Any]:
    """What `--decide` spends: forwards of every sub-layer, and whether its norms came from one
    another.
    """
    report, seconds = audited(base, decide=True)
    assert report.cost is not None
    return {**counts(report), "seconds": round(seconds, 3)}


def goals(result: dict[str, Any]) -> list[tuple[str, float, str, float]]:
    """(what, measured, relation, goal); counts only."""
    axes = result["growth"]
    depth = [row["sub_layer_forwards"] for row in axes["n_layer"]]
    batch = [row["sub_layer_forwards"] for row in axes["batch"]]
    ratio = max(row["all_norms_over_the_dearest"] for rows in axes.values() for row in rows)
    return [
        ("forwards per sub-layer, deepest over shallowest", depth[-1] / depth[0], "<=", 1.1),
        ("forwards per sub-layer, largest batch over smallest", batch[-1] / batch[0], "<=", 1.1),
        ("all norms refined over the dearest, by products", ratio, "<=", 2.9),
        (
            "all norms over the dearest alone, decided",
            result["decided"]["all_norms_over_the_dearest"],
            "<=",
            1.5,
        ),
        (
            "products per norm, decided",
            max(result["decided"][f"{n}_products"] for n in NORMS),
            "<=",
            16,
        ),
        ("forwards per sub-layer, decided", result["decided"]["sub_layer_forwards"], "<=", 24),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes; nothing is written")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    base = {**BASE, "n_layer": 2, "n_embd": 64, "block_size": 16} if args.quick else BASE
    rounds = 1 if args.quick else args.rounds
    result: dict[str, Any] = {
        "base": base,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    result["growth"] = {}
    for axis, values in (QUICK if args.quick else GROWTH).items():
        result["growth"][axis] = rows = growth(axis, values, base, rounds)
        for row in rows:
            forwards, ms = row["sub_layer_forwards"], row["sub_layer_ms_per_1000_tokens"]
            print(
                f"{axis:10s} {row[axis]:5d}   {forwards:6.1f} forwards a sub-layer {ms:10.1f} ms "
                "per 1,000 tokens"
            )
    result["decided"] = decided(base)
    result["goals"] = []
    for what, value, relation, goal in goals(result):
        result["goals"].append(
            {"what": what, "measured": round(value, 3), "goal": goal, "reached": value <= goal}
        )
        print(
            f"{'ok  ' if value <= goal else 'MISS'}  {what:55s} {value:8.3g}   {relation} {goal:g}"
        )
    if not args.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
