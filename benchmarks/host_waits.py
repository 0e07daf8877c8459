"""Count how often the host waits for an accelerator, on a pretended one.

The device is that of tests/accelerator: its numbers are the CPU's, and it counts. Counts depend on
the code alone, not on the machine. They are no times: what a wait takes on a card is not known from
them.

    python benchmarks/host_waits.py            seconds; writes results/accelerator.json
    python benchmarks/host_waits.py --places   which lines make the host wait; prints only
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

from accelerator.pretended import NAME, Counts, pretended_device  # noqa: E402
from accelerator.specimens import ids, tiny  # noqa: E402
from accelerator.training import train  # noqa: E402
from monitor.rig import adam, lines  # noqa: E402

import jacdiag  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "accelerator.json"
SOLVER = "spectra/"  # where the lines lie that run once or more for each product

# The limits that tests/accelerator/test_wait_counts.py holds.
WAITS_PER_PRODUCT = 1
WAITS_PER_SUBLAYER = 30
OPERATIONS_PER_GROUP = 2
OPERATIONS_PER_STEP = 20

FIRST_STEPS = 3  # the watch gets to know optimizer and model in them
STEPS = 12
LOG_EVERY = 16  # no log is written within these steps
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw foreach": {"optimizer": partial(adam, foreach=True)},
    "adamw fused": {"optimizer": partial(adam, fused=True)},
    "sgd": {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1)},
    "accumulation": {"micro": 2},
    "autocast": {"autocast": True},
    "scaler": {"scaler": True},
}


@dataclass
class Totals:
    """The counts of a training before its first step, and after each of them."""

    waits: list[int]
    staged: list[int]
    operations: list[int]


def count_audit(counts: Counts, **options: Any) -> dict[str, Any]:
    """Audit a small GPT with 4 sub-layers, and return the waits."""
    # 1. The audit.
    model, there = tiny(n_layer=2).to(NAME), ids().to(NAME)
    counts.clear()
    report = jacdiag.audit(model, there, **options)

    # 2. Waits of the solver, and all others.
    solver = 0
    for place, number in counts.places.items():
        if place.partition(" ")[2].startswith(SOLVER):
            solver += number
    products, sublayers = report.cost.products, len(report.sublayers)
    assert products is not None
    return {
        "sublayers": sublayers,
        "products": products,
        "operations": counts.operations,
        "waits": counts.waits,
        "waits_allowed": WAITS_PER_PRODUCT * products + WAITS_PER_SUBLAYER * sublayers,
        "waits_per_product": round(solver / products, 2),
        "waits_per_sublayer_beyond": round((counts.waits - solver) / sublayers, 1),
        "uploads_from_pageable_memory": counts.staged_uploads,
        "mixed_operations": counts.mixed,
    }


def count_watch(counts: Counts, **how: Any) -> dict[str, Any]:
    """Train with and without a watch, and return what the watch adds to a step."""
    plain = _totals(counts, partial(train, NAME, None, **how))
    with tempfile.TemporaryDirectory() as folder:
        options = {"every": None, "stats_every": None, "log_every": LOG_EVERY}
        watched = _totals(counts, partial(train, NAME, Path(folder), **how, watch=options))
        groups = len(lines(Path(folder), "run")[0]["groups"])

    # Between logs: after the first steps, and before the log that the end writes.
    operations = _between(watched.operations, plain.operations, FIRST_STEPS, STEPS)
    return {
        "groups": groups,
        "waits_in_the_first_steps": _between(watched.waits, plain.waits, 0, FIRST_STEPS),
        "waits_between_logs": _between(watched.waits, plain.waits, FIRST_STEPS, STEPS),
        "uploads_from_pageable_memory_between_logs": _between(
            watched.staged, plain.staged, FIRST_STEPS, STEPS
        ),
        "operations_per_step": round(operations / (STEPS - FIRST_STEPS), 1),
        "operations_allowed": OPERATIONS_PER_GROUP * groups + OPERATIONS_PER_STEP,
        "mixed_operations": counts.mixed,
    }


def _totals(counts: Counts, run: Callable[..., object]) -> Totals:
    """Train, and return the counts."""
    totals = Totals([0], [0], [0])

    def after(step: int) -> None:
        totals.waits.append(counts.waits)
        totals.staged.append(counts.staged_uploads)
        totals.operations.append(counts.operations)

    counts.clear()
    run(steps=STEPS, after=after)
    return totals


def _between(watched: list[int], plain: list[int], start: int, end: int) -> int:
    """Return what the watch adds to a count from one step to another."""
    return (watched[end] - watched[start]) - (plain[end] - plain[start])


def measure() -> dict[str, Any]:
    """Return every count."""
    with pretended_device() as counts:
        audits = {
            "default": count_audit(counts),
            "decide": count_audit(counts, decide=True),
        }
        watches = {name: count_watch(counts, **how) for name, how in OPTIMIZERS.items()}
    device = "pretended, in pure Python: counts, no times"
    return {"device": device, "torch": torch.__version__, "audit": audits, "watch": watches}


def print_places() -> None:
    """Print the lines of jacdiag that make the host wait in an audit."""
    with pretended_device() as counts:
        count_audit(counts)
        for place, number in counts.places.most_common():
            print(f"{number:6d}  {place}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", action="store_true", help="print where the host waits")
    if parser.parse_args().places:
        print_places()
        return

    # 1. The tables.
    result = measure()
    for part in ("audit", "watch"):
        for name, row in result[part].items():
            print(f"{part} {name}")
            for key, value in row.items():
                print(f"  {key.replace('_', ' '):44s}{value:>10}")

    # 2. The file.
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
