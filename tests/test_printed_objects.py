"""What `print` shows of the objects that users hold in their hands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import jacdiag
from jacdiag.gate.run import Outcome
from jacdiag.records import FiguresRecord, Interval
from tests.render import synthetic


class Net(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.ff = nn.ModuleList([nn.Linear(4, 4) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.ff:
            x = x + layer(x).tanh()
        return x


def test_a_report_is_a_few_lines() -> None:
    report = synthetic.vanilla()
    text = str(report)
    worst = max(
        (row for row in report.sublayers if row.branch_norm),
        key=lambda row: row.branch_norm.estimate,
    )  # type: ignore[union-attr]
    assert len(text.splitlines()) < 12
    assert f"Report of checkpoint.pt ({report.state}, measured)" in text
    assert f"verdict   {report.verdict}" in text
    assert f"branch norm 22.4 to 23.3 at {worst.name}" in text
    assert f"{report.model.layers} layers, {len(report.sublayers)} sub-layers" in text
    for finding in report.findings:
        assert finding.code in text
    assert "more      report.table(), " in text


def test_a_report_without_findings_says_none_and_one_of_weights_has_the_bound() -> None:
    assert "findings  none" in str(replace(synthetic.clean(), findings=[]))
    weights = str(synthetic.weights_tier())
    assert "bound 40.3 at" in weights and "branch norm" not in weights


@pytest.mark.parametrize("name", ["vanilla", "clean", "broken", "trained", "weights_tier"])
def test_every_kind_of_report_can_be_printed(name: str) -> None:
    report = getattr(synthetic, name)()
    assert str(report).startswith("Report of")
    assert len(repr(report)) < 200 and "\n" not in repr(report)
    assert report.verdict in repr(report)


def test_a_name_from_a_file_brings_no_control_character_to_the_terminal() -> None:
    report = synthetic.vanilla()
    bad = replace(report, model=replace(report.model, name="a\x1b[31mb\nc"))
    assert "\x1b" not in str(bad) and "b\nc" not in str(bad)


def test_the_table_is_the_one_that_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.vanilla().table(width=100)
    text = capsys.readouterr().out
    assert "transformer.h.0.attn" in text and "branch norm" in text and "What to do" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text


def test_an_interval_is_its_ends() -> None:
    assert str(Interval(5.81, 5.803, 6.0412)) == "5.80 to 6.05"
    assert f"norm {Interval.exact(2.0)}" == "norm 2.00"


def test_sites_and_a_site() -> None:
    sites = jacdiag.sites(Net(), torch.randn(2, 3, 4))
    assert str(sites[0]) == "ff.0: mlp, no norm, depth 0, shortcut 2 x 3 x 4, 2 parameter tensors"
    assert str(sites).splitlines()[0] == "2 sub-layers, 2 deep"
    assert len(str(sites).splitlines()) == 3
    assert repr(sites) == "<Sites: 2 sub-layers, 2 deep>"
    assert repr(sites[0]).startswith("<Sublayer ff.0:")


def test_many_sites_are_counted() -> None:
    lines = str(jacdiag.sites(Net(30), torch.randn(1, 2, 4))).splitlines()
    assert len(lines) == 26 and lines[-1] == "  ... and 6 more"


def test_printed_spectral_norm_contains_the_true_value() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    text = str(jacdiag.spectral_norm(lambda x: x**2, x))
    first, second = text.split(" (confidence")[0].split(", ")
    for shown, truth in ((first, 4.0), (second, 6.0)):
        low, _, high = shown.partition(" to ")
        assert float(low) <= truth <= float(high or low)
    assert "products" in text
    many = str(jacdiag.spectral_norm(lambda x: x**2, torch.ones(20, 2)))
    assert many.startswith("20 norms, the largest ")


def test_printed_watch_shows_its_state(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with jacdiag.watch(model, optimizer, log_dir=tmp_path) as watch:
        assert str(watch) == "Watch, running: 0 steps, 0 alerts"
    assert str(watch) == "Watch, closed: 0 steps, 0 alerts"


def test_printed_gate_outcome_starts_with_its_exit_code() -> None:
    outcome = Outcome(synthetic.vanilla(), 1, FiguresRecord("GPT", 1, 1, 1, [0]))
    assert str(outcome).startswith("Gate failed (exit code 1)\nReport of")
