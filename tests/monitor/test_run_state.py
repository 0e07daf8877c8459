"""What `live` says of a run: each sentence where it is true, and not where it would be false."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jacdiag_cli.live import Follower
from rich.console import Console

from jacdiag.monitor.log.heartbeat_writer import INTERVAL, Pulse
from jacdiag.records.heartbeat import (
    Heartbeat,
    birth_of,
    is_alive,
    place_of_process,
    read_heartbeat,
)
from jacdiag.records.run_log import RunLog, read_run, to_line
from jacdiag.records.run_state import RunState, RunStatus, state_of_run
from jacdiag.render.terminal.run_screen import screen

NOW = 1_800_000_000.0
BEAT = Heartbeat(
    session="a",
    pid=123,
    born="1",
    host="node7",
    place="here",
    started=NOW - 900,
    time=NOW,
    step=40,
    step_seconds=2.0,
)


def said(
    silent: float, alive: bool | None = True, ended: dict[str, Any] | None = None, **more: Any
) -> tuple[RunStatus, str]:
    beat = replace(BEAT, time=NOW - silent, **more)
    state = state_of_run(RunLog(ended=ended), beat, alive, NOW)
    assert state is not None
    return state.kind, state.text


def test_run_is_slow_after_ten_usual_steps_and_ten_seconds() -> None:
    """The bound is ten usual steps, and 10 s at least."""
    assert said(19.0) == (RunStatus.RUNNING, "running")
    assert said(40.0) == (RunStatus.SLOW, "slow: last step 40 s ago, usually 2 s")
    assert said(9.0, step_seconds=0.014) == (RunStatus.RUNNING, "running")
    assert said(11.0, step_seconds=0.014) == (
        RunStatus.SLOW,
        "slow: last step 11 s ago, usually 14 ms",
    )
    assert said(550.0, step_seconds=60.0) == (RunStatus.RUNNING, "running")
    assert said(650.0, step_seconds=60.0) == (
        RunStatus.SLOW,
        "slow: last step 10 min ago, usually 60 s",
    )


def test_before_the_first_steps() -> None:
    assert said(5.0, step=None, step_seconds=None) == (RunStatus.RUNNING, "running")
    assert said(70.0, step=None, step_seconds=None) == (
        RunStatus.SLOW,
        "no step yet, started 70 s ago",
    )
    assert said(70.0, step=1, step_seconds=None) == (RunStatus.SLOW, "slow: last step 70 s ago")


def test_ended_process_is_reported_at_once() -> None:
    clock = time.strftime("%H:%M:%S", time.localtime(NOW - 3.0))
    assert said(3.0, alive=False) == (RunStatus.GONE, f"no sign since {clock}; process 123 is gone")
    assert said(3.0, alive=None)[0] is RunStatus.RUNNING
    kind, text = said(300.0, alive=None)
    assert kind is RunStatus.UNKNOWN and text.endswith(
        "process 123 on node7 cannot be seen from here"
    )
    assert "gone" not in said(300.0, alive=True)[1]


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ({}, "ended at step 1,050"),
        ({"how": "closed"}, "ended at step 1,050"),
        ({"how": "exit"}, "ended at step 1,050, with its program"),
        (
            {"how": "crash", "reason": "ValueError: x", "flight": "flight-1050"},
            "crashed: ValueError: x at step 1,050, flight in flight-1050",
        ),
        (
            {"how": "crash", "reason": "ValueError: x", "flight": None},
            "crashed: ValueError: x at step 1,050",
        ),
        (
            {"how": "interrupt", "reason": "KeyboardInterrupt"},
            "interrupted by Ctrl-C at step 1,050",
        ),
        ({"how": "signal", "reason": "SIGTERM"}, "ended by SIGTERM at step 1,050"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_how_a_run_ended(end: dict[str, Any], text: str) -> None:
    """Old logs say only that they ended. A process that went on since has another session."""
    ended = {"step": 1050, "session": "a", **end}
    assert said(300.0, alive=False, ended=ended)[1] == text
    assert said(3.0, ended={**ended, "session": "b"}) == (RunStatus.RUNNING, "running")
    state = state_of_run(RunLog(ended=ended), None, None, NOW)
    assert state is not None and state.text == text and state.is_over


def test_without_a_sign_of_life_nothing_is_concluded() -> None:
    assert state_of_run(RunLog(), None, None, NOW) is None


def test_only_this_machine_and_this_process_count_as_seen() -> None:
    place, pid = place_of_process(), os.getpid()
    mine = replace(BEAT, pid=pid, born=birth_of(pid), place=place)
    assert place and is_alive(mine) is True
    assert is_alive(replace(mine, born="1")) is False, "another process has the number now"
    assert (
        is_alive(replace(mine, place="elsewhere")) is None
        and is_alive(replace(mine, place="")) is None
    )
    child = subprocess.Popen([sys.executable, "-c", ""])
    beat = replace(mine, pid=child.pid, born=birth_of(child.pid))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(beat) is False, "it has ended, and nobody has asked how"
    child.wait()
    assert is_alive(beat) is False


def test_the_sign_of_life_is_written_once_a_second_at_most(tmp_path: Path) -> None:
    writes: list[Any] = []
    pulse = Pulse(tmp_path, writes.append)
    asked: list[int] = []

    def usual() -> float:
        asked.append(1)
        return 0.014

    for k in range(500):
        pulse.step_ended(k, 100.0 + 0.014 * k, usual)
    assert len(writes) == 1 + len(asked) and len(asked) == int(499 * 0.014 / INTERVAL) + 1
    for write in writes:
        write()
    beat = read_heartbeat(tmp_path)
    assert (
        beat is not None
        and beat.pid == os.getpid()
        and beat.step_seconds == 0.014
        and beat.step is not None
    )
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]
    (tmp_path / "heartbeat.json").write_text("[1]")
    assert read_heartbeat(tmp_path) is None and read_heartbeat(tmp_path / "no") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "no", lambda call: call())
    pulse.step_ended(1, 100.0, lambda: None)
    assert read_heartbeat(tmp_path / "no") is None and not (tmp_path / "no").exists()


def test_a_run_that_goes_on_is_not_over_before_its_first_step(tmp_path: Path) -> None:
    lines = [
        to_line("run", {"groups": []}),
        to_line("step", {"step": 1}),
        to_line("end", {"step": 1}),
    ]
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines))
    assert read_run(tmp_path).ended is not None
    (tmp_path / "run.jsonl").write_bytes(b"".join([*lines, to_line("run", {"groups": []})]))
    assert read_run(tmp_path).ended is None


def test_the_screen_says_it_in_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_bytes(
        to_line("run", {"groups": []}) + to_line("step", {"step": 1})
    )
    Pulse(tmp_path, lambda call: call())
    state = Follower(tmp_path / "run.jsonl").follow()
    assert state == RunState(RunStatus.RUNNING, "running")

    def last_line(text: str, kind: RunStatus, width: int) -> str:
        console = Console(width=width, height=12, record=True, file=io.StringIO())
        console.print(
            screen(RunLog(), "runs/a/run.jsonl", width, 12, state=RunState(kind, text)), height=12
        )
        return console.export_text().rstrip("\n").splitlines()[-1].strip()

    assert (
        last_line("running", RunStatus.RUNNING, 80)
        == "running  ·  runs/a/run.jsonl  ·  Ctrl-C leaves; the run goes on"
    )
    slow = "slow: last step 40 s ago, usually 2 s"
    assert last_line(slow, RunStatus.SLOW, 80) == f"{slow}  ·  runs/a/run.jsonl  ·  Ctrl-C leaves"
    crash = "crashed: ValueError: shapes do not fit at step 1,050, flight in flight-1050"
    assert last_line(crash, RunStatus.BROKEN, 80) == crash, "the sentence before the path"
