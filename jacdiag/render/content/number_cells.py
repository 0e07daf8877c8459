"""Numbers laid out in columns: decimal points in a line, and a bar for a value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_TO = " to "  # between the ends of an interval
_INTEGER_PART = re.compile(r"-?[\d,]*\d")
_BLOCKS = "▁▂▃▄▅▆▇█"


def aligned(cells: Sequence[str]) -> list[str]:
    """Pad texts to one width so that the points of their numbers stand in a line.

    Both ends of intervals are aligned, each on its own.

    >>> aligned(["35.7", "9.80", "1234"])
    ['  35.7 ', '   9.80', '1234   ']
    >>> aligned(["9.83 to 10.4", "0.456 to 0.502"])
    ['9.83  to 10.4  ', '0.456 to  0.502']
    """
    # 1. The lower ends, or single numbers, and the upper ends.
    ends = [cell.partition(_TO) for cell in cells]
    lowers = _on_the_point([lower for lower, _, _ in ends])
    uppers = _on_the_point([upper for _, _, upper in ends])

    # 2. Put them together again.
    padded = []
    for lower, (_, separator, _), upper in zip(lowers, ends, uppers, strict=True):
        if separator:
            padded.append(f"{lower}{separator}{upper}")
        else:
            padded.append(lower)  # a single number: its column has no upper end

    # 3. One width for all.
    width = max(map(len, padded), default=0)
    return [text.ljust(width) for text in padded]


def _on_the_point(numbers: Sequence[str]) -> list[str]:
    """Pad single numbers on both sides."""
    # 1. What stands before the point, and from it on.
    heads, tails = [], []
    for number in numbers:
        head, tail = _split(number)
        heads.append(head)
        tails.append(tail)

    # 2. Each side as wide as its widest text.
    left = max(map(len, heads), default=0)
    right = max(map(len, tails), default=0)
    pairs = zip(heads, tails, strict=True)
    return [f"{head:>{left}}{tail:<{right}}" for head, tail in pairs]


def _split(number: str) -> tuple[str, str]:
    """Cut a text after the integer part of its leading number.

    Words and "–" have no such part; they end at the point.
    """
    match = _INTEGER_PART.match(number)
    if match is None:
        return number, ""
    return number[: match.end()], number[match.end() :]


def bar(value: float, low: float = 0.01, high: float = 1.0) -> str:
    """Return one block character for a value's place between `low` and `high` on a log scale.

    >>> bar(0.01), bar(0.1), bar(1.0)
    ('▁', '▄', '█')
    """
    if not math.isfinite(value) or value <= low:
        return _BLOCKS[0]

    # 0 at `low`, 1 at `high`, more above it.
    place = math.log(value / low) / math.log(high / low)
    last = len(_BLOCKS) - 1
    return _BLOCKS[min(last, int(place * last))]
