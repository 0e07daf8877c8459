"""Where some layers of one name are zero and others are not, most of them show what is meant."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import nn

import jacdiag
from benchmarks.initbench.catalogue import tokens
from benchmarks.initbench.decoders import Llama
from benchmarks.initbench.draws import draw, normal, ones, zeros
from jacdiag.records import Finding, Report
from jacdiag.records.init_contract import ContractRecord, WeightRecord
from jacdiag.rules.dead_layers import LayersOfZeros

LAYERS = 6
DRAWN = "layers.2.mlp.down_proj.weight"


def build(zero_layers: Collection[int]) -> Llama:
    """Return a model whose W_O are all zero, and W_2 in some layers."""
    torch.manual_seed(0)
    model = Llama(layers=LAYERS, width=64)
    rules = (("norm", ones), ("embed", normal(1.0)), ("o_proj", zeros), ("weight", normal(0.02)))
    draw(model, *rules)
    for index in zero_layers:
        nn.init.zeros_(model.layers[index].mlp.down_proj.weight)
    return model


def audit(model: nn.Module, **options: Any) -> Report:
    return jacdiag.audit(model, tokens(), state="init", **options)


def find(report: Report, code: str) -> list[Finding]:
    return [f for f in report.findings if f.code == code and f.level != "info"]


def test_a_drawn_layer_among_zeros_is_the_odd_one() -> None:
    report = audit(build({0, 1, 3, 4, 5}), remedies="first")
    [layer] = find(report, "JD205")
    assert layer.evidence["parameters"] == [DRAWN]
    assert layer.what.startswith("layers.*.mlp.down_proj (1 of 6, in layer 2): std 0.0")
    assert layer.what.endswith(", the other layers have 0")
    [branch] = find(report, "JD402")
    assert branch.fix == f"set {DRAWN} to zero, as in the other layers"

    # The remedy does the same, and nothing is left of the finding.
    [remedy] = [remedy for remedy in report.remedies if remedy.recommended]
    assert remedy.title == "initialise layers.*.mlp.down_proj with zeros, as in the other layers"
    assert "weight.fill_(0.0)" in remedy.patches["pytorch"]


def test_a_zero_layer_among_draws_is_the_odd_one() -> None:
    report = audit(build({2}), remedies="none")
    [layer] = find(report, "JD205")
    assert layer.evidence["parameters"] == [DRAWN]
    assert layer.what.endswith("; all of it is zero")
    [branch] = find(report, "JD402")
    assert branch.fix == f"initialise {DRAWN} as in the other layers"


def test_half_of_the_layers_show_nothing() -> None:
    report = audit(build({0, 1, 2}), remedies="none")
    [branch] = find(report, "JD402")
    assert branch.fix.startswith("initialise all layers alike: layers.0.mlp.down_proj.weight")
    assert not any("other layers have 0" in finding.what for finding in report.findings)


def test_all_zero_is_an_init() -> None:
    report = audit(build(range(LAYERS)), remedies="none")
    assert not find(report, "JD205") and not find(report, "JD402")


def weight(name: str, family: str) -> WeightRecord:
    return WeightRecord(name, [8, 8], "adapter", name, family=family)


@pytest.mark.parametrize(
    ("families", "fix"),
    [
        ("zero zero normal", "set b.2.ada to zero, as in the other layers"),
        ("zero normal normal", "initialise b.0.ada as in the other layers"),
        ("zero normal", "initialise all layers alike: b.0.ada are zero, and b.1.ada are not"),
        ("zero zero zero", ""),
    ],
)
def test_advice_follows_two_thirds(families: str, fix: str) -> None:
    weights = []
    for index, family in enumerate(families.split()):
        weights.append(weight(f"b.{index}.ada", family))
        weights.append(weight(f"b.{index}.bias", "zero"))
    contract = ContractRecord("", {"d": 8}, weights)
    layers = LayersOfZeros.of(contract, ["b.0.ada", "b.0.bias"])
    assert layers.fix == fix
    # A bias that is zero in every layer differs from none.
    assert "b.0.bias" not in layers.differing
