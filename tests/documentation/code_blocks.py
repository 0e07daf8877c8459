"""The code blocks of a page, and how each kind of block is run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from jacdiag_cli.config import all_options, load
from jacdiag_cli.main import cli, main

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OUTPUT = "text"  # the language of a block that holds no code
_FENCE = re.compile(r"^( {0,3})(`{3,})(\w*)\s*$")
_NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
_FILE = re.compile(r"^<!-- file: (\S+) -->$")


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block.

    Attributes:
        page: the file.
        line: of its first line of code, from 1.
        language: after the fence; empty without one.
        text: the code.
        not_run: why it is not run; empty if it is.
        file: that the reader saves it as; empty if it is run where it stands.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str
    file: str = ""

    @property
    def where(self) -> str:
        """The page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[CodeBlock]:
    """Return the fenced blocks of a page, in order."""
    blocks = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        end = lines.index(fence[1] + fence[2], number + 1)
        before = lines[number - 1].strip() if number else ""
        reason = _NOT_RUN.match(before)
        file = _FILE.match(before)
        blocks.append(
            CodeBlock(
                page=page,
                line=number + 2,
                language=fence[3],
                text="\n".join(lines[number + 1 : end]) + "\n",
                not_run=reason[1] if reason else "",
                file=file[1] if file else "",
            )
        )
        number = end + 1
    return blocks


def commands_of(block: CodeBlock) -> list[list[str]]:
    """Return the commands of a shell block, each as its words, without comments."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            commands.append(words)
    return commands


def check_options(words: list[str]) -> None:
    """Raise unless a `jacdiag` command exists and has the options that it is called with."""
    if len(words) == 1 or words[1].startswith("-"):
        return
    command = cli.commands[words[1]]
    # The settings of the parent count: click keeps the names of the help option.
    parent = click.Context(cli, **cli.context_settings)
    context = click.Context(command, info_name=words[1], parent=parent)
    command.make_parser(context).parse_args(words[2:])


def run_block(block: CodeBlock, folder: Path, namespace: dict[str, Any]) -> None:
    """Run a block; raise if it fails.

    Args:
        block: of a page whose earlier blocks have run.
        folder: the working directory.
        namespace: of the Python blocks of the page.
    """
    if block.file:
        (folder / block.file).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        code = "\n" * (block.line - 1) + block.text  # so that errors show the line of the page
        exec(compile(code, str(block.page), "exec"), namespace)
    elif block.language == "bash":
        for words in commands_of(block):
            _run_command(words, block.where)
    elif block.language == "toml":
        file = folder / "jacdiag.toml"
        table = tomllib.loads(block.text)["tool"]["jacdiag"]
        file.write_text(block.text.replace("[tool.jacdiag]\n", "").replace("tool.jacdiag.", ""))
        assert set(load(folder, all_options()).options) <= set(table)
        file.unlink()
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    else:
        raise AssertionError(f"{block.where}: no way to run a block of '{block.language}'")


def _run_command(words: list[str], where: str) -> None:
    """Run a command. `jacdiag` runs in this process; its exit code 1 means that a rule fired."""
    if words[0] == "jacdiag":
        code = main(words[1:])
        assert code in (0, 1), f"{where}: exit code {code} of {shlex.join(words)}"
        return
    program = [sys.executable, *words[1:]] if words[0] == "python" else words
    subprocess.run(program, check=True, timeout=600)  # a page may train small models
