"""Run a notebook and keep what its cells show.

    python -m scripts.docs.notebook examples/first_audit.ipynb

The cells run in one namespace, in their order, as Jupyter runs them. So the test of the notebook
needs no server and no kernel.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def run_notebook(file: Path) -> list[list[Cell]]:
    """Run the code cells of a notebook in its folder.

    Args:
        file: in the format of Jupyter, version 4.

    Returns:
        The outputs of each code cell, in the format of Jupyter.
    """
    notebook = json.loads(file.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    with contextlib.chdir(file.parent):
        for cell in code_cells(notebook):
            outputs.append(_run_cell("".join(cell["source"]), namespace))
    return outputs


def code_cells(notebook: dict[str, Any]) -> list[Cell]:
    """Return the cells of a notebook that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _run_cell(source: str, namespace: dict[str, Any]) -> list[Cell]:
    """Run a cell and return its outputs: what it prints, and its last expression."""
    # 1. A last expression is shown, so it is evaluated apart.
    tree = ast.parse(source)
    shown = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        shown = ast.Expression(tree.body.pop().value)

    # 2. Run the cell.
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), namespace)
        if shown is not None:
            value = eval(compile(shown, "<cell>", "eval"), namespace)

    # 3. What Jupyter would show.
    outputs: list[Cell] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


def write_outputs(file: Path) -> None:
    """Run a notebook and write what its cells show into it."""
    outputs = run_notebook(file)
    notebook = json.loads(file.read_text(encoding="utf-8"))
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell["execution_count"] = number
        cell["outputs"] = outputs[number - 1]
    file.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    for argument in sys.argv[1:]:
        write_outputs(Path(argument))
