"""One rank of one thread beside two of one thread each, on one audit. GPT-2 124M, B 4, T 128.

Rounds take turns, and the ratio is the median over rounds of one rank's time by two ranks' in the
same round: of the audit itself (its own clock, from the model in memory to the report) and of the
whole command (import, reading the file, torchrun). Needs two cores that are free: what else ran is
written down as the load before each run.

    python benchmarks/ranks.py            about 20 minutes; prints, and writes results/ranks.json
    python benchmarks/ranks.py --quick    a small shape, under a minute; prints only
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

RESULTS = Path(__file__).parent / "results" / "ranks.json"
GOAL = 1.7
SHAPES: dict[str, dict[str, Any]] = {
    "full": {
        "sizes": {
            "n_layer": 12,
            "n_embd": 768,
            "n_head": 12,
            "vocab_size": 50304,
            "block_size": 128,
        },
        "batch": 4,
        "rounds": 3,
    },
    "quick": {
        "sizes": {"n_layer": 6, "n_embd": 192, "n_head": 4, "vocab_size": 512, "block_size": 64},
        "batch": 2,
        "rounds": 1,
    },
}
NORMS = ("branch_norm", "core_norm", "residual_norm", "joint_residual_norm")


def checkpoint(folder: Path, sizes: dict[str, int]) -> Path:
    """A nanoGPT checkpoint at step 0, as a trainer writes it."""
    with seeded(0):
        model = gpt.build("gpt2", **sizes)
    path = folder / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "model_args": sizes, "iter_num": 0}, path)
    return path


def command(ranks: int, args: list[str]) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "jacdiag_cli", *args]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "jacdiag_cli",
    ]
    return [sys.executable, *launcher, *args]


def run(ranks: int, path: Path, batch: int) -> dict[str, Any]:
    """One audit in processes of their own."""
    out = path.with_name(f"{ranks}.json")
    args = [
        "audit",
        str(path),
        "--batch",
        str(batch),
        "--device",
        "cpu",
        "--json",
        str(out),
        "--fail-on",
        "never",
    ]
    load, begun = os.getloadavg()[0], time.perf_counter()
    subprocess.run(
        command(ranks, args),
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process = time.perf_counter() - begun
    report = json.loads(out.read_text())
    return {
        "ranks": ranks,
        "process": process,
        "audit": report["cost"]["seconds"],
        "load_before": load,
        "phases": report["cost"]["phases"],
        "uses": report["settings"].get("ranks", []),
        "report": report,
    }


def disagreements(one: dict[str, Any], two: dict[str, Any]) -> int:
    """Norms whose intervals do not overlap: none, if the reports are equal within them."""
    pairs = [
        (a[n], b[n])
        for a, b in zip(one["sublayers"], two["sublayers"], strict=True)
        for n in NORMS
        if a[n]
    ]
    pairs.append((one["network"]["end_to_end"], two["network"]["end_to_end"]))
    return sum(a["lower"] > b["upper"] or b["lower"] > a["upper"] for a, b in pairs)


def shown(result: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["phases"].items())
    return (
        f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}: audit {result['audit']:.1f} s "
        f"({phases}), "
        f"process {result['process']:.1f} s, load before {result['load_before']:.1f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape; nothing is written")
    shape = SHAPES["quick" if parser.parse_args().quick else "full"]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint(Path(folder), shape["sizes"])
        for k in range(shape["rounds"]):
            pair = [
                run(ranks, path, shape["batch"]) for ranks in ((1, 2) if k % 2 == 0 else (2, 1))
            ]
            one, two = sorted(pair, key=lambda result: result["ranks"])
            rounds.append(
                {
                    "one": one,
                    "two": two,
                    "audit_ratio": one["audit"] / two["audit"],
                    "process_ratio": one["process"] / two["process"],
                    "disagreements": disagreements(one.pop("report"), two.pop("report")),
                }
            )
            print(*map(shown, (one, two)), sep="\n", file=sys.stderr, flush=True)
    result = {
        "shape": {k: shape[k] for k in ("sizes", "batch")},
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads_per_rank": 1,
        "rounds": rounds,
        "audit_ratio": round(statistics.median(r["audit_ratio"] for r in rounds), 3),
        "process_ratio": round(statistics.median(r["process_ratio"] for r in rounds), 3),
        "disagreements": sum(r["disagreements"] for r in rounds),
        "goal": GOAL,
    }
    for what in ("audit_ratio", "process_ratio"):
        print(
            f"{'ok  ' if result[what] >= GOAL else 'MISS'}  {what:14s} {result[what]:.2f}   >= "
            f"{GOAL}"
        )
    apart = result["disagreements"]
    print(f"{'ok  ' if not apart else 'MISS'}  intervals that do not overlap {apart}")
    if shape is SHAPES["full"]:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
