"""The spike lab trains a grid of small GPTs. Each has an audit before its first step, and a watch.

    python -m examples.spike_lab smoke --out runs/lab           half a minute
    python -m examples.spike_lab cpu --out runs/cpu --jobs 2    an hour or two on 2 cores
    python -m examples.spike_lab gpu --out runs/gpu --device cuda --minutes 9

A grid that was stopped goes on with the same command. Then: jacdiag backtest runs/lab
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLAN = Path(__file__).parent / "plan.toml"


def settings(grid: str) -> list[dict[str, Any]]:
    """The factors of every run of a grid, without doubles, in the order of the plan."""
    tables = tomllib.loads(PLAN.read_text(encoding="utf-8"))[grid]
    found: dict[str, dict[str, Any]] = {}
    for table in tables:
        for factors in _combinations(table):
            found.setdefault(name_of(factors), factors)
    return list(found.values())


def _combinations(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in table.values()]
    for values in itertools.product(*lists):
        yield dict(zip(table, values, strict=True))


def name_of(factors: dict[str, Any]) -> str:
    """A folder's name that tells the setting."""
    parts = (
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in factors.items()
    )
    return "_".join(sorted(parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at once, one thread each on a CPU"
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after this time, to go on later"
    )
    options = parser.parse_args()
    if options.jobs > 1:
        code = _several(options)
    else:
        code = 0
        _some(options)

    # A job of several says nothing of the others.
    is_whole = options.part is None and code == 0
    if is_whole and not _to_do(options.out, settings(options.grid)):
        print(f"next: jacdiag backtest {options.out}", flush=True)
    sys.exit(code)


def _to_do(out: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that have not reached their end."""
    return [factors for factors in runs if not (out / name_of(factors) / "done").exists()]


def _several(options: argparse.Namespace) -> int:
    """One process per job, each with its share of the runs."""
    command = [
        sys.executable,
        "-m",
        "examples.spike_lab",
        options.grid,
        "--out",
        str(options.out),
        "--device",
        options.device,
        "--minutes",
        str(options.minutes),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LAB_JOBS": str(options.jobs)}
    jobs = [
        subprocess.Popen([*command, "--part", str(part)], env=env) for part in range(options.jobs)
    ]
    try:
        return max(job.wait() for job in jobs)
    except KeyboardInterrupt:
        for job in jobs:
            job.terminate()
        return 130


def _some(options: argparse.Namespace) -> None:
    """Train a share of the runs, as far as the time goes."""
    import torch

    from .run import Setting, train

    torch.use_deterministic_algorithms(True, warn_only=options.device != "cpu")
    jobs = int(os.environ.get("LAB_JOBS", "1"))
    part = options.part or 0
    runs = settings(options.grid)[part::jobs]
    todo = _to_do(options.out, runs)
    print(f"part {part}: {len(todo)} of {len(runs)} runs to do", flush=True)
    begun = time.perf_counter()
    for done, factors in enumerate(todo, 1):
        left, folder = (
            60 * options.minutes - (time.perf_counter() - begun),
            options.out / name_of(factors),
        )
        if left <= 0 or not train(Setting.of(factors), folder, device=options.device, limit_s=left):
            print("stopped for lack of time; the same command goes on", flush=True)
            return
        each, rest = (time.perf_counter() - begun) / done, len(todo) - done
        told = f"{done} of {len(todo)}, {each:.1f} s each, {each * rest / 60:.0f} min left"
        print(f"part {part}: {told}", flush=True)


if __name__ == "__main__":
    main()
