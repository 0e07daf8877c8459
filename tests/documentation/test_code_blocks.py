"""Every code block of the documentation runs, or says why it is not run."""

from __future__ import annotations

from pathlib import Path

import pytest
from documentation.code_blocks import (
    OUTPUT,
    PAGES,
    CodeBlock,
    check_options,
    commands_of,
    read_blocks,
    run_block,
)
from documentation.example_files import names, write_files

BLOCKS = {page: read_blocks(page) for page in PAGES}
ALL = [block for blocks in BLOCKS.values() for block in blocks]
CODE = [block for block in ALL if block.language != OUTPUT]
# Pages whose blocks take more than two seconds.
SLOW = {
    "README.md",
    "AGENTS.md",
    "concepts/branch-core-shortcut.md",
    "concepts/the-paper.md",
    "concepts/what-conditions-do-not-say.md",
    "how-to/act-on-a-warning.md",
    "how-to/after-a-spike.md",
    "how-to/audit-a-hugging-face-folder.md",
    "how-to/audit-a-model.md",
    "how-to/compare-checkpoints.md",
    "how-to/folder-does-not-load.md",
    "how-to/gate-an-init.md",
    "how-to/gate-in-ci.md",
    "how-to/html-report.md",
    "how-to/predict-runs.md",
    "how-to/try-remedies.md",
    "how-to/write-a-factory.md",
    "tutorials/first-audit.md",
    "tutorials/first-gate.md",
    "tutorials/first-watch.md",
}
ROOT = PAGES[0].parent


def name_of(page: Path) -> str:
    """Return how a page is called in a test's name."""
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def pages_to_run() -> list[object]:
    """Return the pages with a block to run. Slow ones are marked."""
    pages = []
    for page, blocks in BLOCKS.items():
        if any(block.language != OUTPUT and not block.not_run for block in blocks):
            marks = [pytest.mark.long] if name_of(page) in SLOW else []
            pages.append(pytest.param(page, id=name_of(page), marks=marks))
    return pages


def test_every_block_names_its_language() -> None:
    assert [block.where for block in ALL if not block.language] == []


def test_commands_of_the_pages_exist_with_their_options() -> None:
    checked = 0
    for block in CODE:
        if block.language == "bash":
            for words in commands_of(block):
                if words[0] == "jacdiag":
                    check_options(words)
                    checked += 1
    assert checked > 30


def test_python_blocks_that_are_not_run_are_valid_python() -> None:
    for block in CODE:
        if block.language == "python":
            compile(block.text, block.where, "exec")


@pytest.mark.parametrize("page", pages_to_run())
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SLACK_WEBHOOK", "http://127.0.0.1:9/")
    text = page.read_text(encoding="utf-8")
    write_files(tmp_path, text)
    namespace = names(text)
    for block in BLOCKS[page]:
        if block.language != OUTPUT and not block.not_run:
            run_block(block, tmp_path, namespace)
    if "w" in namespace:
        namespace["w"].close()  # a page may leave its watch open, as a program may


def test_a_block_that_names_a_file_is_written_and_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- file: train.py -->\n```python\nraise SystemExit\n```\n")
    (block,) = read_blocks(page)
    run_block(block, tmp_path, {})
    assert (tmp_path / "train.py").read_text() == "raise SystemExit\n"


def test_a_block_without_a_file_is_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nvalue = 3\n```\n")
    (block,) = read_blocks(page)
    namespace: dict[str, object] = {}
    run_block(block, tmp_path, namespace)
    assert namespace["value"] == 3


def test_few_blocks_are_not_run_and_each_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    not_run = [block for block in CODE if block.not_run]
    with capsys.disabled():
        print(f"\ncode blocks of the documentation: {len(CODE)}, not run: {len(not_run)}")
        for block in not_run:
            print(f"  {block.where}: {block.not_run}")
    assert all(has_a_reason(block) for block in not_run)
    assert len(not_run) <= len(CODE) / 4


def has_a_reason(block: CodeBlock) -> bool:
    """Return whether a block says in at least three words why it is not run."""
    return len(block.not_run.split()) >= 3
