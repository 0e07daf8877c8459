"""The built site: every link works, and no page asks another host for anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.docs.check_site import problems
from scripts.docs.repository_files import ROOT

_PAGE = "<html><body><article>{}</article></body></html>"


def site_of(folder: Path, body: str) -> list[str]:
    """Return the problems of a site of two pages."""
    (folder / "glossary.html").write_text(_PAGE.format('<h2 id="probe">Probe</h2>'))
    (folder / "index.html").write_text(_PAGE.format(body))
    return problems(folder)


@pytest.mark.parametrize(
    "body",
    [
        '<a href="glossary.html#probe">here</a>',
        '<a href="https://example.org/x">elsewhere</a>',
        '<h2 id="a">A</h2><a href="#a">up</a>',
        '<img src="data:image/png;base64,AA==">',
        '<p>A <a class="term" href="glossary.html#probe">probe</a> is a probe</p>',
    ],
)
def test_a_site_without_fault_has_no_problem(tmp_path: Path, body: str) -> None:
    assert site_of(tmp_path, body) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ('<img src="gone.png">', "gone.png leads nowhere"),
        ('<a href="glossary.html#gone">x</a>', "leads to a heading that is not there"),
        ('<a href="#gone">x</a>', "leads to a heading that is not there"),
        ('<script src="https://example.org/x.js"></script>', "is on another host"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "is on another host"),
        ("<p>A probe.</p>", "the first use of glossary.html#probe is not linked"),
    ],
)
def test_each_fault_of_a_site_is_named(tmp_path: Path, body: str, problem: str) -> None:
    found = site_of(tmp_path, body)
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs the extra docs: pip install '.[docs]'")
    folder = str(tmp_path / "site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=600)
    assert (tmp_path / "site" / "rules" / "JD102.html").is_file()
