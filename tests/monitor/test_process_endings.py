"""A run that ends without `close`: the flight and the log are written, and nothing of the trainer's
own is lost.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fork_server import fork_server
from jacdiag_cli.live import Follower
from monitor.rig import adam, lines, plain_step, small

import jacdiag
from jacdiag.monitor.process_endings import ENDINGS
from jacdiag.records.run_log import read_run
from jacdiag.records.run_state import state_of_run
from jacdiag.render.content.flight_replay import replay_facts

PROGRAM = Path(__file__).parent / "endings_program.py"
SIGNALS = ("hung", "killed", "interrupted", "killed twice", "interrupted twice", "own handler")
OFTEN = (
    *SIGNALS,
    "crash",
    "crash in forward",
    "crash in backward",
    "workers",
    "thread",
    "no close",
)
SELDOM = ("hung up", "handler exits", "killed at work", "kill -9", "process")
HANGS = 60.0  # seconds that a flight takes in the programs whose flights hang


class Run:
    """What the processes left behind."""

    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        self.root = root
        program = fork_server().start([PROGRAM, root, *names])
        output, errors = program.communicate(timeout=300)
        assert program.returncode == 0, errors
        self.ends: dict[str, list[Any]] = json.loads(output)

    def code(self, name: str) -> int:
        return int(self.ends[name][0])

    def seconds(self, name: str) -> float:
        return float(self.ends[name][1])

    def log(self, name: str) -> Path:
        return self.root / name / "log"

    def flights(self, name: str) -> list[str]:
        return sorted(path.name for path in self.log(name).glob("flight-*"))

    def said(self, name: str) -> str:
        return (self.root / name / "stderr").read_text(encoding="utf-8")

    def state(self, name: str) -> str:
        state = Follower(self.log(name) / "run.jsonl").follow()
        assert state is not None
        return state.text


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("often"), OFTEN)


@pytest.fixture(scope="module")
def seldom(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("seldom"), SELDOM)


def test_a_crash_leaves_a_flight_and_the_users_own_hook_is_called(often: Run) -> None:
    assert often.code("crash") == 1
    assert (
        often.flights("crash") == ["flight-25"]
        and (often.log("crash") / "flight-25" / "batch.pt").is_file()
    )
    about = json.loads((often.log("crash") / "flight-25" / "about.json").read_text())
    assert about["why"] == "ValueError: the loop is broken" and about["batch_step"] == 25
    assert "running_step" not in about, "the next step had not begun"
    assert [row["step"] for row in lines(often.log("crash"), "step")] == list(range(1, 26))
    assert (
        often.state("crash")
        == "crashed: ValueError: the loop is broken at step 25, flight in flight-25"
    )
    assert (often.root / "crash" / "hook").read_text() == "ValueError True", "after the flight"
    assert often.said("crash").count("Traceback") == 1
    assert (often.root / "crash" / "other" / "log" / "flight-3").is_dir(), "of the second watch"


def test_a_crash_inside_the_forward_leaves_its_batch_and_a_replay_names_it(often: Run) -> None:
    assert often.code("crash in forward") == 1 and often.flights("crash in forward") == [
        "flight-25"
    ]
    folder = often.log("crash in forward") / "flight-25"
    about = json.loads((folder / "about.json").read_text())
    assert (about["step"], about["batch_step"], about["running_step"], about["ended"]) == (
        25,
        25,
        26,
        "crash",
    )
    batch = torch.load(folder / "running-batch-1-at-26.pt", weights_only=True)
    assert (
        batch["idx"][1, 2] == 99
        and torch.load(folder / "batch.pt", weights_only=True)["idx"].max() < 16
    )
    assert (folder / "running-random.pt").is_file()

    report = jacdiag.audit(str(folder.parent.parent / "25.pt"), replay=folder, products=False)
    replay = report.replay
    assert replay is not None and (replay.onset, replay.step, replay.probed_step) == (26, 25, 25)
    assert replay.verdict == "batch" and "raises what the run raised (IndexError" in replay.sentence
    assert "step 26 had begun and not ended when the loop was left" in " ".join(
        replay_facts(replay)
    )


def test_a_crash_that_is_not_the_batchs_is_not_decided(often: Run) -> None:
    folder = often.log("crash in backward") / "flight-25"
    names = sorted(path.name for path in folder.glob("running-batch-*"))
    assert names == ["running-batch-1-at-26.pt", "running-batch-2-at-26.pt"]
    report = jacdiag.audit(str(folder.parent.parent / "25.pt"), replay=folder, products=False)
    replay = report.replay
    assert replay is not None and replay.verdict == "not decided" and len(replay.suspects) == 2
    assert (
        "was running when the run raised ValueError: in the backward, runs without an error"
        in replay.sentence
    )


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("killed", -signal.SIGTERM, "ended by SIGTERM"),
        ("interrupted", -signal.SIGINT, "interrupted by Ctrl-C"),
    ],
)
def test_a_signal_leaves_a_flight_and_its_own_exit_code(
    often: Run, name: str, code: int, says: str
) -> None:
    assert often.code(name) == code
    end = lines(often.log(name))[-1]
    assert (
        end["type"] == "end"
        and end["flight"] == f"flight-{end['step']}"
        and often.flights(name) == [end["flight"]]
    )
    assert [row["step"] for row in lines(often.log(name), "step")] == list(
        range(1, end["step"] + 1)
    )
    assert often.state(name) == f"{says} at step {end['step']}, flight in {end['flight']}"
    assert ("Traceback" in often.said(name)) == (name == "interrupted")


@pytest.mark.parametrize(
    ("name", "code"), [("killed twice", -signal.SIGTERM), ("interrupted twice", -signal.SIGINT)]
)
def test_a_second_signal_ends_the_process_while_the_flight_is_written(
    often: Run, name: str, code: int
) -> None:
    assert often.code(name) == code and often.seconds(name) < HANGS / 2
    assert (often.root / name / "writing").exists() and often.flights(name) == []


def test_a_process_that_hangs_outside_of_the_interpreter_still_ends(often: Run) -> None:
    assert often.code("hung") == -signal.SIGTERM and often.seconds("hung") < HANGS / 2
    assert often.state("hung").endswith("is gone"), "no flight, and no line"


def test_a_handler_of_the_trainer_decides_what_happens(often: Run) -> None:
    assert often.code("own handler") == 0
    end = lines(often.log("own handler"))[-1]
    flights = [int(name.removeprefix("flight-")) for name in often.flights("own handler")]
    assert len(flights) == 1 and flights[0] < end["step"], "the loop went on after it"
    assert "SIGTERM came" in " ".join(
        row["text"] for row in lines(often.log("own handler"), "note")
    )
    assert often.state("own handler") == f"ended at step {end['step']}"


def test_workers_and_children_write_nothing(often: Run) -> None:
    assert often.code("workers") == 0 and often.flights("workers") == []
    assert len(lines(often.log("workers"), "end")) == 1 and not lines(often.log("workers"), "fault")
    assert [row["step"] for row in lines(often.log("workers"), "step")] == list(range(1, 10))
    assert often.state("workers") == "ended at step 9"
    assert "jacdiag" not in often.said("workers").replace("endings_program", "")


def test_a_thread_that_crashes_leaves_a_flight(often: Run) -> None:
    assert often.code("thread") == 0 and often.flights("thread") == ["flight-20"]
    assert (
        often.state("thread")
        == "crashed: ValueError: in the thread at step 20, flight in flight-20"
    )
    notes = [row["text"] for row in lines(often.log("thread"), "note")]
    assert any(text.startswith("SIGTERM leaves no flight") for text in notes)
    assert not any("SIGTERM" in row["text"] for row in lines(often.log("crash"), "note"))


def test_a_program_that_ends_without_close_ends_the_log(often: Run) -> None:
    assert often.code("no close") == 0 and often.flights("no close") == []
    assert often.state("no close") == "ended at step 15, with its program"
    assert [row["step"] for row in lines(often.log("no close"), "step")] == list(range(1, 16))


@pytest.mark.long
def test_other_ways_to_end(seldom: Run) -> None:
    # 1. The terminal has gone.
    assert seldom.code("hung up") == -signal.SIGHUP and seldom.state("hung up").startswith(
        "ended by SIGHUP"
    )
    # 2. A handler that leaves the program: its exit code stays.
    assert seldom.code("handler exits") == 7 and len(seldom.flights("handler exits")) == 1
    # 3. The signal waits until the step of the watch has ended.
    assert seldom.code("killed at work") == -signal.SIGTERM and seldom.flights(
        "killed at work"
    ) == ["flight-12"]
    assert (seldom.root / "killed at work" / "finished").exists()
    # 4. Nothing could be written.
    assert seldom.code("kill -9") == -signal.SIGKILL and seldom.flights("kill -9") == []
    assert seldom.state("kill -9").endswith(" is gone") and seldom.state("kill -9").startswith(
        "no sign since"
    )
    # 5. Processes of multiprocessing, which call no hook of the interpreter.
    crashed, ended = (seldom.root / "process" / name / "log" for name in "ab")
    assert read_run(crashed).ended == {
        **read_run(crashed).ended,
        "how": "crash",
        "flight": "flight-15",
    }  # type: ignore[dict-item]
    assert read_run(ended).ended == {**read_run(ended).ended, "how": "exit", "flight": None}  # type: ignore[dict-item]


def test_everything_is_given_back() -> None:
    """Also if the watches are closed in another order than they were opened in."""

    def covered() -> list[Any]:
        return [
            sys.excepthook,
            threading.excepthook,
            *map(signal.getsignal, (signal.SIGTERM, signal.SIGINT)),
        ]

    before = covered()
    models = [small(), small()]
    watches = [jacdiag.watch(model, adam(model), every=None, quiet=True) for model in models]
    assert all(now is not then for now, then in zip(covered()[:3], before, strict=False))
    assert covered()[3] is before[3], "Ctrl-C is an exception"
    watches[0].close()
    assert covered() != before
    watches[1].close()
    assert covered() == before and not ENDINGS.watches
    assert signal.set_wakeup_fd(-1) == -1


def test_handlers_replaced_by_other_code_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        model = small()
        w = jacdiag.watch(model, adam(model), every=None, quiet=True)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "what is ignored stays ignored"
        ours, calls = sys.excepthook, []

        def outer(*error: Any) -> None:
            calls.append(error)
            ours(*error)

        sys.excepthook = outer
        w.close()
        assert sys.excepthook is outer
        with jacdiag.watch(model, adam(model), every=None, quiet=True):
            assert sys.excepthook is outer, "ours is called by it"
        sys.excepthook = ours
        jacdiag.watch(model, adam(model), every=None, quiet=True).close()
        assert sys.excepthook is not ours
    finally:
        signal.signal(signal.SIGTERM, before)


class Shell:
    """As much of IPython's shell as is needed to run cells."""

    def __init__(self) -> None:
        self.events, self.calls = self, list[Any]()

    def register(self, event: str, call: Any) -> None:
        assert event == "post_run_cell"
        self.calls.append(call)

    def unregister(self, event: str, call: Any) -> None:
        self.calls.remove(call)

    def run(self, cell: Any) -> None:
        error = None
        try:
            cell()
        except BaseException as raised:
            error = raised
        for call in self.calls:
            call(SimpleNamespace(error_in_exec=error))


def test_in_a_notebook_a_cell_leaves_a_flight_and_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    model = small()
    optimizer = adam(model)
    w = jacdiag.watch(model, optimizer, log_dir=tmp_path, every=None, quiet=True)

    def train(steps: int, error: BaseException | None = None) -> None:
        for step in range(steps):
            loss, norm = plain_step(model, optimizer, step)
            w.step(loss, grad_norm=norm)
        if error is not None:
            raise error

    shell.run(lambda: train(3, KeyboardInterrupt()))
    assert not w.closed and (tmp_path / "flight-3" / "batch.pt").is_file()
    shell.run(lambda: train(0, ValueError("of another cell")))
    shell.run(lambda: train(2))
    assert [path.name for path in tmp_path.glob("flight-*")] == ["flight-3"], (
        "only of a cell that trained"
    )
    w.close()
    assert shell.calls == [] and [row["step"] for row in lines(tmp_path, "step")] == [1, 2, 3, 4, 5]
    assert state_of_run(read_run(tmp_path), None, None, 0.0).text == "ended at step 5"  # type: ignore[union-attr]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["hugging_face", "lightning", "ranks"])
def test_trainers_that_are_killed_leave_one_flight(kind: str, tmp_path: Path) -> None:
    """SIGTERM to the process, or to torchrun, which passes it on to both ranks."""
    launcher = [sys.executable]
    if kind == "ranks":
        launcher += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
        ]
    program = str(PROGRAM.parent / "killed_trainers.py")
    process = subprocess.Popen(
        [*launcher, program, kind, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    end = lines(tmp_path / "log")[-1]
    assert process.returncode not in (0, None) and end["type"] == "end", said
    flights = [path.name for path in (tmp_path / "log").glob("flight-*")]
    assert flights == [end["flight"]] and (tmp_path / "log" / flights[0] / "batch.pt").is_file(), (
        said
    )
    assert [row["step"] for row in lines(tmp_path / "log", "step")] == list(
        range(1, end["step"] + 1)
    )
    if kind != "lightning":  # Lightning handles the signal, and raises an exception of its own
        assert (end["how"], end["reason"]) == ("signal", "SIGTERM")
