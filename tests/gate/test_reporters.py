"""What the gate writes for machines: GitHub, SARIF, JUnit, Markdown."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from gate import net
from jacdiag_cli.main import main

from jacdiag.gate import gate
from jacdiag.gate.source_location import located
from jacdiag.records import Finding, Report
from jacdiag.render.content import grouped_findings as folded
from jacdiag.render.content.next_step import next_step
from jacdiag.render.formats import github, junit, sarif
from jacdiag.render.formats import pr_comment as comment
from jacdiag.rules import RULES

WILD = "a|b*c_d`e<f>[g]&$%h:i,j\r\n::error::k \x1b[31m \ud83d"


@pytest.fixture(scope="module")
def report() -> Report:
    out = gate(
        lambda: net.model(broken=True), torch.randint(0, 256, (1, 16)), seeds=1, fail_on="warning"
    )
    assert out.exit_code == 1
    return out.report


@pytest.fixture
def wild(report: Report) -> Report:
    """A report whose names and texts are somebody's attempt to break out of a format."""
    evidence = {"parameters": [WILD], "location": {"file": WILD, "line": 3}}
    bad = Finding("JD102", "error", [WILD], WILD, evidence, "", WILD)
    return replace(
        report,
        findings=[bad, *report.findings],
        source={"path": WILD},
        notes=[WILD],
        settings={**report.settings, "name": WILD, "command": WILD},
    )


def test_one_note_per_rule_layers_folded(report: Report) -> None:
    found = folded.notes(report)
    codes = [note.code for note in found]
    assert len(codes) == len(set(codes)) and set(codes) == {f.code for f in report.findings}
    depth = next(note for note in found if note.code == "JD203")
    assert len(depth.sentences) == 1 and len([n for n in depth.names if n.endswith("weight")]) == 4
    assert depth.file == "tests/gate/net.py"


def test_sarif_by_models_made_of_the_official_schema(report: Report, wild: Report) -> None:
    model = pytest.importorskip("pydantic_sarif.model")
    kind = next(
        getattr(model, n)
        for n in (
            "StaticAnalysisResultsFormatSarifVersion210JsonSchema",
            "SarifLog",
            "Model",
            "StaticAnalysisResultsFormatSARIFVersion210JSONSchema",
        )
        if hasattr(model, n)
    )
    for one in (report, wild, replace(report, findings=[])):
        kind.model_validate_json(sarif.render(one))
    with pytest.raises(ValueError, match="validation error"):  # the models do refuse
        kind.model_validate({**json.loads(sarif.render(report)), "extra": 1})


def test_sarif_has_every_finding_with_its_rule_and_location(report: Report) -> None:
    log = json.loads(sarif.render(report))
    [run] = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert log["version"] == "2.1.0" and {r["ruleId"] for r in run["results"]} == {
        f.code for f in report.findings
    }
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        [place] = result["locations"]
        uri = place["physicalLocation"]["artifactLocation"]["uri"]
        assert (
            not uri.startswith("/")
            and Path(uri).is_file()
            and place["physicalLocation"]["region"]["startLine"] >= 1
        )
        assert re.fullmatch("[0-9a-f]{64}", result["partialFingerprints"]["jacdiag/v1"])


def test_fingerprints_stay_when_figures_move(report: Report) -> None:
    def prints(one: Report) -> list[str]:
        return [
            r["partialFingerprints"]["jacdiag/v1"]
            for r in json.loads(sarif.render(one))["runs"][0]["results"]
        ]

    moved = [
        replace(
            f,
            what=f.what + " 0.1",
            evidence={**f.evidence, "location": {"file": "x.py", "line": 9}},
        )
        for f in report.findings
    ]
    assert prints(report) == prints(replace(report, findings=moved))


def test_sarif_location_without_a_file(report: Report) -> None:
    bare = [replace(f, evidence={}) for f in report.findings]
    for result in json.loads(sarif.render(replace(report, findings=bare)))["runs"][0]["results"]:
        assert (
            result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
            == "pyproject.toml"
        )


def test_github_annotations_have_level_file_and_line(report: Report, wild: Report) -> None:
    lines = github.render(report).splitlines()
    commands = [line for line in lines if line.startswith("::")]
    assert len(commands) == len(folded.notes(report))
    pattern = r"::(error|warning|notice) (file=[^,]+,line=\d+,)?title=JD\d{3} [\w-]+::.+"
    assert all(re.fullmatch(pattern, line) for line in commands)
    assert any("file=tests/gate/net.py" in line for line in commands)
    # One command per line, and nothing of a name begins another.
    assert lines[-1].startswith("gate: FAIL: ")
    audit = replace(report, settings={k: v for k, v in report.settings.items() if k != "gate"})
    assert github.render(audit).splitlines()[-1].startswith(f"audit: {report.verdict.upper()}: ")
    assert len(github.render(wild).splitlines()) == len(folded.notes(wild)) + 1
    assert not re.search(r"\n::error::k", github.render(wild))


def test_junit_has_one_test_case_per_rule(report: Report, wild: Report) -> None:
    for one in (report, wild):
        root = ElementTree.fromstring(junit.render(one))
        cases = root.findall("./testsuite/testcase")
        assert [c.get("name", "").split()[0] for c in cases] == [r.code for r in one.rules]
        assert len(root.findall(".//failure")) == int(root.get("failures", "-1")) > 0
        assert len(root.findall(".//skipped")) == int(root.get("skipped", "-1")) > 0
        assert int(root.get("tests", "0")) == len(one.rules) == len(RULES)


def test_pull_request_comment_has_verdict_and_one_row_per_rule(
    report: Report, wild: Report
) -> None:
    text = comment.render(report)
    assert text.startswith("### ✗ jacdiag gate: FAIL") and "| JD203 depth-scaling |" in text
    rows = [line for line in comment.render(wild).splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_locations_fall_back_to_the_factory(tmp_path: Path) -> None:
    shutil.copy(Path(net.__file__), tmp_path / "net.py")
    finding = Finding(
        "JD203", "warning", ["h.0.mlp"], "x", {"parameters": ["h.0.mlp.c_proj.weight"]}
    )
    [one] = located([finding], torch.nn.Linear(2, 2), f"{tmp_path / 'net.py'}:model", tmp_path)
    lines = (tmp_path / "net.py").read_text().splitlines()
    assert one.evidence["location"] == {
        "file": "net.py",
        "line": 1 + next(k for k, line in enumerate(lines) if line.startswith("def model")),
        "what": "factory",
        "name": "model",
    }
    (tmp_path / "config.json").write_text("{}")
    [one] = located([finding], None, f"hf:{tmp_path}", tmp_path)
    assert one.evidence["location"] == {
        "file": "config.json",
        "line": 1,
        "what": "file",
        "name": "",
    }
    [one] = located([finding], None, "nowhere.at:all", tmp_path)
    assert "location" not in one.evidence


def with_place(report: Report, **place: Any) -> Report:
    """Return a report whose one finding is shown at a place."""
    finding = Finding("JD203", "warning", ["h.0.mlp"], "too large", {"location": place})
    return replace(report, findings=[finding])


def rendered(report: Report) -> list[str]:
    """Return a report in every format that shows places."""
    return [form.render(report) for form in (github, junit, sarif, comment)]


def test_a_place_is_said_to_be_no_more_exact_than_it_is(report: Report) -> None:
    at_class = with_place(report, file="m.py", line=7, what="class", name="MLP")
    assert all("class MLP" in text for text in rendered(at_class))
    at_draw = with_place(report, file="m.py", line=9, what="draw", name="h.0.mlp.weight")
    assert not any("shown at" in text or "class MLP" in text for text in rendered(at_draw))
    assert "file=m.py,line=9," in github.render(at_draw)
    assert 'file="m.py" line="9"' in junit.render(at_draw)

    # Of a file alone no line is named.
    at_file = with_place(report, file="config.json", line=1, what="file", name="")
    assert "file=config.json,title=" in github.render(at_file)
    assert 'file="config.json">' in junit.render(at_file)
    assert "| config.json |" in comment.render(at_file)


def test_every_format_says_what_to_do_next(report: Report) -> None:
    """The rule's page for every finding, and the next command for the report as a whole."""
    for text in (github.render(report), junit.render(report), sarif.render(report)):
        for finding in report.findings:
            assert f"jacdiag explain {finding.code}" in text
    for text in (junit.render(report), sarif.render(report), comment.render(report)):
        assert next_step(report).command in text


def test_a_changed_figure_comes_with_the_command_that_accepts_it(report: Report) -> None:
    command = "jacdiag gate net.py:model --baseline init.json"
    settings = {**report.settings, "command": command}
    refused = with_place(replace(report, settings=settings))
    changed = [replace(refused.findings[0], code="JD110", level="error")]
    for form in (github, junit, sarif):
        text = form.render(replace(refused, findings=changed))
        assert f"if the change is meant: {command} --write-baseline" in text
        assert "--write-baseline" not in form.render(refused)


def test_an_undecided_rule_has_a_next_step_in_junit(report: Report) -> None:
    rules = [replace(rule, status="unknown") for rule in report.rules if rule.code == "JD101"]
    text = junit.render(replace(report, rules=rules, findings=[]))
    assert "<error" in text and "jacdiag explain JD101" in text


@pytest.mark.parametrize("name", ["github", "sarif", "junit", "markdown", "json"])
def test_formats_on_the_command_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(Path(net.__file__), tmp_path / "net.py")
    monkeypatch.chdir(tmp_path)
    args = [
        "gate",
        "net.py:model",
        "--seq",
        "16",
        "--batch",
        "1",
        "--seeds",
        "1",
        "--select",
        "JD2",
    ]
    code = main([*args, "--format", name])
    left = capsys.readouterr()
    reads: dict[str, Callable[[str], Any]] = {
        "sarif": json.loads,
        "json": json.loads,
        "junit": ElementTree.fromstring,
    }
    assert code == 0 and left.out and reads.get(name, str)(left.out) is not None
    assert "gate: PASS" in left.err
