"""Correct inits are not blamed, and one mistake in them is named: that weight and no other."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jacdiag
from benchmarks._fresh import libraries, recipes
from benchmarks._fresh.recipes import RECIPES, Decoder, Place, Recipe
from jacdiag.measure.fused_sections import is_sinusoid, sections_of
from jacdiag.measure.init_contract import whole_map, without_adapters
from jacdiag.records import ContractRecord, Finding, Report, WeightRecord
from jacdiag.rules.init.init_contract import judged
from jacdiag.rules.init.scheme_fit import is_projection
from jacdiag.trace.discovery.weight_roles import ParameterUse

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")

IDS = torch.randint(
    recipes.VOCABULARY, (2, recipes.LENGTH), generator=torch.Generator().manual_seed(0)
)


def audit(model: nn.Module, inputs: Any = IDS) -> Report:
    return jacdiag.audit(
        model, inputs, products=False, state="init", select=["JD20"], remedies="none"
    )


def warnings_of(report: Report) -> list[Finding]:
    return [f for f in report.findings if f.code.startswith("JD2") and f.level != "info"]


def sentences(report: Report) -> list[str]:
    return [f"{f.code}: {f.what}" for f in warnings_of(report)]


def named(report: Report) -> set[str]:
    """Return the patterns of the weights that are blamed."""
    return {f.evidence["pattern"] for f in warnings_of(report)}


# -- correct inits ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RECIPES)
def test_published_inits_are_not_blamed(name: str) -> None:
    assert sentences(audit(recipes.build(RECIPES[name], seed=7))) == []


@pytest.mark.parametrize(
    ("library", "name"),
    [
        *(("torch", name) for name in libraries.TORCH),
        ("x-transformers", "default"),
        ("x-transformers", "zero branch outputs"),
        ("x-transformers", "gated values"),
        ("x-transformers", "normalised embedding"),
        ("x-transformers", "embedding of another width"),
        ("peft", "LoRA"),
        ("peft", "LoHa"),
    ],
)
def test_libraries_are_not_blamed(library: str, name: str) -> None:
    pytest.importorskip({"x-transformers": "x_transformers"}.get(library, library))
    fresh = libraries.build(library, name, seed=3)
    assert sentences(audit(fresh.model, fresh.inputs)) == []


@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("causal-lm", "falcon_mamba"),  # mixers
        ("causal-lm", "marian"),  # positions of sines
        ("causal-lm", "nanochat"),  # W_O by 1/sqrt(2N), W_2 not
        ("causal-lm", "nemotron_h"),  # mixers beside attention
        ("causal-lm", "xlm"),  # embedding 1/sqrt(d) of another d
        ("causal-lm", "zamba"),  # raw parameters of a mixer
        ("seq2seq", "umt5"),  # W_Q by 1/sqrt(d_head)
        ("image", "clip"),
        ("image", "deit"),  # tokens and positions of zero
        ("image", "pvt_v2"),  # depthwise kernels
        ("image", "regnet"),  # convolutions
    ],
)
def test_families_of_transformers_are_not_blamed(task: str, family: str) -> None:
    pytest.importorskip("transformers")
    # Only while it is imported: the folder holds modules that are called as folders of tests are.
    sys.path.insert(0, BENCHMARKS)
    try:
        from _coverage.build import build
    finally:
        sys.path.remove(BENCHMARKS)

    built = build(task, family, disturb=False)
    assert sentences(audit(built.model, built.inputs)) == []


def test_a_note_names_the_scheme_that_was_found() -> None:
    notes = {}
    for name in ("DeepNorm, fused", "T-Fixup, fused", "CLIP", "GPT-2", "Xavier, fused whole"):
        report = audit(recipes.build(RECIPES[name]))
        notes[name] = next(rule.note for rule in report.rules if rule.code == "JD204")
    starts = {
        "DeepNorm, fused": "follows DeepNorm",
        "T-Fixup, fused": "follows T-Fixup",
        "CLIP": "follows CLIP",
        "GPT-2": "follows N(0, 0.02), W_O and W_2 by 1/sqrt(2N)",
        "Xavier, fused whole": "follows Xavier sqrt(2/(fan_in + fan_out))",
    }
    for name, start in starts.items():
        assert notes[name].startswith(start), notes[name]


# -- one mistake -----------------------------------------------------------------------------------
@torch.no_grad()
def scale(model: nn.Module, factor: float, *endings: str) -> None:
    for name, weight in model.named_parameters():
        if name.removesuffix(".weight").endswith(endings):
            weight.mul_(factor)


def values_of(weight: Tensor) -> Tensor:
    return weight.chunk(3)[2]


def test_a_changed_output_of_deepnorm_is_named() -> None:
    for name in ("DeepNorm", "DeepNorm, fused", "DeepNorm, heads interleaved"):
        model = recipes.build(RECIPES[name], seed=1)
        scale(model, 3.0, "3.o")
        (finding,) = warnings_of(audit(model))
        assert finding.code == "JD205" and finding.evidence["parameters"] == ["blocks.3.o.weight"]
        model = recipes.build(RECIPES[name], seed=1)
        scale(model, 48**0.25, ".o")  # beta of 6 layers forgotten on W_O
        assert named(audit(model)) == {"blocks.*.o.weight"}


def test_values_of_a_fused_deepnorm_without_beta_are_named() -> None:
    model = recipes.build(RECIPES["DeepNorm, fused"], seed=1)
    with torch.no_grad():
        for block in model.blocks:
            values_of(block.get_submodule("qkv").weight).mul_(48**0.25)  # type: ignore[arg-type]
    (finding,) = warnings_of(audit(model))
    assert finding.what.startswith("the W_V rows of blocks.*.qkv (6 of 6): std 0.12")
    assert finding.evidence["section"] == "W_V" and finding.evidence["of"] == 6


def test_only_the_wrong_section_of_a_fused_matrix_is_drawn_again() -> None:
    model = recipes.build(RECIPES["DeepNorm, fused"], seed=1)
    with torch.no_grad():
        values_of(model.blocks[2].get_submodule("qkv").weight).mul_(3)  # type: ignore[arg-type]
    report = audit(model)
    assert named(report) == {"blocks.*.qkv.weight"}
    from jacdiag.remedies import candidates as remedies

    remedy = remedies._contract(report.contract, ["JD205"])
    assert remedy is not None and remedy.title.startswith("initialise the W_V rows of blocks.*.qkv")
    before = model.blocks[2].get_submodule("qkv").weight.detach().clone()
    remedy.apply(model)
    after = model.blocks[2].get_submodule("qkv").weight.detach()
    values_of(before).copy_(values_of(after))
    assert torch.equal(before, after)


SWAPS: dict[str, Callable[[Place], float]] = {
    "0.02": lambda place: 0.02 / math.sqrt(12) if place.role in ("o", "up") else 0.02,
    "another s": lambda place: 0.031 / math.sqrt(12) if place.role in ("o", "up") else 0.031,
    "gate": lambda place: 0.02 / math.sqrt(12) if place.role in ("o", "gate") else 0.02,
    "attention": lambda place: 0.02 / math.sqrt(12) if place.role in ("v", "down") else 0.02,
}


@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_scaling_on_the_wrong_matrix_names_both(name: str, tied: bool) -> None:
    recipe = Recipe(source="", std=SWAPS[name], shape=recipes.Shape(gated=True, tied=tied))
    wrong = {
        "0.02": {"up", "down"},
        "another s": {"up", "down"},
        "gate": {"gate", "down"},
        "attention": {"v", "o"},
    }
    report = audit(recipes.build(recipe))
    assert named(report) == {f"blocks.*.{role}.weight" for role in wrong[name]}
    looks = {f.evidence["looks"] for f in warnings_of(report)}
    assert looks == {
        "the scaling with depth is missing",
        "scaled with depth, and writes to no shortcut",
    }


def test_wrong_matrix_next_to_a_unit_embedding_is_named() -> None:
    def std(place: Place) -> float:
        return 1.0 if place.role == "embedding" else SWAPS["0.02"](place)

    recipe = Recipe(source="", std=std, shape=recipes.Shape(gated=True))
    assert named(audit(recipes.build(recipe))) == {"blocks.*.up.weight", "blocks.*.down.weight"}


def test_torchtitan_without_its_last_scaling_stays_torchtitan() -> None:
    def std(place: Place) -> float:
        return 0.02 if place.role == "down" else recipes.torchtitan(place)

    recipe = Recipe(source="", std=std, shape=recipes.Shape(gated=True))
    assert named(audit(recipes.build(recipe))) == {"blocks.*.down.weight"}


def one_layer_zero(model: Decoder) -> None:
    scale(model, 0.0, "2.o")


def queries_zero(model: Decoder) -> None:
    scale(model, 0.0, ".q")


def all_zero(model: Decoder) -> None:
    scale(model, 0.0, ".up", ".gate", ".down")


@pytest.mark.parametrize(
    ("change", "blamed"),
    [
        (one_layer_zero, {"blocks.*.o.weight"}),
        (queries_zero, {"blocks.*.q.weight"}),
        (all_zero, {"blocks.*.up.weight", "blocks.*.gate.weight", "blocks.*.down.weight"}),
    ],
)
def test_unintended_zero_weights_are_named(
    change: Callable[[Decoder], None], blamed: set[str]
) -> None:
    model = recipes.build(RECIPES["GPT-2, gated"], seed=2)
    change(model)
    assert named(audit(model)) == blamed


@pytest.mark.parametrize(
    ("name", "parameter", "std", "blamed"),
    [
        ("GPT-2, gated", "head", 0.072, True),  # left at the default of nn.Linear
        ("GPT-2, gated", "head", 0.0, False),
        ("GPT-2, gated", "embedding", 0.0, True),
        ("GPT-2, gated", "embedding", 1e-5, False),
        ("GPT-2", "positions", 1.0, True),  # left at the default of nn.Embedding
        ("GPT-2", "positions", 0.0, False),
        ("GPT-2", "embedding", 0.0004, True),  # the variance for the std
        ("torchtitan", "embedding", 0.02, True),
        ("torchtitan", "embedding", 1.0, False),
    ],
)
def test_tables_are_judged_where_one_agrees(
    name: str, parameter: str, std: float, blamed: bool
) -> None:
    model = recipes.build(RECIPES[name], seed=2)
    with torch.no_grad():
        model.get_parameter(f"{parameter}.weight").normal_(0, std)
    assert named(audit(model)) == ({f"{parameter}.weight"} if blamed else set())


def test_tables_that_agree_nowhere_are_not_judged() -> None:
    model = recipes.build(RECIPES["GPT-2"], seed=2)
    with torch.no_grad():
        model.embedding.weight.normal_(0, 0.3)
        model.positions.weight.normal_(0, 0.3)  # type: ignore[union-attr]
    assert named(audit(model)) <= {"embedding.weight"}
    assert all(f.code == "JD206" for f in warnings_of(audit(model)))


# -- the parts of a fused matrix -------------------------------------------------------------------
def fused(*stds: float, rows: int = 64, columns: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.cat([std * torch.randn(rows, columns, generator=generator) for std in stds])


def stds_of(tensor: Tensor, **options: Any) -> list[tuple[str, int, float]]:
    fan_out = options.pop("fan_out", tensor.shape[0])
    parts = sections_of(tensor, "W_QKV", fan_out, **options)
    return [(part.role, part.fan_out, round(2 * (part.std or 0.0)) / 2) for part in parts]


def test_parts_in_blocks_and_transposed() -> None:
    wanted = [("W_Q", 64, 1.0), ("W_K", 64, 2.0), ("W_V", 64, 4.0)]
    assert stds_of(fused(1, 2, 4)) == wanted
    assert stds_of(fused(1, 2, 4).T, fan_out=192) == wanted  # as GPT-2's Conv1D stores it


def test_fused_matrix_is_split_by_head() -> None:
    heads = torch.cat([fused(1, 2, 4, rows=8) for _ in range(8)])
    wanted = [("W_Q", 64, 1.0), ("W_K", 64, 2.0), ("W_V", 64, 4.0)]
    assert stds_of(heads) == wanted and stds_of(heads, head=8) == wanted


def test_parts_of_grouped_queries() -> None:
    blocks = torch.cat([fused(1), fused(2, 4, rows=16)])
    wanted = [("W_Q", 64, 1.0), ("W_K", 16, 2.0), ("W_V", 16, 4.0)]
    assert stds_of(blocks, heads_width=64) == wanted
    assert stds_of(blocks, heads_width=40) == []  # 28 keys do not share 40 queries
    assert stds_of(fused(1, 1, 1)[:191]) == []


def test_parts_of_one_std_are_taken_as_blocks() -> None:
    layouts = [
        stds_of(0.5 * torch.randn(192, 64, generator=torch.Generator().manual_seed(k)))
        for k in range(20)
    ]
    assert layouts == [[("W_Q", 64, 0.5), ("W_K", 64, 0.5), ("W_V", 64, 0.5)]] * 20


def test_a_fused_matrix_of_unknown_layout_is_not_judged_where_its_sections_differ() -> None:
    report = audit(recipes.build(RECIPES["DeepNorm, fused"]))
    assert report.contract is not None
    bare = [replace(weight, sections=[]) for weight in report.contract.weights]
    assert not judged(replace(report.contract, weights=bare)).deviations
    report = audit(recipes.build(RECIPES["GPT-2"]))
    assert report.contract is not None
    wrong = [
        replace(w, sections=[], std=1.0, lower=0.9, upper=1.1) if w.role == "W_QKV" else w
        for w in report.contract.weights
    ]
    found = judged(replace(report.contract, weights=wrong)).deviations
    assert {one.weight.role for one in found} == {"W_QKV"}


def test_sections_survive_json_and_older_reports_have_none() -> None:
    contract = audit(recipes.build(RECIPES["DeepNorm, fused"])).contract
    assert contract is not None
    data = contract.to_dict()
    assert ContractRecord.from_dict(data) == contract
    for weight in data["weights"]:
        del weight["sections"], weight["kind"]
    older = ContractRecord.from_dict(data)
    assert not any(weight.sections or weight.kind for weight in older.weights)
    assert not judged(older).deviations


def test_sinusoid_tables_are_recognized() -> None:
    table = recipes.sines(32, 16)
    assert is_sinusoid(table) and is_sinusoid(torch.cat([torch.zeros(1, 16), table]))
    assert not is_sinusoid(0.7 * torch.randn(32, 16)) and not is_sinusoid(torch.zeros(4, 4))


# -- what a scheme speaks of -----------------------------------------------------------------------
def record(
    role: str, shape: list[int], fan_in: int, fan_out: int, kind: str = "mlp"
) -> WeightRecord:
    return WeightRecord("w", shape, role, "w", fan_in=fan_in, fan_out=fan_out, kind=kind)


def test_projections_are_maps_of_their_own_sizes() -> None:
    linear = record("W_1", [48, 32], 32, 48)
    assert is_projection(linear) and is_projection(replace(linear, shape=[32, 48]))
    assert is_projection(replace(linear, shape=[4, 48, 32]))  # experts
    assert is_projection(replace(linear, shape=[48, 32, 1]))  # a convolution of one point
    assert is_projection(replace(linear, kind=""))  # a report from before the kind was kept
    assert not is_projection(replace(linear, kind="mixer"))
    assert not is_projection(record("W_gate", [48, 1, 4], 48, 48))  # depthwise
    assert not is_projection(record("W_gate", [48, 4], 5, 5))  # acts along the sequence
    assert not is_projection(record("W_QKV_a", [384, 64], 64, 384, "attention"))  # adaLN
    assert is_projection(record("W_KV_a", [16, 64], 64, 16, "attention"))  # a low rank
    by_head = record("W_V", [64, 4, 8], 8, 4, "attention")
    assert not is_projection(by_head, width=64)  # relative positions
    assert is_projection(replace(by_head, shape=[4, 64, 8], fan_in=64, fan_out=8), width=64)


def test_packed_matrix_read_in_slices_gets_the_sizes_of_the_whole() -> None:
    packed = whole_map(ParameterUse("W_KV", fan_in=64, fan_out=128), (384, 64))
    assert (packed.role, packed.fan_out) == ("W_QKV", 384)
    for use, shape in (
        (ParameterUse("W_1", fan_in=64, fan_out=64), (192, 64)),
        (ParameterUse("W_Q", fan_in=64, fan_out=64), (64, 64)),
        (ParameterUse("W_Q", fan_in=5, fan_out=5), (48, 4)),
    ):
        assert whole_map(use, shape) == use


def test_adapters_have_their_own_role() -> None:
    uses = dict.fromkeys(
        ("h.q.base_layer.weight", "h.q.hada_w1_a.default", "h.k.weight", "h.k.lora_A"),
        ParameterUse("W_Q"),
    )
    roles = {name: use.role for name, use in without_adapters(uses).items()}
    assert roles == {
        "h.q.base_layer.weight": "W_Q",
        "h.q.hada_w1_a.default": "adapter",
        "h.k.weight": "W_Q",
        "h.k.lora_A": "adapter",
    }
