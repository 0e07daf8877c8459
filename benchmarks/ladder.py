"""Measures mainstream inits as transformers builds them, and writes the ladder that a report shows.

python benchmarks/ladder.py            writes jacdiag/rules/healthy.toml and results/ladder.json
python benchmarks/ladder.py --quick    the smallest width; prints only
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import jacdiag
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

WIDTHS = (256, 512, 1024)
LAYERS = 6
ROOT = Path(__file__).parent
TOML = ROOT.parent / "jacdiag" / "report" / "healthy.toml"
PLACEMENTS = {"BERT": "post", "OLMo 2": "reordered", "Gemma 2": "sandwich"}


def shapes(width: int) -> dict[str, Any]:
    """Configs of the families at one width, everything but the sizes at its default."""
    heads, common = width // 64, {"vocab_size": 4096, "max_position_embeddings": 128}
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        **common,
    }
    gated = {
        "intermediate_size": int(8 * width / 3) // 64 * 64,
        "num_key_value_heads": max(1, heads // 4),
    }
    t = transformers
    return {
        "GPT-2": t.GPT2Config(
            n_embd=width, n_layer=LAYERS, n_head=heads, vocab_size=4096, n_positions=128
        ),
        "Llama 3 shape": t.LlamaConfig(**sizes, **gated, rope_theta=500000.0),
        "Qwen 3": t.Qwen3Config(**sizes, **gated, head_dim=64),
        "OLMo 2": t.Olmo2Config(**sizes, **{**gated, "num_key_value_heads": heads}),
        "GPT-NeoX": t.GPTNeoXConfig(**sizes, intermediate_size=4 * width),
        "Gemma 2": t.Gemma2Config(**sizes, **gated, head_dim=64),
        "BERT": t.BertConfig(**sizes, intermediate_size=4 * width),
    }


def build(config: Any) -> torch.nn.Module:
    kind = (
        transformers.AutoModelForMaskedLM
        if config.model_type == "bert"
        else transformers.AutoModelForCausalLM
    )
    with seeded(0):
        return kind.from_config(config, attn_implementation="eager")


def measure(name: str, model: torch.nn.Module, width: int) -> dict[str, Any]:
    report = jacdiag.audit(model, batch=1, seq=64, state="init")
    worst = max(report.sublayers, key=lambda row: row.branch_norm.estimate)
    placements = sorted({str(row.placement) for row in report.sublayers})
    return {
        "name": name,
        "width": width,
        "layers": LAYERS,
        "placement": "/".join(placements),
        "worst_branch_gain": float(f"{worst.branch_norm.estimate:.3g}"),
        "at": worst.name,
        "gain_product_log": float(f"{report.network.gain_product_log:.3g}"),
        "levels": sorted({f"{f.code} {f.level}" for f in report.findings}),
    }


def toml(rungs: list[dict[str, Any]]) -> str:
    lines = [
        (
            "# Worst branch norm at init: mainstream models as transformers builds them, and two "
            "recipes of the paper."
        ),
        f"# Measured by benchmarks/ladder.py: {LAYERS} layers, 64 random tokens, torch "
        f"{torch.__version__},"
        f" transformers {transformers.__version__}.",
    ]
    for rung in rungs:
        lines += ["", "[[rung]]"]
        keys = ("name", "width", "layers", "placement", "worst_branch_gain")
        lines += [f"{key} = {json.dumps(rung[key])}" for key in keys]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the smallest width; nothing is written"
    )
    quick = parser.parse_args().quick
    begun, rungs = time.perf_counter(), []
    for width in WIDTHS[:1] if quick else WIDTHS:
        models: dict[str, Any] = dict(shapes(width))
        sizes = {
            "n_embd": width,
            "n_layer": LAYERS,
            "n_head": width // 64,
            "vocab_size": 4096,
            "block_size": 128,
        }
        for name in ("embed-ln", "scaled-embed"):
            models[name] = (name, sizes)
        for name, config in models.items():
            with seeded(0):
                model = (
                    gpt.build(config[0], **config[1])
                    if isinstance(config, tuple)
                    else build(config)
                )
            rungs.append(measure(name, model, width))
            print(f"{time.perf_counter() - begun:5.0f} s", *rungs[-1].values(), flush=True)
    if not quick:
        TOML.write_text(toml(rungs))
        (ROOT / "results" / "ladder.json").write_text(json.dumps(rungs, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
