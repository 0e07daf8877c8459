"""Numbers as a person writes them: three significant digits, intervals by their ends, the points in
a line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Decimal

from jacdiag.records import Interval
from jacdiag.records.number_format import ABSENT, between, outward, three

__all__ = [
    "ABSENT",
    "aligned",
    "bar",
    "between",
    "counted",
    "level",
    "memory",
    "outward",
    "seconds",
    "share",
    "spoken",
    "three",
]

_TO = " to "  # between the ends of an interval


def spoken(interval: Interval | None) -> str:
    """Return an interval as a person reads it: its two ends, or one number if it has no width.

    >>> spoken(Interval(estimate=23.3, lower=23.29, upper=24.1))
    '23.2 to 24.1'
    >>> spoken(Interval.exact(0.0283)), spoken(None)
    ('0.0283', '–')
    """
    if interval is None:
        return ABSENT
    if not math.isfinite(interval.estimate):
        return three(interval.estimate)
    return between(interval.lower, interval.upper)


def aligned(cells: Sequence[str]) -> list[str]:
    """Pad texts to one width so that the points of their numbers stand in a line, both ends of
    intervals included.

    >>> aligned(["35.7", "9.80", "1234"])
    ['  35.7 ', '   9.80', '1234   ']
    >>> aligned(["9.83 to 10.4", "0.456 to 0.502"])
    ['9.83  to 10.4  ', '0.456 to  0.502']
    """
    ends = [cell.partition(_TO) for cell in cells]
    lowers = _on_the_point([lower for lower, _, _ in ends])
    uppers = _on_the_point([upper for _, _, upper in ends])

    padded = []
    for lower, (_, separator, _), upper in zip(lowers, ends, uppers, strict=True):
        padded.append(f"{lower}{separator}{upper}" if separator else lower)

    width = max((len(cell) for cell in padded), default=0)
    return [f"{cell:<{width}}" for cell in padded]


def _on_the_point(numbers: Sequence[str]) -> list[str]:
    """Pad single numbers on both sides."""
    parts = [_split(number) for number in numbers]
    left = max((len(head) for head, _ in parts), default=0)
    right = max((len(tail) for _, tail in parts), default=0)
    return [f"{head:>{left}}{tail:<{right}}" for head, tail in parts]


_INTEGER_PART = re.compile(r"-?[\d,]*\d")


def _split(number: str) -> tuple[str, str]:
    """Cut a text after the integer part of its leading number; words and "–" have none and end at
    the point.
    """
    match = _INTEGER_PART.match(number)
    cut = match.end() if match else len(number)
    return number[:cut], number[cut:]


def counted(number: int) -> str:
    """A count of parameters as people say it.

    >>> counted(124_439_808), counted(1_300_000_000), counted(51_000), counted(12)
    ('124M', '1.30B', '51.0k', '12')
    """
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{three(number / unit)}{name}"
    return str(number)


def share(part: int, whole: int) -> str:
    """A share in percent that says 100 only of everything and 0 only of nothing.

    >>> share(999_999, 1_000_000), share(7, 7), share(1, 3)
    ('99.99%', '100%', '33.3%')
    """
    if whole <= 0:
        return ABSENT
    percent = 100 * part / whole
    if part >= whole or part <= 0:
        return "100%" if part >= whole else "0%"
    return f"{min(max(percent, 0.01), 99.99):.{2 if percent > 99.9 or percent < 0.1 else 1}f}%"


def level(probability: float) -> str:
    """Return a confidence in percent, rounded down so that it never says more than it is.

    >>> level(0.999), level(0.9999767), level(0.95), level(1 - 1e-9)
    ('99.9%', '99.9976%', '95%', '99.9999999%')
    """
    if not 0 < probability < 1:
        return f"{100 * probability:g}%"
    # Two digits of the chance to miss, of the decimals that the number is written with.
    percent = Decimal(repr(probability)) * 100
    places = max(0, 1 - (100 - percent).adjusted())
    rounded = percent.quantize(Decimal(1).scaleb(-places), rounding=ROUND_FLOOR)
    text = f"{rounded:f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def seconds(value: float | None) -> str:
    """A time span: "0.8 s", "41 s", "3 min 20 s", "2 h 5 min"."""
    if value is None:
        return ABSENT
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def memory(megabytes: float | None) -> str:
    """A size of memory: "810 MB", "1.9 GB"."""
    if megabytes is None:
        return ABSENT
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


_BLOCKS = "▁▂▃▄▅▆▇█"


def bar(value: float, low: float = 0.01, high: float = 1.0) -> str:
    """One block character: where a value stands between `low` and `high` on a log scale.

    >>> bar(0.01), bar(0.1), bar(1.0)
    ('▁', '▄', '█')
    """
    if not math.isfinite(value) or value <= low:
        return _BLOCKS[0]
    place = math.log(value / low) / math.log(high / low)
    return _BLOCKS[min(len(_BLOCKS) - 1, int(place * (len(_BLOCKS) - 1)))]
