"""The front page is short, its links lead somewhere, and its example prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs import generated, glossary, repository_files

ROOT = Path(__file__).parents[1]
_HERE = re.compile(r"\]\((#[^)\s]+)\)")
# Pages that are longer than the others for a reason: results, a list of terms, a list of files.
MOST_WORDS = {
    "evidence/before-the-first-step.md": 1_600,
    "evidence/announced-divergences.md": 1_600,
    "project/architecture.md": 1_300,
}
PAGES = [
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def text_of(path: str) -> str:
    """Return a page as the site has it: with the parts that come from the code.

    Args:
        path: relative to the repository. Pages that are made when the site is built are in `docs/`.
    """
    made = generated.pages().get(repository_files.site_path(path))
    if made is not None:
        return made
    return generated.filled((ROOT / path).read_text(encoding="utf-8"))


def anchors_of(path: str) -> set[str]:
    """Return the anchors of a page's headings."""
    lines = text_of(path).splitlines()
    return {glossary.anchor(line.lstrip("#")) for line in lines if line.startswith("#")}


def exists(path: str) -> bool:
    """Return whether a link may lead to a path: a file, a folder, or a page of the site."""
    return (ROOT / path).exists() or repository_files.site_path(path) in generated.pages()


def test_front_page_has_at_most_150_lines_and_1200_words() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_and_headings_of_this_project_exist(page: Path) -> None:
    dead = []
    name = str(page.relative_to(ROOT))
    text = page.read_text(encoding="utf-8")
    for link in [*repository_files.relative_links(text), *_HERE.findall(text)]:
        target, anchor = repository_files.target_of(link, name)
        if link.startswith("#"):
            target = name
        has_anchor = bool(anchor) and target.endswith(".md")
        if not exists(target) or (has_anchor and anchor not in anchors_of(target)):
            dead.append(link)
    assert dead == []


def test_every_page_is_in_the_navigation_once_and_is_short() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for page in (ROOT / "docs").rglob("*.md"):
        path = str(page.relative_to(ROOT / "docs"))
        assert navigation.count(f"- {path}\n") == 1, f"mkdocs.yml does not name {path} under nav"
        assert len(page.read_text(encoding="utf-8").split()) <= MOST_WORDS.get(path, 1_000), path


def test_the_site_asks_no_other_host_for_anything() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert "polyfills: [assets/iframe-worker.js]" in settings
    assert "https://" not in settings


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
