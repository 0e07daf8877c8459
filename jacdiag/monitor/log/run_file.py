"""The run log on disk.

A thread appends complete lines to it, and the training does not wait for that.
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

_MOST_WAITING = 10_000  # blocks of lines; a disk that is that late will not catch up


class RunFile:
    """The file `run.jsonl` in a folder, which lines are appended to.

    Links are followed. A device or a pipe of that name is written to as it is.

    Args:
        folder: made if it is not there.
        resume: go on with a log that is there.
        failed: called with the first error, by the writing thread.

    Raises:
        UsageError: a log is there and `resume` is not set, or the folder cannot be made.
    """

    def __init__(self, folder: Path, *, resume: bool, failed: Callable[[Exception], None]) -> None:
        """Open the file and start the writing thread; see the class for the arguments."""
        self.path = folder / RUN_FILE
        self.failed = failed
        self.error = False
        try:
            self._open(folder, resume)
        except OSError as error:
            raise UsageError(f"cannot write a log in '{folder}'", got=error.strerror) from error
        self._queue: queue.SimpleQueue[bytes | threading.Event | Callable[[], None] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._write_all, name="jacdiag-log", daemon=True)
        self._thread.start()

    def _open(self, folder: Path, resume: bool) -> None:
        """Open the file for appending; raise UsageError if something else is in its place."""
        # 1. Look at what is there.
        folder.mkdir(parents=True, exist_ok=True)
        mode = self.path.stat().st_mode if self.path.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise UsageError(f"cannot write a log in '{folder}'", got=f"a folder named {RUN_FILE}")
        self._regular = stat.S_ISREG(mode)  # else a device or a pipe
        has_log = self._regular and self.path.exists() and self.path.stat().st_size > 0
        if has_log and not resume:
            raise UsageError(
                f"'{folder}' holds the log of a run already",
                got=RUN_FILE,
                hint="resume=True goes on with it; another log_dir begins a new one",
            )

        # 2. Where the run stopped.
        self.last_step = last_step(self.path) if has_log else None

        # 3. Open it. A pipe is opened for reading too: the training must not wait for a reader.
        access = os.O_RDWR if stat.S_ISFIFO(mode) else os.O_WRONLY
        self._handle = os.open(self.path, access | os.O_CREAT | os.O_APPEND, 0o666)
        if has_log:
            _drop_torn_line(self.path, self._handle)

    def write(self, kind: str, rows: list[Mapping[str, Any]]) -> None:
        """Hand lines to the writing thread.

        Args:
            kind: type of the rows.
            rows: one for each line.

        Raises:
            OSError: too many lines wait for the disk.
        """
        # After an error the file is left alone.
        if self.error or not rows:
            return
        if self._queue.qsize() > _MOST_WAITING:
            raise OSError("the disk is too slow: ten thousand blocks of lines wait to be written")

        # Lines that belong together are written together.
        lines = [to_line(kind, row) for row in rows]
        self._queue.put(b"".join(lines))

    def submit(self, call: Callable[[], None]) -> None:
        """Have the writing thread call a function that does not raise."""
        self._queue.put(call)

    def flush(self, seconds: float = 5.0) -> None:
        """Wait until what was handed over is written, but no longer than some seconds."""
        done = threading.Event()
        self._queue.put(done)
        done.wait(seconds)

    def close(self) -> None:
        """Write what is left, for a few seconds at most."""
        self._queue.put(None)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            os.close(self._handle)

    def _write_all(self) -> None:
        """Work off the queue until `close`, in the writing thread."""
        while True:
            block = self._queue.get()
            # 1. The end, somebody who waits, or a function to call.
            if block is None:
                return
            if isinstance(block, threading.Event):
                block.set()
                continue
            if not isinstance(block, bytes):
                block()
                continue

            # 2. Lines. After an error the file is left alone.
            if self.error:
                continue
            try:
                self._append(block)
            except Exception as error:
                self.error = True
                self.failed(error)

    def _append(self, block: bytes) -> None:
        """Append a block of lines.

        What a full disk has torn off is taken back, so that the log holds complete lines only.
        """
        current = self.path.stat()  # raises if the folder was removed
        if current.st_ino != os.fstat(self._handle).st_ino:
            raise OSError(f"'{self.path}' is another file now")
        size = os.fstat(self._handle).st_size
        try:
            remaining = block
            while remaining:
                remaining = remaining[os.write(self._handle, remaining) :]
        except OSError:
            if self._regular:
                os.ftruncate(self._handle, size)
            raise


def last_step(path: Path) -> int:
    """Return the last step in a log; 0 if there is none."""
    last = 0
    with path.open("rb") as lines:
        for row in parsed(lines):
            if row.get("type") == "resume":
                last = int(row["step"])
            elif row.get("type") == "step":
                last = max(last, int(row["step"]))
    return last


def _drop_torn_line(path: Path, handle: int) -> None:
    """Cut off what a kill in the middle of a write has left after the last complete line."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.ftruncate(handle, end)
