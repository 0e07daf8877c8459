"""Lines that install jacdiag: from a clone, and with extras that exist. No address is invented."""

from __future__ import annotations

import re
import tomllib

import pytest
from documentation.code_blocks import ROOT

# The name alone would be looked up in an index in which the project may not be.
FROM_AN_INDEX = re.compile(r"pip install [^\n|`#]*(?<![\w./-])jacdiag(?![\w\[./-])")
EXTRA = re.compile(r"(?:jacdiag|\.)\[([a-z,]+)\]")
TEXTS = (
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("jacdiag/**/*.py"),
    *ROOT.glob("cli/**/*.py"),
    *ROOT.glob("examples/*.py"),
    ROOT / "action.yml",
)


@pytest.mark.parametrize(
    ("line", "is_invented"),
    [
        ("pip install jacdiag", True),
        ("pip install --upgrade jacdiag", True),
        ("pip install jacdiag==0.2.0", True),
        ("pip install 'jacdiag' torch", True),
        ("pip install ./vendor/jacdiag", False),
        ("pip install '.[hf]'", False),
        # In an environment that has jacdiag this adds the libraries of the extra.
        ("pip install 'jacdiag[hf]'", False),
    ],
)
def test_the_pattern_knows_which_line_asks_an_index(line: str, is_invented: bool) -> None:
    assert bool(FROM_AN_INDEX.search(line)) == is_invented


def test_no_line_takes_jacdiag_from_an_index() -> None:
    for path in TEXTS:
        found = FROM_AN_INDEX.findall(path.read_text(encoding="utf-8"))
        assert found == [], f"{path}: {found}"


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for path in TEXTS:
        for names in EXTRA.findall(path.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras, f"{path}: {names}"
