"""The output files of a command: checked before the work, written after it, named on stderr.

`-` is stdout for every one of them. What a command prints for people then goes to stderr, so that
stdout holds the file alone; a second output for stdout is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

from jacdiag.errors import UsageError, printable
from jacdiag_cli.streams import say


def plan_outputs(
    named: Mapping[str, str | None],
    *,
    inputs: Iterable[tuple[str, str | None]] = (),
    output_format: str = "pretty",
) -> dict[str, str]:
    """Return the requested outputs, refused here rather than after minutes of work.

    Args:
        named: the path that each option was given, such as {"--json": "report.json"}.
        inputs: what the command reads: words for it, and its path.
        output_format: of what is printed.

    Raises:
        UsageError: a path cannot be written, is read by the command, or is named twice.
    """
    # 1. Those that were requested.
    outputs = {option: path for option, path in named.items() if path is not None}
    if not outputs:
        return outputs

    from jacdiag.records.output_file import check_writable

    # 2. Each by itself.
    sources = list(inputs)
    for option, path in outputs.items():
        _check_not_read(option, path, sources)
        check_writable(path)

    # 3. All together.
    _check_apart(outputs)
    _check_stdout(outputs, output_format)
    return outputs


def _check_not_read(option: str, path: str, inputs: Iterable[tuple[str, str | None]]) -> None:
    """Raise if an output would write over a file that the command reads.

    Args:
        option: of the output.
        path: of the output.
        inputs: what the command reads: words for it, and its path.
    """
    for words, source in inputs:
        if source and _is_same_file(path, source):
            raise UsageError(
                f"{option} would write over {words}", got=path, hint="name another file"
            )


def any_on_stdout(outputs: Mapping[str, str]) -> bool:
    """Return whether stdout is taken by one of the outputs."""
    if not outputs:
        return False
    from jacdiag.records.output_file import leads_to_stdout

    return any(map(leads_to_stdout, outputs.values()))


def write_data(path: str, data: bytes) -> None:
    """Write an output and say so."""
    from jacdiag.records.output_file import write_output

    write_output(path, data)
    say_written(path)


def write_text(path: str, text: str) -> None:
    """Write an output of text in UTF-8 and say so.

    A file name in it may hold bytes that are no UTF-8. They are written as escapes of JSON.
    """
    write_data(path, encoded(text))


def encoded(text: str) -> bytes:
    """Return text in UTF-8; what has no UTF-8 becomes an escape, such as \\udcff."""
    return text.encode(errors="backslashreplace")


def say_written(path: str) -> None:
    """Say `wrote FILE` on stderr, if it was.

    Nothing is said for stdout, nor for a pipe whose reader left early.
    """
    from jacdiag.records.output_file import written

    if path in written:
        # a line end in the name would look like a line of ours
        name = printable(path).replace("\n", "\\n")
        say(f"wrote {name}")


def _check_apart(outputs: Mapping[str, str]) -> None:
    """Raise if two outputs name the same file."""
    from jacdiag.records.output_file import OutputKind, find_output

    for option, other in combinations(outputs, 2):
        path = outputs[option]
        if not _is_same_file(path, outputs[other]):
            continue
        # A device takes any number of outputs: /dev/null most of all.
        if find_output(path).kind is not OutputKind.DEVICE:
            raise UsageError(f"{option} and {other} name the same file", got=path)


def _check_stdout(outputs: Mapping[str, str], output_format: str) -> None:
    """Raise if two outputs, or one and the printed format, go to stdout."""
    from jacdiag.records.output_file import leads_to_stdout

    # 1. What goes there. The table for people gives way to an output.
    takers = []
    for option, path in outputs.items():
        if leads_to_stdout(path):
            takers.append(option)
    if output_format != "pretty":
        takers.append(f"--format {output_format}")

    # 2. One may.
    if len(takers) > 1:
        raise UsageError(
            f"{takers[0]} and {takers[1]} both write to stdout", hint="name a file for one of them"
        )


def _is_same_file(path: str, other: str) -> bool:
    """Return whether two paths lead to one file, by links of either kind."""
    if "-" in (path, other):
        return False  # stdout has its own check
    with contextlib.suppress(OSError, ValueError):
        if os.path.realpath(path) == os.path.realpath(other):
            return True
        return Path(path).is_file() and Path(path).samefile(other)
    return False
