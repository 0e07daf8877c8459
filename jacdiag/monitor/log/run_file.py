"""The run log on disk: lines are only appended, whole ones only, by a thread that the training does
not wait for.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jacdiag.errors import UsageError
from jacdiag.records.run_log import RUN_FILE, parsed, to_line

_MOST_WAITING = 10_000  # blocks of lines; a disk that is that far behind will not catch up


class RunFile:
    """Appends to `run.jsonl` in a folder. Links are followed; a device or a pipe of that name is
    written through.

    Args:
        folder: made if it is not there.
        resume: go on with a log that is there.
        failed: told of the first error (from the writing thread).

    Raises:
        UsageError: a log is there and `resume` is not set, or the folder cannot be made.
    """

    def __init__(self, folder: Path, *, resume: bool, failed: Callable[[Exception], None]) -> None:
        self.path = folder / RUN_FILE
        self.failed, self.error = failed, False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mode = self.path.stat().st_mode if self.path.exists() else stat.S_IFREG
            if stat.S_ISDIR(mode):
                raise UsageError(
                    f"cannot write a log in '{folder}'", got=f"a folder named {RUN_FILE}"
                )
            self._regular = stat.S_ISREG(mode)  # else a device or a pipe, which is written through
            there = self._regular and self.path.exists() and self.path.stat().st_size > 0
            if there and not resume:
                raise UsageError(
                    f"'{folder}' holds the log of a run already",
                    got=RUN_FILE,
                    hint="resume=True goes on with it; another log_dir begins a new one",
                )
            self.last_step = last_step(self.path) if there else None
            # A pipe is opened for reading too: the training must not wait here for a reader.
            access = os.O_RDWR if stat.S_ISFIFO(mode) else os.O_WRONLY
            self._handle = os.open(self.path, access | os.O_CREAT | os.O_APPEND, 0o666)
            if there:
                _drop_torn_line(self.path, self._handle)
        except OSError as error:
            raise UsageError(f"cannot write a log in '{folder}'", got=error.strerror) from error
        self._queue: queue.SimpleQueue[bytes | threading.Event | Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._write_all, name="jacdiag-log", daemon=True)
        self._thread.start()

    def write(self, kind: str, rows: list[Mapping[str, Any]]) -> None:
        """Hands lines to the writing thread. Raises OSError where the disk is hopelessly behind."""
        if self.error or not rows:
            return
        if self._queue.qsize() > _MOST_WAITING:
            raise OSError("the disk is too slow: ten thousand blocks of lines wait to be written")
        self._queue.put(b"".join(to_line(kind, row) for row in rows))

    def submit(self, call: Callable[[], None]) -> None:
        """Have the writing thread call a function that does not raise."""
        self._queue.put(call)

    def flush(self, seconds: float = 5.0) -> None:
        """Waits until what was handed over is written, but no longer than that."""
        done = threading.Event()
        self._queue.put(done)
        done.wait(seconds)

    def close(self) -> None:
        """Writes what is left, for a few seconds at most."""
        self._queue.put(None)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            os.close(self._handle)

    def _write_all(self) -> None:
        while True:
            block = self._queue.get()
            if block is None:
                return
            if isinstance(block, threading.Event):
                block.set()
                continue
            if not isinstance(block, bytes):
                block()
                continue
            if self.error:
                continue
            try:
                self._append(block)
            except Exception as error:
                self.error = True
                self.failed(error)

    def _append(self, block: bytes) -> None:
        """Appends a block as a whole; what a full disk tore off is taken back, so that only whole
        lines stand.
        """
        there = self.path.stat()  # raises where the folder was removed
        if there.st_ino != os.fstat(self._handle).st_ino:
            raise OSError(f"'{self.path}' is another file now")
        size = os.fstat(self._handle).st_size
        try:
            rest = block
            while rest:
                rest = rest[os.write(self._handle, rest) :]
        except OSError:
            if self._regular:
                os.ftruncate(self._handle, size)
            raise


def last_step(path: Path) -> int:
    """The last step that a log knows of; 0 if none."""
    last = 0
    with path.open("rb") as lines:
        for row in parsed(lines):
            if row.get("type") == "resume":
                last = int(row["step"])
            elif row.get("type") == "step":
                last = max(last, int(row["step"]))
    return last


def _drop_torn_line(path: Path, handle: int) -> None:
    """Cuts off what a kill in the middle of a write left behind the last whole line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.ftruncate(handle, end)
