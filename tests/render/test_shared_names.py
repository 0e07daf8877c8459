"""A layer that is applied at several depths has one name in everything that is shown."""

from __future__ import annotations

import dataclasses
import io

from render import synthetic
from render.test_plot import shared
from rich.console import Console

from jacdiag.records import Finding
from jacdiag.render.content.shared_names import ShownNames
from jacdiag.render.formats.markdown import render
from jacdiag.render.html.pages import report_page
from jacdiag.render.terminal.report import print_report


def printed(report: object) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as held:
        print_report(report, console)  # type: ignore[arg-type]
    return held.get()


def test_terminal_markdown_and_page_name_the_depth() -> None:
    what = "branch norm 90 at attention@5, and 2 at attention (info)"
    finding = Finding("JD103", "warning", ["attention@5"], what, {}, "", "")
    report = dataclasses.replace(shared(6), findings=[finding])
    for text in (printed(report), render(report), report_page(report)):
        assert "attention at depth 4 (call 5)" in text
        assert "attention@" not in text
    assert "2 at attention at depth 0 (call 1)" in printed(report)


def test_the_kind_of_a_sublayer_is_no_name() -> None:
    kinds = {row.kind for row in shared(6).sublayers}
    text = printed(shared(6))
    assert kinds == {"attention", "mlp"}
    assert "of uniform attention at depth" not in text


def test_names_that_no_call_shares_stay() -> None:
    names = ShownNames({"attention": 0, "h.1.mlp": 1})
    assert names.in_text("norm 3 at attention, a@2 of h.1.mlp") == (
        "norm 3 at attention, a@2 of h.1.mlp"
    )
    assert "transformer.h.0" in printed(synthetic.vanilla(2))
