"""Where output goes: results to stdout, talk to stderr, files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Invocation:
    """How the command was called, for the `again:` line of a report."""

    args: list[str]


def complain(what: str, *, got: str | None = None, hint: str | None = None) -> None:
    """Prints an error for people, to stderr: what cannot be done, what was found, what to try."""
    lines = [f"error: {what}"]
    for label, text in (("got", got), ("try", hint)):
        if text:
            first, *others = text.splitlines()
            lines += [f"  {label}: {first}", *(f"       {line}" for line in others)]
    say("\n".join(lines))


def say(text: str) -> None:
    """Prints a line for people to stderr; nobody listening is no error."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Prints a result to stdout. A reader that has gone (`| head`) is no error: the exit code stays that of the result."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        stop_writing(sys.stdout)


def stop_writing(stream: TextIO) -> None:
    """Points a broken stream at nothing, so that the interpreter's own flush at exit is quiet."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def forgive_streams() -> None:
    """Lets a terminal that cannot show a character show "?" instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def console() -> Console:
    """A console on stdout that collects: print to it inside `with c.capture() as held`, then `emit(held.get())`.

    Printing directly would make rich end the process with code 1 when a reader has gone.
    """
    from rich.console import Console

    return Console(highlight=False)


def columns(head: list[str], rows: list[list[str]]) -> str:
    """A plain table: every column as wide as its widest text, two spaces between."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines) + "\n"
