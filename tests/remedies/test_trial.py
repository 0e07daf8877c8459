"""Remedies on real little models: which is recommended, that it holds on seeds it was not tried on,
what is said.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import jacdiag
from benchmarks.initbench.catalogue import tokens
from benchmarks.initbench.decoders import Llama
from benchmarks.initbench.draws import draw, normal, ones, zeros
from jacdiag.errors import UsageError
from jacdiag.gate import gate, write_baseline
from jacdiag.records import FiguresRecord, Finding, RemedyRecord, Report
from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.remedies import Remedy, sufficient
from jacdiag.remedies.changes import Scale, Weights
from jacdiag.rules.risk_curves import risk_toml
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 128, "block_size": 32}
DEEPER = {**SIZES, "n_layer": 3}  # where a figure of depth decides
PROBE: dict[str, Any] = {"batch": 1, "seq": 16, "decide": True}
NEW = 77  # a seed that no remedy was tried on


def sizes_of(recipe: str) -> dict[str, int]:
    """Return two layers, or three for the recipe whose sub-layers are too large for its depth."""
    return DEEPER if recipe == "xavier" else SIZES


def audited(recipe: str, **options: Any) -> Report:
    arguments = {"recipe": recipe, **sizes_of(recipe)}
    given = {"model_args": arguments, "remedies": "first", **PROBE, **options}
    return jacdiag.audit("jacdiag.sources.gpt:build", **given)


def best(report: Report) -> RemedyRecord:
    (found,) = [r for r in report.remedies if r.recommended]
    return found


def fresh(recipe: str, seed: int = NEW) -> gpt.GPT:
    with seeded(seed):
        return gpt.build(recipe, **sizes_of(recipe))


def loud(report: Report) -> list[str]:
    return sorted({f.code for f in report.findings if f.level != "info"})


def patched(model: nn.Module, remedy: RemedyRecord) -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(remedy.patches["pytorch"], namespace)
    with seeded(NEW):
        namespace["remedy"](model)
    return model


# -- the paper's recipes ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("recipe", "name", "codes"),
    [
        ("vanilla", "scaled-embed", ["JD102", "JD103"]),
        # Its embedding is drawn as in "vanilla", and so is the remedy.
        pytest.param("embed-detach", "scaled-embed", ["JD102", "JD103"], marks=pytest.mark.long),
        pytest.param(
            "xavier",
            "unit-embed + depth-scaling",
            ["JD101", "JD102", "JD103"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_patch_makes_a_failing_recipe_pass_on_a_new_seed(
    recipe: str, name: str, codes: list[str]
) -> None:
    report = audited(recipe)
    remedy = best(report)
    assert (
        remedy.name == name
        and remedy.codes == codes
        and remedy.seeds == ([0, 1, 2] if recipe == "xavier" else [0, 1])
        and remedy.sufficient
    )
    assert remedy.before.fired == codes and remedy.after.fired == [] == remedy.after.undecided
    assert loud(jacdiag.audit(fresh(recipe), **PROBE)) == codes
    after = jacdiag.audit(patched(fresh(recipe), remedy), **PROBE)
    assert after.verdict == "pass" and not loud(after)
    fixes = {(f.fix, f.verified) for f in report.findings if f.level != "info"}
    assert fixes == {(remedy.title, True)}


@pytest.mark.parametrize("recipe", ["scaled-embed", "embed-ln"])
def test_nothing_is_tried_on_a_clean_model(recipe: str) -> None:
    assert audited(recipe).remedies == []


def test_all_are_tried_the_smallest_first_and_one_is_recommended() -> None:
    report = audited("vanilla", remedies="all")
    names = [r.name for r in report.remedies]
    assert names[:3] == ["scaled-embed", "unit-embed", "embed-ln"]
    assert [r.name for r in report.remedies if r.recommended] == ["scaled-embed"]
    insufficient = {r.name: r for r in report.remedies}["small-init"]
    assert not insufficient.sufficient and "JD102" in insufficient.after.fired
    assert "std-1-embed" not in names, "the head reads the table too"
    assert Report.from_dict(report.to_dict()).remedies == report.remedies


def test_the_model_and_the_generator_stay_as_they_were() -> None:
    model = fresh("vanilla")
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    report = jacdiag.audit(model, remedies="first", **PROBE)
    assert best(report).seeds == [0], "a module in memory has one set of weights"
    assert torch.equal(torch.get_rng_state(), state)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


# -- the init contract -----------------------------------------------------------------------------
class Broken(gpt.GPT):
    """GPT-2's init, with one thing wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__(gpt.GPTConfig(**{**SIZES, "n_layer": 6}))
        weights = dict(self.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if fault == "unscaled" and name.endswith("mlp.c_proj.weight"):
                    weight.normal_(0, 0.02)
                if fault == "one layer" and name == "transformer.h.3.attn.c_attn.weight":
                    weight.mul_(2.0)
                if fault == "gain" and name == "transformer.h.2.ln_1.weight":
                    weight.fill_(0.5)


@pytest.mark.parametrize(
    ("fault", "code", "title"),
    [
        ("unscaled", "JD203", "initialise transformer.h.*.mlp.c_proj with 0.02/sqrt(2*N)"),
        ("one layer", "JD205", "initialise transformer.h.*.attn.c_attn with 0.02"),
        ("gain", "JD201", "initialise transformer.h.*.ln_1 with 1"),
    ],
)
def test_remedy_changes_only_the_weights_that_break_the_contract(
    fault: str, code: str, title: str
) -> None:
    with seeded(5):
        model = Broken(fault)
    options: dict[str, Any] = {**PROBE, "products": False, "select": ["JD2"], "state": "init"}
    options |= {"contract": {"norm_gain": 1}} if fault == "gain" else {}
    report = jacdiag.audit(model, remedies="first", **options)
    assert loud(report) == [code]
    remedy = best(report)
    assert remedy.name == "contract" and title in remedy.title
    with seeded(6):
        other = Broken(fault)
    untouched = {n: p.clone() for n, p in other.named_parameters()}
    patched(other, remedy)
    changed = {n for n, p in other.named_parameters() if not torch.equal(p, untouched[n])}
    assert changed == set(next(f for f in report.findings if f.code == code).evidence["parameters"])
    assert not loud(jacdiag.audit(other, **options))


def test_a_tied_table_is_scaled_in_the_forward() -> None:
    model = fresh("gpt2")
    with torch.no_grad():
        model.transformer["wte"].weight.mul_(50.0)  # std 1, and the head's too
    options: dict[str, Any] = {**PROBE, "select": ["JD206"]}
    report = jacdiag.audit(model, remedies="first", **options)
    assert loud(report) == ["JD206"] and best(report).name == "forward-scale"
    ids = torch.arange(16)[None]
    table = model.transformer["wte"](ids)
    other = patched(model, best(report))
    assert torch.allclose(model.transformer["wte"](ids), table, rtol=1e-4), (
        "the stream begins as it did"
    )
    assert float(other(ids).detach().std()) == pytest.approx(1.0, rel=0.2)
    assert not loud(jacdiag.audit(other, **options))


def test_weight_decay_is_taken_off_by_groups() -> None:
    model = fresh("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    options: dict[str, Any] = {**PROBE, "select": ["JD207"]}
    report = jacdiag.audit(model, optimizer=optimizer, remedies="first", **options)
    assert loud(report) == ["JD207"] and best(report).name == "no-decay"
    namespace: dict[str, Any] = {}
    exec(best(report).patches["pytorch"], namespace)
    groups = namespace["remedy"](model)
    assert not loud(
        jacdiag.audit(model, optimizer=torch.optim.AdamW(groups, weight_decay=0.1), **options)
    )


# -- the baseline ----------------------------------------------------------------------------------
GATED: dict[str, Any] = {"batch": 1, "seq": 16, "tol": 0.3}


def baseline(path: Path) -> Path:
    args = {"recipe": "scaled-embed", **DEEPER}
    write_baseline(
        path,
        gate("jacdiag.sources.gpt:build", seeds=3, decide=False, model_args=args, **GATED).figures,
    )
    return path


class Drifted(gpt.GPT):
    """scaled-embed as a change has left it: W_2 half as large again, one bias not zero."""

    def __init__(self) -> None:
        super().__init__(gpt.GPTConfig(**DEEPER, embed_scale=math.sqrt(DEEPER["n_embd"])))
        gpt.initialise(self, gpt.vanilla_std)
        for layer in self.transformer["h"]:
            layer.mlp.c_proj.weight.data.mul_(1.5)
        self.transformer["h"][1].mlp.c_proj.bias.data.fill_(0.1)


@pytest.mark.long
def test_weights_that_left_the_baseline_are_drawn_as_they_were(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **GATED,
        "seeds": 1,
        "baseline": baseline(tmp_path / "b.json"),
        "select": ["JD110"],
    }
    out = gate(Drifted, seed=5, remedies="first", **options)
    remedy = best(out.report)
    assert remedy.name == "baseline" and remedy.codes == ["JD110"] and remedy.after.fired == []
    assert remedy.title == (
        "initialise transformer.h.*.mlp.c_proj, transformer.h.*.mlp.c_proj.bias as in the baseline"
    )
    assert {(f.fix, f.verified) for f in out.report.findings if f.code == "JD110"} == {
        (remedy.title, True)
    }

    def mended() -> nn.Module:
        return patched(Drifted(), remedy)

    assert (
        gate(Drifted, seed=6, **options).exit_code == 1
        and gate(mended, seed=6, **options).exit_code == 0
    )


def test_forward_that_left_the_baseline_is_repaired_by_a_recipe(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {
        **GATED,
        "seeds": 1,
        "baseline": baseline(tmp_path / "b.json"),
        "select": ["JD110"],
    }
    args = {"recipe": "vanilla", **DEEPER}  # the same weights; the embedding is no longer scaled
    out = gate("jacdiag.sources.gpt:build", seed=5, model_args=args, remedies="first", **options)
    assert [(f.evidence["field"], f.evidence["seeds"]) for f in out.report.findings] == [
        ("branch_norm", [0]),
        ("norm_gain", [0]),
    ]
    assert best(out.report).name == "scaled-embed" and best(out.report).seeds == [5, 6, 7]


# -- where a run has begun -------------------------------------------------------------------------
def test_remedy_for_a_trained_model_keeps_its_function() -> None:
    model = fresh("xavier")
    report = jacdiag.audit(model, remedies="begun", state="trained", **PROBE)
    found = {r.name: r for r in report.remedies}
    assert list(found) == ["reparametrise", "learned-scale", "branch-scale"]
    for name in ("reparametrise", "learned-scale"):
        assert found[name].keeps_function and found[name].function_change == 0.0, "to the last bit"
        assert found[name].after.branch_norm == pytest.approx(
            found[name].before.branch_norm, rel=1e-3
        )
    fixed = found["branch-scale"]
    assert not fixed.keeps_function and fixed.function_change is None
    assert fixed.after.branch_norm[1] < fixed.before.branch_norm[1]  # type: ignore[index]
    assert not any(r.recommended for r in report.remedies), (
        "on a trained model these are observations"
    )


# -- what cannot be tried --------------------------------------------------------------------------
class NotCopied(gpt.GPT):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("this model holds a socket")


def test_a_model_that_cannot_be_copied_is_said_so() -> None:
    with seeded(1):
        model = NotCopied(gpt.GPTConfig(**SIZES))
        gpt.initialise(model, gpt.vanilla_std)
    report = jacdiag.audit(model, remedies="first", **PROBE)
    assert report.remedies == [] and loud(report) == ["JD102", "JD103"]
    assert "scaled-embed could not be tried: TypeError: this model holds a socket" in report.notes
    assert not any(f.verified for f in report.findings)


class Raw(nn.Module):
    """The table is a bare parameter: no module's output is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(64, 32))
        self.layer = nn.TransformerEncoderLayer(
            32, 2, 64, norm_first=True, batch_first=True, dropout=0.0
        )
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layer(torch.nn.functional.embedding(ids, self.table)))
        return out


def test_bare_embedding_parameter_is_redrawn() -> None:
    with seeded(1):
        model = Raw()
    report = jacdiag.audit(
        model, torch.arange(16)[None], remedies="all", state="init", select=["JD102"], decide=True
    )
    names = [r.name for r in report.remedies]
    assert "std-1-embed" in names and not {"scaled-embed", "embed-ln"} & set(names)
    assert best(report).name == "std-1-embed" and best(report).after.norm_gain == pytest.approx(
        1.0, rel=0.4
    )


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown way of trying remedies"):
        audited("vanilla", remedies="some")


def test_enough_means_nothing_left_and_nothing_new() -> None:
    base = audited("vanilla", remedies="none")
    remedy = Remedy("x", "X", (Scale(Weights(("w",)), 2.0, "2"),), "", 1.0)
    clean = dataclasses.replace(base, findings=[], rules=[])
    new = Finding("JD901", "warning", [], "something else")
    own = Finding("JD204", "warning", [], "the remedy's own", {"parameters": ["w"]})
    foreign = Finding("JD204", "warning", [], "another weight", {"parameters": ["v", "w"]})
    remark = Finding("JD102", "info", [], "partly")
    for findings, enough in (
        ([], True),
        ([new], False),
        ([own], True),
        ([foreign], False),
        ([remark], True),
    ):
        assert sufficient(base, dataclasses.replace(clean, findings=findings), remedy) is enough
    assert not sufficient(clean, clean, remedy), "nothing was asked for"


def test_the_product_over_depth_counts_only_where_it_is_known() -> None:
    """JD104 stays silent where a norm was left undecided: that is no proof that the product came
    down.
    """
    base = audited("vanilla", remedies="none", decide=False, tol=0.3)
    assert base.network is not None and base.network.gain_product_log is not None
    loud_product = Finding("JD104", "warning", [], "beyond a cut of the user")
    before = dataclasses.replace(base, findings=[loud_product], rules=[])
    after = dataclasses.replace(base, findings=[], rules=[])
    unknown = dataclasses.replace(
        after, network=dataclasses.replace(base.network, gain_product_log=None)
    )
    remedy = Remedy("x", "X", (Scale(Weights(("w",)), 2.0, "2"),), "", 1.0)
    assert sufficient(before, after, remedy) and not sufficient(before, unknown, remedy)


def test_a_product_beyond_a_cut_of_the_user_gets_a_remedy() -> None:
    report = audited(
        "vanilla",
        model_args={"recipe": "vanilla", **DEEPER},
        decide=False,
        tol=0.3,
        thresholds={"gain_product": {"info": 3, "warning": 6}},
        select=["JD104"],
    )
    assert (
        loud(report) == ["JD104"]
        and best(report).codes == ["JD104"]
        and best(report).after.fired == []
    )


# -- the chance at a learning rate -----------------------------------------------------------------
@pytest.mark.parametrize("least", [0.01, pytest.param(3.0, marks=pytest.mark.long)])
def test_a_chance_calls_for_a_remedy_and_counts_only_where_it_is_given(
    tmp_path: Path, least: float
) -> None:
    """Of a figure that the curve does not know after the change, nothing is claimed."""
    ranges = {"figure": [least, 100.0], "lr": [1e-3, 1.0]}
    curve = RiskCurve(
        "pre", "worst branch norm", [-3.0, 3.0, 0.0], [[0.0] * 3] * 3, ranges, 10, 5, "made up"
    )
    path = tmp_path / "risk.toml"
    path.write_text(risk_toml(RiskTable({"pre": curve})), encoding="utf-8")
    report = audited("vanilla", decide=False, lr=0.1, risk=str(path), select=["JD105"], tol=0.3)
    assert report.risk is not None and report.risk.chance is not None and report.risk.chance > 0.5
    assert loud(report) == ["JD105"] and report.remedies[0].codes == ["JD105"]
    if least == 3.0:
        assert not any(r.sufficient for r in report.remedies)
    else:
        assert best(report).name == "scaled-embed" and best(report).after.fired == []


# -- memory ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "tried"), [(0.9, False), (1.1, True)])
def test_a_copy_is_made_only_if_memory_is_free(
    share: float, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(p.numel() * p.element_size() for p in fresh("vanilla").parameters())
    needed = 1.5 * size  # a copy, and the work on it
    monkeypatch.setattr(
        "jacdiag.pipeline.with_remedies.free_host_memory", lambda: int(share * needed)
    )
    report = audited("vanilla")
    said = [note for note in report.notes if "GB of memory" in note]
    assert bool(report.remedies) == tried
    if tried:
        assert not said
    else:
        (note,) = said
        assert (
            f"needs {needed / 1e9:.2g} GB of memory, {int(share * needed) / 1e9:.2g} GB are free"
            in note
        )


# -- a baseline that was accepted with warnings ----------------------------------------------------
def test_a_restored_baseline_is_enough_though_an_accepted_warning_stays() -> None:
    base = jacdiag.audit(fresh("xavier"), products=False, **PROBE)
    regression = Finding("JD110", "error", [], "", {})
    accepted = Finding("JD102", "warning", [], "", {})
    known = FiguresRecord("GPT", 1, 2, 16, 1)
    before = dataclasses.replace(
        base, findings=[regression, accepted], figures=known, baseline=known
    )
    after = dataclasses.replace(before, findings=[accepted])
    restored = Remedy("baseline", "", (), "", 0.4, restores_baseline=True)
    recipe = Remedy("small-init", "", (), "", 5.0)
    assert sufficient(before, after, restored)
    assert not sufficient(before, after, recipe), "a recipe is to end every warning"

    # Not if the difference stays, nor if something new fires.
    new = Finding("JD304", "warning", [], "", {})
    for findings in ([regression], [accepted, new]):
        assert not sufficient(before, dataclasses.replace(before, findings=findings), restored)


# -- what a trial leaves out -----------------------------------------------------------------------
def test_a_trial_measures_what_the_only_rule_about_norms_reads() -> None:
    """Of a model without norms, JD104 alone judges norms. JD904 is not left over by a remedy."""
    with seeded(0):
        model = Llama(layers=3, width=64)
        rules = (("norm", ones), ("embed", normal(1.0)), ("o_proj|down_proj", zeros))
        draw(model, *rules, ("weight", normal(0.02)))
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Identity())
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight.mul_(3)

    report = jacdiag.audit(model, tokens(), state="init", remedies="first")
    assert loud(report) == ["JD205"]
    assert {rule.code: rule.status for rule in report.rules}["JD904"] == "clean"
    assert best(report).after.fired == [] and best(report).after.verdict == "pass"
