"""Errors of click and of jacdiag have one style: `error:` and `try:`, exit code 2, nothing on
stdout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done

Run = Callable[..., Done]


@pytest.mark.parametrize(
    "args,what,hint",
    [
        (["audit", "--bath", "3", "x.pt"], "error: no such option: --bath", "try: --batch"),
        (["audit", "x.pt", "--zzzz"], "error: no such option: --zzzz", "try: jacdiag audit --help"),
        (["audit"], "error: missing argument 'SOURCE'", "try: jacdiag audit [OPTIONS] SOURCE"),
        (
            ["audit", "x.pt", "--batch", "no"],
            "error: invalid value for '--batch'",
            "try: jacdiag audit --help",
        ),
        (
            ["audit", "x.pt", "--batch"],
            "error: option '--batch' requires an argument",
            "try: jacdiag --help",
        ),
        (
            ["audit", "x.pt", "y.pt"],
            "error: got unexpected extra argument",
            "try: jacdiag audit --help",
        ),
        (["audti"], "error: no such command 'audti'", "try: jacdiag --help"),
        (["diff", "a"], "error: missing argument 'B'", "try: jacdiag diff [OPTIONS] A B"),
    ],
)
def test_click_errors_have_the_style_of_all_errors(
    jd: Run, args: list[str], what: str, hint: str
) -> None:
    done = jd(*args)
    assert done.code == 2
    assert done.out == ""
    assert what in done.err
    assert hint in done.err
    assert "Usage:" not in done.err and "Error:" not in done.err


def test_no_arguments_show_the_help(jd: Run) -> None:
    done = jd()
    assert done.code == 2
    assert "Usage: jacdiag" in done.err and "error:" not in done.err


@pytest.mark.parametrize("name", ["jacdiag.toml", "pyproject.toml"])
def test_a_byte_order_mark_is_named(jd: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[tool.other]\nx = "1"\n', encoding="utf-8-sig")
    done = jd("audit", "x.pt")
    assert done.code == 2
    assert name in done.err and "byte order mark (BOM)" in done.err and "without BOM" in done.err


@pytest.mark.parametrize("name", ["pyproject.toml", "jacdiag.toml"])
def test_a_configuration_in_another_encoding(jd: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"# caf\xe9\nseq = 8\n")
    done = jd("audit", "x.pt")
    assert done.code == 2 and "byte 0xe9 at position 5" in done.err and "UTF-8" in done.err
    (tmp_path / name).write_text("seq = " + "[" * 5_000)
    assert jd("audit", "x.pt").code == 2


def test_a_byte_order_mark_in_a_contract_is_named(jd: Run, factory: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('W_O = "0.02"\n', encoding="utf-8-sig")
    done = jd("audit", f"{factory}build", "--seq", "4", "--contract", "c.toml")
    assert done.code == 2
    assert "c.toml" in done.err and "byte order mark (BOM)" in done.err


def test_a_sequence_longer_than_the_table_of_positions_says_its_rows(jd: Run, factory: str) -> None:
    done = jd("sites", f"{factory}build", "--seq", "40")
    assert done.code == 2
    assert "--seq 32" in done.err and "32 rows" in done.err
    assert jd("sites", f"{factory}build", "--seq", "32").code == 0


def test_marks_are_letters_where_the_output_is_ascii(
    jd: Run, factory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import sys

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    from jacdiag_cli.main import main

    assert main(["audit", f"{factory}build", "--seq", "4", "--decide", "--remedies", "none"]) == 0
    sys.stdout.flush()
    text = raw.getvalue().decode("ascii")
    assert "sqrt(2N)" in text and "shortcut std" in text
