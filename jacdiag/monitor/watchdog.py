"""End a process by a signal that its main thread cannot take, because it hangs in a kernel.

Python runs its handlers in the main thread, between two of its own instructions. A main thread that
waits inside a kernel or a collective never gets there. Without a handler the signal would have
ended the process, so it has to end it with one too. The interpreter also writes the number of a
signal into a pipe, and a thread waits at its other end. Until a signal comes, that thread sleeps.
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
_NO_PIPE = -1  # what set_wakeup_fd takes and returns for none


class Watchdog:
    """A thread that waits for signals which are to end the process.

    Args:
        deadly: returns the signals that nobody but the watch handles.
        patience: seconds after which the process is ended by the default action.
    """

    def __init__(self, deadly: Callable[[], set[int]], patience: float) -> None:
        """Note the arguments, see the class; `start` starts the thread."""
        self.deadly = deadly
        self.patience = patience
        self._pipe: tuple[int, int] | None = None

    def start(self) -> None:
        """Start the thread, unless somebody else has such a pipe, as asyncio does.

        Call it in the main thread.
        """
        if self._pipe is not None:
            return
        # 1. Have the interpreter write signals into a new pipe.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        if before != _NO_PIPE:
            signal.set_wakeup_fd(before)
            os.close(read_end)
            os.close(write_end)
            return
        self._pipe = (read_end, write_end)

        # 2. Wait at its other end.
        threading.Thread(
            target=self._wait, args=self._pipe, name="jacdiag-signals", daemon=True
        ).start()

    def stop(self) -> None:
        """End the thread and take the pipe back. Call it in the main thread."""
        pipe = self._detach()
        if pipe is not None:
            with suppress(OSError):
                os.write(pipe[1], bytes([_STOP]))  # the thread closes both ends

    def forget(self) -> None:
        """Close the pipe in a forked child: the thread of its parent does not run there."""
        pipe = self._detach()
        for end in pipe or ():
            with suppress(OSError):
                os.close(end)

    def _detach(self) -> tuple[int, int] | None:
        """Take the pipe away from the interpreter, and return it."""
        pipe = self._pipe
        self._pipe = None
        if pipe is None:
            return None
        current = signal.set_wakeup_fd(_NO_PIPE)
        if current not in (_NO_PIPE, pipe[1]):
            signal.set_wakeup_fd(current)  # somebody else's, set since
        return pipe

    def _wait(self, read_end: int, write_end: int) -> None:
        """End the process by the first deadly signal that comes."""
        while True:
            try:
                numbers = os.read(read_end, 64)
            except OSError:
                return
            if not numbers or _STOP in numbers:
                os.close(read_end)
                os.close(write_end)
                return
            for number in set(numbers) & self.deadly():
                time.sleep(self.patience)
                # Set the default action through C: Python does so in the main thread only.
                ctypes.CDLL(None).signal(number, 0)
                os.kill(os.getpid(), number)
