"""Every column of the tables of `audit` and `diff` is explained, and nothing else is."""

from __future__ import annotations

import dataclasses
import re

import pytest
from render import synthetic

from jacdiag.comparison.match import FIGURES
from jacdiag.records import AgainstRecord, Report
from jacdiag.records.report import ProbeSpread
from jacdiag.render.content.columns import COLUMNS, DIFF_COLUMNS, facts_of, find_column, title_of
from jacdiag.render.content.sublayer_table import build, explain_marks
from jacdiag.render.formats import diff
from jacdiag.rules import EVERY
from jacdiag.rules.thresholds import load_thresholds

pytestmark = pytest.mark.check("jacdiag explain")


def over_probes(report: Report) -> Report:
    """The same report, measured on three probes."""
    spread = ProbeSpread(1.0, 2.0, [1.0, 1.5, 2.0])
    rows = [
        dataclasses.replace(row, over_probes={"branch_norm": spread}) for row in report.sublayers
    ]
    settings = {**report.settings, "probes": {"count": 3, "verdicts": ["warn"] * 3}}
    return dataclasses.replace(report, sublayers=rows, settings=settings)


def against(report: Report) -> Report:
    """The same report, compared with an earlier model."""
    return dataclasses.replace(report, against=AgainstRecord("earlier.pt", "trained", compared=4))


def shown_columns() -> dict[str, str]:
    """Key -> title of every column in reports of every kind."""
    reports = [
        over_probes(synthetic.vanilla(2)),
        against(synthetic.trained(2)),
        synthetic.post(2),
        synthetic.weights_tier(2),
    ]
    columns = {}
    for report in reports:
        for column in build(report).columns:
            columns[column.key] = re.sub(r"\d+", "N", column.title)
    return columns


def test_every_column_of_the_audit_is_explained_and_every_explained_one_can_be_shown() -> None:
    assert shown_columns() == {column.key: column.title for column in COLUMNS}


def test_every_column_of_a_comparison_is_explained() -> None:
    assert tuple(column.title for column in DIFF_COLUMNS) == diff.HEAD
    figures = next(column for column in DIFF_COLUMNS if column.key == "figure")
    for figure in FIGURES:
        assert title_of(figure) in figures.meaning


def test_titles_are_unique_and_found_by_title_or_key() -> None:
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)
    for column in COLUMNS:
        assert find_column(column.title.upper()) is column
        assert find_column(column.key) is column
    assert find_column("JD102") is None


def test_an_explanation_names_rules_that_exist_and_their_thresholds() -> None:
    codes = {rule.code for rule in EVERY}
    for column in (*COLUMNS, *DIFF_COLUMNS):
        assert set(column.rules) <= codes
        assert column.meaning.endswith(".")
    limits = load_thresholds().limits("norm_gain")
    column = find_column("norm gain")
    assert column is not None
    facts = facts_of(column)
    assert (
        f"good: at most {limits.info}; warning above {limits.warning} (pre-norm at init)" in facts
    )
    # A figure that no rule compares with a number has no good value.
    bound = find_column("paper's bound")
    assert bound is not None and not any("good" in fact for fact in facts_of(bound))


def test_marks_are_explained_below_a_table_that_has_some() -> None:
    marked, clean = build(synthetic.vanilla(2)), build(synthetic.clean(2))
    assert explain_marks(marked, marked.columns) == "a mark means that a rule fired: ▲ warning"
    assert explain_marks(clean, clean.columns) == ""
    # Columns with marks that have no room are not in the table.
    unmarked = [column for column in marked.columns if not column.marked]
    assert explain_marks(marked, unmarked) == ""
    # A mark of its own for what is open.
    open_column = dataclasses.replace(marked.columns[-1], levels=["undecided"] * 4)
    assert explain_marks(clean, [open_column]) == "? means that a rule could not decide"
