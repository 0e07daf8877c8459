"""Do published checkpoints open? The layouts of well-known repositories, imitated with tiny
weights.

    python benchmarks/layouts.py [NAME ...]

No file of a repository is downloaded: a tiny model of the same class is saved, and its weights are
renamed, added, left out, cast and sharded as the published files have them. Each folder goes
through `jacdiag audit FOLDER`. Without names all of them run, and results/layouts.json and
results/layouts.md are written. With names (parts of them will do) nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}

from _layouts.catalog import LAYOUTS, REFUSED
from _layouts.check import check_layout, check_refused

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parts = sys.argv[1:]
    rows = [_shown(check_layout(layout)) for layout in LAYOUTS if _chosen(layout.name, parts)]
    refused = [_shown(check_refused(case)) for case in REFUSED if _chosen(case.name, parts)]
    failed = [row for row in (*rows, *refused) if row["problems"]]
    if not parts:
        _write(rows, refused)
    print(f"{len(rows) + len(refused) - len(failed)} of {len(rows) + len(refused)} pass")
    return 1 if failed else 0


def _chosen(name: str, parts: list[str]) -> bool:
    return not parts or any(part in name for part in parts)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    state = "; ".join(row["problems"]) or "ok"
    print(f"{row['name']}: {row['found']}/{row['expected']} {state}", flush=True)
    return row


def _write(rows: list[dict[str, Any]], refused: list[dict[str, Any]]) -> None:
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    RESULTS.mkdir(exist_ok=True)
    record = {**versions, "layouts": rows, "refused": refused}
    (RESULTS / "layouts.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "layouts.md").write_text(_page(rows, refused, versions))


def _page(
    rows: list[dict[str, Any]], refused: list[dict[str, Any]], versions: dict[str, str]
) -> str:
    passed = sum(not row["problems"] for row in rows)
    right = sum(not row["problems"] for row in refused)
    lines = [
        "# Layouts of published checkpoints",
        "",
        f"transformers {versions['transformers']}, torch {versions['torch']}.",
        f"**{passed} of {len(rows)} layouts pass.** {right} of {len(refused)} folders that hold "
        "no whole model of "
        "PyTorch in floating point are refused with the right words.",
        "",
        "The layouts are imitated: no file was downloaded. A tiny model of the same class was "
        "saved. Its weights were",
        "renamed, added, left out, cast and sharded as the published files are known to have "
        "them. Each folder went",
        "through `jacdiag audit FOLDER`. A layout passes if all of this holds:",
        "",
        "- The exit code is 0, and every sub-layer that the config promises is there.",
        "- Every weight equals that of `from_pretrained` to the bit.",
        "- Weights that are left out are named in a note, where transformers reports them as "
        "unexpected.",
        "",
        "| layout | what is special | files | class | sub-layers | weights | passes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "; ".join(row["problems"]).replace("|", "/").replace("\n", " ") or "yes"
        sublayers = f"{row['found']} of {row['expected']}"
        cells = [
            row["name"],
            row["shows"],
            row["files"],
            row["architecture"],
            sublayers,
            row["weights"],
            verdict,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Refused", "", "| folder | error | passes |", "|---|---|---|"]
    for row in refused:
        text = " ".join(" ".join(row["notes"]).replace("|", "/").split())
        lines.append(f"| {row['name']} | {text} | {'; '.join(row['problems']) or 'yes'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
