"""Output that cannot hold the marks shows letters, each different, and stays aligned; UTF-8 is
never touched.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from render import synthetic
from rich.console import Console

from jacdiag.records import Finding
from jacdiag.render.ascii_symbols import letters_of, register, spelled
from jacdiag.render.content.severity import SIGNS
from jacdiag.render.formats import diff as beside
from jacdiag.render.formats import junit, markdown, sarif
from jacdiag.render.formats import pr_comment as comment
from jacdiag.render.terminal import gate
from jacdiag.render.terminal.report import print_report
from jacdiag.render.terminal.run_screen import _BARS, _SHADES

ROOT = Path(__file__).parents[2]
ENCODINGS = ("ascii", "latin-1", "cp1252", "cp437")


def printed() -> str:
    console = Console(width=400, file=io.StringIO())
    with console.capture() as captured:
        print_report(synthetic.vanilla(), console)
    return captured.get()


def test_every_symbol_that_the_sources_print_has_letters_of_its_own() -> None:
    files = [*(ROOT / "jacdiag").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    files = [path for path in files if path.name != "ascii_symbols.py"]
    symbols = {c for path in files for c in path.read_text(encoding="utf-8") if ord(c) > 127}
    assert len(symbols) > 20
    for symbol in symbols:
        letters = letters_of(symbol)
        assert letters.isascii()
        assert "?" not in letters
        assert "\\" not in letters, f"{symbol!r} has an escape only"


def test_marks_that_mean_different_things_stay_different() -> None:
    marks = [*(sign for sign in SIGNS.values() if sign), "✓", "✗"]
    for group in (marks, _BARS, _SHADES):
        letters = [sign if sign == "?" else letters_of(sign) for sign in group]
        assert len(set(letters)) == len(set(group))
        assert all(len(text) == 1 for text in letters)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_no_question_mark_is_added_and_undecided_keeps_its_own(encoding: str) -> None:
    text = printed() + gate.render(synthetic.vanilla())
    assert "▲" in text
    plain = spelled(text, encoding)
    assert plain.encode(encoding).decode(encoding) == plain
    assert plain.count("?") == text.count("?")
    assert spelled("undecided ?", encoding) == "undecided ?"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "UTF8", None])
def test_utf_8_is_never_touched(encoding: str | None) -> None:
    text = printed()
    assert spelled(text, encoding) is text


def test_ascii_spelling_keeps_columns_aligned() -> None:
    lines = [
        "shortcut σ  1/σ gain      core ‖J‖  who",
        "  0.0180 ▁    52.5 ▲  0.03 ±0.01  shortcut",
        "  0.0180 ▁    –       0.03 to 1   both",
    ]
    rows = [spelled(line, "ascii") for line in lines]
    assert rows == [
        "shortcut std 1/std gain   core |J|  who",
        "  0.0180 _    52.5 !  0.03 +-0.01 shortcut",
        "  0.0180 _    -       0.03 to 1   both",
    ]


def test_only_what_does_not_fit_is_replaced() -> None:
    assert spelled("1.39 ±0.07 · ▲", "latin-1") == "1.39 ±0.07 · !"
    assert spelled("1.39 ±0.07 · ▲", "ascii") == "1.39 +-0.07 . !"


def test_names_of_users_lose_accents_or_become_escapes() -> None:
    assert spelled("modèle/中.pt", "ascii") == "modele/\\u4e2d.pt"


def test_machine_formats_lose_nothing() -> None:
    text = json.dumps({"name": "modèle 中 😀", "text": "‖J‖ ▲"}, ensure_ascii=False)
    assert json.loads(spelled(text, "ascii", "json")) == json.loads(text)
    report = synthetic.vanilla()
    whole = sarif.render(report)
    assert json.loads(spelled(whole, "ascii", "json")) == json.loads(whole)
    page = junit.render(report)
    assert ElementTree.canonicalize(spelled(page, "ascii", "xml")) == ElementTree.canonicalize(page)


@pytest.mark.parametrize("render", [markdown.render, comment.render])
def test_markdown_tables_keep_their_cells(render: object) -> None:
    report = synthetic.vanilla()
    sign = Finding("JD103", "warning", [], "a name with ‖ in it")
    page = render(dataclasses.replace(report, findings=[sign]))  # type: ignore[operator]
    assert "‖" in page

    def cells(text: str) -> list[int]:
        return [
            len(re.findall(r"(?<!\\)\|", line))
            for line in text.splitlines()
            if line.startswith("|")
        ]

    assert cells(spelled(page, "ascii", "markdown")) == cells(page)


def test_the_head_of_a_comparison_can_be_spelled() -> None:
    assert all(spelled(title, "ascii").isascii() for title in beside.HEAD)


def test_a_stream_that_is_written_to_directly_prints_letters_too() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors=register(), write_through=True)
    stream.write("▲ ‖J‖ ⠋ ┏")
    assert raw.getvalue() == b"! |J| * +"
