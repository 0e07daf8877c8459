"""Two processes: DDP and FSDP2. The same bits, the norms of the whole, and no rank that waits for another."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from watching.ranks import STEPS
from watching.rig import lines
from watching.test_figures import homes_of

SCRIPT = Path(__file__).parent / "ranks.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def two(folder: Path, mode: str, *faults: str) -> dict[str, list[dict[str, Any]]]:
    """Runs both ranks, once without a watch and once with each fault; what each rank told, by fault.

    A rank that waits for ever fails here.
    """
    faults = faults or ("",)
    for fault in faults:
        (folder / fault).mkdir(exist_ok=True)
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(port), str(folder), mode, ",".join(faults)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output)
    return {
        fault: [json.loads((folder / fault / f"told-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
        for fault in faults
    }


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_same_bits_and_the_norms_of_the_whole(mode: str, tmp_path: Path) -> None:
    told = two(tmp_path, mode)[""]
    assert [t["same"] for t in told] == [{"losses": True, "state": True, "random": True}] * 2
    rows = lines(tmp_path, "step")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    (header,) = lines(tmp_path, "run")
    assert header["sharded"] is (mode == "fsdp") and header["ranks"] == 2
    for row, squares, loss in zip(rows, told[0]["truth"], told[0]["losses"], strict=True):
        names = [name.removeprefix("module.") for name in squares]
        homes = homes_of(_Named(names))
        assert row["grad_norm_post"] == pytest.approx(math.sqrt(math.fsum(squares.values())), rel=1e-5)
        for label, value in zip(header["groups"], row["grad"], strict=True):
            mine = [s for n, s in zip(names, squares.values(), strict=True) if homes[n] == label]
            assert value == pytest.approx(math.sqrt(math.fsum(mine)), rel=1e-5)
        assert row["loss"] == pytest.approx(loss) and row["clipped"] is True
        assert row["grad_norm"] == pytest.approx(row["grad_norm_post"] * row["clip_ratio"], rel=1e-6)
        assert row["update"]["ratio"] > 0
    assert {row["update"]["where"] for row in rows} == set(header["groups"])
    probes = lines(tmp_path, "probe")
    assert [row["step"] for row in probes] == [0, 8, 16, 24]
    assert all(len(row["report"]["sublayers"]) == 4 for row in probes)
    assert not lines(tmp_path, "fault")


class _Named:
    """Names of parameters, as a module would give them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def named_parameters(self) -> list[tuple[str, None]]:
        return [(name, None) for name in self.names]


FAULTS = {
    "on the first": ["copy@0", "gather@0", "record@0", "measure@0", "memory-measure@0"],
    "on the second": ["copy@1", "memory-copy@1", "gather@1", "missing@1"],
}


@pytest.mark.parametrize("where", FAULTS)
def test_a_fault_on_one_rank_is_a_skipped_probe_on_both(where: str, tmp_path: Path) -> None:
    for fault, told in two(tmp_path, "fsdp", *FAULTS[where]).items():
        assert [t["same"] for t in told] == [{"losses": True, "state": True, "random": True}] * 2, fault
        assert max(t["seconds"] for t in told) < 60, fault
        assert not lines(tmp_path / fault, "probe"), fault
        said = lines(tmp_path / fault, "fault")
        assert len({row["part"] for row in said}) == len(said) >= 1, fault  # each said once
        assert "probe" in {row["part"] for row in said}, fault
        if not fault.startswith(("gather", "missing")):
            assert [row["step"] for row in lines(tmp_path / fault, "step")] == list(range(1, STEPS + 1)), fault
