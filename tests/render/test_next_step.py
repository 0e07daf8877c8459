"""The next command after a verdict is true for the report that it stands below."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from render import synthetic
from render.test_remedies import GOOD, POOR, with_remedies

from jacdiag.records import AgainstRecord, Finding, Interval, Report, RuleResult
from jacdiag.render.content.next_step import next_step
from jacdiag.render.content.severity import is_across as is_across_threshold
from jacdiag.render.content.severity import marks
from jacdiag.render.formats import markdown
from jacdiag.render.terminal.gate import render as gate_screen
from jacdiag.render.view import build_view

pytestmark = pytest.mark.check("jacdiag audit", "jacdiag gate")


def called(report: Report, command: str, **gate: Any) -> Report:
    """A report of another command; with settings of a gate if some are given."""
    settings = {**report.settings, "command": command}
    if gate:
        settings["gate"] = {"exit_code": 0, "seeds": 1, "seconds": 1.0, **gate}
    return dataclasses.replace(report, settings=settings)


def of(report: Report) -> str:
    return next_step(report).command


def test_a_remedy_that_is_enough_is_written_as_code_once() -> None:
    report = with_remedies(POOR, GOOD)
    again = str(report.settings["command"])
    assert of(report) == f"{again} --patch fix.md"
    assert of(called(report, f"{again} --patch fix.md")) == "jacdiag explain JD102"
    assert of(with_remedies(POOR)) == "jacdiag explain JD102"  # none is enough


def test_a_warning_or_an_error_is_explained_the_loudest_first() -> None:
    assert of(synthetic.broken()) == "jacdiag explain JD906"
    warning = Finding("JD102", "warning", [], "small")
    error = Finding("JD103", "error", [], "large")
    report = dataclasses.replace(synthetic.vanilla(), findings=[warning, error], verdict="fail")
    assert of(report) == "jacdiag explain JD103"


def test_an_observation_alone_is_nothing_to_explain() -> None:
    info = Finding("JD403", "info", [], "grows")
    report = dataclasses.replace(synthetic.clean(), findings=[info], verdict="pass")
    assert "explain" not in of(report)


@pytest.mark.parametrize(
    ("tokens", "option"), [("random", "--tokens FILE"), ("random pixels", "--inputs FACTORY")]
)
def test_a_trained_model_on_random_input_needs_real_input(tokens: str, option: str) -> None:
    base = synthetic.trained()
    assert base.probe is not None
    finding = Finding("JD903", "warning", [], "probed with random tokens")
    report = dataclasses.replace(
        base,
        findings=[finding],
        verdict="warn",
        probe=dataclasses.replace(base.probe, tokens=tokens),
    )
    assert of(report).endswith(option)


def test_weights_alone_need_the_model() -> None:
    report = dataclasses.replace(synthetic.weights_tier(), verdict="unknown", findings=[])
    assert of(report).endswith(" --model FACTORY")


def test_an_interval_across_a_threshold_is_measured_narrower() -> None:
    rules = [RuleResult("JD103", "unknown", 1, "amplification")]
    rows = [dataclasses.replace(row) for row in synthetic.clean(2).sublayers]
    rows[0] = dataclasses.replace(rows[0], branch_norm=Interval(10.0, 9.0, 11.0, 0.999))
    settings = {**synthetic.vanilla().settings, "thresholds": synthetic.THRESHOLDS, "tol": 0.05}
    report = dataclasses.replace(
        synthetic.clean(2), sublayers=rows, rules=rules, verdict="unknown", settings=settings
    )
    assert of(report).endswith("--tol 0.01 --max-products 1000")
    given = called(report, "jacdiag audit a.pt --max-products=5000")
    assert of(given) == "jacdiag audit a.pt --max-products=5000 --tol 0.01"

    # The same report with an interval on one side: no narrower one decides anything.
    rows[0] = dataclasses.replace(rows[0], branch_norm=Interval(5.0, 4.9, 5.1, 0.999))
    assert "--tol" not in of(dataclasses.replace(report, sublayers=rows))


@pytest.mark.parametrize(
    ("core", "is_across"),
    [
        (Interval(0.4, 0.39, 0.41, 0.999), True),
        (Interval(0.4, 0.41, 0.42, 0.999), False),
        (Interval(0.8, 0.79, 0.81, 0.999), True),
        (None, False),
    ],
)
def test_a_core_is_compared_with_the_thresholds_of_its_kind(
    core: Interval | None, is_across: bool
) -> None:
    """Thresholds of cores are for a kind each, and the lowest of them leaves a rule open too."""
    base = synthetic.clean(2)
    rows = [dataclasses.replace(base.sublayers[0], core_norm=core), *base.sublayers[1:]]
    cuts = {"core_norm": {}, "core_norm.attention": {"info": 0.4, "warning": 0.8}}
    report = dataclasses.replace(
        base,
        sublayers=rows,
        rules=[RuleResult("JD101", "unknown", 4, "small-sublayers")],
        verdict="unknown",
        settings={**base.settings, "thresholds": cuts},
    )
    assert ("--tol" in of(report)) == is_across
    mark = marks(report).get((rows[0].name, "core_norm"))
    assert (mark == "undecided") == is_across


@pytest.mark.parametrize(("placement", "is_across"), [("pre", False), ("post", True)])
def test_a_branch_is_compared_with_the_thresholds_of_its_placement(
    placement: str, is_across: bool
) -> None:
    base = synthetic.clean(2)
    norm = Interval(4.0, 3.9, 4.1, 0.999)
    row = dataclasses.replace(base.sublayers[0], branch_norm=norm, placement=placement)
    cuts = {
        "branch_norm": {"warning": 10.0},
        "branch_norm.pre": {"warning": 10.0},
        "branch_norm.post": {"info": 4.0},
    }
    report = dataclasses.replace(
        base,
        sublayers=[row, *base.sublayers[1:]],
        rules=[RuleResult("JD103", "unknown", 4, "amplification")],
        settings={**base.settings, "thresholds": cuts, "stratum": "pre"},
    )
    assert is_across_threshold(report, row, "branch_norm") == is_across

    # An older report has those of the usual placement alone.
    settings = {**report.settings, "thresholds": {"branch_norm": {"warning": 4.0}}}
    older = dataclasses.replace(report, settings=settings)
    assert is_across_threshold(older, row, "branch_norm") == (placement == "pre")


def test_a_model_that_no_rule_judges_is_told_why() -> None:
    finding = Finding("JD904", "warning", [], "no rule applied")
    report = dataclasses.replace(synthetic.clean(), findings=[finding], rules=[], verdict="unknown")
    assert next_step(report).text == (
        "jacdiag explain JD904   says what the rule checks and what helps"
    )

    # Other rules may have been decided: it is not said that nothing was.
    finding = Finding("JD901", "warning", [], "JD101 undecided")
    report = dataclasses.replace(report, findings=[finding])
    assert next_step(report).text == (
        "jacdiag explain JD901   says what the rule checks and what helps"
    )


def test_a_trained_model_is_compared_with_an_earlier_one() -> None:
    report = dataclasses.replace(synthetic.trained(), findings=[], verdict="observed")
    again = str(report.settings["command"])
    assert of(report) == f"{again} --against EARLIER"
    gated = called(report, "jacdiag gate a.pt", exit_code=0)
    assert of(gated) == "jacdiag gate a.pt --baseline FILE"
    against = AgainstRecord("earlier.pt", "trained", compared=24)
    compared = dataclasses.replace(report, verdict="pass", against=against)
    assert "--against" not in of(compared).removeprefix(again)


def test_a_clean_init_is_recorded_for_a_gate_with_the_same_options() -> None:
    report = called(synthetic.clean(), "jacdiag audit build.py:model --seq 64 --plot 'my gain.png'")
    keep = "--baseline init.json --write-baseline"
    assert of(report) == f"jacdiag gate build.py:model --seq 64 --plot 'my gain.png' {keep}"

    # A gate does not take all options of an audit. The others stay.
    for option in ("--probes 3", "--probes=3", "--against a.pt"):
        command = f"jacdiag audit build.py:model {option} --seq 64"
        assert of(called(synthetic.clean(), command)) == (
            f"jacdiag gate build.py:model --seq 64 {keep}"
        )

    # A report of the library has no command.
    assert of(called(synthetic.clean(), "")) == f"jacdiag gate SOURCE {keep}"


def test_a_gate_that_passed_writes_a_baseline_then_reads_it_then_runs_in_ci() -> None:
    report = called(synthetic.clean(), "jacdiag gate build.py:model", exit_code=0)
    write = of(report)
    assert write == "jacdiag gate build.py:model --baseline init.json --write-baseline"
    read = of(called(report, write, exit_code=0))
    assert read == "jacdiag gate build.py:model --baseline init.json"
    assert of(called(report, read, exit_code=0)) == f"{read} --format github"
    assert of(called(report, f"{read} --format github", exit_code=0)) == "jacdiag rules"


def test_a_baseline_without_norms_is_not_proposed() -> None:
    report = called(synthetic.clean(), "jacdiag gate build.py:model --contract-only", exit_code=0)
    step = next_step(report)
    assert step.command == "jacdiag gate build.py:model --baseline init.json --write-baseline"
    assert step.purpose.startswith("measures the norms too")
    # A baseline that the user has chosen to write without norms is read the same way.
    writes = f"{report.settings['command']} --baseline init.json --write-baseline"
    reads = of(called(report, writes, exit_code=0))
    assert reads == "jacdiag gate build.py:model --contract-only --baseline init.json"


def test_a_gate_without_time_gets_more() -> None:
    report = called(synthetic.clean(), "jacdiag gate m.py:f", exit_code=3, budget_ran_out=True)
    assert of(report) == "jacdiag gate m.py:f --budget SECONDS"
    in_time = called(synthetic.clean(), "jacdiag gate m.py:f", exit_code=3, budget_ran_out=False)
    assert "--budget" not in of(in_time)


@pytest.mark.parametrize("name", ["vanilla", "clean", "post", "trained", "undecided", "broken"])
def test_every_screen_ends_with_one_next_command(name: str) -> None:
    report: Report = getattr(synthetic, name)()
    text = build_view(report).next_step.text
    assert text.startswith("jacdiag ") and "\n" not in text
    assert gate_screen(report).splitlines()[-1] == f"next: {text}"
    assert markdown.render(report).count("**Next**") == 1


@pytest.mark.parametrize(
    ("source", "state", "is_offered"),
    [
        ({"format": "huggingface", "path": "my folder"}, "init", True),
        ({"format": "huggingface", "path": "my folder"}, "trained", False),
        ({"format": "torch", "path": "model.pt"}, "init", False),
    ],
)
def test_fresh_model_is_offered_for_a_folder_whose_weights_stay_in_their_files(
    source: dict[str, str], state: str, is_offered: bool
) -> None:
    report = dataclasses.replace(synthetic.vanilla(2), source=source, state=state, remedies=[])
    command = next_step(report).command
    assert (command == "jacdiag audit 'hf:my folder' --patch fix.md") == is_offered
