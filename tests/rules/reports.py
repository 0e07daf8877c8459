"""Reports made by hand: healthy sub-layers, and what the rules say of them."""

from __future__ import annotations

import math
from dataclasses import replace

from jacdiag.records import (
    Interval,
    ModelRecord,
    PerToken,
    ProbeRecord,
    Report,
    Spread,
    SublayerRecord,
    TokenAt,
    WeightStats,
)
from jacdiag.rules import evaluate
from jacdiag.rules.thresholds import load_thresholds

LAYERS = 2
SCALE = math.sqrt(2 * LAYERS)
LIMITS = load_thresholds(
    {
        "core_norm": {"info": 2.0, "warning": 4.0},
        "norm_gain": {"info": 3.0, "warning": 8.0},
        "branch_norm": {"pre": {"info": 1.0, "warning": 5.0}},
        "gain_product": {"info": 10.0},
    }
)


def gain(value: float) -> Interval:
    spread = PerToken(median=value, p99=value, max=10 * value)
    return Interval.exact(10 * value, per_token=spread)


def row(
    index: int, core: Interval | None, gain_: Interval | None, branch: Interval | None, **other
) -> SublayerRecord:
    sigma = Spread(0.1, 0.05, 0.2, argmin=TokenAt(0, 7, 1234))
    weights = {
        "W_1": WeightStats("fc", [256, 64], 0.02, 1.0),
        "W_2": WeightStats("proj", [64, 256], 0.02, 1.0),
    }
    made = SublayerRecord(
        f"h.{index // 2}.{'mlp' if index % 2 else 'attn'}",
        index,
        index // 2,
        "mlp" if index % 2 else "attention",
        "pre",
        shortcut_std=sigma,
        core_norm=core,
        norm_gain=gain_,
        branch_norm=branch,
        weights=weights,
    )
    return replace(made, **other)


def narrow(value: float) -> Interval:
    return Interval(value, value * 0.999, value * 1.001, 0.999)


def report(rows: list[SublayerRecord], state: str = "init", **other) -> Report:
    made = Report(
        source={},
        tier="measured",
        state=state,
        probe=ProbeRecord(2, 8, 0),
        model=ModelRecord("GPT", 1000, LAYERS, width=64, covered_parameters=1000),
        sublayers=rows,
        settings={"checks": {"deterministic": True, "non_finite": [], "replay": {}}},
    )
    return replace(made, **other)


def healthy(**other) -> list[SublayerRecord]:
    return [row(k, narrow(1.0 / SCALE), gain(1.0), narrow(0.5), **other) for k in range(4)]


def judged(rows: list[SublayerRecord], profile: str = "default", **other) -> Report:
    return evaluate(report(rows, **other), thresholds=LIMITS, profile=profile)


def status(made: Report, code: str) -> str:
    return next(r.status for r in made.rules if r.code == code)


def findings(made: Report, code: str) -> list:
    return [f for f in made.findings if f.code == code]
