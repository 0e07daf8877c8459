"""Group things by a key, in the order in which the keys first occur."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def group_by(items: Iterable[Item], key_of: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return lists of the items that have the same key.

    Args:
        items: in any order; each list keeps it.
        key_of: from an item to its key.

    Returns:
        Key -> its items. Keys stand in the order in which they first occur.

    Example:
        >>> group_by(["W_Q", "bias", "W_K"], len)
        {3: ['W_Q', 'W_K'], 4: ['bias']}
    """
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key_of(item), []).append(item)
    return groups
