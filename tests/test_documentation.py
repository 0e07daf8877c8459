"""The front page is short, its links lead somewhere, and its example prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that a Markdown page has, as GitHub makes them from its headings."""
    anchors = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip().lower()
            kept = re.sub(r"[^\w\- ]", "", heading)
            anchors.add(kept.replace(" ", "-"))
    return anchors


def test_front_page_has_at_most_150_lines_and_1200_words() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_and_headings_of_this_project_exist(page: Path) -> None:
    dead = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        has_anchor = bool(anchor) and target.suffix == ".md"
        if not target.exists() or (has_anchor and anchor not in anchors_of(target)):
            dead.append(link)
    assert dead == []


def test_python_example_of_the_front_page_prints_what_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(import jacdiag\n.*?)```", text, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "README.md", "exec"), {})
    said = [line.split("# ")[1] for line in example[1].splitlines() if "# " in line]
    assert len(said) == 3
    assert capsys.readouterr().out.splitlines() == said
