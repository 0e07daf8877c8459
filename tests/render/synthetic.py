"""Reports made up for the tests of render/ and cli/: GPT-2 shapes with the figures that such models
really have.

No torch, no model: only the plain records. Every builder is deterministic.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jacdiag.records import (
    Conditions,
    Cost,
    Finding,
    Growth,
    Interval,
    ModelRecord,
    NetworkRecord,
    PerToken,
    Plan,
    ProbeRecord,
    Report,
    RuleResult,
    Spread,
    SublayerRecord,
    TokenAt,
    WeightStats,
)

WORST = TokenAt(sequence=0, position=7, token=1234)
THRESHOLDS = {
    "core_norm": {"warning": 1.63, "error": None},
    "norm_gain": {"warning": 10.0, "error": None},
    "branch_norm": {"warning": 10.0, "error": None},
}
LADDER = [
    {"name": "embed-ln", "placement": "pre", "worst_branch_gain": 0.71, "width": 768},
    {"name": "scaled-embed", "placement": "pre", "worst_branch_gain": 1.12, "width": 768},
    {"name": "Pythia shape", "placement": "pre", "worst_branch_gain": 5.04, "width": 768},
    {"name": "GPT-2", "placement": "pre", "worst_branch_gain": 24.1, "width": 768},
    {"name": "Llama 3 shape", "placement": "pre", "worst_branch_gain": 212.0, "width": 768},
    {"name": "OLMo 2", "placement": "reordered", "worst_branch_gain": 397.0, "width": 1024},
]


def interval(
    value: float, width: float = 0.035, *, products: int = 22, per_token: bool = False
) -> Interval:
    """An interval as the solver gives it: the estimate sits near the lower end."""
    spread = (
        PerToken(median=value * 0.7, p99=value * 0.98, max=value, argmax=WORST)
        if per_token
        else None
    )
    return Interval(
        estimate=value,
        lower=value * (1 - 1e-4),
        upper=value * (1 + width),
        confidence=0.999,
        converged=width <= 0.05,
        products=products,
        per_sequence=[value, value * 0.97],
        per_token=spread,
        stop="the interval is as narrow as asked"
        if width <= 0.05
        else "the budget of products ran out",
    )


def spread(sigma: float) -> Spread:
    return Spread(median=sigma * 1.02, min=sigma, max=sigma * 1.1, p01=sigma * 1.001, argmin=WORST)


def exact(sigma: float) -> Interval:
    gain = 1 / math.sqrt(sigma**2 + 1e-5)
    per_token = PerToken(median=gain * 0.97, p99=gain * 0.999, max=gain, argmax=WORST)
    return Interval.exact(gain, per_token=per_token)


def sublayers(
    layers: int, *, sigma0: float = 0.028, scale: float = 1.0, width: float = 0.035
) -> list[SublayerRecord]:
    """The 2 N sub-layers of a pre-norm GPT at init whose embedding has the std `sigma0`."""
    rows, variance, root = [], sigma0**2, math.sqrt(2 * layers)
    for index in range(2 * layers):
        attention, sigma = index % 2 == 0, math.sqrt(variance)
        core = scale * (3.3 if attention else 2.84) / root * (1 + 0.06 * math.sin(1.7 * index))
        gain = exact(sigma)
        branch = 0.94 * core * gain.estimate
        rows.append(
            SublayerRecord(
                name=f"transformer.h.{index // 2}.{'attn' if attention else 'mlp'}",
                index=index,
                depth=index // 2,
                kind="attention" if attention else "mlp",
                placement="pre",
                token_wise=not attention,
                shortcut_std=spread(sigma),
                branch_std=spread(0.1 * core),
                branch_norm=interval(branch, width, per_token=not attention),
                residual_norm=interval(1 + 0.9 * branch, width),
                core_norm=interval(core, width),
                norm_gain=gain,
                bound=1 + 1.75 * branch,
                bound_norms=1 + 1.9 * branch,
                tightness=1.75,
                weights=weights(attention, layers),
                parameters=[
                    f"transformer.h.{index // 2}.{'attn' if attention else 'mlp'}.c_proj.weight"
                ],
                notes={"out_norm_gain": "no norm at the branch's end"},
                cost=24.0,
            )
        )
        variance += (0.1 * core) ** 2
    return rows


def weights(attention: bool, layers: int) -> dict[str, WeightStats]:
    deep = 0.02 / math.sqrt(2 * layers)
    first, last = ("W_Q", "W_O") if attention else ("W_1", "W_2")
    wide = [768, 768] if attention else [768, 3072]
    return {
        first: WeightStats(parameter="c_fc.weight", shape=wide, std=0.02, norm=1.66),
        last: WeightStats(
            parameter="c_proj.weight", shape=wide[::-1], std=deep, norm=1.66 * deep / 0.02
        ),
    }


def findings(layers: int) -> list[Finding]:
    names = [
        f"transformer.h.{index // 2}.{('attn', 'mlp')[index % 2]}" for index in range(2 * layers)
    ]
    shortcut = names[: max(2, layers // 2)]
    return [
        Finding(
            code="JD102",
            level="warning",
            where=shortcut,
            what=(
                "shortcut std 0.028 at the embedding (target: about 1), in layers 0 to "
                f"{(len(shortcut) - 1) // 2}"
            ),
            evidence={"factor": "shortcut", "norm_gain": 34.1, "token": 1234, "position": 7},
            why="Eq. 14: the norm multiplies every gradient by 1 / σ_x.",
            fix=(
                "multiply the embedding by sqrt(d) (scaled-embed), or put a LayerNorm on it "
                "(embed-ln)"
            ),
        ),
        Finding(
            code="JD103",
            level="warning",
            where=shortcut[:2],
            what=(
                "branch norm 22.0 at transformer.h.0.attn; 10 and more is far from what the "
                "published recipes give"
            ),
            evidence={"branch_norm": 22.0},
            why="Eq. 9.",
            fix="see JD102",
        ),
    ]


RULES = [
    RuleResult(code="JD101", status="clean", matched=24, name="small-sublayers"),
    RuleResult(code="JD102", status="fired", matched=24, name="large-shortcut"),
    RuleResult(code="JD103", status="fired", matched=24, name="amplification"),
    RuleResult(code="JD104", status="clean", matched=1, name="depth-product"),
    RuleResult(
        code="JD110", status="not-applicable", matched=0, name="regression", note="no baseline"
    ),
]


def network(rows: list[SublayerRecord]) -> NetworkRecord:
    logs = [math.log(row.residual_norm.estimate) for row in rows if row.residual_norm]
    depths = len(rows) // 2 + 1
    return NetworkRecord(
        gain_product_log=sum(logs),
        end_to_end=interval(11.0 * math.exp(sum(logs) / 6)),
        gradient_norms=[0.9 * 0.8**n for n in range(depths)],
        predicted_gradient_norms=[50 * 0.5**n for n in range(depths)],
        growth=Growth(activation=0.22, gradient=0.21),
        loss={"kind": "next-token cross-entropy", "value": 10.9},
    )


def vanilla(layers: int = 12, **how: Any) -> Report:
    """A GPT-2-like model at init, measured: the large shortcut is missing."""
    rows = sublayers(layers, **how)
    return Report(
        source={"path": "checkpoint.pt", "format": "nanogpt", "step": 0},
        tier="measured",
        state="init",
        probe=ProbeRecord(batch=2, seq=128, seed=0, excluded_rows=12),
        model=ModelRecord(
            name="GPT",
            parameters=124_439_808,
            layers=layers,
            width=768,
            covered_parameters=124_439_808 - 248_900,
            uncovered=["transformer.ln_f.weight", "transformer.wpe.weight"],
            uncovered_reasons={"transformer.ln_f.weight": "the final norm is no sub-layer"},
            weights={
                "embedding": WeightStats(
                    parameter="transformer.wte.weight", shape=[50257, 768], std=0.02
                )
            },
            vocabulary=50257,
        ),
        sublayers=rows,
        network=network(rows),
        conditions=Conditions(small_sublayers="met", large_shortcut="not met"),
        verdict="warn",
        findings=findings(layers),
        rules=RULES,
        cost=Cost(forward_equivalents=612.4, products=528, seconds=41.3, peak_memory_mb=1945.0),
        settings={
            "name": "checkpoint.pt",
            "device": "cpu",
            "dtype": "float32",
            "confidence": 0.999,
            "profile": "default",
            "thresholds": THRESHOLDS,
            "command": "jacdiag audit checkpoint.pt --seed 0",
        },
        ladder=LADDER,
        created="2026-11-24T11:14:00+00:00",
        torch="2.13.0",
        jacdiag="0.1.0",
    )


def clean(layers: int = 12) -> Report:
    """Scaled embedding: both conditions met."""
    rows = sublayers(layers, sigma0=0.632)
    rules = [
        dataclasses.replace(rule, status="clean") if rule.status == "fired" else rule
        for rule in RULES
    ]
    return dataclasses.replace(
        vanilla(layers),
        sublayers=rows,
        network=network(rows),
        conditions=Conditions(small_sublayers="met", large_shortcut="met"),
        verdict="pass",
        findings=[],
        rules=rules,
    )


def post(layers: int = 12) -> Report:
    """Post-norm: no input norm, hence no split and no bound."""
    reason = {
        "norm_gain": "the branch does not begin with a norm (post)",
        "bound": "Eq. 15 and 20 are for pre-norm",
        "bound_norms": "Eq. 15 and 20 are for pre-norm",
        "tightness": "no bound",
    }
    rows = []
    for row in sublayers(layers, sigma0=0.98):
        core = row.core_norm
        assert core is not None
        rows.append(
            dataclasses.replace(
                row,
                placement="post",
                branch_norm=core,
                residual_norm=interval(1.1),
                norm_gain=None,
                bound=None,
                bound_norms=None,
                tightness=None,
                out_norm_gain=Interval.exact(0.97),
                notes=reason,
            )
        )
    return dataclasses.replace(
        vanilla(layers),
        sublayers=rows,
        network=network(rows),
        conditions=Conditions(small_sublayers="not applicable", large_shortcut="not applicable"),
        verdict="pass",
        findings=[],
        rules=[
            dataclasses.replace(
                rule, status="not-applicable", matched=0, note="no pre-norm sub-layer"
            )
            if rule.code in ("JD101", "JD102")
            else dataclasses.replace(rule, status="clean")
            for rule in RULES
        ],
    )


def trained(layers: int = 12) -> Report:
    """After training: the split is an observation, the bound has no footing, the probe is off its
    distribution.
    """
    reason = {
        "bound": "Eq. 15 and 20 describe a model at init",
        "bound_norms": "Eq. 15 and 20 describe a model at init",
        "tightness": "no bound",
    }
    rows = [
        dataclasses.replace(row, bound=None, bound_norms=None, tightness=None, notes=reason)
        for row in sublayers(layers, sigma0=0.4, scale=4.0)
    ]
    base = vanilla(layers)
    assert base.probe is not None
    return dataclasses.replace(
        base,
        source={**base.source, "step": 20_000},
        state="trained",
        sublayers=rows,
        network=network(rows),
        probe=dataclasses.replace(base.probe, off_distribution=True),
        conditions=Conditions(small_sublayers="partly", large_shortcut="met"),
        verdict="warn",
        findings=[
            Finding(
                code="JD903",
                level="warning",
                where=[],
                what="the probe is random tokens, which a trained model never saw",
                fix="give text of its own kind with --tokens FILE",
            ),
            Finding(
                code="JD101",
                level="info",
                where=[rows[0].name, rows[1].name],
                what="core norm·√(2N) up to 13.2 (an observation on a trained model)",
            ),
        ],
        plan=Plan(lr=3e-4, warmup=2000, clip=1.0),
    )


def weights_tier(layers: int = 12) -> Report:
    """No model could be built: only what the matrices say."""
    rows = [
        SublayerRecord(
            name=row.name,
            index=row.index,
            depth=row.depth,
            kind=row.kind,
            placement="none",
            bound=row.bound,
            weights=row.weights,
            notes={"branch_norm": "no model to run: only the weights were read"},
        )
        for row in sublayers(layers)
    ]
    return dataclasses.replace(
        vanilla(layers),
        tier="weights",
        state="init",
        probe=None,
        sublayers=rows,
        network=None,
        conditions=Conditions(small_sublayers="unknown", large_shortcut="unknown"),
        verdict="unknown",
        findings=[],
        rules=[
            dataclasses.replace(rule, status="unknown", note="needs a model that runs")
            for rule in RULES[:4]
        ],
        cost=Cost(seconds=0.8),
        notes=[
            "no model could be built: the file holds a bare state dict; --model FACTORY builds it"
        ],
    )


def undecided(layers: int = 12) -> Report:
    """Wide intervals: the budget of products ran out, and the rules cannot say."""
    base = vanilla(layers, sigma0=0.075, width=0.5)
    across = [row.name for row in base.sublayers if row.branch_norm and 10.0 in row.branch_norm]
    return dataclasses.replace(
        base,
        conditions=Conditions(small_sublayers="met", large_shortcut="unknown"),
        verdict="unknown",
        rules=[
            dataclasses.replace(rule, status="unknown" if rule.code == "JD103" else "clean")
            for rule in RULES
        ],
        findings=[
            Finding(
                code="JD901",
                level="warning",
                where=across,
                what=f"{len(across)} intervals lie across a threshold",
                evidence={"field": "branch_norm"},
                fix="spend more: --tol 0.02",
            )
        ],
    )


def broken(layers: int = 4) -> Report:
    """Nulls with notes and figures that are not finite."""
    base = vanilla(layers)
    rows = list(base.sublayers)
    nan, inf = float("nan"), float("inf")
    rows[1] = dataclasses.replace(
        rows[1],
        branch_norm=None,
        core_norm=None,
        residual_norm=None,
        bound=None,
        notes={
            "branch_norm": "NaN in transformer.h.0.mlp.c_fc.weight",
            "core_norm": "NaN in its weights",
        },
    )
    rows[2] = dataclasses.replace(
        rows[2],
        branch_norm=Interval(nan, nan, inf, confidence=0.999, converged=False),
        norm_gain=Interval.exact(inf),
    )
    bad = Finding(
        code="JD906",
        level="error",
        where=[rows[1].name],
        what="transformer.h.0.mlp.c_fc.weight holds 3 NaN",
        evidence={"parameter": "transformer.h.0.mlp.c_fc.weight", "worst": inf},
        fix="load an earlier checkpoint",
    )
    return dataclasses.replace(
        base, sublayers=rows, findings=[bad, *base.findings], verdict="fail", network=None
    )
