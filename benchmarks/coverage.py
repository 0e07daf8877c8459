"""Every model family of the installed transformers, without adapters: are exactly its sub-layers found, and exactly replayed?

Each family is built from its default config, shrunk, in a process of its own with a time limit. The expected number of
sub-layers comes from the config (layers and kinds of layer), never from what was found. Checked per family: the count,
bit-exact replay of every branch, J^T w against a whole-model re-run, adjointness, covered parameters, and for two
sub-layers of each kind the interval against a dense float64 SVD.

    python benchmarks/coverage.py                       all families, writes benchmarks/results/coverage.{json,md}
    python benchmarks/coverage.py --task causal gpt2    some families of one task, prints only
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TASKS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
}
LARGEST = 300_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per family")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(examine(options.task, options.families[0])))
        return
    work = [(task, family) for task in ([options.task] if options.task else TASKS) for family in
            (options.families or families_of(task))]  # fmt: skip
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda pair: run_one(*pair, limit=options.limit), work))
    text = table(rows)
    print(text)
    if not options.families:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "coverage.json").write_text(json.dumps({"versions": versions(), "families": rows}, indent=1) + "\n")
        (RESULTS / "coverage.md").write_text(text + "\n")


def families_of(task: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, TASKS[task][0]))


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def run_one(task: str, family: str, limit: float) -> dict[str, Any]:
    """Examines one family in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", "--task", task, family]
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        last = done.stdout.strip().splitlines()[-1:] or ["{}"]
        row = json.loads(last[0]) if done.returncode == 0 else {"status": "crash", "why": done.stderr.strip()[-300:]}
    except subprocess.TimeoutExpired:
        row = {"status": "timeout", "why": f"over {limit:.0f} s"}
    except json.JSONDecodeError as error:
        row = {"status": "crash", "why": str(error)}
    row = {"task": task, "family": family, **row, "seconds": round(time.perf_counter() - begun, 1)}
    print(f"{row['status']:10} {task:8} {family:28} {row.get('why', '')[:110]}", file=sys.stderr, flush=True)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown summary per task, and every family that is not strictly right with its reason."""
    lines = ["| task | families | build and run | strictly right | share |", "|---|---|---|---|---|"]
    for task in TASKS:
        mine = [r for r in rows if r["task"] == task]
        ran = [r for r in mine if r["status"] in ("right", "wrong", "error", "timeout", "crash")]
        right = sum(r["status"] == "right" for r in ran)
        if mine:
            lines.append(f"| {task} | {len(mine)} | {len(ran)} | {right} | {right / max(1, len(ran)):.1%} |")
    lines += ["", "| task | family | status | found / expected | why |", "|---|---|---|---|---|"]
    for r in rows:
        if r["status"] != "right":
            why = r.get("why", "").replace("|", "/").replace("\n", " ")[:160]
            lines.append(f"| {r['task']} | {r['family']} | {r['status']} | {r.get('found', '')} / {r.get('expected', '')} | {why} |")
    return "\n".join(lines)


# -- in the process of one family --------------------------------------------------------------------------------------
def examine(task: str, family: str) -> dict[str, Any]:
    """Builds a family, traces it, checks everything; returns a row of the table."""
    import torch
    import transformers
    from coverage_models import expected_sublayers, inputs_of, shrunk_config

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    auto = getattr(transformers, TASKS[task][1])
    try:
        config = shrunk_config(family)
        with torch.device("meta"):
            size = sum(p.numel() for p in auto.from_config(config).parameters())
        if size > LARGEST:
            return {"status": "not built", "why": f"the shrunk default config still has {size:,} parameters"}
        torch.manual_seed(0)
        model = auto.from_config(config).float().eval()
        args, kwargs = inputs_of(model, config, task)
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        return {"status": "not built", "why": f"{type(error).__name__}: {str(error)[:200]}"}
    try:
        return {**check(model, args, kwargs), **count(model, config, task, expected_sublayers)}
    except Exception as error:
        return {"status": "error", "why": f"{type(error).__name__}: {str(error)[:200]}"}


def count(model: Any, config: Any, task: str, expected: Any) -> dict[str, Any]:
    return {"expected": expected(model, config, task)}


def check(model: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    raise SystemExit("replaced below")
