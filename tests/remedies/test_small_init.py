"""The init of the field as a remedy: all matrices are all of them, and a shortcut that is large
enough stays so.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from gate import net
from torch import nn

import jacdiag
from jacdiag.records import Finding
from jacdiag.remedies import remedies_for
from jacdiag.remedies.changes import Redraw
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources.factory import seeded

PROBE: dict[str, Any] = {"batch": 1, "seq": 16, "decide": True, "state": "init"}
S = math.sqrt(2 / (5 * 64))


def xavier(std: float, seed: int = 0) -> nn.Module:
    """Xavier in the sub-layers; an embedding of its own std, and a head that is not tied to it."""
    with seeded(seed):
        model = net.model(layers=2)
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and name.startswith("h."):
                nn.init.xavier_normal_(weight)
        nn.init.normal_(model.wte.weight, std=std)
    return model


def test_all_matrices_are_all_of_them() -> None:
    report = jacdiag.audit(xavier(0.02), remedies="all", **PROBE)
    found = {r.name: r for r in report.remedies}
    assert not [n for n, r in found.items() if "small-init" in n and "JD204" in r.after.fired]
    paper = found["scaled-embed + small-init"]  # all matrices with s, the embedding times sqrt(d)
    assert paper.sufficient and paper.after.fired == []
    namespace: dict[str, Any] = {}
    exec(paper.patches["pytorch"], namespace)
    model = xavier(0.02, seed=5)
    with seeded(6):
        namespace["remedy"](model)
    after = jacdiag.audit(model, **PROBE)
    assert after.verdict == "pass"
    for name in ("wte.weight", "head.weight"):
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(S, rel=0.05)


@pytest.mark.long
def test_two_that_change_one_table_agree_on_it() -> None:
    report = jacdiag.audit(xavier(0.02), remedies="all", **PROBE)
    found = {r.name: r for r in report.remedies}
    unit, one = found["unit-embed + small-init"], found["std-1-embed + small-init"]
    assert f"output * {float(f'{1 / S:.4g}')!r}" in unit.patches["pytorch"], (
        "to 1 from the std that it is drawn with"
    )
    assert "all other matrices" in one.title and one.patches["pytorch"].count("wte.weight") == 1
    megatron = found["scaled-embed + small-init"].patches["megatron"].splitlines()
    flags = [line for line in megatron if line.startswith("--embedding-init")]
    assert flags == ["--embedding-init-method-std 0.632 --untie-embeddings-and-output-weights"]
    assert "# --init-method-std draws the head too" in megatron
    assert (
        found["scaled-embed + small-init"]
        .patches["torchtitan"]
        .count("param_init of tok_embeddings")
        == 1
    )


@pytest.mark.parametrize(("std", "drawn"), [(0.02, S), (0.5, 1.0), (1.0, None)])
def test_a_shortcut_that_is_large_enough_is_not_made_smaller(
    std: float, drawn: float | None
) -> None:
    model = xavier(std)
    report = jacdiag.audit(model, **PROBE)
    judged = dataclasses.replace(report, findings=[Finding("JD101", "warning", [], "too large")])
    small = {r.name: r for r in remedies_for(judged, model, load_thresholds(None, None))}[
        "small-init"
    ]
    tables = {c.weights.names[0]: c.std for c in small.changes if isinstance(c, Redraw)}
    assert (
        tables.get("wte.weight") == (None if drawn is None else pytest.approx(drawn))
        and "head.weight" in tables
    )
