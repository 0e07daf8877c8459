"""The conditions are shown as soon as they are known, and the figures stay what they are."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from jacdiag_cli.progress import Bar, DrawnBar
from rich.console import Console
from torch import nn

import jacdiag
from jacdiag.records import Conditions, JudgedSublayers, Report
from jacdiag.render.content.first_look import first_look_lines
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded


class Display(Bar):
    """A display that keeps what it is to show."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.looks: list[Report] = []

    def show_first_look(self, report: Report) -> None:
        self.looks.append(report)


def small_gpt(recipe: str = "gpt2") -> nn.Module:
    with seeded(0):
        return gpt.build(recipe, n_layer=2, n_embd=32, n_head=2, vocab_size=64, block_size=16)


@cache
def shown() -> tuple[Report, list[Report]]:
    display = Display()
    report = jacdiag.audit(small_gpt(), seq=16, state="init", progress=display)
    return report, display.looks


def without_cost(report: Report) -> dict[str, Any]:
    """Return the report but for what it cost, and when it was made."""
    facts = report.to_dict()
    for key in ("cost", "created"):
        del facts[key]
    for row in facts["sublayers"]:
        del row["cost"]
    return facts


def test_a_display_changes_no_figure() -> None:
    report, _ = shown()
    assert without_cost(report) == without_cost(
        jacdiag.audit(small_gpt(), seq=16, state="init", progress=Bar(lambda: None))
    )


def test_the_first_look_costs_what_the_report_says() -> None:
    report, looks = shown()
    plain = jacdiag.audit(small_gpt(), seq=16, state="init")
    assert report.cost is not None and plain.cost is not None
    spent = sum(
        norm.products
        for row in looks[1].sublayers
        for norm in {id(n): n for n in (row.branch_norm, row.core_norm, row.residual_norm)}.values()
        if norm is not None
    )
    assert spent > 0
    assert report.cost.products == plain.cost.products + spent
    assert report.cost.phases["first look"] > 0


def test_one_forward_decides_the_shortcut_and_nothing_else() -> None:
    _, looks = shown()
    everywhere = JudgedSublayers(judged=4, of=4)
    names = [row.name for row in looks[0].sublayers]
    nowhere = JudgedSublayers(judged=0, of=4, not_judged={"not measured": names})
    assert looks[0].conditions == Conditions("unknown", "not met", nowhere, everywhere)
    (line,) = first_look_lines(looks[0])
    assert line == "first look: large shortcut not met; small sub-layers not measured yet"


def test_the_second_look_has_the_conditions_of_the_report() -> None:
    report, looks = shown()
    assert len(looks) == 2
    assert looks[1].conditions == report.conditions
    assert "large shortcut not met" in first_look_lines(looks[1])[0].lower()
    for wide, narrow in zip(looks[1].sublayers, report.sublayers, strict=True):
        assert wide.branch_norm is not None and narrow.branch_norm is not None
        assert wide.branch_norm.lower <= narrow.branch_norm.upper
        assert narrow.branch_norm.lower <= wide.branch_norm.upper


@pytest.mark.parametrize("recipe", ["scaled-embed", "xavier"])
def test_the_conditions_are_those_of_the_report_for_few_products(recipe: str) -> None:
    """A branch norm decides no condition: its interval stays wide, at one product."""
    display = Display()
    report = jacdiag.audit(small_gpt(recipe), seq=16, state="init", progress=display)
    first_look = display.looks[1]
    assert first_look.conditions == report.conditions
    for row in first_look.sublayers:
        assert row.branch_norm is not None and row.branch_norm.products == 1


def test_an_audit_that_stops_when_decided_is_measured_once() -> None:
    display = Display()
    jacdiag.audit(small_gpt(), seq=16, state="init", decide=True, progress=display)
    assert len(display.looks) == 1


def test_no_line_is_shown_of_a_shortcut_that_is_not_decided() -> None:
    _, looks = shown()
    unknown = replace(looks[0], conditions=Conditions("unknown", "unknown"))
    assert first_look_lines(unknown) == []


def test_nothing_is_shown_of_weights_that_are_not_finite() -> None:
    broken = small_gpt()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    display = Display()
    jacdiag.audit(broken, seq=16, state="init", progress=display)
    assert display.looks == []


def test_a_terminal_shows_the_lines_below_the_bar() -> None:
    _, looks = shown()
    written = io.StringIO()
    drawn = DrawnBar(Console(file=written, force_terminal=True, width=100), "reading", lambda: None)
    with drawn.display:
        drawn.start(3, "measuring")
        drawn.show_first_look(looks[1])
    assert "small sub-layers met" in written.getvalue()
