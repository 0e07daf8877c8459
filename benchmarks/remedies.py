"""Does the remedy that is recommended hold? The paper's failing recipes, mended by the patch as it
is printed.

For each shape and failing recipe: an audit with remedies, then the text of its patch for PyTorch,
run on models of seeds that no remedy was tried on, each judged by the gate. The price of the trials
is set against the audit alone.

    python benchmarks/remedies.py            6x256 and 24x256, about a quarter of an hour
    python benchmarks/remedies.py --sizes 6x1024 --seeds 2    each shape updates its own entry
    python benchmarks/remedies.py --quick    one small shape; prints only
"""

from __future__ import annotations

import argparse
import json
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


def held(recipe: str, args: dict[str, Any], seeds: int) -> dict[str, Any]:
    """One recipe: the recommended remedy, and how many new seeds pass the gate with it."""
    timed = {}
    for way in ("none", "first"):
        begun = time.perf_counter()
        report = jacdiag.audit(
            BUILD, model_args={"recipe": recipe, **args}, decide=True, remedies=way, **PROBE
        )
        timed[way] = time.perf_counter() - begun
    best = next((r for r in report.remedies if r.recommended), None)
    if best is None:
        return {"recommended": None, "tried": [r.name for r in report.remedies]}
    namespace: dict[str, Any] = {}
    exec(best.patches["pytorch"], namespace)
    passed, before = 0, 0
    for seed in range(FIRST_NEW, FIRST_NEW + seeds):
        for mended in (False, True):
            with seeded(seed):
                model = gpt.build(recipe, **args)
                if mended:
                    namespace["remedy"](model)
            out = gate(model, seed=seed, fail_on="warning", select=["JD1"], state="init", **PROBE)
            passed += mended and out.exit_code == 0
            before += not mended and out.exit_code == 0
    return {
        "recommended": best.name,
        "tried": len(report.remedies),
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
    options = parser.parse_args()
    made: dict[str, Any] = {}
    for size in ["3x64"] if options.quick else options.sizes:
        layers, width = map(int, size.split("x"))
        for recipe in RECIPES:
            made[f"{size} {recipe}"] = held(
                recipe, sizes(layers, width, 4096), 1 if options.quick else options.seeds
            )
            print(size, recipe, made[f"{size} {recipe}"], flush=True)
    if not options.quick:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        entries = {**known.get("recipes", {}), **made}
        about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        RESULTS.write_text(
            json.dumps({**about, "recipes": entries}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
