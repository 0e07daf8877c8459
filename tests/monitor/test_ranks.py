"""Two processes: DDP and FSDP2. The same bits, the norms of the whole, and no rank that waits for
another.
"""

from __future__ import annotations

import importlib.util
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import fork_server
from monitor.rig import PROBE_EVERY, STEPS, adam, batch, lines, plain_step, small
from monitor.test_step_metrics import homes_of
from monitor.two_ranks import OPTIONS, SHORT

import jacdiag
from jacdiag.monitor.sharded_weights import ROOM

SCRIPT = Path(__file__).parent / "two_ranks.py"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def both(script: Path, folder: Path, *arguments: str) -> None:
    """Run a script as two ranks; fail if one of them waits for ever."""
    port = free_port()
    ranks = [
        fork_server().start([script, str(rank), str(port), folder, *arguments]) for rank in range(2)
    ]
    try:
        output = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], output


def two(folder: Path, mode: str, *faults: str) -> dict[str, list[dict[str, Any]]]:
    """Trains on both ranks, once without a watch and once with each fault; what each rank told, by
    fault.
    """
    faults = faults or ("",)
    for fault in faults:
        (folder / fault).mkdir(exist_ok=True)
    both(SCRIPT, folder, mode, ",".join(faults))
    return {
        fault: [
            json.loads((folder / fault / f"told-{rank}.json").read_text(encoding="utf-8"))
            for rank in range(2)
        ]
        for fault in faults
    }


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of FSDP2, its folder and what its ranks told."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, two(folder, "fsdp")[""]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_same_bits_and_the_norms_of_the_whole(
    mode: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With dropout; 200 steps with JACDIAG_LONG."""
    tmp_path, told = (
        request.getfixturevalue("sharded")
        if mode == "fsdp"
        else (tmp_path, two(tmp_path, mode)[""])
    )
    assert [t["same"] for t in told] == [{"losses": True, "state": True, "random": True}] * 2
    rows = lines(tmp_path, "step")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    (header,) = lines(tmp_path, "run")
    assert header["sharded"] is (mode == "fsdp") and header["ranks"] == 2
    for row, squares, loss in zip(rows, told[0]["truth"], told[0]["losses"], strict=True):
        names = [name.removeprefix("module.") for name in squares]
        homes = homes_of(_Named(names))
        assert row["grad_norm_post"] == pytest.approx(
            math.sqrt(math.fsum(squares.values())), rel=1e-5
        )
        for label, value in zip(header["groups"], row["grad"], strict=True):
            mine = [s for n, s in zip(names, squares.values(), strict=True) if homes[n] == label]
            assert value == pytest.approx(math.sqrt(math.fsum(mine)), rel=1e-5)
        assert row["loss"] == pytest.approx(loss) and row["clipped"] is True
        assert row["grad_norm"] == pytest.approx(
            row["grad_norm_post"] * row["clip_ratio"], rel=1e-6
        )
        assert row["update"]["ratio"] > 0
    assert {row["update"]["where"] for row in rows} == set(header["groups"])
    probes = lines(tmp_path, "probe")
    assert [row["step"] for row in probes] == list(range(0, STEPS + 1, PROBE_EVERY))
    assert all(len(row["report"]["sublayers"]) == 4 for row in probes)
    assert not lines(tmp_path, "fault")


def unsharded(folder: Path, state: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Statistics and probe of the same weights in one process, on the tokens that the leading rank
    has seen first.
    """
    model = small()
    if state is not None:
        model.load_state_dict(state)
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, log_dir=folder, probe=batch(10)[0][:2], every=9, quiet=True, strict=True
    ) as w:
        loss, norm = plain_step(model, optimizer, 1)
        w.step(loss, grad_norm=norm)
    return lines(folder, "stats")[0]["figures"], lines(folder, "probe")[0]


@pytest.mark.parametrize("step", [0, STEPS])
def test_every_figure_of_the_probe_is_the_unsharded_one(
    step: int, sharded: Any, tmp_path: Path
) -> None:
    folder = sharded[0]
    figures, whole = unsharded(tmp_path, torch.load(folder / "state.pt") if step else None)
    (stats,) = [row["figures"] for row in lines(folder, "stats") if row["step"] == step]
    (probe,) = [row for row in lines(folder, "probe") if row["step"] == step]
    for name, values in figures.items():
        assert stats[name] == pytest.approx(values, rel=1e-5), name
    names = ("branch_norm", "residual_norm", "core_norm")
    pairs = [
        (one[n], other[n])
        for one, other in zip(
            whole["report"]["sublayers"], probe["report"]["sublayers"], strict=True
        )
        for n in names
    ]
    assert len(pairs) == 12
    for one, other in pairs:
        # the later probe began with the vectors of the one before: another interval of the same
        # norm
        if step:
            assert one["lower"] <= other["upper"] and other["lower"] <= one["upper"]
        else:
            assert [other["lower"], other["upper"]] == pytest.approx(
                [one["lower"], one["upper"]], rel=1e-5
            )
    for name in ("shortcut_std",) if step else whole["figures"]:
        assert probe["figures"][name] == pytest.approx(whole["figures"][name], rel=1e-5), name


def test_no_more_than_one_block_of_the_weights_is_whole_at_a_time(sharded: Any) -> None:
    for told in sharded[1]:
        weights = told["weights"]
        assert weights["whole"] > 2 * weights["largest"] > 0
        # and one that is in use
        assert weights["largest"] <= weights["most"] <= (ROOM + 0.25) * weights["largest"]
        assert weights["now"] == 0  # nothing is kept
        # blocks, and not products
        assert weights["gathered"] < 60 * len(lines(sharded[0], "stats"))


class _Named:
    """Names of parameters, as a module would give them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def named_parameters(self) -> list[tuple[str, None]]:
        return [(name, None) for name in self.names]


FAULTS = {
    "on the first": ["gather@0", "memory-measure@0"],
    "on the second": ["copy@1", "full@1", "missing@1"],
    "on the first, the others": ["measure@0", "copy@0", "assemble@0", "record@0", "series@0"],
    "on the second, the others": ["memory-copy@1", "gather@1", "record@1", "measure@1", "series@1"],
}
OTHERS = {where: [] if where == "on the first" else [pytest.mark.long] for where in FAULTS}


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=marks) for where, marks in OTHERS.items()]
)
def test_a_fault_on_one_rank_is_a_skipped_probe_on_both(where: str, tmp_path: Path) -> None:
    for fault, told in two(tmp_path, "fsdp", *FAULTS[where]).items():
        assert [t["same"] for t in told] == [{"losses": True, "state": True, "random": True}] * 2, (
            fault
        )
        assert max(t["seconds"] for t in told) < 60, fault
        assert not lines(tmp_path / fault, "probe"), fault
        said = lines(tmp_path / fault, "fault")
        if fault.startswith("full"):  # no fault: every rank skips what one has no room for
            notes = [row["text"] for row in lines(tmp_path / fault, "note")]
            assert [note for note in notes if "skipped" in note] and not said
            # a probe begins with the statistics, which need no room
            due: set[int] = set()
            for cadence in ("stats_every", "every"):
                due.update(range(0, SHORT + 1, OPTIONS[cadence]))
            assert [row["step"] for row in lines(tmp_path / fault, "stats")] == sorted(due)
            continue
        assert len({row["part"] for row in said}) == len(said) >= 1, fault  # each said once
        assert "probe" in {row["part"] for row in said}, fault
        if not fault.startswith(("gather", "missing")):
            assert [row["step"] for row in lines(tmp_path / fault, "step")] == list(
                range(1, SHORT + 1)
            ), fault


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning is not installed"
)
def test_lightning_fsdp2_is_bitwise_identical_and_probes_the_whole_model(tmp_path: Path) -> None:
    """FSDP2 under a Lightning Trainer of two processes: the same bits, and the probe of the
    whole.
    """
    both(SCRIPT.with_name("lightning_ranks.py"), tmp_path)
    told = [
        json.loads((tmp_path / f"told-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(2)
    ]
    assert [t["same"] for t in told] == [{"losses": True, "state": True}] * 2
    rows = lines(tmp_path / "log", "step")
    assert [row["loss"] for row in rows] == pytest.approx(told[0]["losses"])
    assert lines(tmp_path / "log", "run")[0]["sharded"] is True
    assert all(row["grad_norm_post"] > 0 and row["grad_norm"] is None for row in rows)
    probes = lines(tmp_path / "log", "probe")
    assert [row["step"] for row in probes] == [0, 12, 24] and len(
        probes[0]["report"]["sublayers"]
    ) == 4
    assert not lines(tmp_path / "log", "fault")
