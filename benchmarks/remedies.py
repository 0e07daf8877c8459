"""Does the remedy that is recommended hold? The paper's failing recipes, mended by the patch as it
is printed.

For each shape and failing recipe: an audit with remedies, then the text of its patch for PyTorch,
run on models of seeds that no remedy was tried on, each judged by the gate. The price of the trials
is set against the audit alone.

    python benchmarks/remedies.py            6x256 and 24x256, about 4 minutes
    python benchmarks/remedies.py --sizes 6x1024 --seeds 2    each shape updates its own entry
    python benchmarks/remedies.py --spread   how far seeds of a mended model differ: 2 minutes
    python benchmarks/remedies.py --quick    one small shape; prints only
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import jacdiag
from benchmarks.gate import BUILD, sizes
from jacdiag.gate import gate
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

RESULTS = Path(__file__).parent / "results" / "remedies.json"
RECIPES = ("vanilla", "embed-detach", "xavier")
FIRST_NEW = 1000  # seeds below were tried on
PROBE: dict[str, Any] = {"batch": 1, "seq": 64}
SPREAD_SIZES, SPREAD_SEEDS = ("3x64", "6x256"), 12


def recommended(recipe: str, args: dict[str, Any], way: str = "first") -> Any:
    """Return the report of an audit, and the remedy that it recommends; None for none."""
    report = jacdiag.audit(
        BUILD, model_args={"recipe": recipe, **args}, decide=True, remedies=way, **PROBE
    )
    return report, next((r for r in report.remedies if r.recommended), None)


def remedy_function(remedy: Any) -> Any:
    """Return the function of a model that the remedy's patch for PyTorch defines."""
    namespace: dict[str, Any] = {}
    exec(remedy.patches["pytorch"], namespace)
    return namespace["remedy"]


def spread(recipe: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return how far the worst figures of mended models differ by their seed.

    For each figure: the largest over seeds, over the median.
    """
    # 1. The worst figures of each seed.
    _, best = recommended(recipe, args)
    mend = remedy_function(best)
    worst: dict[str, list[float]] = {}
    for seed in range(FIRST_NEW, FIRST_NEW + SPREAD_SEEDS):
        with seeded(seed):
            model = gpt.build(recipe, **args)
            mend(model)
        rows = jacdiag.audit(
            model, state="init", seed=seed, tol=0.02, remedies="none", **PROBE
        ).sublayers
        for kind in ("attention", "mlp"):
            norms = [row.core_norm.estimate for row in rows if row.kind == kind]
            worst.setdefault(f"core_norm.{kind}", []).append(max(norms))
        worst.setdefault("branch_norm", []).append(max(row.branch_norm.estimate for row in rows))
        gains = [row.norm_gain.per_token.p99 for row in rows]
        worst.setdefault("norm_gain", []).append(max(gains))

    # 2. The largest over the median.
    over_median = {
        figure: round(max(values) / statistics.median(values), 3)
        for figure, values in worst.items()
    }
    return {"remedy": best.name, "seeds": SPREAD_SEEDS, "largest_over_median": over_median}


def held(recipe: str, args: dict[str, Any], seeds: int) -> dict[str, Any]:
    """One recipe: the recommended remedy, and how many new seeds pass the gate with it."""
    timed = {}
    for way in ("none", "first"):
        begun = time.perf_counter()
        report, best = recommended(recipe, args, way)
        timed[way] = time.perf_counter() - begun
    if best is None:
        return {"recommended": None, "tried": [r.name for r in report.remedies]}
    mend = remedy_function(best)
    passed, before = 0, 0
    for seed in range(FIRST_NEW, FIRST_NEW + seeds):
        for mended in (False, True):
            with seeded(seed):
                model = gpt.build(recipe, **args)
                if mended:
                    mend(model)
            out = gate(model, seed=seed, fail_on="warning", select=["JD1"], state="init", **PROBE)
            passed += mended and out.exit_code == 0
            before += not mended and out.exit_code == 0
    return {
        "recommended": best.name,
        "tried": len(report.remedies),
        "seeds_tried": best.seeds,
        "passed": passed,
        "passed_unmended": before,
        "of": seeds,
        "branch_norm": [best.before.branch_norm, best.after.branch_norm],
        "seconds": {way: round(s, 1) for way, s in timed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["6x256", "24x256"], metavar="LxD")
    parser.add_argument("--seeds", type=int, default=5, help="new seeds that must pass")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--spread", action="store_true", help="how far seeds differ")
    options = parser.parse_args()

    # 1. How far seeds differ.
    if options.spread:
        spreads = {}
        for size in SPREAD_SIZES:
            layers, width = map(int, size.split("x"))
            for recipe in ("vanilla", "xavier"):
                made = spread(recipe, sizes(layers, width, 4096))
                spreads[f"{size} {recipe}"] = made
                print(size, recipe, made, flush=True)
        _write(spread=spreads)
        return

    # 2. Whether the remedies hold.
    entries: dict[str, Any] = {}
    for size in ["3x64"] if options.quick else options.sizes:
        layers, width = map(int, size.split("x"))
        for recipe in RECIPES:
            seeds = 1 if options.quick else options.seeds
            made = held(recipe, sizes(layers, width, 4096), seeds)
            entries[f"{size} {recipe}"] = made
            print(size, recipe, made, flush=True)
    if not options.quick:
        _write(recipes=entries)


def _write(**parts: dict[str, Any]) -> None:
    """Write results, on top of those of earlier runs."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, entries in parts.items():
        known[name] = {**known.get(name, {}), **entries}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
