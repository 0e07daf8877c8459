"""Where output goes: results to stdout, talk to stderr, files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jacdiag.errors import printable
from jacdiag.render.ascii_symbols import Form, register, spelled

if TYPE_CHECKING:
    from rich.console import Console

    from jacdiag.distributed import Team

INTERRUPTED = 130


@dataclass(frozen=True)
class Invocation:
    """How the command was called, for the `again:` line of a report, and the signals of Ctrl-C
    since.
    """

    args: list[str]
    interrupts: list[int] = field(default_factory=list)
    team: Team | None = None  # the ranks that this process is one of

    @property
    def heard(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.team is None or self.team.first

    def heed(self) -> None:
        """Raises KeyboardInterrupt if there was one: a bare `except` in some import may have
        swallowed it.
        """
        if self.interrupts:
            raise KeyboardInterrupt


def complain(what: str, *, got: str | None = None, hint: str | None = None) -> None:
    """Prints an error for people, to stderr: what cannot be done, what was found, what to try."""
    lines = [f"error: {what}"]
    for label, text in (("got", got), ("try", hint)):
        if text:
            first, *others = text.splitlines()
            lines += [f"  {label}: {first}", *(f"       {line}" for line in others)]
    say(printable("\n".join(lines)))


def interrupted() -> int:
    """The exit code after Ctrl-C.

    CPython keeps a note of a Ctrl-C that ended an exec() of text, and dies by the signal at its
    end; this clears it.
    """
    exec("")
    return INTERRUPTED


def say(text: str) -> None:
    """Prints a line for people to stderr; nobody listening, or no room to write, is no error of its
    own.
    """
    try:
        print(_for(sys.stderr, text), file=sys.stderr, flush=True)
    except OSError:
        stop_writing(sys.stderr)


def emit(text: str, form: Form = "text") -> None:
    """Print a result to stdout. A reader that has gone (`| head`) is no error: the exit code is the
    result's.

    Args:
        text: what to print.
        form: its syntax, which decides what stands for a character that the stream cannot hold.
    """
    try:
        sys.stdout.write(_for(sys.stdout, text, form))
        sys.stdout.flush()
    except BrokenPipeError:
        stop_writing(sys.stdout)


def show(text: str, *, aside: bool) -> None:
    """Prints a result to stdout, or to stderr if an output file takes stdout."""
    if aside:
        say(text.removesuffix("\n"))
    else:
        emit(text)


def _for(stream: TextIO, text: str, form: Form = "text") -> str:
    """Return a text as a stream can hold it."""
    return spelled(text, getattr(stream, "encoding", None), form)


def stop_writing(stream: TextIO) -> None:
    """Points a broken stream at nothing, so that the interpreter's own flush at exit is quiet."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def forgive_streams() -> None:
    """Let a terminal that cannot show a character show letters, and a stream that was closed
    swallow everything.
    """
    errors = register()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # `jacdiag ... >&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115, for the life of the process
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


@contextlib.contextmanager
def guest_talk() -> Iterator[None]:
    """What the model's own code prints goes to stderr: stdout is the result's alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr that collects.

    Print to it inside `with c.capture() as held`, then `emit(held.get())`.
    Printing directly would make rich end the process with code 1 when a reader has gone.
    """
    from rich.console import Console

    return Console(highlight=False, stderr=stderr)


def room(*, stderr: bool = False) -> int | None:
    """Columns of the terminal on stdout; None where output is piped, and then nothing is cut or
    wrapped to fit.

    Args:
        stderr: the text goes there.
    """
    stream = sys.stderr if stderr else sys.stdout
    if not stream.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


@dataclass(frozen=True)
class Column:
    """A column of a plain table. `interest` decides which go first where a terminal is narrow; 100
    stays.
    """

    title: str
    cells: Sequence[str]
    interest: int = 100
    right: bool = False

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.title, *self.cells))


def grid(columns: Sequence[Column], width: int | None = None, other: str = "markdown") -> str:
    """A plain table: every column as wide as its widest text, two spaces between; no row is ever
    wrapped.

    Where a terminal is too narrow, a line below names the columns left out, and `other`, the format
    that has them all.
    """
    kept = list(columns)
    while width is not None and sum(c.width + 2 for c in kept) - 2 > width:
        droppable = [column for column in kept if column.interest < 100]
        if not droppable:
            break
        kept.remove(min(droppable, key=lambda column: column.interest))
    lines = []
    for row in zip(*((c.title, *c.cells) for c in kept), strict=True):
        cells = zip(row, kept, strict=True)
        padded = [text.rjust(c.width) if c.right else text.ljust(c.width) for text, c in cells]
        lines.append("  ".join(padded).rstrip())
    text = "".join(f"{clipped(line, width)}\n" for line in lines)
    dropped = [column.title for column in columns if column not in kept]
    return text + (_told_of(dropped, width, other) if dropped and width else "")


def _told_of(dropped: list[str], width: int, other: str) -> str:
    import textwrap

    from jacdiag.render.terminal.sentences import left_out

    lines = textwrap.wrap(
        left_out(dropped, other), width, subsequent_indent="  ", break_on_hyphens=False
    )
    return "".join(f"{line}\n" for line in lines)


def clipped(line: str, width: int | None) -> str:
    """A line cut to the terminal, with a sign that it was."""
    return line if width is None or len(line) <= width else f"{line[: max(1, width - 1)]}…"
