"""Write the flight if a run ends without `close`: an exception, a signal, the program's end.

A loop needs no `with`. While a watch is open, the hooks of the interpreter for uncaught exceptions
and the handlers of SIGTERM and SIGHUP are covered. Whatever stood there before is called
afterwards, and it is put back at the end.

What a signal does depends on who handled it before:

- nobody: the process is going to die. The flight and the log are written, then the signal is sent
  again with the default action, so that the exit code is that of the signal. A second signal ends
  the process at once.
- a handler of the trainer: it is called. The flight is written by the next `Watch.step`, or when
  the watch is closed.
- it was ignored: it stays ignored.

Ctrl-C is an exception, `KeyboardInterrupt`, and is treated as one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from jacdiag.errors import one_line
from jacdiag.monitor.guards import logger, quietly
from jacdiag.monitor.watchdog import Watchdog

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_PATIENCE = 10.0  # seconds for the last writes after a signal; torchrun and Kubernetes wait for 30


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a loop was left.

    Attributes:
        how: "closed", "exit" (the program ended without `close`), "crash", "interrupt" (Ctrl-C) or
            "signal".
        reason: the exception in one line, or the name of the signal; empty if there is none.
        has_flight: a flight is to be written.
        is_alone: do not wait for what other ranks know about the figures, since they may be at
            another place.
    """

    how: str
    reason: str = ""
    has_flight: bool = False
    is_alone: bool = False

    @classmethod
    def by_error(
        cls, error: BaseException, *, has_flight: bool = True, is_alone: bool = False
    ) -> Ending:
        """Return the ending by an exception.

        >>> Ending.by_error(ValueError("too large")).reason
        'ValueError: too large'
        """
        how = "interrupt" if isinstance(error, KeyboardInterrupt) else "crash"
        return cls(how=how, reason=one_line(error), has_flight=has_flight, is_alone=is_alone)


class OpenWatch(Protocol):
    """The part of a watch that the endings use."""

    closed: bool
    inert: bool
    busy: bool
    thread: int

    @property
    def count(self) -> int:
        """Return the steps so far."""

    def left_by(self, error: BaseException) -> None:
        """Write the flight and close, because of an exception."""

    def killed_by(self, name: str) -> None:
        """Write the flight and the last lines, because of a signal that ends the process."""

    def noticed(self, name: str) -> None:
        """Take note of a signal that somebody else handles."""

    def interrupted_by(self, error: BaseException) -> None:
        """Write the flight and stay open, because of an exception in an interactive session."""

    def ended_with_process(self) -> None:
        """Close, because the process ends."""

    def note(self, text: str) -> None:
        """Write a note to the log."""


class Endings:
    """The open watches of this process, and the hooks that are covered for them.

    Attributes:
        watches: id -> the watch.
        pid: of the process that the watches belong to.
        handlers: signal -> the handler that was there before.
        excepthook, thread_hook: the hooks that were there before.
        shell: of IPython, if there is one.
        pending: a signal that came while a watch was at work.
        counts: id -> steps of the watch when the last cell of a notebook ended.
    """

    def __init__(self) -> None:
        """Begin without a watch, and with nothing covered."""
        self.watches: dict[int, weakref.ref[Any]] = {}
        self.pid = os.getpid()
        self.handlers: dict[int, Any] = {}
        self.excepthook: Callable[..., Any] = sys.__excepthook__
        self.thread_hook: Callable[..., Any] = threading.__excepthook__
        self.shell: Any = None
        self.pending: int | None = None
        self.watchdog = Watchdog(self.deadly, _PATIENCE)
        self.counts: dict[int, int] = {}
        self._covers_excepthook = False
        self._covers_thread_hook = False
        self._is_registered_at_fork = False
        self._has_finalizer = False

    # -- the watches -------------------------------------------------------------------------------
    def open(self, watch: OpenWatch) -> None:
        """Cover the hooks and signals for a watch from now on."""
        if not self.watches:
            self._cover()
        self._cover_signals(watch)
        self.watches[id(watch)] = weakref.ref(watch)

    def close(self, watch: OpenWatch) -> None:
        """Let go of a watch. After the last one, put back what was covered."""
        self.watches.pop(id(watch), None)
        self.counts.pop(id(watch), None)

        # A watch that nobody holds any more was never closed, and counts no longer.
        is_last = not any(ref() is not None for ref in self.watches.values())
        if is_last:
            self.watches.clear()
            self._uncover()

    def current(self) -> list[OpenWatch]:
        """Return the watches of this process that are open."""
        if os.getpid() != self.pid:
            return []
        open_watches: list[OpenWatch] = []
        for reference in self.watches.values():
            watch = reference()
            if watch is not None and not watch.closed:
                open_watches.append(watch)
        return open_watches

    # -- covering ----------------------------------------------------------------------------------
    def _cover(self) -> None:
        """Cover the hooks of the interpreter, of forks, of subprocesses and of IPython."""
        self.pid = os.getpid()
        self.pending = None
        if not self._covers_excepthook:
            self.excepthook = sys.excepthook
            sys.excepthook = _on_exception
            self._covers_excepthook = True
        if not self._covers_thread_hook:
            self.thread_hook = threading.excepthook
            threading.excepthook = _on_thread_exception
            self._covers_thread_hook = True
        # Hooks of forks cannot be removed, so they are registered once.
        if not self._is_registered_at_fork and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_on_fork)
            self._is_registered_at_fork = True
        self._cover_subprocess()
        self._cover_shell()

    def _cover_subprocess(self) -> None:
        """Have a process of `multiprocessing` call back when it ends.

        It ends without atexit and without sys.excepthook.
        """
        import multiprocessing
        from multiprocessing.util import Finalize

        if multiprocessing.parent_process() is not None and not self._has_finalizer:
            Finalize(None, _on_process_end, exitpriority=10)
            self._has_finalizer = True

    def _cover_shell(self) -> None:
        """Have IPython call back after each cell: an exception ends a cell, not the process."""
        get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
        if get_shell is None:
            return
        shell = get_shell()
        if shell is not None and self.shell is None:
            shell.events.register("post_run_cell", _on_cell_end)
            self.shell = shell

    def _cover_signals(self, watch: OpenWatch) -> None:
        """Take the signals that end the process, and that somebody wants to notice."""
        if watch.inert or signal.SIGTERM in self.handlers:
            return
        if threading.current_thread() is not threading.main_thread():
            watch.note(
                "SIGTERM leaves no flight: jacdiag.watch was called in a thread, and Python takes "
                "signal handlers from the main thread only. A crash of the thread leaves one"
            )
            return
        for number in _SIGNALS:
            if number in self.handlers:
                continue  # somebody has covered our handler, and may call it
            before = signal.getsignal(number)
            is_foreign = before is None  # set outside of Python, which cannot call it
            is_ignored = before == signal.SIG_IGN
            if is_foreign or is_ignored:
                continue
            signal.signal(number, _on_signal)
            self.handlers[number] = before
        if self.deadly():
            quietly(self.watchdog.start)

    def deadly(self) -> set[int]:
        """Return the signals that end the process, because nobody else handles them."""
        return {number for number, before in self.handlers.items() if not callable(before)}

    def _uncover(self) -> None:
        """Put back what still points to this module.

        A hook that somebody else has covered since stays, and only calls through from now on.
        """
        # 1. Hooks of exceptions.
        if sys.excepthook is _on_exception:
            sys.excepthook = self.excepthook
            self._covers_excepthook = False
        if threading.excepthook is _on_thread_exception:
            threading.excepthook = self.thread_hook
            self._covers_thread_hook = False

        # 2. Signals, which only the main thread can set.
        if threading.current_thread() is threading.main_thread():
            for number, before in list(self.handlers.items()):
                if signal.getsignal(number) is _on_signal:
                    signal.signal(number, before)
                    del self.handlers[number]
            if not self.handlers:
                quietly(self.watchdog.stop)

        # 3. Cells of a notebook.
        shell = self.shell
        self.shell = None
        if shell is not None:
            quietly(shell.events.unregister, "post_run_cell", _on_cell_end)

    def forget(self) -> None:
        """Put back everything in a child process: the watches are those of its parent."""
        self.watches.clear()
        self.counts.clear()
        self.shell = None
        self.pending = None
        self._has_finalizer = False
        self.watchdog.forget()
        self._uncover()

    # -- what happens ------------------------------------------------------------------------------
    def error(self, error: BaseException, thread: int) -> None:
        """End the watches of a thread by an exception that nobody has caught.

        Args:
            error: the exception.
            thread: identifier of the thread.
        """
        for watch in self.current():
            if watch.thread != thread:
                continue
            end = watch.interrupted_by if _is_interactive() else watch.left_by
            with _DeadlyInterrupt(error):
                quietly(end, error)

    def cell_ended(self, error: BaseException | None) -> None:
        """Note that a cell of a notebook has ended. Watches may go on in another one.

        Args:
            error: that ended the cell; None if it ran to its end.
        """
        for watch in self.current():
            has_stepped = watch.count != self.counts.get(id(watch), 0)
            self.counts[id(watch)] = watch.count
            # A watch without a step in this cell was not interrupted by its error.
            if error is not None and has_stepped:
                quietly(watch.interrupted_by, error)

    def signalled(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        # 1. Somebody handles it, and may let the process go on.
        before = self.handlers.get(number, signal.SIG_DFL)
        if callable(before):
            for watch in self.current():
                quietly(watch.noticed, signal.Signals(number).name)
            before(number, frame)
            return

        # 2. It ends the process, but not in the middle of a step.
        thread = threading.get_ident()
        is_at_work = any(watch.busy and watch.thread == thread for watch in self.current())
        if is_at_work and self.pending is None:
            self.pending = number  # the watch dies when it has finished
            return
        self.die(number)

    def settle(self) -> None:
        """End the process by a signal that came while a watch was at work."""
        if self.pending is None:
            return
        if threading.current_thread() is threading.main_thread():
            self.die(self.pending)

    def die(self, number: int) -> None:
        """Write what is left and end the process by a signal, even if the writing fails."""
        # From now on a second signal ends the process at once.
        signal.signal(number, signal.SIG_DFL)
        killer = threading.Timer(_PATIENCE, os.kill, (os.getpid(), number))
        killer.daemon = True
        try:
            killer.start()
            for watch in self.current():
                quietly(watch.killed_by, signal.Signals(number).name)
        finally:
            os.kill(os.getpid(), number)


class _DeadlyInterrupt:
    """Lets a second Ctrl-C end the process at once while the flight of the first is written.

    It does so even inside a kernel.
    """

    def __init__(self, error: BaseException) -> None:
        is_ctrl_c = isinstance(error, KeyboardInterrupt)
        is_main_thread = threading.current_thread() is threading.main_thread()
        self.is_needed = is_ctrl_c and is_main_thread and not _is_interactive()
        self.before: Any = None

    def __enter__(self) -> None:
        if self.is_needed:
            self.before = signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _is_interactive() -> bool:
    """Return whether the process goes on after an uncaught exception.

    It does at the prompt of Python, and with `python -i`.
    """
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


ENDINGS = Endings()


def _on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    try:
        quietly(ENDINGS.error, error, threading.get_ident())
    finally:
        ENDINGS.excepthook(kind, error, trace)


def _on_thread_exception(args: Any) -> None:
    error, thread = args.exc_value, args.thread
    # A thread that calls sys.exit has ended as it wanted to.
    is_exit = error is None or isinstance(error, SystemExit)
    if thread is not None and not is_exit:
        quietly(ENDINGS.error, error, thread.ident)
    ENDINGS.thread_hook(args)


def _on_signal(number: int, frame: FrameType | None) -> None:
    ENDINGS.signalled(number, frame)


def _on_cell_end(result: Any = None) -> None:
    error = getattr(result, "error_in_exec", None)
    ENDINGS.cell_ended(error if isinstance(error, BaseException) else None)


def _on_fork() -> None:
    """Put back the handlers in a child: a signal that ends it must neither write nor log."""
    try:
        ENDINGS.forget()
    except Exception:
        logger.debug(
            "jacdiag.watch: a child process keeps the handlers of its parent", exc_info=True
        )


def _on_process_end() -> None:
    """Close the watches of a subprocess that ends, by the exception on its way or by itself."""
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit):
        # torch.multiprocessing reports the error and leaves by sys.exit(1).
        error = error.__context__ if error.code else None
    for watch in ENDINGS.current():
        if error is not None:
            quietly(watch.left_by, error)
        else:
            quietly(watch.ended_with_process)
