"""The audit on several probes: what each estimate is of, and what cannot be varied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import jacdiag
from jacdiag.errors import JacdiagError, ProbeError, UsageError
from jacdiag.records import Interval, Report
from jacdiag.render.content import verdict as lines
from jacdiag.render.content.sublayer_table import build
from jacdiag.render.formats.markdown import render
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded

SIZES: dict[str, Any] = {
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "vocab_size": 64,
    "block_size": 16,
}


def model() -> nn.Module:
    with seeded(0):
        return gpt.build("gpt2", **SIZES)


def branch(report: Report) -> list[float]:
    return [row.branch_norm.estimate for row in report.sublayers if row.branch_norm is not None]


def random_ids() -> torch.Tensor:
    return torch.randint(64, (2, 16))


def fixed_ids() -> torch.Tensor:
    return torch.arange(32).view(2, 16)


def test_each_estimate_is_that_of_an_audit_on_that_probe() -> None:
    report = jacdiag.audit(model(), probes=3, batch=2, seq=16)
    drawn = [
        torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1, 2)
    ]
    alone = [branch(jacdiag.audit(model(), ids)) for ids in drawn]
    for place, row in enumerate(report.sublayers):
        spread = row.over_probes["branch_norm"]
        assert spread.estimates == pytest.approx([estimates[place] for estimates in alone])
        assert (spread.least, spread.most) == (min(spread.estimates), max(spread.estimates))
        assert row.branch_norm is not None and spread.estimates[0] == row.branch_norm.estimate
    assert report.settings["probes"] == {
        "count": 3,
        "seeds": [0, 1, 2],
        "verdicts": [report.verdict] * 3,
    }
    assert report.network is not None and report.network.end_to_end is not None
    assert (
        report.network.over_probes["end_to_end"].estimates[0] == report.network.end_to_end.estimate
    )


def test_intervals_findings_and_verdict_are_those_of_the_first_probe() -> None:
    one, three = (jacdiag.audit(model(), probes=probes, batch=2, seq=16) for probes in (1, 3))
    assert [row.branch_norm for row in one.sublayers] == [
        row.branch_norm for row in three.sublayers
    ]
    assert (one.findings, one.verdict) == (three.findings, three.verdict)
    assert one.cost.products is not None and three.cost.products is not None
    assert three.cost.products > 2.5 * one.cost.products, "the price of all three"
    assert all(row.over_probes == {} for row in one.sublayers) and "probes" not in one.settings


def test_the_parts_of_a_file_are_the_probes(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 64, 200).astype("uint16")
    ids.tofile(tmp_path / "ids.bin")
    report = jacdiag.audit(model(), tokens=tmp_path / "ids.bin", probes=3, batch=2, seq=16)
    parts = [
        torch.from_numpy(ids[k * 32 : (k + 1) * 32].astype("int64")).view(2, 16) for k in range(3)
    ]
    alone = [branch(jacdiag.audit(model(), part)) for part in parts]
    spread = report.sublayers[0].over_probes["branch_norm"]
    assert spread.estimates == pytest.approx([estimates[0] for estimates in alone])
    assert "seeds" not in report.settings["probes"], "a file does not depend on a seed"


def test_a_table_of_ids_gives_its_next_rows(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 64, (5, 16))
    np.save(tmp_path / "rows.npy", rows)
    report = jacdiag.audit(model(), tokens=tmp_path / "rows.npy", probes=2, batch=2)
    second = branch(jacdiag.audit(model(), torch.from_numpy(rows[2:4])))
    assert report.sublayers[0].over_probes["branch_norm"].estimates[1] == pytest.approx(second[0])
    with pytest.raises(ProbeError, match="too few sequences") as refused:
        jacdiag.audit(model(), tokens=tmp_path / "rows.npy", probes=3, batch=2)
    assert "--probes 2" in str(refused.value)


def test_a_file_too_short_is_refused_before_any_product(tmp_path: Path) -> None:
    np.arange(64, dtype="uint16").tofile(tmp_path / "short.bin")
    with pytest.raises(ProbeError, match="too few tokens for so many probes") as refused:
        jacdiag.audit(model(), tokens=tmp_path / "short.bin", probes=3, batch=2, seq=16)
    assert "64 tokens; the first 3 probes of 2 x 16 take 96" in str(refused.value)
    assert "--probes 2" in str(refused.value)
    jacdiag.audit(model(), tokens=tmp_path / "short.bin", probes=2, batch=2, seq=16, decide=True)


def test_an_input_that_cannot_be_varied_is_refused() -> None:
    with pytest.raises(UsageError, match="needs an input that varies"):
        jacdiag.audit(model(), fixed_ids(), probes=2)
    with pytest.raises(UsageError, match="the same tensors with another seed"):
        jacdiag.audit(model(), input_factory=fixed_ids, probes=2)
    report = jacdiag.audit(model(), input_factory=random_ids, probes=2, decide=True)
    assert report.sublayers[0].over_probes
    assert any("--decide" in note for note in report.notes)
    with pytest.raises(UsageError, match="nothing to repeat"):
        jacdiag.audit(model(), products=False, probes=2)


def test_weights_alone_are_not_probed(tmp_path: Path) -> None:
    torch.save({"h.0.mlp.c_fc.weight": torch.randn(8, 8)}, tmp_path / "w.pt")
    with pytest.raises(JacdiagError, match="needs a model that runs"):
        jacdiag.audit(tmp_path / "w.pt", probes=2)


def test_a_report_shows_the_spread_next_to_the_interval() -> None:
    report = jacdiag.audit(model(), probes=3, batch=2, seq=16)
    titles = [column.title for column in build(report).columns]
    assert titles.index("over 3 probes") == titles.index("branch norm") + 1
    row = report.sublayers[0]
    text = render(report)
    assert str(row.over_probes["branch_norm"]) in text and "the first of 3 probes" in text
    line = next(line for line in lines.verdict_lines(report) if line.label == "over probes")
    assert "on 3 probes" in line.text and "not an error of the measurement" in line.text
    assert "further probes" in lines.cost(report)
    again = Report.from_json(report.to_json())
    assert again.sublayers[0].over_probes == row.over_probes
    old = report.to_dict()
    for record in (*old["sublayers"], old["network"]):
        del record["over_probes"]
    assert Report.from_dict(old).sublayers[0].over_probes == {}, "a report of before is read"


def test_one_probe_has_no_such_column() -> None:
    report = jacdiag.audit(model(), batch=2, seq=16, decide=True)
    assert not any(column.key == "over_probes" for column in build(report).columns)
    assert not any(line.label == "over probes" for line in lines.verdict_lines(report))


def test_a_figure_that_one_probe_does_not_have() -> None:
    from jacdiag.pipeline.probe_spread import spread_of

    one, nan = Interval.exact(2.0), Interval.exact(float("nan"))
    assert (
        spread_of([None, one]) is None
        and spread_of([one, None]) is None
        and spread_of([one, nan]) is None
    )
    spread = spread_of([one, None, Interval.exact(3.0)])
    assert spread is not None and (spread.least, spread.most, spread.estimates) == (
        2.0,
        3.0,
        [2.0, None, 3.0],
    )


def test_the_ladder_of_a_report_has_its_placement() -> None:
    placements = {
        rung["placement"] for rung in jacdiag.audit(model(), batch=1, seq=8, decide=True).ladder
    }
    assert placements == {"pre"}
    post = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    report = jacdiag.audit(post, torch.randn(1, 6, 16), state="init", decide=True)
    assert {rung["name"] for rung in report.ladder} == {"BERT"}
