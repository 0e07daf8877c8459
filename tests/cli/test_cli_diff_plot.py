"""`jacdiag diff A B --plot FILE`: the picture is written, and a wrong name is refused first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli.rig import Done
from render import synthetic

Run = Callable[..., Done]


@pytest.fixture
def reports(tmp_path: Path) -> tuple[str, str]:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(synthetic.vanilla(2).to_json(), encoding="utf-8")
    second.write_text(synthetic.clean(2).to_json(), encoding="utf-8")
    return str(first), str(second)


def test_diff_draws_what_differs_and_says_so(
    jd: Run, reports: tuple[str, str], tmp_path: Path
) -> None:
    picture = tmp_path / "diff.svg"
    result = jd("diff", *reports, "--plot", str(picture))
    assert result.code == 1
    assert f"wrote {picture}" in result.err
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("name", ["diff.jpg", "diff", "diff.html"])
def test_a_wrong_suffix_is_refused(
    jd: Run, reports: tuple[str, str], tmp_path: Path, name: str
) -> None:
    result = jd("diff", *reports, "--plot", str(tmp_path / name))
    assert result.code == 2
    assert "end it in .png, .svg or .pdf" in result.err
    assert not (tmp_path / name).exists()


def test_a_picture_over_a_report_is_refused(jd: Run, reports: tuple[str, str]) -> None:
    result = jd("diff", *reports, "--plot", reports[0])
    assert result.code == 2
    assert "would write over what is compared" in result.err


def test_picture_and_page_cannot_both_go_to_stdout(jd: Run, reports: tuple[str, str]) -> None:
    result = jd("diff", *reports, "--plot", "-", "--html", "-")
    assert result.code == 2
    assert "both write to stdout" in result.err
