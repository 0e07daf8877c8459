"""Run a watch inside the trainers and optimizers of other people, and check six things in each.

    python benchmarks/trainers.py [--only NAME ...]

Each trainer trains a small model on the CPU for some seconds, as its users write it. Cells: the
watched run equals the run without the watch bit for bit; loss, learning rate, gradient norms and
update norms are those computed by hand; a healthy run brings no message; a NaN in a weight and a
corrupted batch are found; a resumed run holds every step once; an exception leaves a flight with
the batch of the step. A trainer that is not installed is null in every cell. Writes
results/trainers.json and docs/evidence/trainers.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "critical",
    "TOKENIZERS_PARALLELISM": "false",
}

import torch
from _trainers.checks import CELLS, Trainer, check
from _trainers.libraries import LIBRARIES
from _trainers.loops import LOOPS

RESULTS = Path(__file__).parent / "results" / "trainers.json"
PAGE = Path(__file__).parent.parent / "docs" / "trainers.md"
TITLES = {
    "bit_identical": "bit-identical",
    "figures": "figures right",
    "no_false_message": "no false message",
    "faults": "faults found",
    "resume": "resume",
    "crash": "crash",
}
PACKAGES = {
    "lion_pytorch": "lion-pytorch",
    "pytorch_optimizer": "pytorch-optimizer",
    "x_transformers": "x-transformers",
}


def main() -> None:
    """Check the trainers and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of trainers; the other rows stay as they are"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = (
        {row["trainer"]: row for row in json.loads(RESULTS.read_text())["rows"]}
        if RESULTS.is_file()
        else {}
    )
    trainers = (*LOOPS, *LIBRARIES)
    table = {trainer.name: known.get(trainer.name) or empty(trainer) for trainer in trainers}
    for trainer in trainers:
        if options.only and trainer.name not in options.only:
            continue
        row = table[trainer.name] = measured(trainer)
        print(line_of(row), *row["wrong"].items(), flush=True)
        rows = list(table.values())  # written after each row: a run that is interrupted loses one
        RESULTS.write_text(
            json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n",
            encoding="utf-8",
        )
        PAGE.write_text(page(rows), encoding="utf-8")
    print(f"wrote {RESULTS.name} and {PAGE.name}", file=sys.stderr)


def measured(trainer: Trainer) -> dict[str, Any]:
    """Return the row of a trainer."""
    if importlib.util.find_spec(trainer.library) is None:
        return empty(trainer)
    begun = time.perf_counter()
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        cells = check(trainer)
    seconds = round(time.perf_counter() - begun, 1)
    version = importlib.metadata.version(PACKAGES.get(trainer.library, trainer.library))
    return {
        "trainer": trainer.name,
        "library": trainer.library,
        "version": version,
        **cells,
        "seconds": seconds,
    }


def empty(trainer: Trainer) -> dict[str, Any]:
    """Return the row of a trainer that was not run."""
    cells = dict.fromkeys(CELLS)
    return {
        "trainer": trainer.name,
        "library": trainer.library,
        "version": None,
        **cells,
        "wrong": {},
        "seconds": None,
    }


def line_of(row: dict[str, Any]) -> str:
    words = {True: "yes", False: "no", None: "-"}
    version = (
        f"{row['library']} {row['version']}" if row["version"] else f"{row['library']}, not run"
    )
    return (
        f"| {row['trainer']} | {version} | " + " | ".join(words[row[cell]] for cell in CELLS) + " |"
    )


def page(table: list[dict[str, Any]]) -> str:
    """Return docs/evidence/trainers.md."""
    measured_cells = [row[cell] for row in table for cell in CELLS if row[cell] is not None]
    lines = [
        "# Trainers and optimizers of other people",
        "",
        "Written by `make trainers`. Each row is a small model that is trained with the real "
        "library on one CPU core,",
        "as its users write it. The cells say:",
        "",
        "- **bit-identical**: losses and weights after 14 steps equal those without the watch.",
        "- **figures right**: loss, learning rate, gradient norm before and after clipping, and "
        "update norms equal",
        "  those computed by hand, within 0.2%.",
        "- **no false message**: nothing is said in a healthy run. Reports on the init (JD1xx, "
        "JD2xx) are left out.",
        "- **faults found**: a NaN in one weight is reported at its step or the next one, and a "
        "corrupted batch at",
        "  step 90 within ten steps, with no alert before it.",
        "- **resume**: a run that goes on from a checkpoint holds every step once.",
        "- **crash**: an exception in the loop leaves a flight with the batch of its step.",
        "",
        f"{sum(measured_cells)} of {len(measured_cells)} cells that were run are right. A dash "
        "was not run.",
        "",
        "| trainer | library | " + " | ".join(TITLES[cell] for cell in CELLS) + " |",
        "|---|---|" + "---|" * len(CELLS),
        *map(line_of, table),
    ]
    wrong = [(row["trainer"], cell, texts) for row in table for cell, texts in row["wrong"].items()]
    if wrong:
        lines += ["", "What is wrong in the other cells:", ""]
        lines += [f"- {name}, {TITLES[cell]}: {texts[0]}" for name, cell, texts in wrong]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
