"""Count fresh models that are called trained, and trained models that are called fresh, by their weights alone.

    python benchmarks/states.py [--seeds N] [--families N] [--checkpoints FOLDER]

Three parts: models of many inits and shapes, whose tensors are drawn and never run; every family of transformers that
can be built here; and checkpoints below a folder, which are all trained. Writes results/states.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}

import torch
from _coverage import build
from _states.fresh import INITS, SHAPES

from jacdiag.errors import JacdiagError
from jacdiag.measure.state import WeightEvidence, judge_weights
from jacdiag.sources.checkpoint import open_checkpoint

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the three parts and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=60, help="of each init and shape")
    parser.add_argument("--families", type=int, default=1, help="seeds of each family of transformers")
    parser.add_argument("--checkpoints", type=Path, default=Path("out/real-models"), help="folder of trained models")
    options = parser.parse_args()
    parts = {
        "inits": list(drawn_models(options.seeds)),
        "families": list(family_models(options.families)),
        "checkpoints": list(trained_models(options.checkpoints)),
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
        if file.suffix not in (".pt", ".bin", ".ckpt", ".safetensors", ".weights") or "step0" in file.name:
            continue
        try:
            weights = open_checkpoint(file).state
        except JacdiagError:
            continue
        if weights:
            yield row("/".join(file.parts[-2:]), [judge_weights(weights)])


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
        "Written by `python benchmarks/states.py`. A model counts as trained if at least a third of its matrices, and",
        "two, are no draw of an init. The last column shows the model of each row with the largest share.",
        "",
        "## Fresh: inits and shapes",
        "",
        *table(parts["inits"]),
        "",
        f"## Fresh: {len(families)} families of transformers, {models} models, {alarms} called trained",
        "",
        "Families in which a matrix failed:",
        "",
        *table(failing),
        "",
        "## Trained: checkpoints of packages and of the examples",
        "",
        *table(parts["checkpoints"]),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table."""
    head = ["| models | count | called trained | matrices that failed |", "|---|---|---|---|"]
    return head + [f"| {r['name']} | {r['models']} | {r['trained']} | {r['most_failed']} of {r['of']} |" for r in rows]


if __name__ == "__main__":
    main()
