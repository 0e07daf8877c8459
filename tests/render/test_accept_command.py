"""The command that accepts new figures of a gate: it never makes the baseline weaker."""

from __future__ import annotations

import dataclasses

import pytest
from render import synthetic

from jacdiag.records import FiguresRecord, Finding
from jacdiag.render.content.grouped_findings import build_gate_view

GATE = "jacdiag gate build.py:model --baseline init.json"


def accept_command(command: str, seeds: int = 3) -> str:
    """Return what a gate that its baseline refused tells to run."""
    report = synthetic.vanilla(2)
    baseline = FiguresRecord(model="GPT", parameters=1, layers=2, width=8, seeds=seeds)
    finding = Finding("JD110", "error", ["h.0.mlp"], "std 0.02 -> 0.1")
    settings = {**report.settings, "gate": {"seeds": 1}, "command": command}
    report = dataclasses.replace(report, findings=[finding], baseline=baseline, settings=settings)
    return build_gate_view(report).accept


@pytest.mark.parametrize(
    "options",
    ["--contract-only", "--seeds 1", "--seeds=1", "--budget 3 --format github", "--html a.html"],
)
def test_options_that_would_weaken_the_baseline_are_left_out(options: str) -> None:
    command = accept_command(f"{GATE} {options}")
    assert command == f"{GATE} --seeds 3 --write-baseline"


def test_options_that_belong_to_the_model_and_the_probe_stay() -> None:
    command = f"{GATE} --seq 64 --model-args '{{\"n\": 2}}'"
    assert accept_command(command) == f"{command} --seeds 3 --write-baseline"


def test_seeds_are_those_of_the_baseline() -> None:
    command = accept_command(f"{GATE} --seeds 1", seeds=20)
    assert "--seeds 20" in command
