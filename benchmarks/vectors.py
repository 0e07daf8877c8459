"""JD208 to JD211 on models that are as they should be: every family that transformers registers,
and other inits.

    python benchmarks/vectors.py [FAMILY ...] [--layers 4] [--seeds 20]

Without names it writes results/vectors.json: how many models each rule compared something in, what
it said, which of it a source confirms (_fresh/confirmed.py), and the largest number of any
parameter. A family whose config does not take that many layers is built with two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}

import torch
from _coverage import build, shrink
from torch import nn

import jacdiag
from benchmarks._fresh.confirmed import source_of

CODES = ("JD208", "JD209", "JD210", "JD211")
RESULTS = Path(__file__).parent / "results" / "vectors.json"
LIMIT = 60  # seconds for a family


# -- families of transformers ----------------------------------------------------------------------
def fresh(task: str, family: str, layers: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Build a family's tiny model just as transformers initialises it, and the inputs of one
    forward.

    Args:
        task: of `_coverage.build.TASKS`.
        family: model type.
        layers: of each stack, where the config takes a number of layers.
        seed: of the draw.

    Raises:
        CannotBuild: the family cannot be built here.
    """
    facts = build.facts_of(task, family)
    if "unbuildable" in facts:
        raise build.CannotBuild(facts["unbuildable"])
    compiled = list(shrink._COMPILED)
    shrink._COMPILED[:] = [
        (pattern, layers if value == shrink.LAYERS and _counts_layers(pattern.pattern) else value)
        for pattern, value in compiled
    ]
    try:
        config = build.config_of(family, facts)
        with build.seeded(seed):
            model = build.model_of(task, family, config).eval()
    finally:
        shrink._COMPILED[:] = compiled
    return model, build.inputs_of(model, config, facts)


def _counts_layers(pattern: str) -> bool:
    return "layers" in pattern or "depth" in pattern


def audit_family(task: str, family: str, layers: int) -> dict[str, Any]:
    """Return what the rules say of one family, or why it could not be built or traced."""
    reasons = []
    for count in (layers, 2):
        try:
            with time_limit(LIMIT):
                model, inputs = fresh(task, family, count)
                report = audit(model, inputs)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}"[:200])
            continue
        return {"task": task, "family": family, "layers": count, **judged(report)}
    return {"task": task, "family": family, "error": reasons[-1]}


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError if the body takes longer than this."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- other inits that are as they should be --------------------------------------------------------
class Block(nn.Module):
    """Pre-norm block with everything at PyTorch's own init: biases drawn, gains one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.scale * self.mlp(self.norm2(x))


def default(width: int, layers: int) -> nn.Module:
    """Return a model at PyTorch's own init."""
    return nn.Sequential(*(Block(width) for _ in range(layers)), nn.LayerNorm(width))


def drawn_gains(width: int, layers: int) -> nn.Module:
    """Return the same with gains drawn N(1, 0.02) and biases N(0, 0.02), as older networks are."""
    model = default(width, layers)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.startswith(f"{layers}."):
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.02)
    return model


def zero_last_gains(width: int, layers: int) -> nn.Module:
    """Return the same with the gain of every second norm at zero."""
    model = default(width, layers)
    for name, parameter in model.named_parameters():
        if name.endswith("norm2.weight"):
            nn.init.zeros_(parameter)
    return model


INITS = {"default": default, "drawn gains": drawn_gains, "zero last gains": zero_last_gains}


def audit_inits(seeds: int) -> Iterator[dict[str, Any]]:
    """Yield what the rules say of each init at several sizes and seeds."""
    for name, make in INITS.items():
        for width, layers in ((16, 3), (16, 12), (64, 6), (64, 24)):
            for seed in range(seeds):
                torch.manual_seed(seed)
                report = audit(make(width, layers), torch.randn(1, 3, width))
                yield {
                    "init": name,
                    "width": width,
                    "layers": layers,
                    "seed": seed,
                    **judged(report),
                }


# -- both ------------------------------------------------------------------------------------------
def audit(model: nn.Module, inputs: Any) -> jacdiag.Report:
    """Audit a model's init without measuring a norm."""
    return jacdiag.audit(model, inputs, products=False, state="init", select=CODES, remedies="none")


def judged(report: jacdiag.Report) -> dict[str, Any]:
    """Return the rules that compared something, their findings, and the largest number of any
    parameter.
    """
    assert report.contract is not None
    return {
        "compared": [rule.code for rule in report.rules if rule.code in CODES and rule.matched],
        "findings": [
            f"{one.code} {one.level}: {one.what}" for one in report.findings if one.code in CODES
        ],
        "largest": max((weight.largest or 0.0 for weight in report.contract.weights), default=0.0),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts over a list of results."""
    ran = [row for row in rows if "error" not in row]
    said = [line for row in ran for line in row["findings"]]
    confirmed = [
        line for row in ran for line in row["findings"] if source_of(row.get("family", ""), line)
    ]
    compared = Counter(code for row in ran for code in row["compared"])
    return {
        "models": len(ran),
        "not built": len(rows) - len(ran),
        "compared": {code: compared[code] for code in CODES},
        "warnings": sum(" warning:" in line for line in said),
        "confirmed": len(confirmed),
        "infos": sum(" info:" in line for line in said),
        "largest": max((row["largest"] for row in ran), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=20)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    families = []
    for task, family in build.families():
        if chosen.family and family not in chosen.family:
            continue
        started = time.perf_counter()
        row = audit_family(task, family, chosen.layers)
        families.append(row)
        shown = row.get("error") or "; ".join(row["findings"]) or "nothing"
        print(f"{task} {family} {time.perf_counter() - started:.1f} s: {shown}", flush=True)
    print("families", summary(families))
    if chosen.family:
        return
    inits = list(audit_inits(chosen.seeds))
    print("inits", summary(inits))
    told = [row for row in (*families, *inits) if row.get("findings") or "error" in row]
    result = {"families": summary(families), "inits": summary(inits), "told": told}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
