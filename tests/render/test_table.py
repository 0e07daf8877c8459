"""The screen: what a person sees of a report in a terminal of any width, and what a file or a pipe
gets.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable

import pytest
from render import synthetic
from rich.cells import cell_len
from rich.console import Console

from jacdiag.records import Finding, Interval, Report, RuleResult, SublayerRecord
from jacdiag.render.content.sublayer_table import build
from jacdiag.render.terminal.report import print_report

WIDTHS = (40, 60, 80, 100, 120, 200)
KINDS: dict[str, Callable[[int], Report]] = {
    name: getattr(synthetic, name)
    for name in ("vanilla", "clean", "post", "trained", "weights_tier", "undecided", "broken")
}
ODD_NAMES = (
    "[red]x[/red]",
    "blöcke.0.注意力.attn",
    "a" * 200,
    "x.[/]",
    ":smile:",
    "a b",
    "注" * 60,
)
MARK = re.compile("[●▲?]")
ROW = re.compile(r" +\d+  \S")


def shown(
    report: Report, width: int | None = None, *, colours: bool = False, **options: object
) -> str:
    """The screen as text: piped where no width is given, else as on a terminal so wide."""
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=width is not None,
        color_system="truecolor" if colours else None,
        no_color=not colours,
        _environ={},
    )
    print_report(report, console, **options)  # type: ignore[arg-type]
    return out.getvalue()


def rows_of(text: str) -> list[str]:
    """The lines of sub-layers: those under the head of the table that begin with a depth."""
    lines = text.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("  layer  sub-layer"))
    block = lines[start + 1 :]
    return [line for line in block[: block.index("")] if ROW.match(line)]


def with_rows(report: Report, rows: list[SublayerRecord], **changes: object) -> Report:
    return dataclasses.replace(report, sublayers=rows, **changes)  # type: ignore[arg-type]


def renamed(report: Report, names: tuple[str, ...]) -> Report:
    rows = [
        dataclasses.replace(row, name=names[k % len(names)] + f".{k}")
        for k, row in enumerate(report.sublayers)
    ]
    model = dataclasses.replace(report.model, name=names[0], uncovered=list(names))
    finding = Finding(
        "JD102",
        "warning",
        [row.name for row in rows[:5]],
        f"σ_x is small at {rows[2].name}",
        fix=names[0],
    )
    settings = {**report.settings, "name": names[-1]}
    return with_rows(report, rows, model=model, settings=settings, findings=[finding])


@pytest.mark.parametrize("width", [None, *WIDTHS])
@pytest.mark.parametrize("name", KINDS)
def test_each_sublayer_has_one_line(name: str, width: int | None) -> None:
    report = KINDS[name](12)
    rows = rows_of(shown(report, width, all_rows=True))
    assert len(rows) == len(report.sublayers)
    for line, row in zip(rows, report.sublayers, strict=True):
        assert line.split()[0] == str(row.depth) and row.name[-6:] in line
        assert re.search(r"[\d\]–●▲?]$|shortcut$", line), (
            "a row ends in a figure, or in the factor that breaks its condition"
        )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layers", [2, 12, 96])
@pytest.mark.parametrize("name", KINDS)
def test_no_line_is_wider_than_the_terminal(name: str, layers: int, width: int) -> None:
    for line in shown(KINDS[name](layers), width).splitlines():
        assert cell_len(line) <= width, line


@pytest.mark.parametrize("width", [None, *WIDTHS])
def test_columns_that_are_left_out_are_named(width: int | None) -> None:
    report = synthetic.vanilla(2)
    head, _, told = " ".join(shown(report, width).split()).partition("left out: ")
    named = (
        told.partition("; a wider terminal or --format markdown shows all")[0].split(", ")
        if told
        else []
    )
    for column in build(report).columns:
        assert (column.title in named) != (column.title in head), column.title
    assert bool(named) == (width is not None and width < 110)


@pytest.mark.parametrize("width", WIDTHS)
def test_long_and_odd_names_stay_within_the_terminal(width: int) -> None:
    for name in ("vanilla", "weights_tier", "broken"):
        text = shown(renamed(KINDS[name](4), ODD_NAMES), width)
        assert max(cell_len(line) for line in text.splitlines()) <= width
        assert len(rows_of(text)) == 8


def test_points_of_a_column_stand_below_each_other() -> None:
    base = synthetic.vanilla(4)
    sizes = (0.0283, 9.8, 44_842.0, 1234.0, 2.5e19, 0.5, 31.0, 7.0)
    rows = [
        dataclasses.replace(row, branch_norm=synthetic.interval(size, width), bound=size)
        for row, size, width in zip(base.sublayers, sizes, [0.03, 0.6] * 4, strict=True)
    ]
    for report in (with_rows(base, rows), base, synthetic.undecided()):
        lines = rows_of(shown(report, all_rows=True))
        figures = [
            column for column in build(report, all_rows=True).columns[2:] if column.key != "who"
        ]
        for column in figures:
            whole = [match for cell in column.cells if (match := re.match(r" *\[?[\d,]*\d", cell))]
            assert len({match.end() for match in whole}) <= 1, column.cells
            assert len(whole) == len(lines)
            pairs = zip(lines, [re.escape(cell.rstrip()) for cell in column.cells], strict=True)
            found = [{match.start() for match in re.finditer(cell, line)} for line, cell in pairs]
            assert set.intersection(*found), f"{column.title} begins at another place in each row"


def test_only_figures_judged_by_a_rule_are_marked() -> None:
    assert not MARK.search("".join(rows_of(shown(synthetic.clean()))))
    report = dataclasses.replace(synthetic.clean(), findings=[])
    name = report.sublayers[3].name
    for level, sign in (("error", "●"), ("warning", "▲"), ("info", "")):
        finding = Finding("JD103", level, [name], "too much")  # type: ignore[arg-type]
        marked = {
            line.split()[1]: MARK.findall(line)
            for line in rows_of(
                shown(dataclasses.replace(report, findings=[finding]), all_rows=True)
            )
        }
        assert marked.pop(name) == ([sign] if sign else [])
        assert not any(marked.values())


def test_an_interval_across_a_threshold_is_marked_as_undecided() -> None:
    base = synthetic.clean(2)
    wide = dataclasses.replace(base.sublayers[0], branch_norm=Interval(9.0, 8.9, 12.0))
    rules = [RuleResult("JD103", "unknown", 4, "amplification")]
    open_ = with_rows(base, [wide, *base.sublayers[1:]], rules=rules)
    assert re.search(r"8\.90 to 12\.0 +\?", rows_of(shown(open_))[0])
    assert not MARK.search(rows_of(shown(dataclasses.replace(open_, rules=[])))[0])


@pytest.mark.parametrize("name", KINDS)
def test_colour_is_never_the_only_sign(name: str) -> None:
    report = KINDS[name](12)
    coloured = shown(report, 120, colours=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == shown(report, 120)
    loud = re.findall(r"\x1b\[(?:1;)?3[136]m([^\x1b]+)\x1b", coloured)
    rows = "\n".join(rows_of(shown(report, 120)))
    for text in {text for text in loud if text.strip() and text in rows}:
        assert all(MARK.search(line) for line in rows.splitlines() if text in line)


def test_what_was_not_measured_is_a_dash_with_its_reason() -> None:
    text = shown(synthetic.broken())
    line = rows_of(text)[1]
    assert line.count("–") == 3 and not re.search(r"nan|None|inf| 0 ", line.split("mlp", 1)[1])
    assert "no branch norm at transformer.h.0.mlp: NaN in transformer.h.0.mlp.c_fc.weight" in text
    for name in KINDS:
        assert "None" not in shown(KINDS[name](4)) and "null" not in shown(KINDS[name](4))


def test_a_long_model_is_folded_and_shown_whole_on_request() -> None:
    report = synthetic.vanilla(96)
    text = shown(report)
    hidden = re.findall(
        r"^    \.\.\.  (\d+) more like this.*\(--all shows them\)$", text, re.MULTILINE
    )
    assert hidden and len(rows_of(text)) <= 20
    assert sum(map(int, hidden)) + len(rows_of(text)) == 192
    assert rows_of(text)[0].split()[1] == report.sublayers[0].name
    assert rows_of(text)[-1].split()[1] == report.sublayers[-1].name
    whole = shown(report, all_rows=True)
    assert [line.split()[1] for line in rows_of(whole)] == [row.name for row in report.sublayers]
    assert "more like this" not in whole


def test_a_loud_sublayer_is_not_folded_away() -> None:
    report = synthetic.clean(96)
    name = report.sublayers[101].name
    loud = dataclasses.replace(report, findings=[Finding("JD103", "error", [name], "too much")])
    assert any(name in line and "●" in line for line in rows_of(shown(loud)))
    many = [row.name for row in report.sublayers[20:60]]
    text = shown(
        dataclasses.replace(report, findings=[Finding("JD103", "warning", many, "too much")]), 40
    )
    counted = sum(int(n) for n in re.findall(r"more like this.*?(\d+) ▲", text))
    assert counted + sum("▲" in line for line in rows_of(text)) == 40


def test_the_worst_come_first_on_request() -> None:
    report = synthetic.clean(96)
    lines = rows_of(shown(report, sort="worst", all_rows=True))
    worst = sorted(
        report.sublayers, key=lambda row: -row.branch_norm.estimate if row.branch_norm else 0
    )
    assert [line.split()[1] for line in lines] == [row.name for row in worst]
    assert rows_of(shown(report, sort="worst")) != rows_of(shown(report))
    # not finite
    assert rows_of(shown(synthetic.broken(), sort="worst"))[0].split()[1] == "transformer.h.1.attn"


def test_narrow_terminals_drop_columns_and_keep_the_branch_norm() -> None:
    heads = []
    for width in WIDTHS:
        text = shown(synthetic.vanilla(), width)
        heads.append(
            next(line for line in text.splitlines() if line.startswith("  layer")).split("  ")
        )
    assert all("branch norm" in " ".join(head) for head in heads)
    counts = [len([title for title in head if title.strip()]) for head in heads]
    assert counts == sorted(counts) and counts[0] == 3 and counts[-1] == 8
    for width in WIDTHS:  # a weights-only table keeps a figure too
        assert "paper's bound" in shown(synthetic.weights_tier(), width).split("–")[0]


@pytest.mark.parametrize("name", KINDS)
def test_piped_output_is_plain_whole_and_the_same_twice(name: str) -> None:
    report = KINDS[name](12)
    text = shown(report)
    assert "\x1b" not in text and text == shown(report) and text.endswith("\n")
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "…" not in shown(renamed(report, ODD_NAMES))


def test_no_color_means_no_escape_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    print_report(synthetic.vanilla(), Console(file=out, force_terminal=True, width=100))
    assert "\x1b" not in out.getvalue() and "▲" in out.getvalue()


def test_names_are_shown_as_they_are_and_cannot_command_the_terminal() -> None:
    text = shown(renamed(synthetic.vanilla(4), ODD_NAMES), 200, colours=True)
    for name in ("[red]x[/red].0", "x.[/].3", ":smile:.4", "blöcke.0.注意力.attn.1"):
        assert name in text
    evil = shown(renamed(synthetic.vanilla(4), ("a\x1b]0;title\x07b\rc\nd\u202ee",)), 200)
    assert not set("\x1b\x07\r\u202e") & set(evil)
    assert len(rows_of(evil)) == 8


@pytest.mark.parametrize("width", [None, 40, 80, 120])
@pytest.mark.parametrize("name", KINDS)
def test_the_last_block_is_verdict_what_to_do_cost(name: str, width: int | None) -> None:
    report = KINDS[name](12)
    text = shown(report, width)
    order = [
        f"  {report.verdict.upper()}",
        "  small sub-layers",
        "  large shortcut",
        "  What to do",
        "  Cost",
    ]
    places = [text.index(f"\n{part}") for part in order]
    assert places == sorted(places) and places[0] > text.index(rows_of(text)[-1])
    assert re.search(r"again:\s+jacdiag\s+audit\s+checkpoint\.pt\s+--seed\s+0\n$", text)
    assert text.count("\n\n") == 3, "header, table, verdict, what to do: no other blank lines"


def test_reports_with_little_in_them() -> None:
    base = synthetic.vanilla(2)
    one = with_rows(base, base.sublayers[:1], network=None, ladder=[], findings=[], rules=[])
    text = shown(one, 80)
    assert len(rows_of(text)) == 1 and "whole network" not in text and "gradient" not in text
    assert "no sub-layers" in shown(with_rows(base, [], network=None), 80)
