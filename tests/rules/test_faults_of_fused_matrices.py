"""A fault of the queries, keys or values of a fused matrix is named as theirs, and mended alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import jacdiag
from benchmarks.initbench.catalogue import tokens
from benchmarks.initbench.decoders import GPT
from benchmarks.initbench.draws import draw, normal, ones
from jacdiag.measure.fused_sections import sections_of
from jacdiag.records import Finding, Report
from jacdiag.remedies.changes import Rows

LAYERS = 6
WIDTH = 64
FUSED = "h.*.attn.c_attn"


def gpt() -> Any:
    torch.manual_seed(0)
    model = GPT(layers=LAYERS, width=WIDTH, tied=False, bias=False)
    outputs = normal(0.02 / math.sqrt(2 * LAYERS))
    draw(model, ("ln_", ones), ("wte", normal(1.0)), ("c_proj", outputs), ("weight", normal(0.02)))
    return model


def audit(model: nn.Module, remedies: str = "none") -> Report:
    return jacdiag.audit(model, tokens(), state="init", products=False, remedies=remedies)


def named(report: Report) -> list[Finding]:
    codes = ("JD203", "JD204", "JD205")
    return [finding for finding in report.findings if finding.code in codes]


@torch.no_grad()
def scale(model: Any, layers: range, first: int, last: int, factor: float) -> None:
    for layer in layers:
        model.h[layer].attn.c_attn.weight[first:last].mul_(factor)


@pytest.mark.parametrize(("role", "first"), [("W_Q", 0), ("W_K", WIDTH), ("W_V", 2 * WIDTH)])
def test_a_section_of_zeros_is_named(role: str, first: int) -> None:
    model = gpt()
    scale(model, range(3, 4), first, first + WIDTH, 0.0)
    [finding] = named(audit(model))
    assert finding.code == "JD205" and finding.evidence["section"] == role
    assert finding.what.startswith(f"the {role} rows of {FUSED} (1 of 6, in layer 3): std 0, ")
    assert finding.fix == "initialise these rows with std 0.02"


def test_a_factor_on_the_queries_is_named_with_their_std() -> None:
    model = gpt()
    scale(model, range(LAYERS), 0, WIDTH, 5.0)
    [finding] = named(audit(model))
    assert finding.evidence["section"] == "W_Q"
    assert finding.evidence["value"] == pytest.approx(0.1, rel=0.05)


def test_a_factor_on_all_sections_is_one_of_the_matrix() -> None:
    model = gpt()
    scale(model, range(2, 3), 0, 3 * WIDTH, 2.0)
    [finding] = named(audit(model))
    assert "section" not in finding.evidence
    assert finding.what.startswith(f"{FUSED} (1 of 6, in layer 2): std 0.0")


def test_sections_that_are_wrong_in_different_ways_are_named_one_by_one() -> None:
    model = gpt()
    scale(model, range(2, 3), 0, WIDTH, 3.0)
    scale(model, range(2, 3), WIDTH, 3 * WIDTH, 0.3)
    sections = {finding.evidence["section"] for finding in named(audit(model))}
    assert sections == {"W_Q", "W_K", "W_V"}


def test_a_number_far_outside_its_own_section_is_still_named() -> None:
    model = gpt()
    model.h[2].attn.c_attn.weight.data[3, 5] = -2.0
    [finding] = named(audit(model))
    assert "1 number lies far outside the draw" in finding.what


def test_a_pinned_name_is_judged_by_its_sections_too() -> None:
    model = gpt()
    scale(model, range(3, 4), WIDTH, 2 * WIDTH, 0.0)
    contract = {f"{FUSED}.weight": "0.02"}
    report = jacdiag.audit(model, tokens(), products=False, contract=contract, remedies="none")
    [finding] = [finding for finding in report.findings if finding.code == "JD201"]
    assert finding.what.startswith(f"the W_K rows of {FUSED} (1 of 6, in layer 3): std 0, ")


def test_the_remedy_draws_these_rows_alone() -> None:
    model = gpt()
    scale(model, range(3, 4), WIDTH, 2 * WIDTH, 0.0)
    before = model.h[3].attn.c_attn.weight.detach().clone()
    report = jacdiag.audit(model, tokens(), state="init", select=["JD2"], remedies="first")
    [remedy] = [remedy for remedy in report.remedies if remedy.recommended]
    assert remedy.title == f"initialise the W_K rows of {FUSED} with 0.02"

    namespace: dict[str, Any] = {}
    exec(remedy.patches["pytorch"], namespace)
    after = namespace["remedy"](model).h[3].attn.c_attn.weight.detach()
    keys = slice(WIDTH, 2 * WIDTH)
    assert float(after[keys].std()) == pytest.approx(0.02, rel=0.05)
    before[keys] = after[keys]
    assert torch.equal(before, after)
    assert "the W_K rows of" in remedy.patches["megatron"]
    assert not named(audit(model))


def test_rows_of_heads_that_follow_one_another() -> None:
    # 1. Four heads, each with its queries, keys and values. The keys are ten times larger.
    weight = torch.randn(192, WIDTH, generator=torch.Generator().manual_seed(0))
    heads = weight.view(4, 3, 16, WIDTH)
    heads[:, 1] *= 10
    keys = sections_of(weight, "W_QKV", 192, head=16)[1]
    assert (keys.dim, keys.groups, keys.start) == (0, 4, 16)

    # 2. The rows of the record are those of the keys.
    rows = Rows("W_K", keys.dim or 0, keys.groups, keys.start, keys.fan_out // keys.groups)
    assert torch.equal(rows.of(weight), heads[:, 1])
    assert torch.equal(eval(rows.code(), {"weight": weight}), heads[:, 1])


def test_rows_of_a_matrix_that_is_stored_the_other_way() -> None:
    weight = torch.randn(WIDTH, 192, generator=torch.Generator().manual_seed(0))
    values = sections_of(weight, "W_QKV", 192)[2]
    rows = Rows("W_V", values.dim or 0, values.groups, values.start, values.fan_out)
    assert torch.equal(rows.of(weight), weight[:, 128:])
