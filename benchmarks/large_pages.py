"""Do large pages (`THP_MEM_ALLOC_ENABLE=1`, which the command sets) make an audit faster?

Each workload runs in pairs of processes, with and without, in turns. CPU seconds count, since the
clock also measures what else the machine does. Page faults show whether the switch took effect.

    python benchmarks/large_pages.py            about 5 minutes; writes results/large_pages.json
    python benchmarks/large_pages.py --quick    one pair of the shortest; prints only
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "large_pages.json"
PAIRS = 2
SWITCH = "THP_MEM_ALLOC_ENABLE"


def raise_matrices() -> Callable[[], None]:
    """Raise a matrix of bf16 to float32, 40 times, and drop the result."""
    import torch

    matrix = torch.empty(4096, 4096, dtype=torch.bfloat16).normal_()

    def work() -> None:
        for _ in range(40):
            matrix.float()

    return work


def audit(layers: int, width: int, dtype: str, batch: int, length: int) -> Callable[[], None]:
    """Audit a GPT-2 with `decide`."""
    import torch

    import jacdiag
    from jacdiag.sources import gpt
    from jacdiag.sources.factory import seeded

    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // 64}
    with seeded(0):
        model = gpt.build("gpt2", **sizes, vocab_size=512, block_size=128).eval()
        ids = torch.randint(512, (batch, length))
    model = model.to(getattr(torch, dtype))
    return lambda: jacdiag.audit(model, ids, state="init", decide=True) and None


WORKLOADS: dict[str, Callable[[], Callable[[], None]]] = {
    "raising 40 bf16 matrices of 4,096 x 4,096": raise_matrices,
    "audit, 3 layers of 768, float32, 2 x 128 tokens": lambda: audit(3, 768, "float32", 2, 128),
    "audit, 1 layer of 2,048, bf16, 64 tokens": lambda: audit(1, 2048, "bfloat16", 1, 64),
}


def measured(name: str) -> dict[str, float]:
    """Return the CPU seconds and the page faults of a workload in this process."""
    work = WORKLOADS[name]()
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(used, 2), "page_faults": after.ru_minflt - before.ru_minflt}


def in_a_process(name: str, switch: str) -> dict[str, float]:
    """Return the same of a process of its own, with the switch set to "0" or "1"."""
    command = [sys.executable, __file__, "--workload", name]
    environment = {**os.environ, SWITCH: switch}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def pairs_of(name: str, pairs: int) -> dict[str, Any]:
    """Return the runs of a workload by the switch, and the ratio of their CPU seconds."""
    runs: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    for turn in range(pairs):
        order = ("0", "1") if turn % 2 == 0 else ("1", "0")
        for switch in order:
            runs[switch].append(in_a_process(name, switch))
    without, with_pages = (
        statistics.median(run["cpu_seconds"] for run in runs[switch]) for switch in ("0", "1")
    )
    return {
        "without": runs["0"],
        "with": runs["1"],
        "cpu_seconds": [round(without, 2), round(with_pages, 2)],
        "ratio": round(with_pages / without, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one pair of the shortest")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.workload:
        print(json.dumps(measured(args.workload)))
        return
    names = list(WORKLOADS)[:1] if args.quick else list(WORKLOADS)
    results = {}
    for name in names:
        results[name] = pairs_of(name, 1 if args.quick else PAIRS)
        without, with_pages = results[name]["cpu_seconds"]
        print(f"{name:50} {without:.2f} s without, {with_pages:.2f} s with large pages", flush=True)
    if not args.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
