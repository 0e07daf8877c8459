"""Further seeds of a remedy: what is measured of them, and what they are judged by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import jacdiag
from jacdiag.comparison.seed_spread import figures_of
from jacdiag.pipeline import with_remedies
from jacdiag.pipeline.request import Request
from jacdiag.records import Finding, Report
from jacdiag.remedies import trial
from jacdiag.rules.thresholds import Limits, Thresholds, load_thresholds
from jacdiag.sources import gpt
from jacdiag.trace.tracer import Tracer

SOURCE = "jacdiag.sources.gpt:build"
SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 128, "block_size": 32}
OPTIONS: dict[str, Any] = {"batch": 2, "seq": 16, "decide": True, "remedies": "first"}


def tried(
    monkeypatch: pytest.MonkeyPatch, source: str = SOURCE, **options: Any
) -> tuple[Report, list[Report]]:
    """Audit a model that asks for remedies; return its report and those of further seeds."""
    reports: list[Report] = []
    confirm = with_remedies._Trial.confirm

    def noting(*arguments: Any) -> Report:
        reports.append(confirm(*arguments))
        return reports[-1]

    monkeypatch.setattr(with_remedies._Trial, "confirm", noting)
    if source == SOURCE:
        options["model_args"] = {"recipe": "vanilla", **SIZES}
    return jacdiag.audit(source, **OPTIONS | options), reports


def first_trials(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """Return a list that gets the reports on the seed of the audit, of one sequence and of all."""
    reports: list[Report] = []
    on_one, on_all = with_remedies._Trial.audit_on_one_sequence, with_remedies._Trial.audit

    def noting_one(*arguments: Any) -> Report | None:
        report = on_one(*arguments)
        if report is not None:
            reports.append(report)
        return report

    def noting_all(*arguments: Any) -> tuple[Report, Any]:
        report, output = on_all(*arguments)
        reports.append(report)
        return report, output

    monkeypatch.setattr(with_remedies._Trial, "audit_on_one_sequence", noting_one)
    monkeypatch.setattr(with_remedies._Trial, "audit", noting_all)
    return reports


def sequences_of(reports: list[Report]) -> list[int | None]:
    return [report.probe.batch for report in reports if report.probe is not None]


def recommended(report: Report) -> list[tuple[str, list[int]]]:
    return [(remedy.name, remedy.seeds) for remedy in report.remedies if remedy.recommended]


def spent(reports: list[Report]) -> int:
    return sum(report.cost.products or 0 for report in reports if report.cost is not None)


def test_only_what_the_rules_read_is_measured_of_further_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, further = tried(monkeypatch)
    assert recommended(report) == [("scaled-embed", [0, 1])] and further
    for of_seed in further[-1:]:
        assert {rule.code for rule in of_seed.rules} == {"JD102", "JD103"}
        assert of_seed.probe is not None and of_seed.probe.batch == 1
        assert of_seed.contract is None and of_seed.network is not None
        assert of_seed.network.gradient_norms is None
        for row in of_seed.sublayers:
            assert row.branch_norm is not None and row.branch_norm.upper < 2.35
            assert row.residual_norm is None and row.bound is None and not row.weights


@pytest.mark.parametrize(("factor", "seeds"), [(1.01, [0, 1]), (0.99, [0, 1, 2])])
def test_another_seed_follows_where_a_figure_comes_near_a_cut(
    monkeypatch: pytest.MonkeyPatch, factor: float, seeds: list[int]
) -> None:
    _, further = tried(monkeypatch)
    gains = [row.norm_gain.per_token.p99 for row in further[-1].sublayers]
    cut = factor * with_remedies._CLEAR * max(gains)
    report, _ = tried(monkeypatch, thresholds={"norm_gain": {"info": 0.5 * cut, "warning": cut}})
    assert recommended(report) == [("scaled-embed", seeds)]


def test_another_seed_follows_where_the_distance_from_a_cut_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, _ = tried(monkeypatch, profile="paper")
    assert [remedy.seeds for remedy in report.remedies if remedy.sufficient] == [[0, 1, 2]]


@pytest.mark.parametrize("last", [0, 1])
def test_a_remedy_that_fails_on_a_further_seed_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """The first further seed, or the second where that one comes near a cut."""
    changed = trial._changed

    def only_on_the_first(model: nn.Module, remedy: Any, seed: int) -> nn.Module:
        return changed(model, remedy, seed) if seed <= last else model

    monkeypatch.setattr(trial, "_changed", only_on_the_first)
    if last == 1:
        monkeypatch.setattr(with_remedies, "_CLEAR", 1000.0)
    report, further = tried(monkeypatch)
    assert not any(remedy.sufficient for remedy in report.remedies)
    assert {finding.code for finding in further[-1].findings} >= {"JD102", "JD103"}


def test_infos_need_no_products_unless_a_profile_makes_warnings_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, further = tried(monkeypatch)
    cuts = further[-1].settings["thresholds"]["branch_norm"]
    assert cuts["info"] == pytest.approx(cuts["warning"] / with_remedies._CLEAR)
    fewer = spent(further)
    with monkeypatch.context() as patched:
        patched.setattr(Thresholds, "with_infos_below_warnings", lambda self, _: load_thresholds())
        _, further = tried(monkeypatch)
    assert fewer < spent(further)
    _, further = tried(monkeypatch, profile="paper")
    assert "info" in further[-1].settings["thresholds"]["branch_norm"]


def test_infos_of_branches_are_left_open_in_the_first_trial_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They decide neither a condition nor a verdict, unless a profile makes warnings of them."""
    reports = first_trials(monkeypatch)
    report, _ = tried(monkeypatch)
    cuts = reports[-1].settings["thresholds"]
    assert "info" not in cuts["branch_norm"] and "info" in cuts["norm_gain"]
    assert report.remedies[-1].sufficient and not report.remedies[-1].after.undecided
    assert report.remedies[-1].after.large_shortcut == "met"

    tried(monkeypatch, profile="paper")
    assert "info" in reports[-1].settings["thresholds"]["branch_norm"]


def test_the_cuts_of_warnings_are_those_of_the_table() -> None:
    table, warnings = load_thresholds(), load_thresholds().of_warnings()
    for key, limits in table.table.items():
        assert warnings.table[key].warning == limits.warning
        assert warnings.table[key].info is None


def test_an_info_can_say_that_a_figure_comes_near_a_warning() -> None:
    near = load_thresholds().with_infos_below_warnings(2.0)
    for key, limits in load_thresholds().table.items():
        info = None if limits.warning is None else limits.warning / 2
        assert near.table[key] == replace(limits, info=info)


def test_infos_of_one_figure_can_be_left_out() -> None:
    table, fewer = load_thresholds(), load_thresholds().without_infos("branch_norm")
    for key, limits in table.table.items():
        # Where an info is the only cut, it decides whether the rule applies.
        has_both = key[0] == "branch_norm" and limits.warning is not None
        assert fewer.table[key] == (replace(limits, info=None) if has_both else limits)
    assert fewer.limits("branch_norm", "pre").info is None
    assert fewer.limits("branch_norm", "post").info is not None


def test_an_error_without_a_warning_below_it_stays_a_cut() -> None:
    table = Thresholds({("norm_gain", ""): Limits(info=4.0, error=9.0)})
    assert table.of_warnings().limits("norm_gain").cuts == (9.0,)
    table = Thresholds({("norm_gain", ""): Limits(info=4.0, warning=8.0, error=9.0)})
    assert table.of_warnings().limits("norm_gain").cuts == (8.0,)


def test_hooks_that_are_part_of_a_model_are_recorded_without_a_run_of_the_model() -> None:
    model = gpt.build("vanilla", **SIZES).eval()
    ids = torch.arange(16)[None]
    model.transformer.wte.register_forward_hook(lambda _module, _args, output: 3 * output)
    calls: list[int] = []
    model.transformer.ln_f.register_forward_hook(lambda *_: calls.append(1))

    compared = Tracer(model, (ids,), {}, torch.float32).trace()
    runs_compared = len(calls)
    calls.clear()
    kept = Tracer(model, (ids,), {}, torch.float32, keep_hooks=True).trace()
    for site, compared_site in zip(kept, compared, strict=True):
        assert torch.equal(site.shortcut, compared_site.shortcut)
        assert torch.equal(site.value, compared_site.value)
    assert len(calls) < runs_compared


UNSCALED = """
import torch
from jacdiag.sources import gpt


def model():
    built = gpt.build("gpt2", n_layer=4, n_embd=64, n_head=2, vocab_size=128, block_size=32)
    torch.nn.init.normal_(built.transformer.h[1].mlp.c_proj.weight, std=0.02)
    return built
"""


def test_the_init_contract_of_further_seeds_needs_no_product(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "build.py").write_text(UNSCALED)
    source = f"{tmp_path / 'build.py'}:model"
    report, further = tried(monkeypatch, source, select=["JD2"])
    assert {finding.code for finding in report.findings} == {"JD205"}
    assert recommended(report) == [("contract", [0, 1, 2])]
    for of_seed in further:
        assert of_seed.contract is not None and not of_seed.sublayers
        assert [rule.status for rule in of_seed.rules] == ["clean"]


def test_figures_of_another_model_do_not_stop_further_seeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A baseline is of the entire probe, and a comparison needs norms; no rule here reads them."""
    # 1. A baseline with a probe of two sequences.
    plain = {**OPTIONS, "remedies": "none", "model_args": {"recipe": "vanilla", **SIZES}}
    report, further = tried(monkeypatch, baseline=figures_of([jacdiag.audit(SOURCE, **plain)], 0.3))
    assert recommended(report) == [("scaled-embed", [0, 1])] and len(further) == 1

    # 2. An earlier checkpoint, where only weights are judged.
    (tmp_path / "build.py").write_text(UNSCALED)
    source = f"{tmp_path / 'build.py'}:model"
    report, _ = tried(monkeypatch, source, select=["JD2"], against=source)
    assert recommended(report) == [("contract", [0, 1, 2])]


HELD = """
from jacdiag.sources import gpt

MODEL = gpt.build("vanilla", n_layer=2, n_embd=64, n_head=2, vocab_size=128, block_size=32)


def model():
    return MODEL
"""


def test_a_model_that_a_factory_keeps_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "held_model.py").write_text(HELD)
    monkeypatch.syspath_prepend(tmp_path)
    import held_model  # type: ignore[import-not-found]

    before = {name: tensor.clone() for name, tensor in held_model.MODEL.state_dict().items()}
    report, further = tried(monkeypatch, "held_model:model", state="init")
    assert further and recommended(report)
    after = held_model.MODEL.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert not any(module._forward_hooks for module in held_model.MODEL.modules())


TWO_AT_LEAST = """
from jacdiag.sources import gpt


class Pairs(gpt.GPT):
    def forward(self, ids, targets=None):
        assert len(ids) > 1, "a pair of sequences"
        return super().forward(ids, targets)


def model():
    sizes = dict(n_layer=2, n_embd=64, n_head=2, vocab_size=128, block_size=32)
    built = gpt.build("vanilla", **sizes)
    built.__class__ = Pairs
    return built
"""


def test_a_model_that_does_not_run_on_one_sequence_gets_the_entire_probe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "build.py").write_text(TWO_AT_LEAST)
    first = first_trials(monkeypatch)
    report, further = tried(monkeypatch, f"{tmp_path / 'build.py'}:model")
    assert recommended(report) == [("scaled-embed", [0, 1])]
    assert set(sequences_of(first)) == {2} == set(sequences_of(further))


def test_a_remedy_that_passes_on_one_sequence_is_not_tried_on_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = first_trials(monkeypatch)
    report, _ = tried(monkeypatch)
    assert sequences_of(first) == [1] and report.remedies[-1].sequences == 1


def test_what_one_sequence_has_left_is_left_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A remedy that changes nothing is not tried twice."""
    monkeypatch.setattr(trial, "_changed", lambda model, remedy, seed: model)
    first = first_trials(monkeypatch)
    report, further = tried(monkeypatch)
    assert first and set(sequences_of(first)) == {1} and not further
    assert not any(remedy.sufficient for remedy in report.remedies)


@pytest.mark.parametrize("is_on_all", [False, True])
def test_something_new_on_one_sequence_is_looked_for_on_all(
    monkeypatch: pytest.MonkeyPatch, is_on_all: bool
) -> None:
    """Such as an expert that no token of the first sequence chose."""
    judged = Request.judged
    new = Finding("JD405", "warning", [], "an expert that no token chose")

    def with_new(self: Request, report: Report) -> Report:
        found = judged(self, report)
        sequences = 2 if is_on_all else 1
        is_trial = self.options.remedies == "none" and "JD405" in {r.code for r in found.rules}
        if is_trial and self.options.batch <= sequences:
            found = replace(found, findings=[*found.findings, new])
        return found

    monkeypatch.setattr(Request, "judged", with_new)
    first = first_trials(monkeypatch)
    report, _ = tried(monkeypatch)
    assert sequences_of(first)[:2] == [1, 2]
    assert any(remedy.sufficient for remedy in report.remedies) is not is_on_all
    assert report.remedies[0].sequences == 2


def test_the_function_is_compared_on_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    first = first_trials(monkeypatch)
    report, _ = tried(monkeypatch, remedies="begun")
    kept = [remedy for remedy in report.remedies if remedy.keeps_function]
    assert kept and {remedy.sequences for remedy in kept} == {2}
    assert all(remedy.function_change is not None for remedy in kept)
    assert 2 in sequences_of(first)


def test_figures_of_a_baseline_are_compared_on_its_own_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = {**OPTIONS, "remedies": "none", "model_args": {"recipe": "vanilla", **SIZES}}
    figures = figures_of([jacdiag.audit(SOURCE, **plain)], 0.3)
    first = first_trials(monkeypatch)
    tried(monkeypatch, baseline=figures)
    assert first and set(sequences_of(first)) == {2}


ASLEEP = """
import torch
from jacdiag.sources import gpt


def model():
    sizes = dict(n_layer=4, n_embd=64, n_head=2, vocab_size=128, block_size=32)
    built = gpt.build("gpt2", **sizes)
    torch.nn.init.zeros_(built.transformer.h[1].attn.c_proj.weight)
    return built
"""


def test_a_branch_that_a_remedy_wakes_up_is_looked_at_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A branch of zeros depends on nothing. Its operations show that it mixes tokens."""
    (tmp_path / "build.py").write_text(ASLEEP)
    woken = first_trials(monkeypatch)
    options = {**OPTIONS, "remedies": "all"}
    report = jacdiag.audit(f"{tmp_path / 'build.py'}:model", state="init", **options)
    name = "transformer.h.1.attn"
    (asleep,) = [row for row in report.sublayers if row.name == name]
    awake = [row for of_copy in woken for row in of_copy.sublayers if row.name == name]
    assert awake and {row.problems for row in [asleep, *awake]} == {"one per sequence"}
