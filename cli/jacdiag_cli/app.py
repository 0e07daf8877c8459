"""The `jacdiag` command: its group, and how everything that can go wrong becomes a message and an exit code.

Exit codes: 0 clean, 1 findings at or above --fail-on, 3 (gate) undecided, 2 cannot run, 130 after Ctrl-C; 70 is a bug
in jacdiag.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

import jacdiag
from jacdiag.errors import JacdiagError
from jacdiag_cli.audit import audit
from jacdiag_cli.explain import explain
from jacdiag_cli.gate import gate
from jacdiag_cli.output import Invocation, complain, forgive_streams, stop_writing
from jacdiag_cli.rules import rules
from jacdiag_cli.sites import sites

CANNOT_RUN, BUG, INTERRUPTED = 2, 70, 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(jacdiag.__version__, prog_name="jacdiag")
def cli() -> None:
    """Jacobian and gradient-norm diagnostics for transformer pre-training.

    Start with: jacdiag audit checkpoint.pt
    """


for _command in (audit, gate, sites, rules, explain):
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; never raises.

    Args:
        argv: arguments without the program's name; those of the process if not given.

    Example:
        >>> main(["--version"])                                   # doctest: +SKIP
        jacdiag, version 0.1.0
        0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    # Read by torch when it first takes memory: with large pages, raising a bf16 matrix takes an eighth of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    forgive_streams()
    with _interrupts() as interrupted:
        try:
            result = cli.main(args=args, prog_name="jacdiag", standalone_mode=False, obj=Invocation(args, interrupted))
            return result if isinstance(result, int) else 0
        except BaseException as error:
            real = (error.__cause__ or KeyboardInterrupt()) if isinstance(error, click.Abort) else error
            return _interrupted() if interrupted or isinstance(real, KeyboardInterrupt) else _refuse(real)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Keeps a note of Ctrl-C: code that is stopped in the middle of an import may raise another error for it."""
    seen: list[int] = []
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by who started us, as a shell does behind `&`
    if ignored or threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted() -> int:
    # CPython keeps a note of a Ctrl-C that ended an exec() of text, and dies by the signal at its end; this clears it.
    exec("")
    complain("interrupted: nothing was written that was not whole")
    return INTERRUPTED


def _refuse(error: BaseException) -> int:
    if isinstance(error.__context__, BrokenPipeError):  # how click leaves when its reader has gone
        stop_writing(sys.stdout)
    elif isinstance(error, SystemExit):  # the model's own code: its exit code must not pass for ours
        complain(f"the model's code called sys.exit({error.code!r})", hint="guard its script with if __name__ == ...")
    elif isinstance(error, JacdiagError):
        complain(error.what, got=error.got, hint=error.hint)
    elif isinstance(error, click.ClickException):
        error.show(sys.stderr)
    elif isinstance(error, OSError) and error.errno in _NO_ROOM:
        stop_writing(sys.stdout)  # what is still in its buffer could not be written at exit either
        complain("cannot write the result", got=error.strerror, hint="free some space, or write elsewhere")
    elif _out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        complain("out of memory", got=first, hint="a smaller probe: --batch 1, or a shorter --seq")
    else:
        traceback.print_exception(error)
        complain("this is a bug in jacdiag; please report it with the lines above")
        return BUG
    return CANNOT_RUN


def _out_of_memory(error: Any) -> bool:
    """Whether memory ran out. Torch is not imported for it: its errors are told by name (CUDA) and by text (CPU)."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
