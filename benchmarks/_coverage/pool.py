"""Workers that check one family after another; one that takes too long, or dies, is replaced."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Job = tuple[str, str]


def _serve(connection: Connection) -> None:
    """A worker's life: jobs in, results out."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "critical",
        "OMP_NUM_THREADS": "1",
    }
    import warnings

    import torch

    from _coverage.check import check

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while (job := connection.recv()) is not None:
        try:
            connection.send(check(*job))
        except Exception as error:  # a fault of this script: shown, not hidden in a dead process
            connection.send(repr(error))


class _Worker:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.started = 0.0

    def give(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        self.connection.send(job)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(
    jobs: Sequence[Job], workers: int, limit: float, lost: Callable[[Job, str], Any]
) -> Iterator[Any]:
    """Yields a result per job, in the order they come. `lost(job, reason)` makes one for a job that
    was cut off.
    """
    left, busy = list(jobs), [_Worker() for _ in range(min(workers, len(jobs)))]
    try:
        while True:
            for worker in busy:
                if worker.job is None and left:
                    worker.give(left.pop(0))
            active = [w for w in busy if w.job is not None]
            if not active:
                return
            ready = wait([w.connection for w in active], timeout=0.5)
            for worker in active:
                assert worker.job is not None
                if worker.connection in ready:
                    try:
                        result = worker.connection.recv()
                        worker.job, job = None, worker.job
                    except EOFError:
                        job, result = worker.job, None
                    yield (
                        result
                        if isinstance(result, dict)
                        else lost(job, result or "the process died")
                    )
                    if worker.job is None:
                        continue
                elif time.monotonic() - worker.started <= limit:
                    continue
                else:
                    yield lost(worker.job, f"not done in {limit:.0f} s")
                worker.stop()
                busy[busy.index(worker)] = _Worker()
    finally:
        for worker in busy:
            worker.stop()
