"""`--remedies` and `--patch`, of a model that fails for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rig import files

Run = Any
SMALL = (
    '{"recipe": "vanilla", "n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 128, '
    '"block_size": 32}'
)
SOURCE = (
    "jacdiag.sources.gpt:build",
    "--model-args",
    SMALL,
    "--batch",
    "1",
    "--seq",
    "16",
    "--decide",
)


def test_what_to_do_was_tried_and_the_patch_is_written(jd: Run, tmp_path: Path) -> None:
    done = jd("audit", *SOURCE, "--patch", "patch.md", "--json", "report.json")
    assert done.code == 0
    assert "What to do   multiply the embedding by √d = 8.00 (scaled-embed)" in done.out
    assert "tried on a copy, on seeds 0 and 1, one sequence each: worst branch norm" in done.out
    assert "--patch FILE" not in done.out  # this command writes it
    patch = (tmp_path / "patch.md").read_text(encoding="utf-8")
    assert (
        "### PyTorch" in patch
        and "output * 8.0" in patch
        and "--embedding-init-method-std" in patch
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [r["name"] for r in report["remedies"] if r["recommended"]] == ["scaled-embed"]
    fixed = [f for f in report["findings"] if f["level"] == "warning"]
    assert fixed and all(
        f["verified"] and f["fix"] == report["remedies"][0]["title"] for f in fixed
    )


def test_without_trying_nothing_is_called_a_remedy(jd: Run, tmp_path: Path) -> None:
    done = jd("audit", *SOURCE, "--remedies", "none", "--patch", "patch.md")
    assert done.code == 0
    assert "What to do   the page of JD102 says what helps   jacdiag explain JD102" in done.out
    assert "√d" not in done.out
    patch = (tmp_path / "patch.md").read_text()
    assert (
        "None was tried: JD102, JD103 ask for one, but remedies are switched off (--remedies none)"
        in patch
    )


def test_a_gate_tries_when_it_is_asked_to(jd: Run) -> None:
    args = ("gate", *SOURCE[:-1], "--seeds", "2", "--profile", "paper")
    silent, asked = jd(*args), jd(*args, "--remedies", "first", "--format", "markdown")
    assert silent.code == asked.code == 1
    assert "try:" not in silent.out
    assert "**What to do**" in asked.out and "multiply the embedding by √d" in asked.out
    assert "try: multiply the embedding by √d" in asked.err


def test_a_file_for_the_patch_is_refused_before_the_work(jd: Run, tmp_path: Path) -> None:
    for args, message in (
        (["--patch", "no/such/x.md"], "its folder does not exist"),
        (["--patch", "x.txt"], "end it in .md"),
        (["--patch", "x"], "end it in .md"),
        (["--patch", "a.json", "--json", "a.json"], "name the same file"),
    ):
        done = jd("audit", *SOURCE, *args)
        assert done.code == 2 and message in done.err
    assert files(tmp_path) == set()


def test_unknown_value_of_remedies_lists_the_allowed_ones(jd: Run) -> None:
    done = jd("audit", *SOURCE, "--remedies", "some")
    assert done.code == 2 and "'first', 'all', 'begun', 'none'" in done.err
