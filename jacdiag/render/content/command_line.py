"""Change a command line that a report holds, word by word."""

from __future__ import annotations

from collections.abc import Collection


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
