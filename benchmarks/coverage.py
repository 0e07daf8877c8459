"""Does "any PyTorch model, no adapters" hold? Every family that transformers registers, checked one
by one.

    python benchmarks/coverage.py [FAMILY ...] [--task TASK] [--workers N] [--limit SECONDS]

Without names it runs them all (about 330, from default configs made tiny, random weights, no
network) and writes results/coverage.json and results/coverage.md; with names it prints what fails
and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}

from _coverage import build, pool, table

RESULTS = Path(__file__).parent / "results"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*")
    parser.add_argument("--task", choices=list(build.TASKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per family")
    return parser.parse_args()


def lost(job: tuple[str, str], reason: str) -> dict[str, Any]:
    """The result of a family whose worker was cut off."""
    return {
        "task": job[0],
        "family": job[1],
        "status": "failed",
        "reason": reason,
        "expected": 0,
        "found": 0,
        "covered": 0.0,
        "dense": 0,
        "interpreted": False,
        "sublayers": [],
        "problems": {"time": reason},
        "notes": [],
    }


def main() -> None:
    chosen = options()
    jobs = [
        (task, family)
        for task, family in build.families()
        if chosen.task in (None, task) and (not chosen.family or family in chosen.family)
    ]
    rows = []
    for row in pool.run(jobs, chosen.workers, chosen.limit, lost):
        rows.append(row)
        shown = "; ".join(f"{k}: {v}" for k, v in row["problems"].items()) or row["reason"]
        print(
            f"[{len(rows)}/{len(jobs)}] {row['task']} {row['family']}: {row['status']} "
            f"{row['found']}/{row['expected']} {shown}",
            flush=True,
        )
    if not chosen.family and not chosen.task:
        write(sorted(rows, key=lambda r: jobs.index((r["task"], r["family"]))))
    ran = [r for r in rows if r["status"] != "not built"]
    print(f"{sum(r['status'] == 'ok' for r in ran)} of {len(ran)} pass")


def write(rows: list[dict[str, Any]]) -> None:
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)  # a family a line
    head = json.dumps(versions)[:-1]
    (RESULTS / "coverage.json").write_text(f'{head}, "families": [\n{lines}\n]}}\n')
    (RESULTS / "coverage.md").write_text(table.page(rows, versions))


if __name__ == "__main__":
    main()
