"""JD201 to JD207 on real little models: what they find, whom they blame, and where they stay
silent.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import jacdiag
from benchmarks._families import CONFIGS, RECIPES, SCHEMES, Subject, family, recipe, written
from benchmarks.mutants import blamed, groups, judged, mutations
from jacdiag.errors import UsageError
from jacdiag.records import Finding
from jacdiag.rules import checked_contract

BUILDERS: dict[str, Any] = {
    **{f"transformers {n}": (family, n) for n in CONFIGS},
    **{f"recipe {n}": (recipe, n) for n in RECIPES},
    **{f"scheme {n}": (written, n) for n in SCHEMES},
}


def contract(subject: Subject, **options: Any) -> Any:
    return jacdiag.audit(subject.model, subject.probe, products=False, **options)


def findings(report: Any, code: str) -> list[Finding]:
    return [f for f in report.findings if f.code == code]


def status(report: Any, code: str) -> str:
    return next(r.status for r in report.rules if r.code == code)


def note(report: Any, code: str) -> str:
    return next(r.note for r in report.rules if r.code == code)


@torch.no_grad()
def scale(subject: Subject, factor: float, *names: str) -> None:
    for name in names:
        subject.model.get_parameter(name).mul_(factor)


# Another draw of the same init may show a false alarm, not another mistake of the code.
@pytest.mark.parametrize("seed", [100, pytest.param(101, marks=pytest.mark.long)])
@pytest.mark.parametrize("label", BUILDERS)
def test_unchanged_models_are_silent(label: str, seed: int) -> None:
    build, name = BUILDERS[label]
    assert not blamed(judged(build(name, seed)))


SLOW = [
    pytest.param(label, marks=pytest.mark.long)
    for label in ("transformers t5", "scheme torchtitan-depth")
]


@pytest.mark.parametrize("label", ["transformers gpt2", "recipe vanilla", *SLOW])
def test_mutants_are_found_and_located(label: str) -> None:
    build, name = BUILDERS[label]
    count = len(list(mutations(build(name, 0), name)))
    assert count >= 14
    for k in range(0, count, 2):
        subject = build(name, 500 + k)
        what, mutate = list(mutations(subject, name))[k]
        meant = mutate(subject)
        assert blamed(judged(subject)) == meant, what


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "GPT-2"),
        ("t5", "T5"),
        ("gemma", "Gemma"),
        ("llama", "llama"),
        ("opt", "opt"),
        ("olmo2", "olmo2"),
    ],
)
def test_init_scheme_of_transformers_families_is_named(name: str, words: str) -> None:
    report = contract(family(name, 0))
    assert status(report, "JD202") == "clean" and words in note(report, "JD202")
    assert status(report, "JD204") == "not-applicable"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchtitan-depth", "torchtitan, depth"),
        ("pytorch", "PyTorch"),
        ("small-init", "small init"),
        ("neox", "GPT-NeoX"),
        ("deepnorm", "DeepNorm"),
        ("own-depth", "s = 0.0130"),
    ],
)
def test_published_init_schemes_are_named(name: str, words: str) -> None:
    assert words in note(contract(written(name, 0)), "JD204")


def test_the_sentence_says_which_what_and_expected() -> None:
    subject = family("gpt2", 0)
    scale(subject, math.sqrt(8), *groups(subject)["transformer.h.*.mlp.c_proj.weight"])
    [one] = findings(contract(subject), "JD203")
    assert one.what.startswith("transformer.h.*.mlp.c_proj (4 of 4): std 0.0")
    assert "the published init of gpt2 expects initializer_range/sqrt(2*N) = 0.00707" in one.what
    assert one.what.endswith("the scaling with depth is missing")
    assert one.evidence["role"] == "W_2" and one.level == "warning"


@pytest.mark.parametrize(
    ("pattern", "factor", "looks"),
    [
        (
            "transformer.h.*.attn.c_proj.weight",
            1 / math.sqrt(8),
            "scaled with depth once too often",
        ),
        (
            "transformer.h.*.mlp.c_fc.weight",
            1 / math.sqrt(8),
            "scaled with depth, and writes to no shortcut",
        ),
        ("transformer.h.*.mlp.c_fc.weight", 0.02, "about the square of that"),
    ],
)
def test_scaled_gpt2_weights_are_named_with_their_mistake(
    pattern: str, factor: float, looks: str
) -> None:
    subject = family("gpt2", 3)
    scale(subject, factor, *groups(subject)[pattern])
    found = [f for f in contract(subject).findings if f.code.startswith("JD2")]
    assert [f.evidence["looks"] for f in found] == [looks]


def test_one_layer_is_another_rule() -> None:
    subject = family("llama", 0)
    scale(subject, 1.5, "model.layers.2.mlp.up_proj.weight")
    report = contract(subject)
    [one] = findings(report, "JD205")
    assert "(1 of 4, in layer 2)" in one.what and not findings(report, "JD202")
    assert one.where == ["model.layers.2.mlp"]


def test_a_gain_that_is_not_one() -> None:
    subject = family("llama", 0)
    scale(subject, 0.5, "model.norm.weight")
    [one] = findings(contract(subject), "JD202")
    assert one.evidence["parameters"] == ["model.norm.weight"] and "value 0.5" in one.what


def test_a_matrix_of_zeros() -> None:
    subject = written("small-init", 0)
    scale(subject, 0.0, *groups(subject)["model.layers.*.self_attn.q_proj.weight"])
    [one] = findings(contract(subject), "JD204")
    assert one.evidence["looks"] == "all of it is zero" and one.evidence["role"] == "W_Q"


def test_no_scheme_no_blame_but_layers_are_compared() -> None:
    subject = written("small-init", 0)
    stds = iter((0.011, 0.052, 0.23, 0.0071, 0.19, 0.47, 0.031))
    for members in groups(subject).values():
        std = next(stds)
        for layer, name in enumerate(members):
            subject.model.get_parameter(name).data.normal_(0, std * (layer + 1) ** 0.5)
    report = contract(subject)
    assert not blamed(report) and "no known scheme" in note(report, "JD205")
    scale(subject, 1.6, "model.layers.1.mlp.down_proj.weight")
    assert blamed(contract(subject)) == {"model.layers.1.mlp.down_proj.weight"}


# -- pinned ----------------------------------------------------------------------------------------
def test_a_pinned_contract_is_an_error() -> None:
    subject = recipe("gpt2", 0)
    held = contract(
        subject, contract={"matrix": "0.02", "W_O": "0.02/sqrt(2*N)", "W_2": "0.02/sqrt(2*N)"}
    )
    assert status(held, "JD201") == "clean"
    broken = contract(subject, contract={"matrix": 0.02, "norm_gain": 1})
    assert {f.evidence["role"] for f in findings(broken, "JD201")} == {"W_O", "W_2"}
    assert all(f.level == "error" for f in findings(broken, "JD201")) and broken.verdict == "fail"


def test_pinned_by_name_and_by_layer() -> None:
    subject = written("torchtitan-depth", 0)
    pinned = {"W_O": "0.02/sqrt(2*(l+1))", "model.layers.*.mlp.gate_proj.weight": "0.03"}
    report = contract(subject, contract=pinned)
    assert {f.evidence["pattern"] for f in findings(report, "JD201")} == {
        "model.layers.*.mlp.gate_proj.weight"
    }


def test_a_role_that_matches_nothing_is_not_applicable() -> None:
    report = contract(recipe("gpt2", 0), contract={"router": "0.02"})
    assert status(report, "JD201") == "not-applicable" and "router" in note(report, "JD201")


@pytest.mark.parametrize(
    ("pinned", "message"),
    [
        ({"W_0": "0.02"}, "no role 'W_0'"),
        ({"W_O": "0.02/n"}, "uses 'n'"),
        ({"W_O": "0.02/"}, "cannot be read"),
        ({"W_O": [1]}, "takes a formula"),
        ({"W_O": True}, "takes a formula"),
        ({"embed": "1"}, "no role"),
    ],
)
def test_contracts_that_are_none(pinned: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked_contract(pinned)


# -- tied, decayed, trained ------------------------------------------------------------------------
def test_an_embedding_scaled_up_and_tied() -> None:
    subject = family("gpt2", 0)
    assert status(contract(subject), "JD206") == "clean"
    scale(subject, 50.0, "transformer.wte.weight")
    [one] = findings(contract(subject), "JD206")
    # std 1, d 64: logits of std sqrt(64)
    assert one.evidence["value"] == pytest.approx(8.0, rel=0.2)
    assert status(contract(family("llama", 0)), "JD206") == "not-applicable"


def test_scaling_in_the_forward_is_no_fault() -> None:
    for subject in (recipe("scaled-embed", 0), family("gemma", 0), family("t5", 0)):
        assert status(contract(subject), "JD206") == "clean"


def test_jd207_names_parameters_that_should_have_no_weight_decay() -> None:
    subject = family("gpt2", 0)
    model = subject.model
    assert status(contract(subject), "JD207") == "not-applicable"
    everything = contract(
        subject, optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    )
    found = {f.evidence["role"]: f.level for f in findings(everything, "JD207")}
    assert found == {"embedding": "warning", "norm_gain": "warning", "bias": "info"}
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "wte" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() < 2 or "wte" in n]
    good = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    assert status(contract(subject, optimizer=good), "JD207") == "clean"


def test_a_trained_model_is_not_judged() -> None:
    report = contract(family("gpt2", 0), state="trained")
    assert {status(report, f"JD20{k}") for k in range(1, 7)} == {"not-applicable"}


def test_the_report_survives_json() -> None:
    report = contract(recipe("vanilla", 0), contract={"W_O": "0.01"})
    again = jacdiag.Report.from_json(report.to_json())
    assert again.contract == report.contract and again.findings == report.findings
