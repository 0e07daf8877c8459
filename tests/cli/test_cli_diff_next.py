"""What `jacdiag diff` says to do next."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done
from render import synthetic

from jacdiag.records import Report

pytestmark = pytest.mark.check("jacdiag diff")

Run = Callable[..., Done]


def written(report: Report, path: Path) -> Path:
    """Write a report as `--json` does."""
    path.write_text(json.dumps(report.to_dict()), encoding="utf-8")
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return written(synthetic.vanilla(2), tmp_path / "a.json")


def test_figures_that_differ_are_explained_in_plain_words(
    jd: Run, first: Path, tmp_path: Path
) -> None:
    second = written(synthetic.clean(2), tmp_path / "b.json")
    done = jd("diff", first, second)
    assert done.code == 1
    model_a, model_b, _, head, *_, verdict, step = done.out.splitlines()
    assert model_a.startswith(f"A  {first}") and model_b.startswith(f"B  {second}")
    assert head.split()[0] == "layer" and head.split()[-1] == "differs"
    assert "shortcut std" in done.out and "shortcut_std" not in done.out
    assert verdict.startswith("they differ first ")
    assert step == "next: jacdiag explain columns   says what each figure and column means"


def test_figures_that_agree_are_shown_on_request(jd: Run, first: Path) -> None:
    done = jd("diff", first, first)
    assert done.code == 0
    *_, verdict, step = done.out.splitlines()
    assert verdict.startswith("none of ") and verdict.endswith("differs beyond its interval")
    assert step == f"next: jacdiag diff {first} {first} --all   shows the figures that agree too"
    assert "--all" not in jd("diff", first, first, "--all").out


def test_a_model_that_shares_nothing_is_looked_at(jd: Run, first: Path, tmp_path: Path) -> None:
    empty = dataclasses.replace(synthetic.vanilla(2), sublayers=[])
    second = written(empty, tmp_path / "b.json")
    done = jd("diff", second, second)
    assert "nothing in one model has a counterpart in the other" in done.out
    assert "next: jacdiag sites SOURCE " in done.out  # a report is no model to look at


def test_machines_get_no_next_line(jd: Run, first: Path) -> None:
    assert "next:" not in jd("diff", first, first, "--format", "markdown").out
    json.loads(jd("diff", first, first, "--format", "json").out)


def trained_report(path: Path, tokens: str) -> Path:
    """Write the report of a trained model that was measured on these tokens."""
    report = synthetic.trained(2)
    assert report.probe is not None
    is_random = tokens == "random"
    probe = dataclasses.replace(report.probe, tokens=tokens, off_distribution=is_random)
    source = {**report.source, "step": 1200}
    return written(dataclasses.replace(report, probe=probe, source=source), path)


def test_each_model_is_said_with_step_state_and_probe(jd: Run, first: Path, tmp_path: Path) -> None:
    second = trained_report(tmp_path / "b.json", "random")
    done = jd("diff", first, second)
    head = done.out.splitlines()[:2]
    assert "step 0, init" in head[0]
    assert "step 1,200, trained" in head[1] and "random tokens" in head[1]
    models = json.loads(jd("diff", first, second, "--format", "json").out)["models"]
    assert [model["step"] for model in models] == [0, 1200]
    page = jd("diff", first, second, "--format", "markdown").out
    assert "step 1,200, trained, probe: " in page.splitlines()[3]


def test_a_random_probe_of_a_trained_model_is_said(jd: Run, first: Path, tmp_path: Path) -> None:
    warning = "note: B is trained and measured on random tokens"
    second = trained_report(tmp_path / "b.json", "random")
    assert warning in jd("diff", first, second).out
    # Nothing is said of an initialized model, nor of one that was measured on text.
    assert "random tokens, unlike" not in jd("diff", first, first).out
    second = trained_report(tmp_path / "c.json", "text.txt")
    assert "random tokens, unlike" not in jd("diff", first, second).out
