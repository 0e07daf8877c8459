"""Does the closed form still rank SwiGLU, grouped queries and parallel blocks as the measured norms
do? No training.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from jacdiag.measure.weight_statistics import bound_ffn
from jacdiag.records import SublayerRecord

from . import pictures
from .measuring import sublayers
from .part import Data, Options, Part, Table, in_parallel, rounded, span, three

LAYERS, WIDTH, LENGTH, VOCABULARY = 4, 128, 32, 256
KINDS = ("two-matrix FFN", "parallel", "SwiGLU", "SwiGLU and GQA")
_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight")


@dataclass(frozen=True)
class Init:
    """Std of the matrices of a sub-layer (s or a number; None for Xavier), output matrices by
    depth, embedding.
    """

    std: float | None
    by_depth: bool
    embedding: float
    branches: float = 1.0


_S = math.sqrt(2 / (5 * WIDTH))
INITS = {
    "N(0, 0.02)": Init(0.02, False, 0.02),
    "N(0, 0.02), by depth": Init(0.02, True, 0.02),
    "vanilla": Init(_S, True, _S),
    "xavier": Init(None, False, _S),
    "scaled-embed": Init(_S, True, _S * math.sqrt(WIDTH)),
    "scaled-embed, branches × 3": Init(_S, True, _S * math.sqrt(WIDTH), 3.0),
    "embedding × 0.1": Init(_S, True, 0.1 * _S),
}


def build(kind: str, init: Init, layers: int = LAYERS) -> nn.Module:
    """A small model of transformers' own classes, drawn as the init says from torch's global
    generator.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    common: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "attn_implementation": "eager",
        "use_cache": False,
    }
    model: nn.Module
    if kind in ("two-matrix FFN", "parallel"):
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                **common, intermediate_size=4 * WIDTH, use_parallel_residual=kind == "parallel"
            )
        )
    else:
        heads = 1 if kind == "SwiGLU and GQA" else 4
        model = LlamaForCausalLM(
            LlamaConfig(**common, intermediate_size=3 * WIDTH, num_key_value_heads=heads)
        )
    draw_weights(model, init, layers)
    return model.eval()


@torch.no_grad()
def draw_weights(model: nn.Module, init: Init, layers: int) -> None:
    """Normal draws for every matrix; gains stay 1, biases 0."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if "embed_tokens" in name or "embed_in" in name:
            std = init.embedding
        elif ".layers." in name:
            std = init.std if init.std is not None else math.sqrt(2 / sum(weight.shape))
            std *= init.branches / (
                math.sqrt(2 * layers) if init.by_depth and name.endswith(_OUTPUTS) else 1.0
            )
        else:
            std = _S
        weight.normal_(0.0, std)


def estimate(options: Options) -> float:
    begun = time.process_time()
    _measured(("two-matrix FFN", "vanilla", 1))
    return (
        (time.process_time() - begun) * len(KINDS) * (2 if options.quick else len(INITS) * LAYERS)
    )


def measure(options: Options) -> Data:
    names = list(INITS)[2:4] if options.quick else list(INITS)
    layers = 1 if options.quick else LAYERS
    asked = [(kind, name, layers) for kind in KINDS for name in names]
    rows = [row for rows in in_parallel(_measured, asked, options.jobs) for row in rows]
    return rounded(
        {"layers": layers, "width": WIDTH, "length": LENGTH, "inits": names, "rows": rows}
    )


def _measured(asked: tuple[str, str, int]) -> list[Data]:
    kind, name, layers = asked
    torch.manual_seed(0)
    model = build(kind, INITS[name], layers)
    ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))[None, :LENGTH]
    records = sublayers(model, ids)
    print(f"  {kind}, {name}", flush=True)
    return [{"blocks": kind, "init": name, **_row(record)} for record in records]


def _row(record: SublayerRecord) -> Data:
    branch, spread, stats = record.branch_norm, record.shortcut_std, record.weights
    assert branch is not None and spread is not None
    joint = record.joint_residual_norm
    return {
        "depth": record.depth,
        "kind": record.kind,
        "placement": record.placement,
        "parallel": record.parallel,
        "sigma": spread.median,
        "branch": branch.estimate,
        "joint": joint.estimate if joint is not None else None,
        "bound": record.bound,
        "roles": sorted(stats),
        **_gated(record),
    }


def _gated(record: SublayerRecord) -> dict[str, float]:
    """Two readings of Eq. 15 for W_2 (silu(W_gate z) * W_1 z), which the paper does not treat.

    `plain` takes the gate for an activation of slope 1. `gated` counts two paths, each times the
    size of the other factor, s sqrt(d), and 1/2 for what silu lets through.
    """
    stats, spread = record.weights, record.shortcut_std
    if not {"W_1", "W_gate", "W_2"} <= set(stats) or spread is None:
        return {}
    s1, gate, s2 = (stats[role].std or 0.0 for role in ("W_1", "W_gate", "W_2"))
    d, d_ffn = min(stats["W_1"].shape), max(stats["W_1"].shape)
    return {
        "plain": bound_ffn(s1, s2, spread.median, d, d_ffn),
        "gated": bound_ffn(s1 * gate * math.sqrt(d), s2, spread.median, d, d_ffn),
    }


# -- words -----------------------------------------------------------------------------------------
SERIES = (
    ("two-matrix FFN", "mlp", "bound"),
    ("two-matrix FFN", "attention", "bound"),
    ("parallel", "mlp", "bound"),
    ("parallel", "attention", "bound"),
    ("SwiGLU", "mlp", "plain"),
    ("SwiGLU", "mlp", "gated"),
    ("SwiGLU", "attention", "bound"),
    ("SwiGLU and GQA", "mlp", "plain"),
    ("SwiGLU and GQA", "mlp", "gated"),
    ("SwiGLU and GQA", "attention", "bound"),
)


def points(data: Data, blocks: str, kind: str, key: str) -> list[tuple[float, float, str]]:
    """(bound - 1, measured, init) of every sub-layer of a series."""
    rows = [row for row in data["rows"] if row["blocks"] == blocks and row["kind"] == kind]
    return [(row[key] - 1, row["branch"], row["init"]) for row in rows if row.get(key) is not None]


def ranks(data: Data, blocks: str, kind: str, key: str) -> Data:
    """Rank correlation over all sub-layers of all inits, and over inits by their worst sub-layer;
    looseness.
    """
    found = points(data, blocks, kind, key)
    if len(found) < 2:
        return {"all": None, "inits": None, "loose": [], "count": len(found)}
    worst = [
        (max(p[0] for p in of), max(p[1] for p in of))
        for name in data["inits"]
        if (of := [p for p in found if p[2] == name])
    ]
    return {
        "all": _rho([p[0] for p in found], [p[1] for p in found]),
        "inits": _rho(*zip(*worst, strict=True)),
        "loose": [b / m for b, m, _ in found],
        "count": len(found),
    }


def _rho(x: Any, y: Any) -> float:
    return float(spearmanr(x, y).statistic)


def setup(data: Data) -> list[str]:
    return [
        "transformers' GPT-NeoX (sequential and parallel) and Llama (4 and 1 key-value heads of "
        f"4), {data['layers']} "
        f"layers, width {data['width']}, one sequence of {data['length']} tokens, "
        f"{len(data['inits'])} inits, not "
        "trained. ρ is Spearman's rank correlation of bound − 1 with the measured norm of the "
        "branch, over all "
        "sub-layers of all inits. Eq. 15 is for two matrices: for SwiGLU `plain` takes the gate "
        "for an activation of "
        "slope 1, `gated` counts both factors of the product at their typical size."
    ]


def tell(data: Data) -> list[str]:
    found = {series: ranks(data, *series) for series in SERIES}
    known = {series: r for series, r in found.items() if r["all"] is not None}
    lines = []
    for what, kind, key in (
        ("Eq. 15, two matrices", "mlp", "bound"),
        ("Eq. 20", "attention", "bound"),
        ("SwiGLU, plain", "mlp", "plain"),
        ("SwiGLU, gated", "mlp", "gated"),
    ):
        of = {series: r for series, r in known.items() if series[1:] == (kind, key)}
        if not of:
            lines.append(f"{what}: nothing could be compared.")
            continue
        told = ", ".join(f"{series[0]} {r['all']:.3f}" for series, r in of.items())
        loose = [value for r in of.values() for value in r["loose"]]
        under = sum(value < 1 for value in loose)
        below = (
            f"; below the measured norm, no bound at all, in {under} of {len(loose)}"
            if under
            else ""
        )
        lines.append(f"{what}: ρ {told}; (bound − 1) / measured {span(loose)}{below}.")
    return [*lines, _joint(data)]


def _joint(data: Data) -> str:
    """Both branches of a parallel block at once."""
    found: dict[tuple[str, int], list[Data]] = {}
    for row in data["rows"]:
        if row["blocks"] == "parallel" and row["joint"] is not None and row["bound"] is not None:
            found.setdefault((row["init"], row["depth"]), []).append(row)
    pairs = [
        (sum(r["bound"] - 1 for r in rows), rows[0]["joint"])
        for rows in found.values()
        if len(rows) == 2
    ]
    if len(pairs) < 2:
        return "Parallel blocks as wholes: nothing could be compared."
    rho = _rho([a for a, _ in pairs], [b for _, b in pairs])
    return (
        "Parallel blocks as wholes: 1 + the two excesses against the measured ‖I + J_a + J_m‖: ρ "
        f"{rho:.3f} over "
        f"{len(pairs)} blocks, {span((1 + a) / b for a, b in pairs)} times as large."
    )


def tables(data: Data) -> list[Table]:
    head = [
        "blocks, sub-layer, bound",
        "sub-layers",
        "ρ, all",
        "ρ, inits by their worst",
        "(bound − 1) / measured",
    ]
    rows = []
    for series in SERIES:
        r = ranks(data, *series)
        rows.append(
            [
                ", ".join(series),
                str(r["count"]),
                three(r["all"]),
                three(r["inits"]),
                span(r["loose"]) if r["loose"] else "–",
            ]
        )
    return [Table("How the closed forms rank", head, rows)]


def draw(data: Data, figure: Any) -> None:
    panels = figure.subplots(1, 2)
    looks = list(pictures.LOOKS.values())
    titles = (
        "(b) FFN: filled Eq. 15; SwiGLU open `gated`, crosses `plain`",
        "(b) attention, Eq. 20",
    )
    for axes, kind, title in zip(panels, ("mlp", "attention"), titles, strict=True):
        seen: list[float] = []
        for blocks, look in zip(KINDS, looks, strict=False):
            for key, face in (("plain", "none"), ("bound", look.colour), ("gated", "white")):
                found = points(data, blocks, kind, key)
                if found:
                    axes.plot(
                        [p[0] for p in found],
                        [p[1] for p in found],
                        "x" if key == "plain" else look.marker,
                        color=look.colour,
                        markerfacecolor=face,
                        markersize=3.5 if key == "plain" else 4.5,
                        linestyle="",
                        label="_" if key == "plain" else blocks,
                    )
                seen += [value for p in found for value in p[:2]]
        pictures.logarithmic(axes, "xy")
        axes.plot(
            [min(seen), max(seen)], [min(seen), max(seen)], color=pictures.PALE, linewidth=0.8
        )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("bound − 1")
        axes.set_ylabel("measured ‖J‖")
        axes.legend(frameon=False, fontsize=9)


PART = Part(
    "questions-b",
    "Does the bound still rank SwiGLU, GQA and parallel blocks",
    estimate,
    measure,
    setup,
    tell,
    tables,
    draw,
)
