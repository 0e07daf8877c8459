"""Figures of the forward and backward rules: on the recipes of the paper, and on fresh families of
transformers.

Run as `python benchmarks/flow.py recipes` or `python benchmarks/flow.py families [NAME ...]`. Both
write to benchmarks/results/. The families are built as transformers initialises them, tiny, from
their default configs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

import jacdiag
from jacdiag.measure.gradients import gradient_profile
from jacdiag.measure.network import backward_record
from jacdiag.measure.stream_statistics import forward_record
from jacdiag.pipeline import measured_audit as measured
from jacdiag.records import Report
from jacdiag.sources.factory import seeded

RESULTS = Path(__file__).parent / "results"
CODES = ("JD3", "JD4")
LIMIT = 60  # seconds per family
RECIPES = ("vanilla", "xavier", "embed-detach", "embed-ln", "scaled-embed")


def recipes() -> list[dict[str, Any]]:
    """Measure the recipes of the paper on a GPT of width 256."""
    from jacdiag.sources.gpt import build

    ids = torch.randint(1000, (2, 64), generator=torch.Generator().manual_seed(0))
    rows = []
    for layers in (6, 12, 24):
        for recipe in RECIPES:
            with seeded(0):
                model = build(n_layer=layers, n_embd=256, n_head=4, vocab_size=1000, recipe=recipe)
            sites = jacdiag.sites(model, ids)
            profile = gradient_profile(sites, ids)
            assert profile is not None
            stream = forward_record(sites, ids)
            assert stream.variance is not None and stream.token_cosine is not None
            variance = stream.variance
            attention = list(profile.attention.values())
            rows.append(
                {
                    "recipe": recipe,
                    "layers": layers,
                    "gradient_growth_whole": math.log(profile.norms[0] / profile.norms[-1]),
                    "activation_growth_whole": math.log(
                        profile.activations[-1] / profile.activations[0]
                    ),
                    "embedding_share": backward_record(sites, profile, [], {}).embedding_share,
                    "variance_end_over_middle": variance[-1] / variance[len(variance) // 2],
                    "token_cosine": max(stream.token_cosine),
                    "attention_logit": max(record.max_logit or 0.0 for record in attention),
                    "entropy_share": min(record.entropy_share or 0.0 for record in attention),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def families(names: list[str]) -> list[dict[str, Any]]:
    """Audit every family that builds, in gate mode, and keep what the forward and backward rules
    say.
    """
    from _coverage import build as building

    rows = []
    for task, family in building.families():
        label = f"{family}:{task}"
        if names and family not in names and label not in names:
            continue
        row: dict[str, Any] = {"family": label}
        started = time.perf_counter()
        signal.alarm(LIMIT)
        try:
            row |= _of_family(building, task, family)
        except building.CannotBuild as error:
            row["unbuilt"] = str(error)[:200]
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            traceback.print_exc()
        finally:
            signal.alarm(0)
        row["seconds"] = round(time.perf_counter() - started, 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _of_family(building: Any, task: str, family: str) -> dict[str, Any]:
    model, inputs = fresh(building, task, family)
    measured.contract_of = lambda *_: None  # type: ignore[assignment]  # another benchmark's, and slow for some
    report = jacdiag.audit(
        model, inputs, decide=True, state="init", remedies="none", max_products=4, tol=0.5
    )
    return {
        "placements": sorted({str(row.placement) for row in report.sublayers}),
        "findings": [
            {"code": f.code, "level": f.level, "what": f.what}
            for f in report.findings
            if f.code.startswith(CODES)
        ],
        "rules": {rule.code: rule.status for rule in report.rules if rule.code.startswith(CODES)},
        "attention": _attention(report),
        "embedding_share": _share(report),
        "notes": report.network.notes if report.network else {},
        "phases": {name: round(value, 2) for name, value in report.cost.phases.items()},
    }


def _attention(report: Report) -> str:
    rows = [row for row in report.sublayers if row.kind == "attention"]
    return f"{sum(row.attention is not None for row in rows)} of {len(rows)}"


def _share(report: Report) -> float | None:
    backward = report.network.backward if report.network else None
    return backward.embedding_share if backward else None


def fresh(building: Any, task: str, family: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Build a family as transformers initialises it, and an input for it."""
    facts = building.facts_of(task, family)
    if "unbuildable" in facts:
        raise building.CannotBuild(facts["unbuildable"])
    try:
        config = building.config_of(family, facts)
        with building.seeded(0):
            model = building.model_of(task, family, config).eval()
        inputs = building.inputs_of(model, config, facts, batch=2)
        with torch.no_grad(), building.seeded(0):
            copy.deepcopy(model)(**inputs)
    except Exception as error:
        raise building.CannotBuild(f"{type(error).__name__}: {str(error).strip()[:200]}") from error
    return model, inputs


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {LIMIT} s")


def main() -> None:
    """Run the part that the first argument names and write its results."""
    signal.signal(signal.SIGALRM, _too_long)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    part = sys.argv[1] if len(sys.argv) > 1 else "recipes"
    sys.path.insert(0, str(Path(__file__).parent))
    rows = recipes() if part == "recipes" else families(sys.argv[2:])
    if part == "recipes" or not sys.argv[2:]:
        path = RESULTS / f"flow_{part}.json"
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        path.write_text(
            json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n",
            encoding="utf-8",
        )
        print(f"wrote {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
