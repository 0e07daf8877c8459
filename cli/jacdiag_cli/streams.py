"""Where output goes: results to stdout, words for people to stderr."""

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
class CommandInvocation:
    """How the command was called.

    Attributes:
        args: of the command line, for the `again:` line of a report.
        interrupts: the signals of Ctrl-C since.
        team: the ranks that this process is one of.
    """

    args: list[str]
    interrupts: list[int] = field(default_factory=list)
    team: Team | None = None

    @property
    def heard(self) -> bool:
        """Whether this process writes and prints for all ranks."""
        return self.team is None or self.team.first

    def heed(self) -> None:
        """Raise KeyboardInterrupt if there was a Ctrl-C.

        A bare `except` in some import may have swallowed it.
        """
        # Each step of the work calls this.
        if self.interrupts:
            raise KeyboardInterrupt


def complain(what: str, *, got: str | None = None, hint: str | None = None) -> None:
    """Print an error to stderr: what cannot be done, what was found, what to try."""
    lines = [f"error: {what}"]
    for label, text in (("got", got), ("try", hint)):
        if not text:
            continue
        # Further lines stand under the first one.
        first, *others = text.splitlines()
        lines.append(f"  {label}: {first}")
        lines += [f"       {line}" for line in others]
    say(printable("\n".join(lines)))


def interrupted() -> int:
    """Return the exit code after Ctrl-C.

    CPython keeps a note of a Ctrl-C that ended an exec() of text, and dies by the signal at its
    end; this clears it.
    """
    exec("")
    return INTERRUPTED


def say(text: str) -> None:
    """Print a line for people to stderr.

    That nobody listens, or that there is no room to write, is no error of its own.
    """
    try:
        print(_for(sys.stderr, text), file=sys.stderr, flush=True)
    except OSError:
        stop_writing(sys.stderr)


def emit(text: str, form: Form = "text") -> None:
    """Print a result to stdout.

    A reader that has gone (`| head`) is no error: the exit code is the result's.

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
    """Print a result to stdout, or to stderr if an output file takes stdout."""
    if aside:
        say(text.removesuffix("\n"))
    else:
        emit(text)


def _for(stream: TextIO, text: str, form: Form = "text") -> str:
    """Return a text as a stream can hold it."""
    return spelled(text, getattr(stream, "encoding", None), form)


def stop_writing(stream: TextIO) -> None:
    """Point a broken stream at nothing, so that the interpreter's own flush at exit is quiet."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def forgive_streams() -> None:
    """Let a terminal spell what it cannot show, and a closed stream take everything."""
    # 1. Streams that are closed: `jacdiag ... >&-`.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115, for the life of the process

    # 2. Letters in place of what an encoding cannot hold. Some streams have no encoding.
    errors = register()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors=errors)  # type: ignore[union-attr]


@contextlib.contextmanager
def model_output() -> Iterator[None]:
    """Send what the model's own code prints to stderr: stdout is the result's alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr that collects.

    Print to it inside `with c.capture() as held`, then `emit(held.get())`.
    Printing directly would make rich end the process with code 1 when a reader has gone.
    """
    from rich.console import Console

    return Console(highlight=False, stderr=stderr)


def room(*, stderr: bool = False) -> int | None:
    """Return the width of the terminal on stdout; None if output is piped: then nothing is cut.

    Args:
        stderr: whether the text goes there instead.
    """
    stream = sys.stdout
    if stderr:
        stream = sys.stderr
    if not stream.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


@dataclass(frozen=True)
class TableColumn:
    """A column of a plain table.

    Attributes:
        title: its header.
        cells: its texts.
        interest: the column with the least is left out first on a narrow terminal; 100 stays.
        right: whether the texts are aligned to the right.
    """

    title: str
    cells: Sequence[str]
    interest: int = 100
    right: bool = False

    @property
    def width(self) -> int:
        """The width of its widest text."""
        return max(len(text) for text in (self.title, *self.cells))

    def padded(self) -> list[str]:
        """Return the title and the cells, all of one width."""
        width = self.width
        texts = (self.title, *self.cells)
        # Numbers are aligned to the right.
        if self.right:
            return [text.rjust(width) for text in texts]

        return [text.ljust(width) for text in texts]


def grid(columns: Sequence[TableColumn], width: int | None = None, other: str = "markdown") -> str:
    """Return a plain table: every column as wide as its widest text, two spaces between.

    No row is ever wrapped. If the terminal is too narrow, a line below names the columns that were
    left out.

    Args:
        columns: from left to right.
        width: of the terminal; None for no limit.
        other: the format that has all columns.
    """
    # 1. The rows of the columns that fit.
    shown = _fitting(columns, width)
    padded = [column.padded() for column in shown]
    text = ""
    for row in zip(*padded, strict=True):
        line = "  ".join(row).rstrip()
        text += f"{clipped(line, width)}\n"

    # 2. The columns that do not.
    dropped = [column.title for column in columns if column not in shown]
    if not dropped or not width:
        return text
    return text + _name_dropped(dropped, width, other)


def _fitting(columns: Sequence[TableColumn], width: int | None) -> list[TableColumn]:
    """Return the columns that fit a width, without those of the least interest."""
    shown = list(columns)
    if width is None:
        return shown

    # Columns of interest 100 stay, even if the row is then cut.
    droppable = [column for column in columns if column.interest < 100]
    droppable.sort(key=lambda column: column.interest)
    for column in droppable:
        if row_width(shown) <= width:
            break
        shown.remove(column)
    return shown


def row_width(columns: Sequence[TableColumn]) -> int:
    """Return the width of a row, with two spaces between its cells."""
    return sum(column.width + 2 for column in columns) - 2


def _name_dropped(dropped: list[str], width: int, other: str) -> str:
    """Return a sentence that names the columns that were left out."""
    import textwrap

    from jacdiag.render.content.sentences import left_out

    lines = textwrap.wrap(
        left_out(dropped, other), width, subsequent_indent="  ", break_on_hyphens=False
    )
    return "".join(f"{line}\n" for line in lines)


def clipped(line: str, width: int | None) -> str:
    """Return a line cut to the terminal, with a sign that it was."""
    if width is None:
        return line
    if len(line) <= width:
        return line
    return f"{line[: max(1, width - 1)]}…"
