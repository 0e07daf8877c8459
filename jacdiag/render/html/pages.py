"""Pages of reports, comparisons, backtests and runs as HTML.

A page is one file that loads nothing from elsewhere: style, script and pictures are inside it. The
names in it come out of files that somebody else made. So every text is escaped, and the page's
policy allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jacdiag._version import __version__
from jacdiag.records import Report
from jacdiag.render.content.compared_curves import compared_curves
from jacdiag.render.content.run_alerts import alerts_of_run, report_at_start
from jacdiag.render.content.sentences import legible
from jacdiag.render.content.severity import SIGNS
from jacdiag.render.content.sublayer_table import Grid
from jacdiag.render.html.depth_chart import charts_of, charts_of_comparison
from jacdiag.render.html.markdown_text import to_html
from jacdiag.render.view import ReportView, build_view
from jacdiag.rules.page import PAGES, read_page

if TYPE_CHECKING:
    from jacdiag.records.backtest import BacktestReport
    from jacdiag.records.run_log import RunLog
    from jacdiag.render.content.compared_models import ComparisonView
    from jacdiag.render.content.run_flights import RunFlight

_FOLDER = Path(__file__).parent / "templates"
_NUMBER = re.compile(r"-?[\d,]*\.?\d+(?:e[+-]?\d+)?", re.IGNORECASE)
_WORDS_OF_VERDICT = {
    "pass": "rules applied, and nothing above info fired",
    "warn": "a warning fired",
    "fail": "an error fired",
    "unknown": "a rule is undecided, a norm could not be measured, or no rule applied",
    "observed": "a trained model that is compared with nothing",
}


@dataclass(frozen=True)
class PageCell:
    """A cell of a table: its text, what it is sorted by, and the mark of a rule."""

    text: str
    key: str
    level: str = ""
    sign: str = ""


@dataclass(frozen=True)
class PageRow:
    """A row of the table of sub-layers. A folded one is left out in print."""

    cells: list[PageCell]
    folded: bool


# -- pages -----------------------------------------------------------------------------------------
def report_page(report: Report) -> str:
    """Return the page of a report, of an audit or of a gate.

    Args:
        report: of either tier and state.

    Example:
        >>> "<html" in report_page(report)                           # doctest: +SKIP
        True
    """
    # 1. All rows are in the page. Those that the terminal folds are left out where room is scarce.
    view = build_view(report, all_rows=True)
    folded_view = build_view(report)
    brief = {row.name for row in folded_view.rows.rows}

    # 2. The rules that the page explains.
    codes = [line.code for line in view.verdict.lines if line.code]
    codes += [note.code for note in view.gate.notes]
    return _render(
        "report.html.j2",
        title=f"{view.header.name}: {view.verdict.word}",
        view=view,
        meaning=_WORDS_OF_VERDICT[view.verdict.word],
        charts=charts_of(view.depth),
        titles=[column.title for column in view.rows.columns],
        rows=_rows(view.rows, brief),
        folded=len(view.rows.rows) - len(brief),
        remedies=_remedies(view),
        rules=_rule_texts(codes),
        is_gate=view.gate.command == "gate",
    )


def report_in_notebook(report: Report) -> str:
    """Return what a notebook shows of a report: verdict, picture, table, what to do.

    It is a part of a page, without a script. Its style reaches no other cell.

    Args:
        report: of either tier and state.
    """
    view = build_view(report, all_rows=True)
    return (
        _environment()
        .get_template("notebook.html.j2")
        .render(
            style=Markup(_read("notebook.css")),
            view=view,
            charts=charts_of(view.depth),
            titles=[column.title for column in view.rows.columns],
            rows=_rows(view.rows, set()),
        )
    )


def comparison_page(view: ComparisonView) -> str:
    """Return the page of two models compared.

    Args:
        view: of the comparison.
    """
    from jacdiag.render.formats.diff import HEAD, rows
    from jacdiag.render.plots.diff_plot import picture_of_comparison

    # 1. The pictures: figures over depth, and the figures that differ.
    picture = Markup("")
    if view.shown_pairs():
        picture = _inline_svg(picture_of_comparison(view, ".svg"))

    # 2. The table of all figures.
    figure_rows = []
    for pair, cells in zip(view.pairs, rows(view.pairs), strict=True):
        figure_rows.append((pair.parts, [_cell(str(legible(text))) for text in cells[:-1]]))
    return _render(
        "comparison.html.j2",
        title=" and ".join(model.name for model in view.models),
        view=view,
        charts=charts_of_comparison(compared_curves(view.pairs)),
        picture=picture,
        titles=HEAD[:-1],
        rows=figure_rows,
    )


def backtest_page(report: BacktestReport, lead: int) -> str:
    """Return the page of a backtest.

    Args:
        report: of a backtest.
        lead: steps before an event from which an alert counts.
    """
    from jacdiag.render import backtest as layout

    held_out = [layout.held_out_lines(entry) for entry in report.held_out]
    return _render(
        "backtest.html.j2",
        title=f"backtest of {len(report.bad)} runs",
        summary=layout.summary(report),
        titles=layout.HEAD,
        rows=[[_cell(text) for text in row] for row in layout.rows(report, every=True)],
        detectors=[layout.detected(detector, lead) for detector in report.detectors],
        held_out=held_out,
        picture=_inline_svg(layout.picture(report, ".svg")),
    )


def run_page(
    runs: dict[str, RunLog],
    picture: bytes,
    flights: Mapping[str, Mapping[int, RunFlight]] = MappingProxyType({}),
) -> str:
    """Return the page of one run, or of several drawn over each other.

    Args:
        runs: name -> log.
        picture: of the runs, as SVG.
        flights: name -> flights of the run, by the step of the alert.
    """
    sections = []
    for name, run in runs.items():
        sections.append(_run_section(name, run, flights.get(name, {})))
    codes: list[str] = []
    for section in sections:
        codes += [str(row["code"]) for row in [*section.alerts, *section.findings]]
    return _render(
        "run.html.j2",
        title=" and ".join(section.name for section in sections),
        runs=sections,
        picture=_inline_svg(picture),
        rules=_rule_texts(codes),
    )


@dataclass(frozen=True)
class RunSection:
    """What a page says of one run.

    Attributes:
        name: of the run.
        header: the first line of its log.
        last_step: the number of the last step; None without one.
        alerts, findings: lines of the log with code, level, step and what.
        flights: step of an alert -> lines on its flight.
    """

    name: str
    header: dict[str, Any]
    last_step: int | None
    alerts: list[dict[str, Any]]
    findings: list[dict[str, Any]]
    flights: dict[int, list[str]]


def _run_section(name: str, run: RunLog, flights: Mapping[int, RunFlight]) -> RunSection:
    last_step = None
    if run.steps:
        last_step = run.steps[-1]["step"]
    return RunSection(
        name=legible(name),
        header=legible(dict(run.header)),
        last_step=last_step,
        alerts=[legible(dict(row)) for row in alerts_of_run(run)],
        findings=[legible(dict(row)) for row in report_at_start(run)],
        flights={step: legible(flight.lines) for step, flight in flights.items()},
    )


# -- parts of pages --------------------------------------------------------------------------------
def _rows(grid: Grid, brief: set[str]) -> list[PageRow]:
    """Return the rows of the table of sub-layers, with the marks of the rules."""
    rows = []
    for place, record in enumerate(grid.rows):
        cells = []
        for column in grid.columns:
            level = column.levels[place]
            cells.append(_cell(column.cells[place].strip(), level))
        rows.append(PageRow(cells, folded=record.name not in brief))
    return rows


def _cell(text: str, level: str = "") -> PageCell:
    """Return a cell. Numbers are sorted by their value, other texts as texts."""
    number = _NUMBER.match(text)
    key = text
    if number is not None:
        key = number.group().replace(",", "")
    return PageCell(text, key, level, SIGNS[level])


def _remedies(view: ReportView) -> Markup:
    """Return the remedies with their code; "" if none was tried."""
    if not view.remedies:
        return Markup("")
    _title, _, text = view.remedy_document.partition("\n")
    return to_html(text)


def _rule_texts(codes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the page of each rule that fired, in the order of the codes."""
    texts: dict[str, dict[str, Any]] = {}
    for code in codes:
        has_page = (PAGES / f"{code}.md").is_file()
        if code in texts or not has_page:
            continue

        page = read_page(code)
        texts[code] = {
            "summary": page.summary,
            "sections": [
                ("What it measures", to_html(page.what)),
                ("Why it matters", to_html(page.why)),
                ("What to do", to_html(page.remedy)),
            ],
        }
    return texts


def _inline_svg(picture: bytes) -> Markup:
    """Return a picture that matplotlib wrote as the element that HTML takes."""
    text = picture.decode("utf-8")
    return Markup(text[text.index("<svg") :])


# -- templates -------------------------------------------------------------------------------------
def _render(template: str, **values: Any) -> str:
    """Fill a template.

    Args:
        template: its name in the folder `templates`.
        values: what it shows. Texts are escaped.
    """
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_read("page.css")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            version=__version__,
            **values,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
