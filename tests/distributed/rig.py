"""Real processes as ranks: started as torchrun would, or by torchrun; each test says what goes
wrong on which.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fork_server import ForkedProcess, fork_server

ROOT = Path(__file__).parents[2]
SIZES = "{'n_layer': 2, 'n_embd': 16, 'n_head': 2, 'vocab_size': 64, 'block_size': 8}"
MODEL = f'''
"""A little GPT, and what may go wrong with it on one rank: on rank BAD alone."""
import ctypes, os, signal, sys, time
from pathlib import Path

import jacdiag.pipeline.measured_audit
from jacdiag.sources import gpt

BAD = os.environ.get("RANK") == os.environ.get("BAD")


def fine(**sizes):
    return gpt.build("vanilla", **{{**{SIZES}, **sizes}})


def talks():
    print("out of", os.environ.get("RANK"))
    print("err of", os.environ.get("RANK"), file=sys.stderr)
    return fine()


def has_no_file():
    if BAD:
        Path("data.bin").read_bytes()
    return fine()


def other_weight():
    model = fine()
    if BAD:
        weight = model.transformer.h[1].mlp.c_fc.weight.data
        weight[3, 5] = weight[3, 5].nextafter(weight.new_tensor(1.0))
    return model


def no_copy():
    model = fine()
    if BAD:
        def refused(memo):
            raise MemoryError
        model.__deepcopy__ = refused
    return model


def other_heads():
    return fine(n_head=4 if BAD else 2)


def while_measuring(what):
    real = jacdiag.pipeline.measured_audit.measure_group

    def instead(*args):
        Path(f"measuring-{{os.environ.get('RANK')}}").touch()
        return what(*args) if BAD else (time.sleep(0.3), real(*args))[1]

    jacdiag.pipeline.measured_audit.measure_group = instead
    return fine()


def killed():
    return while_measuring(lambda *args: os.kill(os.getpid(), signal.SIGKILL))


def raises():
    def broken(*args):
        raise LookupError("the router lost its way")

    return while_measuring(broken)


def out_of_memory():
    def greedy(*args):
        raise MemoryError("cannot hold the basis")

    return while_measuring(greedy)


def slow():
    return while_measuring(lambda *args: time.sleep(60))


def stuck_in_c():
    """A lock of C that no signal gets it out of."""
    import jacdiag_cli.torchrun

    jacdiag_cli.torchrun._GRACE = 1.0
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(256)
    return while_measuring(lambda *args: (lock(mutex), lock(mutex)))
'''


@dataclass
class Ended:
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment(folder: Path, **more: str) -> dict[str, str]:
    (folder / "build.py").write_text(MODEL, encoding="utf-8")
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {
        **clean,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cli")]),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def as_ranks(
    folder: Path,
    *command: str,
    bad: int | None = None,
    size: int = 2,
    then: Callable[[list[ForkedProcess]], None] = lambda processes: None,
) -> list[Ended]:
    """Run `python COMMAND` once per rank, without torchrun: rank 0 keeps the store.

    Nothing outlives the call.
    """
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = environment(folder, **shared, BAD=str(bad))
    processes = [
        fork_server().start(command, folder, {**env, "RANK": str(rank)}) for rank in range(size)
    ]
    try:
        then(processes)
        left = [process.communicate(timeout=90) for process in processes]
        return [
            Ended(process.returncode, *texts)
            for process, texts in zip(processes, left, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def by_torchrun(folder: Path, *args: str, bad: int | None = None, interrupt: bool = False) -> Ended:
    """Runs `torchrun --nproc-per-node 2 -m jacdiag_cli ARGS`, with Ctrl-C in the middle if
    asked.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "jacdiag_cli", *args]
    process = fork_server().start(command, folder, environment(folder, BAD=str(bad)))
    try:
        if interrupt:
            until_measuring(folder, 0)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        return Ended(process.wait(0), out, err)
    finally:
        process.kill()


def until_measuring(folder: Path, *ranks: int) -> None:
    """Waits until these ranks are at work."""
    limit = time.monotonic() + 60
    while not all((folder / f"measuring-{rank}").exists() for rank in ranks):
        assert time.monotonic() < limit, "no rank began to measure"
        time.sleep(0.02)
