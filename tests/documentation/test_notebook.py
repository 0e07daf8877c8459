"""The notebook runs from its first cell to its last, and shows what its file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.docs.notebook import code_cells, run_notebook
from scripts.docs.repository_files import ROOT

FILE = ROOT / "examples" / "first_audit.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))


def notebook_of(folder: Path, *sources: str) -> Path:
    """Write a notebook with a code cell for each source."""
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    file = folder / "made.ipynb"
    file.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return file


def printed(outputs: list[dict[str, object]]) -> list[object]:
    """Return what a cell printed."""
    return [output["text"] for output in outputs if output["output_type"] == "stream"]


@pytest.mark.long
def test_notebook_runs_and_prints_what_its_file_holds() -> None:
    outputs = run_notebook(FILE)
    for cell, now in zip(code_cells(NOTEBOOK), outputs, strict=True):
        assert printed(now) == printed(cell["outputs"]), cell["source"]
        assert len(now) == len(cell["outputs"])


def test_notebook_was_saved_after_it_ran_and_shows_reports_and_sites() -> None:
    cells = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell["outputs"] for cell in cells)
    shown = [output["data"] for cell in cells for output in cell["outputs"] if "data" in output]
    pages = ["".join(data.get("text/html", [])) for data in shown]
    assert len(pages) == 3
    assert all("transformer.h.0.attn" in page for page in pages)
    assert sum("<svg" in page for page in pages) == 2


def test_cells_share_a_namespace_and_the_last_expression_is_shown(tmp_path: Path) -> None:
    outputs = run_notebook(notebook_of(tmp_path, "value = 2\nprint('set')", "value + 1"))
    assert printed(outputs[0]) == [["set\n"]]
    assert outputs[1][0]["data"] == {"text/plain": ["3"]}


def test_a_cell_that_raises_fails_the_notebook(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run_notebook(notebook_of(tmp_path, "1 / 0"))


def test_the_folder_of_a_notebook_is_where_it_runs(tmp_path: Path) -> None:
    (tmp_path / "here.txt").write_text("found")
    outputs = run_notebook(notebook_of(tmp_path, "print(open('here.txt').read())"))
    assert printed(outputs[0]) == [["found\n"]]
