"""The screen as Markdown: tables that every reader of GitHub's dialect takes for tables, whatever a
name holds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
from render import synthetic

from jacdiag.records import Finding, Report
from jacdiag.render.formats.markdown import render

pytestmark = pytest.mark.check("render")

KINDS: dict[str, Callable[[int], Report]] = {
    name: getattr(synthetic, name)
    for name in ("vanilla", "clean", "post", "trained", "weights_tier", "undecided", "broken")
}
ODD = "a|b\\|c *d* _e_ <b>`f` [g](h) ~i~ $j$ &lt;\nk"


def cells(row: str) -> list[str]:
    """The cells of a table's row: split at the pipes that no backslash takes the meaning from."""
    assert row.startswith("|") and row.endswith("|"), row
    parts = re.split(r"(?<!\\)(?:\\\\)*\|", row)
    return parts[1:-1]


def tables(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [[cells(row) for row in block] for block in blocks if block[0].startswith("|")]


def odd(report: Report) -> Report:
    """The same report with names that are full of what Markdown reads as markup."""
    rows = [dataclasses.replace(row, name=f"{ODD}.{k}") for k, row in enumerate(report.sublayers)]
    finding = Finding(
        "JD102", "warning", [rows[0].name], f"small at {rows[0].name}", fix=f"change {ODD}"
    )
    model = dataclasses.replace(report.model, name=ODD, uncovered=[ODD])
    settings = {**report.settings, "name": ODD, "command": "jacdiag audit 'a`b'"}
    return dataclasses.replace(
        report, sublayers=rows, findings=[finding], model=model, settings=settings
    )


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("layers", [2, 96])
@pytest.mark.parametrize("name", KINDS)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(
    name: str, layers: int, hostile: bool
) -> None:
    report = KINDS[name](layers)
    found = tables(render(odd(report) if hostile else report))
    assert len(found) == 2, "sub-layers, and the verdict by condition"
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
        assert all(re.fullmatch(r":?-{3,}:?", cell) for cell in table[1])
        assert len(table) > 3


def test_the_cells_are_the_figures() -> None:
    head, _, first, *_ = tables(render(synthetic.vanilla(2)))[0]
    row = {title.strip(): cell.strip() for title, cell in zip(head, first, strict=True)}
    assert row["sub-layer"] == "transformer.h.0.attn"
    assert row["branch norm"] == "55.0 to 57.0 ▲" and row["norm gain"] == "35.5 ▲"
    assert row["factor"] == "shortcut" and row["layer"] == "0"


def test_names_keep_no_meaning_as_markup() -> None:
    text = render(odd(synthetic.vanilla(2)))
    plain = re.sub(r"\\[\\|*_<`\[~&$]", "", text)  # what is left can be read as markup
    body = plain.split("**Next**")[0]
    body = re.sub(r"`JD\d+`", "", re.sub(r"\*\*[\w -]+\*\*", "", body))
    assert not set("_<`[~&$*") & set(body)
    assert "a\\|b\\\\\\|c" in text, "a pipe behind a backslash needs both escaped"
    assert "again: `` jacdiag audit 'a`b' ``" in text


def test_what_is_missing_is_a_dash() -> None:
    text = render(synthetic.broken())
    row = next(row for row in tables(text)[0] if "transformer.h.0.mlp" in row[1])
    assert [cell.strip() for cell in row[4:7]] == ["–", "– ●", "–"]
    assert "- no core norm at transformer.h.0.mlp: NaN in its weights" in text
    assert "None" not in text


def test_a_long_model_is_folded_and_whole_on_request() -> None:
    report = synthetic.vanilla(96)
    folded, whole = tables(render(report))[0], tables(render(report, all_rows=True))[0]
    assert len(folded) < 22 and len(whole) == 2 + 192
    gap = [row[1] for row in folded if "more like this" in row[1]]
    assert sum(int(re.findall(r"\d+", text)[0]) for text in gap) == 192 - (
        len(folded) - 2 - len(gap)
    )
    worst = tables(render(synthetic.clean(96), all_rows=True, sort="worst"))[0]
    gains = [float(row[5].split(" to ")[0]) for row in worst[2:]]
    assert gains == sorted(gains, reverse=True) and len(set(gains)) > 10


@pytest.mark.parametrize("name", KINDS)
def test_heading_and_last_block(name: str) -> None:
    report = KINDS[name](2)
    text = render(report)
    signs = {"pass": "✓", "warn": "▲", "fail": "●", "unknown": "?", "observed": "·"}
    assert text.startswith(f"### {signs[report.verdict]} {report.verdict.upper()}: ")
    places = [
        text.index(part)
        for part in ("| **small sub-layers**", "| **large shortcut**", "**What to do**", "**Cost**")
    ]
    assert places == sorted(places)
    assert text.endswith("again: `jacdiag audit checkpoint.pt --seed 0`\n")
    assert "\x1b" not in text and text == render(report)
    assert not any(
        line.rstrip("\n") != line.rstrip() and not line.endswith("  ") for line in text.splitlines()
    )


def test_a_report_without_sublayers_is_still_a_table() -> None:
    report = dataclasses.replace(synthetic.vanilla(1), sublayers=[], network=None)
    assert {len(row) for row in tables(render(report))[0]} == {2}
