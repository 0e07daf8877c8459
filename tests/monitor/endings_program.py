"""Runs training loops that end in many ways, each in a process of its own; torch is imported once
for all of them.

Usage: endings_program.py FOLDER NAME...; prints a JSON object, name -> exit code and seconds until
the end.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import jacdiag
from jacdiag.monitor.process_endings import ENDINGS as UNDERWAY
from jacdiag.sources.gpt import build

ENDLESS = 100_000
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 16, "block_size": 4}
READY = 12  # steps before the parent sends a signal


def setup() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = build("scaled-embed", **SIZES)
    return model, torch.optim.AdamW(model.parameters())


def watched(folder: Path, **options: Any) -> tuple[Any, Any, Any]:
    model, optimizer = setup()
    w = jacdiag.watch(
        model,
        optimizer,
        log_dir=folder / "log",
        every=None,
        stats_every=None,
        quiet=True,
        **options,
    )
    return model, optimizer, w


def step(model: Any, optimizer: Any, w: Any) -> None:
    ids = torch.randint(16, (2, 5))
    _, loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    w.step(loss)


def train(
    folder: Path, parts: tuple[Any, Any, Any], steps: int = ENDLESS, pause: float = 0.02
) -> None:
    """Train; once the program is ready for its signal, it trains slowly."""
    for _ in range(steps):
        step(*parts)
        if parts[2].count == READY:
            (folder / "ready").touch()
        time.sleep(pause if parts[2].count < READY else 10 * pause)


def slow_flights(folder: Path) -> None:
    """Writing a flight takes a minute, outside of the interpreter."""
    from jacdiag.monitor.log.flight_recorder import FlightRecorder

    def dump(*_args: Any, **_options: Any) -> None:
        (folder / "writing").touch()
        threading.Event().wait(60)

    FlightRecorder.dump = dump  # type: ignore[method-assign,assignment]


# -- the ways to end -------------------------------------------------------------------------------
def crash(folder: Path) -> None:
    """An exception, with a hook of the user for uncaught ones, and two watches."""

    def hook(kind: Any, error: Any, trace: Any) -> None:
        (folder / "hook").write_text(f"{kind.__name__} {(folder / 'log' / 'flight-25').is_dir()}")
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    parts = watched(folder)
    other = watched(folder / "other")
    train(folder, other, 3, 0)
    train(folder, parts, 25, 0)
    raise ValueError("the loop is broken")


def crash_in_forward(folder: Path) -> None:
    """A batch with an id that the model does not have."""
    model, optimizer, w = watched(folder)
    train(folder, (model, optimizer, w), 25, 0)
    torch.save({"model": model.state_dict(), "model_args": SIZES, "step": 25}, folder / "25.pt")
    ids = torch.randint(16, (2, 5))
    ids[1, 2] = 99
    model(ids[:, :-1], ids[:, 1:])


def crash_in_backward(folder: Path) -> None:
    """The second micro-batch crashes in the backward; its batch is as good as any."""
    model, optimizer, w = watched(folder)
    train(folder, (model, optimizer, w), 25, 0)
    torch.save({"model": model.state_dict(), "model_args": SIZES, "step": 25}, folder / "25.pt")
    for _ in range(2):
        ids = torch.randint(16, (2, 5))
        _, loss = model(ids[:, :-1], ids[:, 1:])
    loss.register_hook(_break)
    loss.backward()


def _break(gradient: Any) -> None:
    raise ValueError("in the backward")


def killed(folder: Path) -> None:
    train(folder, watched(folder))


def interrupted(folder: Path) -> None:
    train(folder, watched(folder))


def killed_twice(folder: Path) -> None:
    slow_flights(folder)
    train(folder, watched(folder))


def interrupted_twice(folder: Path) -> None:
    slow_flights(folder)
    train(folder, watched(folder))


def own_handler(folder: Path) -> None:
    """The trainer's own handler ends the loop after the step at hand."""
    stop: list[int] = []

    def mine(number: int, frame: Any) -> None:
        stop.append(number)

    signal.signal(signal.SIGTERM, mine)
    parts = watched(folder)
    while not stop:
        train(folder, parts, 1)
    train(folder, parts, 2, 0)
    parts[2].close()
    # the end of the interpreter takes a second
    os._exit(0 if signal.getsignal(signal.SIGTERM) is mine else 9)


def handler_exits(folder: Path) -> None:
    """The trainer's own handler leaves the program."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    train(folder, watched(folder))


def killed_at_work(folder: Path) -> None:
    """The signal comes while the watch is inside of its own step."""
    parts = watched(folder)
    run = parts[2].measurements.run

    def slow(*args: Any) -> None:
        run(*args)
        if parts[2].count == READY:
            (folder / "ready").touch()
            while UNDERWAY.pending is None:
                time.sleep(0.01)
            (folder / "finished").touch()

    parts[2].measurements.run = slow
    train(folder, parts)


def hung(folder: Path) -> None:
    """The main thread waits for ever outside of the interpreter, for a lock that it holds
    itself.
    """
    parts = watched(folder)
    UNDERWAY.watchdog.patience = 1.0
    train(folder, parts, 5, 0)
    (folder / "ready").touch()
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)


def workers(folder: Path) -> None:
    """Workers end by a signal, and a child by an exception, an exit and a signal; the run goes
    on.
    """
    parts = watched(folder)
    iterator = iter(DataLoader(list(range(8)), batch_size=1, num_workers=2))
    for _batch in iterator:
        step(*parts)
    for worker in iterator._workers:  # type: ignore[attr-defined]
        worker.terminate()
    for way in ("raise", "exit", "signal"):
        pid = os.fork()
        if pid == 0:
            if way == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            if way == "exit":
                sys.exit(5)
            raise ValueError("of a child")
        os.waitpid(pid, 0)
    step(*parts)
    parts[2].close()
    os._exit(0)


def thread(folder: Path) -> None:
    """The training runs in a thread and crashes; the program ends as if nothing had happened."""

    def run() -> None:
        train(folder, watched(folder), 20, 0)
        raise ValueError("in the thread")

    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    os._exit(0)


def no_close(folder: Path) -> None:
    train(folder, watched(folder), 15, 0)


def process(folder: Path) -> None:
    """A process of multiprocessing crashes, and one ends without close."""
    context: Any = multiprocessing.get_context("fork")
    for name, target in (("a", _crashes), ("b", no_close)):
        (folder / name).mkdir()
        child = context.Process(target=target, args=(folder / name,))
        child.start()
        child.join()


def _crashes(folder: Path) -> None:
    train(folder, watched(folder), 15, 0)
    raise ValueError("in the process")


# name -> what runs, and the signals that it is sent: a file to wait for, then the signal
ENDINGS: dict[str, tuple[Callable[[Path], None], list[tuple[str, int]]]] = {
    "crash": (crash, []),
    "crash in forward": (crash_in_forward, []),
    "crash in backward": (crash_in_backward, []),
    "killed": (killed, [("ready", signal.SIGTERM)]),
    "hung up": (killed, [("ready", signal.SIGHUP)]),
    "interrupted": (interrupted, [("ready", signal.SIGINT)]),
    "killed twice": (killed_twice, [("ready", signal.SIGTERM), ("writing", signal.SIGTERM)]),
    "interrupted twice": (
        interrupted_twice,
        [("ready", signal.SIGINT), ("writing", signal.SIGINT)],
    ),
    "hung": (hung, [("ready", signal.SIGTERM)]),
    "own handler": (own_handler, [("ready", signal.SIGTERM)]),
    "handler exits": (handler_exits, [("ready", signal.SIGTERM)]),
    "killed at work": (killed_at_work, [("ready", signal.SIGTERM)]),
    "workers": (workers, []),
    "thread": (thread, []),
    "no close": (no_close, []),
    "process": (process, []),
    "kill -9": (killed, [("ready", signal.SIGKILL)]),
}


def wait_for(file: Path, pid: int) -> bool:
    """Wait until a file is there; False if the process ended before."""
    while not file.exists():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    root = Path(sys.argv[1])
    warm = watched(root)  # what is imported at the first use is imported here, once
    train(root, warm, 2, 0)
    warm[2].close()
    gc.freeze()  # the ends of the interpreters need not look at what this one has imported
    # 1. Begin all of them.
    begun_at = {}
    for name in sys.argv[2:]:
        folder = root / name
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            said = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 2)
            os.dup2(said, 1)
            ENDINGS[name][0](folder)
            return
        begun_at[name] = pid
    # 2. Send the signals, and wait for the ends.
    found: dict[str, tuple[int, float]] = {}
    for name, pid in begun_at.items():
        begun = time.monotonic()
        for file, number in ENDINGS[name][1]:
            if not wait_for(root / name / file, pid):
                break
            begun = time.monotonic()
            os.kill(pid, number)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found[name] = code, time.monotonic() - begun
    print(json.dumps(found))


if __name__ == "__main__":
    main()
