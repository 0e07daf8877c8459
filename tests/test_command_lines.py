"""The command lines in the docstrings of scripts: one a line, as they are typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "examples", "scripts", "tests")
_COMMAND = re.compile(r"(?<!`)\b(python (-m \w|\w+/\w+)|torchrun --)")


def broken_lines(docstring: str) -> Iterator[str]:
    """Yield the lines of a docstring in which a command is not on a line of its own.

    A line that begins with a command may be followed by another such line, or by the rest of what
    is said of it, which is indented further.
    """
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        starts = [_COMMAND.match(line.lstrip()) is not None for line in lines]
        if not any(starts):
            continue
        indent = min(
            len(line) - len(line.lstrip())
            for line, is_command in zip(lines, starts, strict=True)
            if is_command
        )
        for line, is_command in zip(lines, starts, strict=True):
            is_continued = len(line) - len(line.lstrip()) >= indent + 4
            has_one_command = len(_COMMAND.findall(line)) == 1
            if not (is_command and has_one_command) and not is_continued:
                yield line


def test_each_command_of_a_script_stands_on_a_line_of_its_own() -> None:
    broken = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False)
        broken += [f"{path.relative_to(ROOT)}: {line}" for line in broken_lines(docstring or "")]
    assert broken == []


@pytest.mark.parametrize(
    ("docstring", "broken"),
    [
        ("    python a/b.py      all\n    python a/b.py -q   one", 0),
        ("    python a/b.py      all of it, which\n                       takes an hour", 0),
        ("    python a/b.py      all, writes\n    results python a/b.py -q    one", 1),
        ("    python a/b.py   all   python a/b.py -q   one", 1),
        ("Run as `python a/b.py`. Both\nwrite.", 0),
    ],
)
def test_a_reflowed_command_is_seen(docstring: str, broken: int) -> None:
    assert len(list(broken_lines(docstring))) == broken
