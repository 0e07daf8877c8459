"""Count fresh models that are called trained, and trained models that are called fresh, by their
weights alone.

    python benchmarks/states.py [--seeds N] [--families N] [--checkpoints FOLDER] [--only PART ...]

Five parts: models of many inits and shapes, whose tensors are drawn and never run (inits); every
family of transformers that can be built here (families); checkpoints below a folder, which are all
trained (checkpoints); short training runs, and the steps after which their weights show it (runs);
and what the decision costs (times). Writes results/states.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}

import torch
from _coverage import build
from _states.fresh import INITS, SHAPES, normal, plain
from _states.runs import LOOKS, training_runs

from jacdiag.errors import JacdiagError
from jacdiag.measure.init_or_trained import WeightEvidence, judge_weights
from jacdiag.sources.checkpoint import open_checkpoint

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the three parts and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=60, help="of each init and shape")
    parser.add_argument(
        "--families", type=int, default=1, help="seeds of each family of transformers"
    )
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("out/real-models"), help="folder of trained models"
    )
    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "inits": lambda: drawn_models(options.seeds),
        "families": lambda: family_models(options.families),
        "checkpoints": lambda: trained_models(options.checkpoints),
        "runs": training_runs,
        "times": timed_models,
    }
    parser.add_argument(
        "--only",
        nargs="+",
        choices=makers,
        default=list(makers),
        help="the others stay as they are",
    )
    options = parser.parse_args()
    earlier = (
        json.loads((RESULTS / "states.json").read_text()) if len(options.only) < len(makers) else {}
    )
    parts = {
        name: list(make()) if name in options.only else earlier[name]
        for name, make in makers.items()
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "states.json").write_text(json.dumps(parts, indent=1) + "\n")
    (RESULTS / "states.md").write_text(page(parts))
    print(page(parts))


def drawn_models(seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each init: models of every shape, `seeds` of each."""
    for name, make in INITS.items():
        begun = time.perf_counter()
        judged = []
        for shape in SHAPES:
            for seed in range(seeds):
                torch.manual_seed(seed)
                with torch.no_grad():
                    judged.append(judge_weights(make(shape)))
        yield row(name, judged) | {"seconds": round(time.perf_counter() - begun, 1)}


def family_models(seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each family of transformers that can be built, as its own init leaves it."""
    for task, family in build.families():
        facts = build.facts_of(task, family)
        if "unbuildable" in facts:
            continue
        judged = []
        for seed in range(seeds):
            try:
                config = build.config_of(family, facts)
                with build.seeded(seed):
                    model = build.model_of(task, family, config)
            except Exception:  # a family that cannot be built here, whatever jacdiag does
                break
            judged.append(judge_weights(dict(model.named_parameters())))
        if judged:
            yield row(f"{family} ({task})", judged)


def trained_models(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each checkpoint below a folder, and for those of the examples."""
    examples = Path(__file__).parent.parent / "examples" / "checkpoints"
    files = [file for place in (folder, examples) for file in sorted(place.rglob("*"))]
    for file in files:
        if (
            file.suffix not in (".pt", ".bin", ".ckpt", ".safetensors", ".weights")
            or "step0" in file.name
        ):
            continue
        try:
            weights = open_checkpoint(file).state
        except JacdiagError:
            continue
        if weights:
            yield row("/".join(file.parts[-2:]), [judge_weights(weights)])


def timed_models() -> Iterator[dict[str, Any]]:
    """Yield what the decision costs for models of a few sizes, in memory."""
    torch.manual_seed(0)
    for width, layers in [(64, 4), (768, 12), (2048, 16)]:
        with torch.no_grad():
            weights = plain((width, layers, 4, 50_257), normal)
        begun = time.perf_counter()
        judged = judge_weights(weights)
        seconds = time.perf_counter() - begun
        size = sum(tensor.numel() for tensor in weights.values())
        yield {"parameters": size, "matrices": judged.tested, "seconds": round(seconds, 2)}


def row(name: str, judged: list[WeightEvidence]) -> dict[str, Any]:
    """Return what became of models of one kind."""
    worst = max(judged, key=lambda one: len(one.failed) / max(one.tested, 1))
    return {
        "name": name,
        "models": len(judged),
        "trained": sum(one.trained for one in judged),
        "most_failed": len(worst.failed),
        "of": worst.tested,
    }


def page(parts: dict[str, list[dict[str, Any]]]) -> str:
    """Return results/states.md."""
    families = parts["families"]
    models = sum(one["models"] for one in families)
    alarms = sum(one["trained"] for one in families)
    failing = [one for one in families if one["most_failed"]]
    lines = [
        "# Fresh or trained, by the weights alone",
        "",
        "Written by `python benchmarks/states.py`. A model counts as trained if at least a third "
        "of its matrices, and",
        "two, are no draw of an init. The last column shows the model of each row with the "
        "largest share.",
        "",
        "## Fresh: inits and shapes",
        "",
        *table(parts["inits"]),
        "",
        f"## Fresh: {len(families)} families of transformers, {models} models, {alarms} called "
        "trained",
        "",
        "Families in which a matrix failed:",
        "",
        *table(failing),
        "",
        "## Trained: checkpoints of packages and of the examples",
        "",
        *table(parts["checkpoints"]),
        "",
        "## Trained for a few steps",
        "",
        "Matrices that failed, of 18 or 26, after so many steps of small GPTs on text; **bold** "
        "where the model",
        "counts as trained.",
        "",
        *table_of_runs(parts["runs"]),
        "",
        "## What the decision costs",
        "",
        "| parameters | matrices tested | seconds, one thread |",
        "|---|---|---|",
        *(f"| {r['parameters']:,} | {r['matrices']} | {r['seconds']} |" for r in parts["times"]),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table."""
    head = ["| models | count | called trained | matrices that failed |", "|---|---|---|---|"]
    return head + [
        f"| {r['name']} | {r['models']} | {r['trained']} | {r['most_failed']} of {r['of']} |"
        for r in rows
    ]


def table_of_runs(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of training runs, a column for each look."""
    head = [
        "| optimizer | width | layers |" + "".join(f" {step} |" for step in LOOKS),
        "|---|---|---|" + "---|" * len(LOOKS),
    ]
    body = []
    for one in rows:
        cells = [
            f"**{look['failed']}**" if look["trained"] else str(look["failed"])
            for look in one["looks"]
        ]
        body.append(
            f"| {one['optimizer']} | {one['width']} | {one['layers']} | " + " | ".join(cells) + " |"
        )
    return head + body


if __name__ == "__main__":
    main()
