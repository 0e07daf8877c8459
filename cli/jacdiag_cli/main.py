"""The `jacdiag` command: its group, and how every error becomes a message and an exit code.

Exit codes: 0 clean, 1 findings at or above --fail-on (diff: a figure differs), 2 cannot run, 3
(gate) undecided or no rule applied, 130 after Ctrl-C; 70 is a bug in jacdiag. Several ranks under
torchrun end with one code: that of rank 0, or of the rank that failed (2, or 130).
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

import jacdiag
from jacdiag.errors import JacdiagError, RankError, Stopped
from jacdiag.records.output_file import written
from jacdiag_cli.audit import audit
from jacdiag_cli.backtest import backtest
from jacdiag_cli.demo import demo
from jacdiag_cli.diff import diff
from jacdiag_cli.explain import explain
from jacdiag_cli.gate import gate
from jacdiag_cli.live import live
from jacdiag_cli.plot import plot
from jacdiag_cli.rules import rules
from jacdiag_cli.sites import sites
from jacdiag_cli.streams import (
    CommandInvocation,
    complain,
    forgive_streams,
    interrupted,
    say,
    stop_writing,
)
from jacdiag_cli.torchrun import calm, enrolled, quiet

if TYPE_CHECKING:
    from jacdiag.distributed import Team

CANNOT_RUN, BUG = 2, 70
_NOTHING_WRITTEN = "no file was written or changed"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _show_versions(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    """Print the versions that a report of a problem needs, and exit.

    The version of torch comes from its metadata: an import would take a second.
    """
    if not asked or context.resilient_parsing:
        return
    try:
        torch_version = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch_version = "torch is not installed"
    click.echo(f"jacdiag, version {jacdiag.__version__}")
    click.echo(f"{torch_version}, Python {platform.python_version()}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_versions,
    help="Show the versions of jacdiag, torch and Python, and exit.",
)
def cli() -> None:
    """Jacobian and gradient-norm diagnostics for transformer pre-training.

    Start with: jacdiag audit checkpoint.pt, or jacdiag demo to see an example.
    """


for _command in (audit, demo, gate, diff, sites, rules, explain, live, plot, backtest):
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raise.

    Args:
        argv: arguments without the program's name; those of the process if not given.

    Example:
        >>> main(["--version"])                                   # doctest: +SKIP
        jacdiag, version 0.2.0
        torch 2.13.0+cpu, Python 3.11.7
        0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    # Read by torch when it first takes memory. With large pages, raising a bf16 matrix takes less
    # than half of the time: see docs/evidence/cost.md.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    forgive_streams()
    written.clear()
    with _interrupts() as interrupts:
        try:
            team = enrolled()
        except BaseException as error:
            return _ended(error, interrupts)
        if team is None:
            try:
                return _run(CommandInvocation(args, interrupts))
            except BaseException as error:
                return _ended(error, interrupts)
        return _run_as_one_of(team, CommandInvocation(args, interrupts, team))


def _run(invocation: CommandInvocation) -> int:
    result = cli.main(
        args=invocation.args, prog_name="jacdiag", standalone_mode=False, obj=invocation
    )
    return result if isinstance(result, int) else 0


def _run_as_one_of(team: Team, invocation: CommandInvocation) -> int:
    """Run on every rank; rank 0 alone prints.

    All leave when it has written everything, or at the first failure.
    """
    try:
        with quiet(unless=team.first):
            code = _run(invocation)
            calm()
            team.finish()
        return code
    except BaseException as error:
        return _failed_as_one_of(team, _real(error, invocation.interrupts))


def _failed_as_one_of(team: Team, error: BaseException) -> int:
    try:
        calm()
        what = team.fail(error, _explained)
        with quiet(unless=team.reports_failure):
            code = _ended(what, [])
        team.close()
        return code
    except Stopped:  # it came a moment before calm(), and does not come twice
        return _failed_as_one_of(team, error)


def _real(error: BaseException, interrupts: list[int]) -> BaseException:
    """Return KeyboardInterrupt in place of an error that Ctrl-C caused."""
    real = (error.__cause__ or KeyboardInterrupt()) if isinstance(error, click.Abort) else error
    return KeyboardInterrupt() if interrupts else real


def _ended(error: BaseException, interrupts: list[int]) -> int:
    real = _real(error, interrupts)
    return _interrupted() if isinstance(real, KeyboardInterrupt) else _refuse(real)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Record Ctrl-C.

    Code that is stopped in the middle of an import may raise another error for it.
    """
    seen: list[int] = []
    # by who started us, as a shell does behind `&`
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted() -> int:
    outputs = _NOTHING_WRITTEN
    if written:
        outputs = f"written completely before that: {', '.join(written)}"
    complain(f"interrupted; {outputs}")
    return interrupted()


def _refuse(error: BaseException) -> int:
    """Print why a command failed; return its exit code."""
    # 1. Output that cannot be written any more.
    if isinstance(error.__context__, BrokenPipeError) or _no_room(error):
        stop_writing(sys.stdout)  # what is still in its buffer cannot be written at exit either
    if isinstance(error.__context__, BrokenPipeError):  # how click leaves when its reader has gone
        return CANNOT_RUN
    if isinstance(error, click.UsageError) and error.format_message().startswith("Usage:"):
        say(error.format_message())  # a command without arguments: click gives its help
        return CANNOT_RUN

    # 2. A bug shows its traceback; every other error says what, got and try.
    explained = _explained(error)
    if explained is None:
        traceback.print_exception(error)
        complain("this is a bug in jacdiag; please report it with the lines above")
        return BUG
    if isinstance(error, RankError) and error.trace:
        say(error.trace)
    what, got, hint = explained
    complain(what, got=got, hint=hint)
    return CANNOT_RUN


def _explained(error: BaseException) -> tuple[str, str | None, str | None] | None:
    """Return what, got and try of any error that is no bug in jacdiag; None for a bug."""
    # 1. Errors that explain themselves.
    if isinstance(error, JacdiagError):
        return error.what, error.got, error.hint

    # 2. An exit that was asked for, or a reader that has gone.
    has_no_reader = isinstance(error.__context__, BrokenPipeError)
    if has_no_reader or isinstance(error, SystemExit | Stopped):
        return _explained_exit(error)

    # 3. A command line that click refuses.
    if isinstance(error, click.ClickException):
        return _usage(error)

    # 4. A full disk, or too little memory.
    if _no_room(error):
        reason = getattr(error, "strerror", None)
        return "cannot write the result", reason, "free some space, or write elsewhere"
    if _out_of_memory(error):
        first = type(error).__name__
        if str(error):
            first = str(error).splitlines()[0]
        return "out of memory", first, "a smaller probe: --batch 1, or a shorter --seq"

    # 5. Anything else is a bug.
    return None


def _explained_exit(error: BaseException) -> tuple[str, str | None, str | None]:
    """Return what, got and try of a program that something else ends."""
    if isinstance(error.__context__, BrokenPipeError):
        return "nobody reads the output", None, None
    if isinstance(error, SystemExit):  # the model's own code: its exit code must not pass for ours
        return (
            f"the model's code called sys.exit({error.code!r})",
            None,
            "guard its script with if __name__ == ...",
        )
    return "stopped from outside (SIGTERM)", None, None


def _usage(error: click.ClickException) -> tuple[str, str | None, str | None]:
    """Return what, got and try of an error that click raised, in the style of all others."""
    # 1. A sentence that goes on after "error: ". An abbreviation keeps its capitals.
    what = error.format_message().strip()
    if not what[1:2].isupper():
        what = what[:1].lower() + what[1:]

    # 2. The command that was called.
    context = getattr(error, "ctx", None)
    path = "jacdiag"
    if context is not None:
        path = context.command_path
    help_ = f"{path} --help"

    # 3. What helps with this kind of error.
    if isinstance(error, click.NoSuchOption):
        close = ", ".join(sorted(error.possibilities or ()))
        return f"no such option: {error.option_name}", None, close or help_
    if isinstance(error, click.MissingParameter) and context is not None:
        usage = " ".join(context.command.collect_usage_pieces(context))
        return what.rstrip("."), None, f"{path} {usage}"
    return what.rstrip("."), None, help_


def _no_room(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def _out_of_memory(error: Any) -> bool:
    """Return whether memory ran out.

    Torch is not imported for it: its errors are recognised by name (CUDA) and by text (CPU).
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
