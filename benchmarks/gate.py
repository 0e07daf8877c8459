"""The gate: the paper's recipes over seeds, an unchanged model over 100 seeds, the time for a
12-layer model.

    python benchmarks/gate.py recipes --sizes 6x256 --seeds 20
    python benchmarks/gate.py recipes --sizes 24x1024 --seeds 10 --first 10    ten more seeds
    python benchmarks/gate.py unchanged --seeds 100
    python benchmarks/gate.py time

Each part updates its own entry of benchmarks/results/gate.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jacdiag.gate import gate, write_baseline

RESULTS = Path(__file__).parent / "results" / "gate.json"
BUILD = "jacdiag.sources.gpt:build"
# What each recipe must fire, what at least one of, and what nothing of.
EXPECTED: dict[str, tuple[set[str], set[str], set[str]]] = {
    "vanilla": ({"JD102"}, set(), {"JD101"}),
    "embed-detach": ({"JD102"}, set(), {"JD101"}),
    "xavier": ({"JD101"}, {"JD102", "JD103"}, set()),
    "embed-ln": (set(), set(), {"JD101", "JD102", "JD103"}),
    "scaled-embed": (set(), set(), {"JD101", "JD102", "JD103"}),
}


def sizes(layers: int, width: int, vocabulary: int) -> dict[str, Any]:
    heads = max(2, width // 64)
    return {
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "vocab_size": vocabulary,
        "block_size": 128,
    }


def recipes(options: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for size in options.sizes:
        layers, width = map(int, size.split("x"))
        for name, (must, one_of, never) in EXPECTED.items():
            right, errors, begun = 0, 0, time.perf_counter()
            for seed in range(options.first, options.first + options.seeds):
                args = {"recipe": name, **sizes(layers, width, 4096)}
                out = gate(
                    BUILD,
                    seeds=1,
                    seed=seed,
                    batch=1,
                    seq=64,
                    model_args=args,
                    select=["JD1", "JD2"],
                    profile="paper" if options.paper else "default",
                )
                loud = {f.code for f in out.report.findings if f.level in ("warning", "error")}
                contract = {c for c in loud if c.startswith("JD2")}
                right += (
                    must <= loud
                    and (not one_of or bool(one_of & loud))
                    and not never & loud
                    and not contract
                )
                errors += any(
                    f.level == "error" and f.code in ("JD101", "JD102") for f in out.report.findings
                )
            made[f"{size} {name}"] = {
                "right": right,
                "of": options.seeds,
                "errors_with_paper": errors if options.paper else None,
                "seconds_each": round((time.perf_counter() - begun) / options.seeds, 1),
            }
            print(size, name, made[f"{size} {name}"], flush=True)
    return made


def _joined(known: dict[str, Any], made: dict[str, Any], first: int) -> dict[str, Any]:
    """Recipes anew; with a first seed above 0 the counts are added to those of the seeds before
    it.
    """
    for name, entry in made.items():
        before = known.get(name)
        if first and before is not None and before["of"] == first:
            counts = {
                k: before[k] + entry[k]
                for k in ("right", "of", "errors_with_paper")
                if entry[k] is not None
            }
            made[name] = {**entry, **counts}
        elif first:
            raise SystemExit(
                f"{name}: the seeds before {first} are not there; found {before and before['of']}"
            )
    return {**known, **made}


def unchanged(options: argparse.Namespace) -> dict[str, Any]:
    """A baseline of three seeds, then other seeds of the same model, everything at its default."""
    codes: dict[int, int] = {}
    args = {"recipe": "scaled-embed", **sizes(3, 64, 512)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "baseline.json"
        write_baseline(
            path, gate(BUILD, seeds=3, decide=False, batch=1, seq=32, model_args=args).figures
        )
        for seed in range(1000, 1000 + options.seeds):
            out = gate(
                BUILD,
                seeds=1,
                seed=seed,
                batch=1,
                seq=32,
                model_args=args,
                baseline=path,
                fail_on="warning",
            )
            codes[out.exit_code] = codes.get(out.exit_code, 0) + 1
    made = {
        "exit_codes": {str(k): v for k, v in sorted(codes.items())},
        "seeds": options.seeds,
        "model": args,
    }
    print(made)
    return made


def timed(options: argparse.Namespace) -> dict[str, Any]:
    args = {"recipe": "gpt2", **sizes(12, 768, 50304)}
    begun = time.perf_counter()
    out = gate(BUILD, seeds=1, batch=2, seq=128, model_args=args)
    made = {
        "seconds": round(time.perf_counter() - begun, 1),
        "threads": torch.get_num_threads(),
        "exit": out.exit_code,
        "phases": out.report.cost.phases,
        "model": args,
    }
    print(made)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "part", nargs="?", default="unchanged", choices=["recipes", "unchanged", "time"]
    )
    parser.add_argument("--sizes", nargs="+", default=["6x256"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--first", type=int, default=0, help="the first seed; those before it are counted already"
    )
    parser.add_argument("--paper", action="store_true", help="under --profile paper")
    options = parser.parse_args()
    made = {"recipes": recipes, "unchanged": unchanged, "time": timed}[options.part](options)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    part = (
        f"recipes {'paper' if options.paper else 'default'}"
        if options.part == "recipes"
        else options.part
    )
    known[part] = (
        _joined(known.get(part, {}), made, options.first) if options.part == "recipes" else made
    )
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
