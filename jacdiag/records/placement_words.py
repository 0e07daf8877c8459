"""Where the norms of sub-layers stand, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

NO_NORM_AT_ENDS = "no norm found at either end of a branch"
_NO_NORM = "no norm"


class _Placed(Protocol):
    """What the words for a placement read of a sub-layer."""

    @property
    def placement(self) -> Any:
        """Where its norm stands, "none" if at no end of the branch."""

    @property
    def norm_inside(self) -> bool | None:
        """Whether a call that may be a norm lies in the branch; None if that is not known."""


def placement_in_words(row: _Placed) -> str:
    """Return where a sub-layer has its norm, as "pre-norm".

    It has "no norm" only if no call of its branch may be one.
    """
    if row.placement not in (None, "none"):
        return f"{row.placement}-norm"
    if row.norm_inside is False:
        return _NO_NORM
    return NO_NORM_AT_ENDS


def placements_in_words(rows: Iterable[_Placed]) -> list[str]:
    """Return where the norms of several sub-layers stand, each place once.

    A model has "no norm" only if none of its branches may hold one.
    """
    # 1. Each place.
    words: dict[str, None] = {}
    for row in rows:
        words[placement_in_words(row)] = None

    # 2. One norm somewhere is enough.
    if NO_NORM_AT_ENDS in words:
        words.pop(_NO_NORM, None)
    return list(words)
