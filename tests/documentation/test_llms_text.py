"""`llms.txt` has the form of llmstxt.org, and its links lead to pages: here, and on the site."""

from __future__ import annotations

import re

import pytest

from scripts.docs import generated
from scripts.docs.llms_text import llms_text
from scripts.docs.repository_files import ROOT, relative_links, site_path

TEXT = (ROOT / "llms.txt").read_text(encoding="utf-8")
LINK = re.compile(r"- \[[^\]]+\]\([^)]+\): \S.*")


def faults_of_form(text: str) -> list[str]:
    """Return what is not as llmstxt.org asks: a title, a quoted summary, then sections of links."""
    lines = [line for line in text.splitlines() if line]
    faults = []
    if not re.fullmatch(r"# \S.*", lines[0]):
        faults.append("the first line is no title")
    if not lines[1].startswith("> "):
        faults.append("the title is not followed by a summary")
    sections = [number for number, line in enumerate(lines) if line.startswith("## ")]
    for line in lines[sections[0] :]:
        if not line.startswith("## ") and not LINK.fullmatch(line):
            faults.append(f"no link with a note: {line}")
    return faults


def test_the_form_is_that_of_llmstxt_org() -> None:
    assert faults_of_form(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [("# jacdiag", "jacdiag"), ("> jacdiag", "jacdiag"), ("- [README](README.md)", "- README")],
)
def test_another_form_is_noticed(old: str, new: str) -> None:
    assert len(faults_of_form(TEXT.replace(old, new, 1))) == 1


def test_links_lead_to_files_of_the_repository() -> None:
    links = relative_links(TEXT)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_links_on_the_site_lead_to_pages_of_the_site() -> None:
    places = {site_path(path) for path in generated.repository_pages()}
    places |= {site_path(path) for path in generated.docs_pages()}
    pages = {re.sub(r"\.md$", ".html", place) for place in places}
    links = relative_links(llms_text())
    assert len(links) == len(relative_links(TEXT))
    assert set(links) <= pages
