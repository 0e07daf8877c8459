"""`--html` of every command that has it: the page is written, and a wrong name is refused first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done, Stub
from jacdiag_cli.main import main
from render import synthetic
from render.run_logs import write_log

Run = Callable[..., Done]


def test_audit_writes_a_page_and_says_so(jd: Run, stub: Stub, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = jd("audit", "model.pt", "--html", str(page))
    assert result.code == 0
    assert f"wrote {page}" in result.err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_page_on_stdout_moves_the_table_to_stderr(jd: Run, stub: Stub) -> None:
    result = jd("audit", "model.pt", "--html", "-")
    assert result.out.startswith("<!doctype html>")
    assert result.out.rstrip().endswith("</html>")
    assert "branch" in result.err


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.json"])
def test_page_needs_the_suffix_of_html(jd: Run, stub: Stub, tmp_path: Path, name: str) -> None:
    result = jd("audit", "model.pt", "--html", str(tmp_path / name))
    assert result.code == 2
    assert "end it in .html" in result.err
    assert not (tmp_path / name).exists()


def test_plot_writes_the_page_of_a_run_and_no_other_picture(tmp_path: Path) -> None:
    run, page = write_log(tmp_path / "run", 200, spike=150), tmp_path / "run.html"
    assert main(["plot", str(run), "--html", str(page)]) == 0
    assert "JD502" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in run.iterdir()) == ["run.jsonl"]


def test_plot_writes_the_page_of_a_report_next_to_a_picture(tmp_path: Path) -> None:
    report, page, picture = tmp_path / "r.json", tmp_path / "r.html", tmp_path / "r.png"
    report.write_text(synthetic.vanilla(2).to_json(), encoding="utf-8")
    assert main(["plot", str(report), "--html", str(page), "-o", str(picture)]) == 0
    assert "<svg" in page.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_diff_writes_every_figure_and_its_pictures(tmp_path: Path) -> None:
    first, second, page = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "diff.html"
    first.write_text(synthetic.vanilla(2).to_json(), encoding="utf-8")
    second.write_text(synthetic.clean(2).to_json(), encoding="utf-8")
    assert main(["diff", str(first), str(second), "--html", str(page)]) == 1
    text = page.read_text(encoding="utf-8")
    assert "Two models compared" in text
    assert "branch norm ‖J‖ over depth" in text  # the chart, next to the picture of dumbbells
    assert text.count("<svg") >= 5
    assert main(["diff", str(first), str(first), "--html", str(page)]) == 0
    same = page.read_text(encoding="utf-8")
    assert "branch norm ‖J‖ over depth" in same and "A ring" not in same
    assert "Figures that differ</h2>" not in same


def test_diff_does_not_write_over_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "a.html"
    first.write_text("no report", encoding="utf-8")
    assert main(["diff", str(first), str(first), "--html", str(first)]) == 2
    assert "would write over what is compared" in capsys.readouterr().err
    assert first.read_text(encoding="utf-8") == "no report"
