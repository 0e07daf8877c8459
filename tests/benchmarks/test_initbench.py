"""The catalogue of InitBench is complete, and its judge counts what it should."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.initbench.catalogue import BUGS, RECIPES, SOURCES, Bug, Recipe, load_cases
from benchmarks.initbench.draws import leftover, names_of
from benchmarks.initbench.judge import Remark, blaming, judge_bug, locate, tensors_named

load_cases()
TABLE = tomllib.loads(SOURCES.read_text(encoding="utf-8"))
TRACKER = ("/issues/", "/pull/")


def build(case: Bug, fixed: bool) -> nn.Module:
    """Return a model of a pair, drawn from the same seed as its partner."""
    torch.manual_seed(0)
    return case.build(fixed)


def output_of(model: nn.Module, probe: Any) -> torch.Tensor:
    """Return the output of a model for a probe."""
    inputs = probe()
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)


# -- the catalogue ----------
def test_there_are_at_least_sixty_of_each() -> None:
    assert len(BUGS) >= 60
    assert len(RECIPES) >= 60


def test_every_source_belongs_to_a_case() -> None:
    assert set(TABLE["bugs"]) == set(BUGS)
    assert set(TABLE["recipes"]) == set(RECIPES)


def test_every_bug_names_an_issue_or_a_pull_request_of_its_own() -> None:
    addresses = [case.source.url for case in BUGS.values()]
    assert all(any(part in address for part in TRACKER) for address in addresses)
    assert len(set(addresses)) == len(addresses)


def test_what_does_not_count_has_a_reason_and_is_not_counted() -> None:
    counted = {case.source.url for case in BUGS.values()}
    for name, entry in TABLE["undecidable"].items():
        assert entry["why"], name
        assert entry["url"] not in counted, name


@pytest.mark.parametrize("case", BUGS.values(), ids=BUGS.keys())
def test_a_pair_differs_in_a_tensor_that_it_blames(case: Bug) -> None:
    broken, mended = build(case, False), build(case, True)
    assert case.build.__doc__
    assert output_of(mended, case.probe).isfinite().all()
    before = {**dict(broken.named_parameters()), **dict(broken.named_buffers())}
    after = {**dict(mended.named_parameters()), **dict(mended.named_buffers())}
    differing = {
        name for name in before if name not in after or not torch.equal(before[name], after[name])
    }
    targets = {name for pattern in case.blames for name in names_of(broken, pattern)}

    # A factor on the wrong operand changes what is computed and no tensor; a detach or a config not
    # even that.
    if case.kind in ("factor on the wrong operand", "gradient cut off", "tie denied"):
        is_equal = torch.equal(output_of(broken, case.probe), output_of(mended, case.probe))
        assert not differing
        assert is_equal is (case.kind != "factor on the wrong operand")
        return
    assert targets & differing


@pytest.mark.parametrize("case", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_builds_a_finite_model(case: Recipe) -> None:
    torch.manual_seed(0)
    assert output_of(case.build(), case.probe).isfinite().all()


def test_leftover_memory_is_zeros_and_addresses() -> None:
    tensor = torch.empty(1000)
    leftover(0)(tensor)
    assert (tensor == 0).float().mean() > 0.3
    assert tensor.abs().max() < 1e-20
    words = tensor.view(torch.int64)
    assert set((words[words != 0] >> 40).tolist()) == {0x7F}


# -- the judge ----------
def remark(*named: str, code: str = "JD204") -> Remark:
    """Return a finding that names these."""
    return Remark(code=code, named=named, what="")


@pytest.fixture
def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.LayerNorm(2))


def test_located_needs_every_tensor_and_no_other(two_layers: nn.Module) -> None:
    answers = [(r"[01]\.weight",)]
    assert locate(two_layers, [remark("0.weight", "1.weight")], answers, ())[0]
    assert locate(two_layers, [remark("0.weight"), remark("1")], answers, ())[0]
    assert locate(two_layers, [remark("0.weight")], answers, ()) == (False, ["1.weight"], [])
    wrong = [remark("0.weight", "1.weight", "2.weight")]
    assert locate(two_layers, wrong, answers, ()) == (False, [], ["2.weight"])
    assert locate(two_layers, wrong, answers, (r"^2\.",))[0]


def test_an_answer_that_explains_the_weights_as_well_counts(two_layers: nn.Module) -> None:
    answers = [(r"0\.weight",), (r"1\.weight",)]
    assert locate(two_layers, [remark("1.weight")], answers, ())[0]
    assert not locate(two_layers, [remark("0.weight", "1.weight")], answers, ())[0]


def test_nothing_said_is_not_located(two_layers: nn.Module) -> None:
    assert not locate(two_layers, [], [(r"0\.weight",)], ())[0]
    assert not locate(two_layers, [], [()], ())[0]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("0.weight", {"0.weight"}),
        ("0", {"0.weight"}),
        ("*.weight", {"0.weight", "1.weight"}),
        ("2", set()),
        ("2.weight", set()),
        ("10", set()),
    ],
)
def test_a_name_stands_for_a_tensor_or_its_module(
    two_layers: nn.Module, name: str, named: set[str]
) -> None:
    assert tensors_named(two_layers, name, {"0.weight", "1.weight"}, ()) == named


def test_an_outer_module_counts_if_all_of_it_is_wrong() -> None:
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))])}
    )
    weights = {"blocks.0.0.weight", "blocks.0.1.weight"}
    every = weights | {"blocks.0.0.bias", "blocks.0.1.bias"}
    assert tensors_named(model, "blocks.0", every, ()) == every
    assert tensors_named(model, "blocks.0", weights, (r"bias",)) == weights
    assert tensors_named(model, "blocks.0", weights, ()) == set()


def test_conditions_on_norms_and_incomplete_audits_blame_no_init() -> None:
    apart = [remark(code=code) for code in ("JD101", "JD102", "JD103", "JD901", "JD902", "JD904")]
    assert blaming([*apart, remark(code="JD301"), remark()]) == [remark(code="JD301"), remark()]


def test_a_pair_is_judged_from_end_to_end() -> None:
    outcome = judge_bug(BUGS["gpt2_depth_scaling_never_applied"])
    assert outcome.found
    assert outcome.located
    assert not outcome.alarms
