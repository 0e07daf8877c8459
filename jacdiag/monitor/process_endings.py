"""Write the flight if a run ends without `close`: an exception, a signal, the end of the program.

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
from jacdiag.monitor.fault_isolation import logger, quietly
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
        is_alone: leave out what other ranks know of the figures: they may be at another place.
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
    """What the endings need of a watch."""

    closed: bool
    inert: bool
    busy: bool
    thread: int

    @property
    def count(self) -> int:
        """Steps so far."""

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
    """The open watches of this process, and what is covered for them."""

    def __init__(self) -> None:
        self.watches: dict[int, weakref.ref[Any]] = {}
        self.pid = os.getpid()
        self.handlers: dict[int, Any] = {}  # signal -> the handler that was there before
        self.excepthook: Callable[..., Any] = sys.__excepthook__
        self.thread_hook: Callable[..., Any] = threading.__excepthook__
        self.shell: Any = None  # of IPython
        self.pending: int | None = None  # a signal that came while a watch was at work
        self.watchdog = Watchdog(self.deadly, _PATIENCE)
        # steps of each watch when the last cell of a notebook ended
        self.counts: dict[int, int] = {}
        self._covers_errors = self._covers_threads = False
        self._knows_forks = False
        self._finalizes = False

    # -- the watches -------------------------------------------------------------------------------
    def open(self, watch: OpenWatch) -> None:
        """Take care of a watch from now on."""
        if not self.watches:
            self._cover()
        self._cover_signals(watch)
        self.watches[id(watch)] = weakref.ref(watch)

    def close(self, watch: OpenWatch) -> None:
        """Let go of a watch; after the last one, give back what was covered."""
        self.watches.pop(id(watch), None)
        self.counts.pop(id(watch), None)
        if not any(ref() is not None for ref in self.watches.values()):
            self.watches.clear()
            self._uncover()

    def current(self) -> list[OpenWatch]:
        """The watches of this process that are open."""
        if os.getpid() != self.pid:
            return []
        watches = [ref() for ref in self.watches.values()]
        return [watch for watch in watches if watch is not None and not watch.closed]

    # -- covering ----------------------------------------------------------------------------------
    def _cover(self) -> None:
        self.pid = os.getpid()
        self.pending = None
        if not self._covers_errors:
            self.excepthook, sys.excepthook = sys.excepthook, _on_exception
            self._covers_errors = True
        if not self._covers_threads:
            self.thread_hook, threading.excepthook = threading.excepthook, _on_thread_exception
            self._covers_threads = True
        if not self._knows_forks and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_on_fork)
            self._knows_forks = True
        self._cover_process()
        self._cover_shell()

    def _cover_process(self) -> None:
        """A process of `multiprocessing` ends without atexit and without sys.excepthook."""
        import multiprocessing
        from multiprocessing.util import Finalize

        if multiprocessing.parent_process() is not None and not self._finalizes:
            Finalize(None, _on_process_end, exitpriority=10)
            self._finalizes = True

    def _cover_shell(self) -> None:
        """In IPython an exception ends a cell and not the process."""
        module = sys.modules.get("IPython")
        shell = (
            module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
        )
        if shell is not None and self.shell is None:
            shell.events.register("post_run_cell", _on_cell_end)
            self.shell = shell

    def _cover_signals(self, watch: OpenWatch) -> None:
        if watch.inert or signal.SIGTERM in self.handlers:
            return
        if threading.current_thread() is not threading.main_thread():
            watch.note(
                "SIGTERM leaves no flight: jacdiag.watch was called in a thread, and Python takes "
                "signal handlers "
                "from the main thread only. A crash of the thread leaves one"
            )
            return
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if number in self.handlers:  # somebody has covered ours, and may call it
                continue
            # not Python's to chain, or not to be heard
            if before is None or before == signal.SIG_IGN:
                continue
            signal.signal(number, _on_signal)
            self.handlers[number] = before
        if self.deadly():
            quietly(self.watchdog.start)

    def deadly(self) -> set[int]:
        """The signals that end the process, as nobody else handles them."""
        return {number for number, before in self.handlers.items() if not callable(before)}

    def _uncover(self) -> None:
        """Give back the handlers that are still ours.

        A handler that somebody else has covered since only calls through from now on.
        """
        if sys.excepthook is _on_exception:
            sys.excepthook = self.excepthook
            self._covers_errors = False
        if threading.excepthook is _on_thread_exception:
            threading.excepthook = self.thread_hook
            self._covers_threads = False
        if threading.current_thread() is threading.main_thread():
            for number, before in list(self.handlers.items()):
                if signal.getsignal(number) is _on_signal:
                    signal.signal(number, before)
                    del self.handlers[number]
            if not self.handlers:
                quietly(self.watchdog.stop)
        shell, self.shell = self.shell, None
        if shell is not None:
            quietly(shell.events.unregister, "post_run_cell", _on_cell_end)

    def forget(self) -> None:
        """Forget the watches in a child process: they are the parent's.

        The handlers are those from before.
        """
        self.watches.clear()
        self.counts.clear()
        self.shell = self.pending = None
        self._finalizes = False
        self.watchdog.forget()
        self._uncover()

    # -- what happens ------------------------------------------------------------------------------
    def error(self, error: BaseException, thread: int) -> None:
        """An exception was caught by nobody; the watches of its thread end with it."""
        for watch in self.current():
            if watch.thread != thread:
                continue
            act = watch.interrupted_by if _is_interactive() else watch.left_by
            with _DeadlyInterrupt(error):
                quietly(act, error)

    def cell_ended(self, error: BaseException | None) -> None:
        """A cell of a notebook has ended; watches that stepped in it may go on in another one."""
        for watch in self.current():
            before = self.counts.get(id(watch), 0)
            self.counts[id(watch)] = watch.count
            if error is not None and watch.count != before:
                quietly(watch.interrupted_by, error)

    def signalled(self, number: int, frame: FrameType | None) -> None:
        """A signal came, in the main thread."""
        before = self.handlers.get(number, signal.SIG_DFL)
        if callable(before):
            for watch in self.current():
                quietly(watch.noticed, signal.Signals(number).name)
            before(number, frame)
            return
        here = threading.get_ident()
        is_at_work = any(watch.busy and watch.thread == here for watch in self.current())
        if is_at_work and self.pending is None:
            self.pending = number  # the watch dies when it has finished
            return
        self.die(number)

    def settle(self) -> None:
        """Die of a signal that came while a watch was at work."""
        if self.pending is not None and threading.current_thread() is threading.main_thread():
            self.die(self.pending)

    def die(self, number: int) -> None:
        """Write what is left and end the process by a signal, whatever the writing does."""
        signal.signal(number, signal.SIG_DFL)  # from here on a second one ends the process at once
        killer = threading.Timer(_PATIENCE, os.kill, (os.getpid(), number))
        killer.daemon = True
        try:
            killer.start()
            for watch in self.current():
                quietly(watch.killed_by, signal.Signals(number).name)
        finally:
            os.kill(os.getpid(), number)


class _DeadlyInterrupt:
    """End the process at once at a second Ctrl-C while the flight of the first is written.

    This holds inside a kernel of torch, too.
    """

    def __init__(self, error: BaseException) -> None:
        self.wanted = isinstance(error, KeyboardInterrupt)
        self.wanted &= (
            threading.current_thread() is threading.main_thread() and not _is_interactive()
        )
        self.before: Any = None

    def __enter__(self) -> None:
        if self.wanted:
            self.before = signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _is_interactive() -> bool:
    """Return whether the process goes on after an uncaught exception.

    The prompt of Python and `python -i` do.
    """
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


ENDINGS = Endings()


def _on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    try:
        quietly(ENDINGS.error, error, threading.get_ident())
    finally:
        ENDINGS.excepthook(kind, error, trace)


def _on_thread_exception(args: Any) -> None:
    if (
        args.exc_value is not None
        and args.thread is not None
        and not isinstance(args.exc_value, SystemExit)
    ):
        quietly(ENDINGS.error, args.exc_value, args.thread.ident)
    ENDINGS.thread_hook(args)


def _on_signal(number: int, frame: FrameType | None) -> None:
    ENDINGS.signalled(number, frame)


def _on_cell_end(result: Any = None) -> None:
    error = getattr(result, "error_in_exec", None)
    ENDINGS.cell_ended(error if isinstance(error, BaseException) else None)


def _on_fork() -> None:
    """A worker of a DataLoader must neither write nor speak when it is ended by a signal."""
    try:
        ENDINGS.forget()
    except Exception:
        logger.debug(
            "jacdiag.watch: a child process keeps the handlers of its parent", exc_info=True
        )


def _on_process_end() -> None:
    """A process of `multiprocessing` ends: by an exception that is on its way, or by itself."""
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit):
        # torch.multiprocessing reports the error and leaves by sys.exit(1).
        error = error.__context__ if error.code else None
    for watch in ENDINGS.current():
        if error is not None:
            quietly(watch.left_by, error)
        else:
            quietly(watch.ended_with_process)
