"""The badges of the front page say what the package says of itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BADGE = re.compile(r"\(docs/assets/badges/(\w+)\.svg\)")


def text_of(name: str) -> str:
    tree = ElementTree.parse(ROOT / "docs" / "assets" / "badges" / f"{name}.svg")
    title = tree.find("{http://www.w3.org/2000/svg}title")
    assert title is not None and title.text is not None
    return title.text


def test_every_badge_is_on_the_front_page_and_needs_no_network() -> None:
    front_page = (ROOT / "README.md").read_text(encoding="utf-8")
    files = {path.stem for path in (ROOT / "docs" / "assets" / "badges").glob("*.svg")}
    assert set(BADGE.findall(front_page)) == files == {"python", "torch", "license"}


def test_badges_agree_with_the_package() -> None:
    least_python = PACKAGE["requires-python"].removeprefix(">=")
    assert text_of("python") == f"python {least_python}+"
    assert text_of("license") == f"license {PACKAGE['license']}"

    # The oldest torch that is allowed, and the newest that is tested.
    (torch,) = [line for line in PACKAGE["dependencies"] if line.startswith("torch")]
    pinned = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert text_of("torch") == f"torch {torch.removeprefix('torch>=')} to {pinned[1]}"
