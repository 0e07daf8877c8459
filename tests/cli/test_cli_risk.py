"""`jacdiag audit --lr LR`: a chance where the curves reach, and words where they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jacdiag_cli.main import main

from jacdiag.records.risk import RiskCurve, RiskTable
from jacdiag.rules.risk_curves import risk_toml

SIZES = (
    '{"recipe": "vanilla", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, '
    '"block_size": 16}'
)
AUDIT = [
    "audit",
    "jacdiag.sources.gpt:build",
    "--model-args",
    SIZES,
    "--batch",
    "1",
    "--seq",
    "8",
    "--remedies",
    "none",
]


@pytest.fixture
def curves(tmp_path: Path) -> str:
    ranges = {"figure": [0.01, 1000.0], "lr": [1e-4, 1.0], "width": [16.0, 128.0]}
    spread = [[0.01, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    curve = RiskCurve("pre", "worst branch norm", [2.5, 0.5, 1.0], spread, ranges, 90, 30, "a lab")
    path = tmp_path / "risk.toml"
    path.write_text(risk_toml(RiskTable({"pre": curve})), encoding="utf-8")
    return str(path)


def test_spike_probability_is_printed_with_its_interval(
    curves: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    code = main([*AUDIT, "--lr", "0.1", "--risk", curves, "--json", str(out)])
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 1, "a run that is likelier to go wrong than not is an error"
    risk = json.loads(out.read_text())["risk"]
    told = (f"a chance of {risk['chance']:.0%}", "at lr 0.100", "JD105", "90 runs")
    assert all(part in shown for part in told)
    assert (
        0.5 < risk["lower"] < risk["chance"] < risk["upper"] < 1
        and risk["figure"] == "worst branch norm"
    )


def test_reason_is_printed_outside_the_range_of_the_curves(
    curves: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*AUDIT, "--lr", "2.0", "--risk", curves]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no chance is given: outside the calibrated range: lr 2, 0.0001 to 1 were run" in shown
    assert main([*AUDIT, "--lr", "0.1", "--decide", "--risk", curves]) == 0
    assert "worst branch norm is measured to its width without --decide" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main([*AUDIT, "--risk", curves]) == 0
    assert "no chance" not in capsys.readouterr().out, "no learning rate, no word of it"


def test_a_file_without_curves_ends_it_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("curve = 3")
    assert main([*AUDIT, "--lr", "0.1", "--risk", str(path)]) == 2
    assert "cannot read the curves" in capsys.readouterr().err


def test_a_file_of_something_else_is_no_file_of_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.toml"
    path.write_text("x = 1")
    assert main([*AUDIT, "--lr", "0.1", "--risk", str(path)]) == 2
    told = capsys.readouterr().err
    assert "holds no curve" in told and "--write-risk" in told


def test_the_help_says_what_reads_the_parts_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown.count("JD105 gives no chance for one that was not run") == 2
    assert "warm-up steps; nothing without --lr" in shown
