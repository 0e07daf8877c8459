"""Further seeds of a remedy: what is measured of them, and what they are judged by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import jacdiag
from jacdiag.distributed import enlisted
from jacdiag.pipeline import with_remedies
from jacdiag.pipeline.audit import AuditOptions
from jacdiag.pipeline.measured_audit import Audit
from jacdiag.pipeline.request import Request
from jacdiag.records import Report
from jacdiag.remedies import trial
from jacdiag.rules.thresholds import load_thresholds
from jacdiag.sources import gpt
from jacdiag.sources.python_source import source_of
from jacdiag.trace.tracer import Tracer

SOURCE = "jacdiag.sources.gpt:build"
SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 128, "block_size": 32}
OPTIONS: dict[str, Any] = {"batch": 2, "seq": 16, "decide": True, "remedies": "first"}


def tried(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Report, list[Report]]:
    """Audit a model that asks for remedies; return its report and those of further seeds."""
    reports: list[Report] = []
    confirm = with_remedies._Trial.confirm

    def noting(*arguments: Any) -> Report:
        reports.append(confirm(*arguments))
        return reports[-1]

    monkeypatch.setattr(with_remedies._Trial, "confirm", noting)
    report = jacdiag.audit(SOURCE, model_args={"recipe": "vanilla", **SIZES}, **OPTIONS | options)
    return report, reports


def test_only_what_the_rules_read_is_measured_of_further_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, further = tried(monkeypatch)
    assert [r.seeds for r in report.remedies if r.recommended] == [[0, 1, 2]]
    for of_seed in further[-2:]:
        assert {rule.code for rule in of_seed.rules} == {"JD102", "JD103"}
        assert of_seed.probe is not None and of_seed.probe.batch == 1
        assert of_seed.contract is None and of_seed.network is not None
        assert of_seed.network.gradient_norms is None
        for row in of_seed.sublayers:
            assert row.branch_norm is not None and row.branch_norm.upper < 2.35
            assert row.residual_norm is None


def test_a_remedy_that_fails_on_a_further_seed_is_not_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = trial._changed

    def only_on_the_first(model: nn.Module, remedy: Any, seed: int) -> nn.Module:
        return changed(model, remedy, seed) if seed < 2 else model

    monkeypatch.setattr(trial, "_changed", only_on_the_first)
    report, further = tried(monkeypatch)
    assert not any(remedy.sufficient for remedy in report.remedies)
    assert {finding.code for finding in further[-1].findings} >= {"JD102", "JD103"}


def test_infos_need_no_products_unless_a_profile_makes_warnings_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, further = tried(monkeypatch)
    cuts = further[-1].settings["thresholds"]["branch_norm"]
    assert "warning" in cuts and "info" not in cuts
    _, further = tried(monkeypatch, profile="paper")
    assert "info" in further[-1].settings["thresholds"]["branch_norm"]


def test_the_cuts_of_warnings_are_those_of_the_table() -> None:
    table, warnings = load_thresholds(), load_thresholds().of_warnings()
    for key, limits in table.table.items():
        assert warnings.table[key].warning == limits.warning
        assert warnings.table[key].info is warnings.table[key].error is None


def test_the_model_itself_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt.build("vanilla", **SIZES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    jacdiag.audit(model, **OPTIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


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
    for one, other in zip(kept, compared, strict=True):
        assert torch.equal(one.shortcut, other.shortcut) and torch.equal(one.value, other.value)
    assert len(calls) < runs_compared


def test_what_is_independent_is_found_once_for_all_copies() -> None:
    model = gpt.build("vanilla", **SIZES)
    first, again = traced(model), traced(model)
    report = first.run()
    again.share_independence(first)
    shared = again.run()
    for one, other in zip(report.sublayers, shared.sublayers, strict=True):
        assert one.branch_norm is not None and one.branch_norm == other.branch_norm
    assert spent(shared) < spent(report)


def traced(model: nn.Module) -> Audit:
    options = AuditOptions(batch=2, seq=16, state="init")
    with enlisted(False) as ranks:
        request = Request(
            source=source_of(model), options=options, thresholds=load_thresholds(), ranks=ranks
        )
    audit = Audit(request)
    audit.trace()
    return audit


def spent(report: Report) -> float:
    return sum(row.cost or 0.0 for row in report.sublayers)
