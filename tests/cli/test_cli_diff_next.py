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
    head, *_, verdict, step = done.out.splitlines()
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
