"""The sweep over checkpoints, as its first lines say it is used."""

from __future__ import annotations

import json
import runpy
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def run(*args: str) -> str:
        script = str(EXAMPLES / "sweep_checkpoints.py")
        monkeypatch.setattr(sys, "argv", [script, *args])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_series_is_swept_goes_on_and_gives_rungs(
    tmp_path: Path, sweep: Callable[..., str]
) -> None:
    out, folder = str(tmp_path / "s.jsonl"), EXAMPLES / "checkpoints"
    sweep(f"step0={folder / 'vanilla-step0.pt'}", "--out", out, "--seq", "8")
    again = [
        f"step0={folder / 'vanilla-step0.pt'}",
        f"end={folder / 'vanilla-trained.pt'}",
        "--seq",
        "8",
    ]
    second = sweep(*again, "--out", out)
    assert "step0" not in second and "end trained" in second
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [r["name"] for r in rows] == ["step0", "end"] and rows[0]["large_shortcut"] == "not met"
    low, high = rows[0]["worst_branch_norm"]
    assert 3 < low <= high < 1.06 * low < 12 and rows[1]["worst_branch_norm"][0] > high
    [rung] = tomllib.loads(sweep("--out", out, "--rungs", "vanilla"))["rung"]
    assert (
        rung["placement"] == "pre"
        and rung["layers"] == 6
        and low <= rung["worst_branch_gain"] <= high
    )
