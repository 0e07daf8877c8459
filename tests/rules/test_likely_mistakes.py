"""A cause is named where the formula computed with that mistake gives what was measured, and where
several matrices show it. Elsewhere the sentence has the factor alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from benchmarks.initbench.catalogue import tokens
from benchmarks.initbench.decoders import Llama
from benchmarks.initbench.draws import draw, fan_in_normal, normal, ones, xavier_normal
from jacdiag.records import Finding

WIDTH = 64
LAYERS = 4
OUTPUTS = "o_proj|down_proj"


def build(*rules: tuple[str, Callable[[Tensor], object]]) -> Llama:
    torch.manual_seed(0)
    model = Llama(layers=LAYERS, width=WIDTH)
    draw(model, ("norm", ones), *rules)
    return model


def scale(model: nn.Module, factor: float, *ends: str) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.removesuffix(".weight").endswith(ends):
                weight.mul_(factor)


def findings(model: nn.Module) -> list[Finding]:
    report = jacdiag.audit(
        model, tokens(), products=False, state="init", select=["JD20"], remedies="none"
    )
    return [finding for finding in report.findings if finding.level != "info"]


def by_outputs(weight: Tensor) -> Any:
    return nn.init.normal_(weight, 0.0, weight.shape[0] ** -0.5)


def gpt2_like() -> Llama:
    outputs = normal(0.02 / math.sqrt(2 * LAYERS))
    return build((OUTPUTS, outputs), ("weight", normal(0.02)))


# -- fan_in, fan_out and the width of a head -----------------------------------------------------
@pytest.mark.parametrize("layers", ["1.", ""])
def test_a_number_without_fans_is_not_wrong_because_of_fans(layers: str) -> None:
    """Of a constant 0.02, any factor would match some ratio of sizes by chance."""
    model = gpt2_like()
    scale(model, 2.0, f"{layers}self_attn.q_proj", f"{layers}mlp.up_proj", f"{layers}mlp.gate_proj")
    found = findings(model)
    assert len(found) == 3
    for finding in found:
        assert finding.evidence["looks"] == ""
        words = finding.what.rpartition("; ")[2].split()
        assert float(words[0]) == pytest.approx(2.0, rel=0.05)
        assert words[1:] == ["times", "that"]


def test_exchanged_fans_are_named_in_all_layers_and_in_several_sizes() -> None:
    model = build((r"mlp", by_outputs), ("embed", normal(1.0)), ("weight", fan_in_normal()))
    found = findings(model)
    assert {finding.evidence["role"] for finding in found} == {"W_1", "W_gate", "W_2"}
    assert all(finding.what.endswith("; fan_in and fan_out confused") for finding in found)


def test_one_matrix_does_not_prove_that_fans_were_exchanged() -> None:
    model = build(("embed", normal(1.0)), ("weight", fan_in_normal()))
    by_outputs(model.layers[2].mlp.down_proj.weight.data)
    [finding] = findings(model)
    assert finding.evidence["looks"] == "" and " times that" in finding.what


def test_a_symmetric_formula_is_not_wrong_because_of_fans() -> None:
    model = build(("embed", normal(1.0)), ("weight", xavier_normal()))
    hidden = model.layers[0].mlp.up_proj.weight.shape[0]
    scale(model, math.sqrt(hidden / WIDTH), "up_proj", "down_proj")
    found = findings(model)
    assert found and not any(finding.evidence["looks"] for finding in found)


def test_the_width_of_a_head_is_named_in_all_layers_and_not_in_one() -> None:
    head = normal(16**-0.5)
    rest = (("embed", normal(1.0)), ("weight", fan_in_normal()))
    everywhere = findings(build((r"[qkv]_proj", head), *rest))
    assert {finding.evidence["role"] for finding in everywhere} == {"W_Q", "W_K", "W_V"}
    assert all("by the width of a head" in finding.what for finding in everywhere)

    [once] = findings(build((r"layers\.1\.self_attn\.q_proj", head), *rest))
    assert once.evidence["looks"] == "" and once.what.endswith(" times that")


# -- std and variance ----------------------------------------------------------------------------
def test_a_variance_is_named_where_the_formula_reads_sizes() -> None:
    def variance(weight: Tensor) -> Any:
        return nn.init.normal_(weight, 0.0, 1 / weight.shape[1])

    model = build(("down_proj", variance), ("embed", normal(1.0)), ("weight", fan_in_normal()))
    [finding] = findings(model)
    assert finding.evidence["role"] == "W_2"
    assert finding.what.endswith("; std and variance confused")


def test_seven_times_a_constant_is_no_variance() -> None:
    model = gpt2_like()
    scale(model, 7.0, "layers.1.self_attn.v_proj")
    [once] = findings(model)
    assert once.evidence["looks"] == "" and once.what.endswith(" times that")

    # In all layers, only the arithmetic is certain.
    model = gpt2_like()
    scale(model, 1 / math.sqrt(0.02), "self_attn.v_proj")
    [everywhere] = findings(model)
    assert everywhere.what.endswith("; about the square root of that")


# -- depth ---------------------------------------------------------------------------------------
def test_the_scaling_with_depth_is_missing_in_all_layers() -> None:
    model = gpt2_like()
    scale(model, math.sqrt(2 * LAYERS), "down_proj")
    [finding] = findings(model)
    assert finding.code == "JD203"
    assert finding.what.endswith("; the scaling with depth is missing")


def test_a_factor_of_two_in_one_layer_is_no_scaling_with_depth() -> None:
    """In layer 1, 2 is also the root of 2(l + 1)."""
    for factor, name in ((2.0, "layers.1.mlp.down_proj"), (0.5, "layers.1.mlp.up_proj")):
        model = gpt2_like()
        scale(model, factor, name)
        [finding] = findings(model)
        assert finding.code == "JD205" and finding.evidence["looks"] == ""
        assert finding.what.endswith(" times that")


def test_what_no_formula_scales_cannot_miss_its_scaling() -> None:
    model = build(("embed", normal(1.0)), ("weight", normal(0.02)))
    scale(model, math.sqrt(2 * LAYERS), "down_proj")
    [finding] = findings(model)
    assert finding.code == "JD204" and finding.evidence["looks"] == ""
