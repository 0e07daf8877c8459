"""A finding about a scheme says what the baseline holds for the same weights."""

from __future__ import annotations

import dataclasses

import pytest
from render import synthetic

from jacdiag.records import AgainstRecord, FiguresRecord, Finding, Report
from jacdiag.rules.baseline_values import with_baseline_values

NAME = "h.0.mlp.c_proj.weight"


def weight(std: float) -> dict[str, object]:
    return {
        "family": "normal",
        "std": std,
        "lower": 0.99 * std,
        "upper": 1.01 * std,
        "value": None,
        "role": "W_2",
    }


def report(now: float, before: float) -> Report:
    return dataclasses.replace(
        synthetic.vanilla(2),
        figures=FiguresRecord("GPT", 1, 2, 16, 1, weights={NAME: weight(now)}),
        baseline=FiguresRecord("GPT", 1, 2, 16, 1, weights={NAME: weight(before)}),
    )


def said(of: Report, code: str = "JD204", name: str = NAME) -> str:
    finding = Finding(code, "warning", [], "std 0.04, expected 0.02", {"parameters": [name]})
    [finding] = with_baseline_values([finding], of)
    return finding.what.removeprefix("std 0.04, expected 0.02")


@pytest.mark.parametrize("code", ["JD202", "JD203", "JD204", "JD205"])
def test_a_weight_that_left_the_baseline_has_its_value_named(code: str) -> None:
    assert said(report(0.04, 0.01), code) == (
        "; the baseline has std 0.0100 (JD110 compares with that)"
    )


def test_a_weight_as_in_the_baseline_is_said_to_be_accepted() -> None:
    assert said(report(0.04, 0.04)) == "; the baseline has the same std"


def test_nothing_is_said_without_a_baseline_or_of_another_weight_or_rule() -> None:
    moved = report(0.04, 0.01)
    assert said(dataclasses.replace(moved, baseline=None)) == ""
    assert said(moved, name="other.weight") == ""
    assert said(moved, code="JD206") == ""
    against = AgainstRecord("a.pt", "init")
    assert said(dataclasses.replace(moved, against=against)) == ""
