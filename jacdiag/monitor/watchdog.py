"""End a process by a signal that its main thread cannot take because it hangs in native code.

Python runs its handlers in the main thread, between two of its own instructions. A main thread that
waits inside a kernel or a collective never gets there. Without a handler the signal would have
ended the process, so it has to with one: the interpreter also writes the number of a signal into a
pipe, and a thread waits at its other end. Until a signal comes, that thread sleeps in the kernel.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_STOP = 0  # no signal has this number


class Watchdog:
    """Waits for signals that are to end the process.

    Args:
        deadly: returns the signals that nobody but the watch handles.
        patience: seconds after which the process is ended by the default action.
    """

    def __init__(self, deadly: Callable[[], set[int]], patience: float) -> None:
        self.deadly, self.patience = deadly, patience
        self._pipe: tuple[int, int] | None = None

    def start(self) -> None:
        """Begin, if nobody else has such a pipe, as asyncio does; call in the main thread."""
        if self._pipe is not None:
            return
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        if before != -1:
            signal.set_wakeup_fd(before)
            os.close(reads)
            os.close(writes)
            return
        self._pipe = reads, writes
        threading.Thread(
            target=self._wait, args=(reads, writes), name="jacdiag-signals", daemon=True
        ).start()

    def stop(self) -> None:
        """End, and give the place back; call in the main thread."""
        pipe = self._leave()
        if pipe is not None:
            with suppress(OSError):
                os.write(pipe[1], bytes([_STOP]))  # the thread closes both ends

    def forget(self) -> None:
        """In a forked child: its signals are no business of the parent's thread."""
        pipe = self._leave()
        for end in pipe or ():
            with suppress(OSError):
                os.close(end)

    def _leave(self) -> tuple[int, int] | None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            current = signal.set_wakeup_fd(-1)
            if current not in (-1, pipe[1]):
                signal.set_wakeup_fd(current)
        return pipe

    def _wait(self, reads: int, writes: int) -> None:
        while True:
            try:
                numbers = os.read(reads, 64)
            except OSError:
                return
            if not numbers or _STOP in numbers:
                os.close(reads)
                os.close(writes)
                return
            for number in set(numbers) & self.deadly():
                time.sleep(self.patience)
                # the default action; Python sets it in the main thread only
                ctypes.CDLL(None).signal(number, 0)
                os.kill(os.getpid(), number)
