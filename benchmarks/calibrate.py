"""Measures the recipes of the paper, and derives from them the thresholds of JD101 to JD103 in
report/thresholds.toml.

For each figure, `a` is the largest value among the recipes that meet a condition, `b` the smallest
worst-sub-layer value among those that do not. "Met" ends a third of the way from a to b on a log
scale, "not met" begins at two thirds.

    python benchmarks/calibrate.py            about 10 minutes; writes results/calibration.json
    python benchmarks/calibrate.py --quick    the smallest size; prints only
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

import jacdiag

SIZES = ((6, 256), (6, 1024), (12, 512), (24, 256), (24, 512))  # layers, width
SEEDS = (0, 1)
RECIPES = ("vanilla", "xavier", "embed-detach", "embed-ln", "scaled-embed")
SMALL, NOT_SMALL = ("vanilla", "embed-detach", "embed-ln", "scaled-embed"), ("xavier",)
LARGE, NOT_LARGE = ("embed-ln", "scaled-embed"), ("vanilla", "embed-detach", "xavier")
RESULTS = Path(__file__).parent / "results" / "calibration.json"


def measure(recipe: str, layers: int, width: int, seed: int) -> list[dict[str, Any]]:
    """One audit of one recipe: the figures of every sub-layer."""
    sizes = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": max(2, width // 64),
        "vocab_size": 4096,
        "block_size": 64,
    }
    report = jacdiag.audit(
        "jacdiag.sources.gpt:build",
        model_args={"recipe": recipe, **sizes},
        batch=1,
        seq=64,
        seed=seed,
        state="init",
    )
    product = report.network.gain_product_log
    return [
        {
            "recipe": recipe,
            "layers": layers,
            "width": width,
            "seed": seed,
            "name": row.name,
            "depth": row.depth,
            "kind": row.kind,
            "core": row.core_norm.estimate * math.sqrt(2 * layers),
            "branch": row.branch_norm.estimate,
            "gain_p99": row.norm_gain.per_token.p99,
            "product_log": product,
        }
        for row in report.sublayers
    ]


def worst(
    rows: list[dict[str, Any]], figure: str, recipes: tuple[str, ...], kind: str | None, pick: Any
) -> float:
    """`pick` over models of the largest value in each: max for the recipes that meet, min for those
    that do not.
    """
    models: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["recipe"] in recipes and kind in (None, row["kind"]):
            key = (row["recipe"], row["layers"], row["width"], row["seed"])
            models[key] = max(models.get(key, -math.inf), row[figure])
    return pick(models.values())


def cuts(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b, "info": a * (b / a) ** (1 / 3), "warning": a * (b / a) ** (2 / 3)}


def derive(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The cuts for thresholds.toml."""
    table = {}
    for kind in ("attention", "mlp"):
        table[f"core_norm.{kind}"] = cuts(
            worst(rows, "core", SMALL, kind, max), worst(rows, "core", NOT_SMALL, kind, min)
        )
    table["norm_gain"] = cuts(
        worst(rows, "gain_p99", LARGE, None, max), worst(rows, "gain_p99", NOT_LARGE, None, min)
    )
    table["branch_norm.pre"] = cuts(
        worst(rows, "branch", LARGE, None, max), worst(rows, "branch", NOT_LARGE, None, min)
    )
    return table


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per recipe and size: the worst of each figure over sub-layers and seeds."""
    lines = []
    for recipe in RECIPES:
        for size in sorted({(r["layers"], r["width"]) for r in rows}):
            some = [r for r in rows if r["recipe"] == recipe and (r["layers"], r["width"]) == size]
            line: dict[str, Any] = {"recipe": recipe, "layers": size[0], "width": size[1]}
            for kind in ("attention", "mlp"):
                line[f"core_{kind}"] = round(max(r["core"] for r in some if r["kind"] == kind), 3)
            for figure in ("gain_p99", "branch", "product_log"):
                line[figure] = round(max(r[figure] for r in some), 3)
            lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the smallest size and one seed; nothing is written"
    )
    quick = parser.parse_args().quick
    begun, rows = time.perf_counter(), []
    for layers, width in SIZES[:1] if quick else SIZES:
        for recipe in RECIPES:
            for seed in SEEDS[:1] if quick else SEEDS:
                rows += measure(recipe, layers, width, seed)
            print(
                f"{time.perf_counter() - begun:6.0f} s  {layers} layers, d {width}, {recipe}",
                file=sys.stderr,
            )
    table, lines = derive(rows), summary(rows)
    for line in lines:
        print("  ".join(f"{k} {v}" for k, v in line.items()))
    for name, values in table.items():
        print(f"[{name}]  " + "  ".join(f"{k} = {v:.3g}" for k, v in values.items()))
    if not quick:
        result = {
            "torch": torch.__version__,
            "sizes": SIZES,
            "seeds": SEEDS,
            "cuts": table,
            "recipes": lines,
        }
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
