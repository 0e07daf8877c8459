"""The sweep over checkpoints, as its first lines say it is used."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sweep(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "sweep_checkpoints.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_series_is_swept_goes_on_and_gives_rungs(tmp_path: Path) -> None:
    out, folder = str(tmp_path / "s.jsonl"), ROOT / "examples" / "checkpoints"
    first = sweep(f"step0={folder / 'vanilla-step0.pt'}", "--out", out, "--seq", "16")
    assert first.returncode == 0, first.stderr
    again = [f"step0={folder / 'vanilla-step0.pt'}", f"end={folder / 'vanilla-trained.pt'}", "--seq", "16"]
    second = sweep(*again, "--out", out)
    assert second.returncode == 0 and "step0" not in second.stdout and "end trained" in second.stdout
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [r["name"] for r in rows] == ["step0", "end"] and rows[0]["large_shortcut"] == "not met"
    low, high = rows[0]["worst_branch_norm"]
    assert 3 < low <= high < 12 and rows[1]["worst_branch_norm"][0] > high
    [rung] = tomllib.loads(sweep("--out", out, "--rungs", "vanilla").stdout)["rung"]
    assert rung["placement"] == "pre" and rung["layers"] == 6 and low <= rung["worst_branch_gain"] <= high
