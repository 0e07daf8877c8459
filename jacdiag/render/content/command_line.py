"""The command line that a report holds: its words, its options, and how to change it."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from jacdiag.records import Report


def words_of(report: Report) -> list[str]:
    """Return the words of the command that gave a report; [] if a program called the library."""
    command = str(report.settings.get("command") or "")
    try:
        return shlex.split(command)
    except ValueError:
        return []  # a report of another program may hold anything


def has_option(report: Report, option: str) -> bool:
    """Return whether the command that gave a report has an option."""
    return any(names_option(word, (option,)) for word in words_of(report))


def names_option(word: str, options: Collection[str]) -> bool:
    """Return whether a word is one of some options, as in "--tol" or "--tol=0.1"."""
    return word.partition("=")[0] in options


def without_options(
    words: list[str], *, flags: Collection[str] = (), valued: Collection[str] = ()
) -> list[str]:
    """Return the words of a command without some options.

    Args:
        words: of the command.
        flags: options that take no value.
        valued: options that take one, as the next word or after "=".

    Example:
        >>> without_options(["gate", "--seeds", "1", "--all"], flags=["--all"], valued=["--seeds"])
        ['gate']
    """
    left: list[str] = []
    is_value = False
    for word in words:
        if is_value:
            is_value = False
            continue
        name, has_value, _ = word.partition("=")
        if name in valued:
            is_value = not has_value
            continue
        if name not in flags:
            left.append(word)
    return left
