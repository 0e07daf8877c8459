"""`jacdiag rules` and `jacdiag explain`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import ROOT, Done, on_terminal
from jacdiag_cli.streams import TableColumn, grid

from jacdiag.rules import EVERY

pytestmark = pytest.mark.check("jacdiag rules", "jacdiag explain")

Run = Callable[..., Done]
CODES = [rule.code for rule in EVERY]


def test_every_rule_has_a_line(jd: Run) -> None:
    done = jd("rules")
    assert (done.code, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    assert head.split("  ")[0] == "code"
    assert [line.split()[0] for line in lines if line.startswith("JD")] == CODES
    for rule, line in zip(EVERY, lines, strict=False):
        assert rule.name in line and rule.level in line and rule.summary in line


def test_rules_command_prints_json_with_every_code(jd: Run) -> None:
    rows = json.loads(jd("rules", "--format", "json").out)
    assert [row["code"] for row in rows] == CODES
    assert set(rows[0]) == {"code", "name", "level", "states", "placements", "summary"}
    assert all(
        row["level"] in ("info", "warning", "error") and row["states"] and row["placements"]
        for row in rows
    )


@pytest.mark.parametrize("columns", [20, 50, 80])
def test_rules_on_a_narrow_terminal(tmp_path: Path, columns: int) -> None:
    code = "\n".join(
        [
            "import sys",
            f"sys.path[:0] = {[str(ROOT), str(ROOT / 'cli')]!r}",
            "from jacdiag_cli.main import main",
            "sys.exit(main(['rules']))",
        ]
    )
    done = on_terminal(code, tmp_path, columns=columns)
    assert done.code == 0
    rows = [line for line in done.out.splitlines() if line.startswith("JD")]
    assert len(rows) == len(CODES) and all(len(row) <= columns for row in rows)
    told = " ".join(done.out.split())
    for title in ("at most", "applies to", "what it says"):  # what is not there is named
        assert (title in done.out.splitlines()[0]) != (title in told.partition("left out: ")[2])
    assert ("or --format json shows all" in told) == ("left out" in told)


def test_a_table_names_the_columns_that_it_left_out() -> None:
    columns = [
        TableColumn("name", ["a"]),
        TableColumn("long", ["x" * 30], 2),
        TableColumn("odd", ["y" * 20], 1),
    ]
    assert grid(columns, 60).splitlines()[2:] == []
    assert grid(columns, 50).splitlines()[2:] == [
        "1 column left out: odd; a wider terminal or",
        "  --format markdown shows all",
    ]
    assert "2 columns left out: long, odd;" in grid(columns, 35).replace("\n ", "")
    assert "left out" not in grid(columns)  # piped output has them all


@pytest.mark.parametrize("code", CODES)
def test_explain_prints_every_section_of_each_rule(jd: Run, code: str) -> None:
    done = jd("explain", code.lower())
    assert (done.code, done.err) == (0, "")
    titles = [
        line for line in done.out.splitlines() if line in ("What", "Why", "Example", "Remedy")
    ]
    assert titles == ["What", "Why", "Example", "Remedy"]
    assert done.out.startswith(f"{code} ")


def test_explain_keeps_the_lines_of_an_example(jd: Run) -> None:
    from jacdiag.rules import rule

    shown = [line.strip() for line in jd("explain", "JD102").out.splitlines()]
    assert all(line.strip() in shown for line in rule("JD102").page.example.splitlines())


@pytest.mark.parametrize(
    ("asked", "closest"),
    [("JD111", "JD10"), ("102", "JD102"), ("JD9999", "JD90"), ("", "jacdiag rules")],
)
def test_explain_an_unknown_code(jd: Run, asked: str, closest: str) -> None:
    done = jd("explain", asked)
    assert (done.code, done.out) == (2, "")
    assert closest in done.err and "Traceback" not in done.err


def test_explain_takes_the_name_of_a_rule_with_spaces(jd: Run) -> None:
    by_code = jd("explain", "JD203")
    for words in (["depth-scaling"], ["depth", "scaling"], ["Depth scaling"]):
        assert jd("explain", *words).out == by_code.out


def test_light_commands_are_fast(tmp_path: Path) -> None:
    import time

    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")])}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "jacdiag_cli", "explain", "JD101"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
    )
    assert done.returncode == 0 and time.perf_counter() - begun < 2.0


def test_explain_columns_has_every_title_with_its_rules_and_thresholds(jd: Run) -> None:
    from jacdiag.render.content.columns import COLUMNS, DIFF_COLUMNS

    done = jd("explain", "Columns")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    for column in (*COLUMNS, *DIFF_COLUMNS):
        assert column.title in lines
    for word in ("symbol: ", "formula: ", "unit: ", "good: ", "read by: JD103"):
        assert f"  {word}" in done.out


@pytest.mark.parametrize("name", ["branch norm", "branch_norm", " Branch Norm "])
def test_explain_one_column_by_title_or_key(jd: Run, name: str) -> None:
    done = jd("explain", name)
    assert (done.code, done.out.splitlines()[0]) == (0, "branch norm")


def test_explain_a_rule_by_its_name(jd: Run) -> None:
    assert jd("explain", "large-shortcut").out == jd("explain", "JD102").out


def test_explain_alone_lists_what_can_be_explained(jd: Run) -> None:
    from jacdiag.render.content.columns import COLUMNS

    done = jd("explain")
    assert (done.code, done.err) == (0, "")
    words = " ".join(done.out.split())
    for topic in (*CODES, "columns", *(column.title for column in COLUMNS)):
        assert topic in words


def test_explain_an_unknown_word_names_the_list_of_topics(jd: Run) -> None:
    done = jd("explain", "banana")
    assert (done.code, done.out) == (2, "")
    assert "nothing to explain is called 'banana'" in done.err
    assert "`jacdiag explain` lists every topic" in done.err


def test_topic_of_several_words_needs_no_quotes(jd: Run) -> None:
    assert jd("explain", "core", "norm").out == jd("explain", "core norm").out
    assert "‖J_core‖" in jd("explain", "core", "norm").out


@pytest.mark.parametrize(
    ("asked", "closest"),
    [
        ("regresion", "regression"),
        ("norm gian", "norm gain"),
        ("colums", "columns"),
        ("brnch", "branch norm"),
    ],
)
def test_explain_offers_the_closest_topic(jd: Run, asked: str, closest: str) -> None:
    done = jd("explain", asked)
    assert done.code == 2
    assert closest in done.err.partition("closest: ")[2]


def test_explain_offers_nothing_for_a_word_like_no_topic(jd: Run) -> None:
    assert "closest" not in jd("explain", "zzzzqqq").err
