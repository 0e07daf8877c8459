"""Pages for a browser: complete, self-contained, and deaf to what a name would like to be."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from render import synthetic
from render.run_logs import run_log

import jacdiag
from jacdiag.comparison import compare
from jacdiag.records import Finding, Report
from jacdiag.render.content.compared_models import build_comparison_view
from jacdiag.render.html.markdown_text import to_html
from jacdiag.render.html.pages import comparison_page, report_page, run_page
from jacdiag.render.plots.run_plot import picture_of_run
from jacdiag.sources.gpt import build

pytestmark = pytest.mark.check("render")

KINDS: dict[str, Callable[[int], Report]] = {
    name: getattr(synthetic, name)
    for name in ("vanilla", "clean", "post", "trained", "weights_tier", "undecided", "broken")
}
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&lt;"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def hostile(report: Report) -> Report:
    """The same report with names that try to become elements of the page."""
    rows = [
        dataclasses.replace(row, name=f"{HOSTILE}.{k}") for k, row in enumerate(report.sublayers)
    ]
    finding = Finding("JD102", "warning", [rows[0].name], f"small at {HOSTILE}", fix=HOSTILE)
    model = dataclasses.replace(report.model, name=HOSTILE, uncovered=[HOSTILE])
    settings = {**report.settings, HOSTILE: HOSTILE, "name": HOSTILE, "command": HOSTILE}
    return dataclasses.replace(
        report, sublayers=rows, findings=[finding], model=model, settings=settings
    )


def assert_harmless(page: str) -> None:
    """No script but the page's own, no handler in an attribute, nothing that is loaded."""
    elements = Elements(page)
    assert elements.count("script") == 1
    for tag in ("img", "iframe", "link", "object", "embed", "base", "form"):
        assert elements.count(tag) == 0, tag
    for tag, attributes in elements.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;")), (tag, name, value)


@pytest.mark.parametrize("layers", [2, 96])
@pytest.mark.parametrize("name", KINDS)
def test_page_shows_every_sublayer_and_the_verdict(name: str, layers: int) -> None:
    report = KINDS[name](layers)
    page = report_page(report)
    elements = Elements(page)
    assert report.verdict in elements.text
    for row in report.sublayers:
        assert row.name in elements.text
    assert_harmless(page)
    assert len(page) < 1_000_000


@pytest.mark.parametrize("name", KINDS)
def test_script_in_a_name_stays_text(name: str) -> None:
    report = hostile(KINDS[name](2))
    page = report_page(report)
    assert_harmless(page)
    assert "<script>alert(1)</script>" in Elements(page).text


def test_script_in_a_name_stays_text_in_comparison_and_run() -> None:
    first, second = hostile(synthetic.vanilla(2)), hostile(synthetic.clean(2))
    comparison = compare(first, second)
    names = HOSTILE, HOSTILE
    view = build_comparison_view(comparison.pairs, [HOSTILE], (first, second), names)
    assert_harmless(comparison_page(view))
    assert comparison.pairs, "nothing was compared"

    run = run_log(300, spike=200)
    page = run_page({HOSTILE: run}, picture_of_run({HOSTILE: run}, ".svg"))
    assert_harmless(page)


def test_markdown_cannot_bring_html_or_a_script_link() -> None:
    page = to_html("<script>alert(1)</script> [x](javascript:alert(1)) ![y](http://z/y.png)")
    elements = Elements(page)
    assert elements.count("script") == 0
    assert elements.count("img") == 0
    assert "javascript:" not in str([attributes for _, attributes in elements.elements])


def test_point_of_the_chart_says_its_sublayer_and_interval() -> None:
    report = synthetic.vanilla(3)
    row = report.sublayers[1]
    assert row.branch_norm is not None
    titles = re.findall(r"<title>([^<]*)</title>", report_page(report))
    shown = [title for title in titles if title.startswith(f"{row.name}:")]
    assert any(str(row.branch_norm) in title for title in shown), shown


def test_rule_that_fired_is_explained_and_no_other_is() -> None:
    report = synthetic.vanilla(2)
    fired = {finding.code for finding in report.findings}
    explained = set(re.findall(r'id="rule-(JD\d+)"', report_page(report)))
    assert fired, "the report has no finding"
    assert fired <= explained
    assert "JD302" not in explained
    assert not re.findall(r'id="rule-', report_page(synthetic.clean(2)))


def test_page_does_not_say_that_conditions_hold_which_are_not_met() -> None:
    clean = synthetic.clean(2)
    report = dataclasses.replace(
        clean,
        verdict="pass",
        conditions=dataclasses.replace(clean.conditions, large_shortcut="partly"),
    )
    assert "conditions hold" not in report_page(report)


def test_numbers_sort_by_value() -> None:
    page = report_page(synthetic.vanilla(2))
    keys = re.findall(r'data-key="([^"]*)"', page)
    norm = synthetic.vanilla(2).sublayers[0].branch_norm
    assert norm is not None
    ends = str(norm).split(" to ")
    assert ends[0].replace(",", "") in keys


def test_same_report_gives_the_same_page() -> None:
    assert report_page(synthetic.vanilla(4)) == report_page(synthetic.vanilla(4))


@pytest.mark.parametrize("name", KINDS)
def test_notebook_shows_the_verdict_and_runs_no_script(name: str) -> None:
    shown = hostile(KINDS[name](2))._repr_html_()
    elements = Elements(shown)
    assert elements.count("script") == 0
    assert elements.count("img") == 0
    assert KINDS[name](2).verdict in elements.text


def test_notebook_shows_the_sublayers_that_were_found() -> None:
    torch.manual_seed(0)
    model = build("vanilla", n_layer=2, n_head=2, n_embd=16, vocab_size=32, block_size=8)
    sites = jacdiag.sites(model, torch.randint(32, (1, 8)))
    elements = Elements(sites._repr_html_())
    assert elements.count("tr") == 1 + len(sites)
    for site in sites:
        assert site.name in elements.text


# -- in a browser ----------------------------------------------------------------------------------
def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a headless browser."""
    assert BROWSER is not None
    profile = path.parent / "profile"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--v=0", *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@needs_browser
def test_browser_runs_the_page_without_an_error_and_runs_no_hostile_script(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report_page(hostile(synthetic.vanilla(126))), encoding="utf-8")
    result = browse(page, "--dump-dom")
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    # The page's own script has run: it is the one that adds these buttons.
    assert 'class="copy"' in result.stdout
    assert page.stat().st_size < 1_000_000


@needs_browser
def test_browser_prints_two_pages_for_126_layers(tmp_path: Path) -> None:
    page, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write_text(report_page(synthetic.vanilla(126)), encoding="utf-8")
    browse(page, f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    pages = len(re.findall(rb"/Type /Page\b(?!s)", printed.read_bytes()))
    assert 1 <= pages <= 2
