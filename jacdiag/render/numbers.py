"""Numbers as a person writes them: three significant digits, intervals as ± while narrow, the point aligned."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jacdiag.report import Interval
from jacdiag.report.numbers import ABSENT, PLAIN_FROM, PLAIN_TO, decimals, last_digit, outward, three, written

__all__ = [
    "ABSENT", "aligned", "bar", "counted", "decimals", "gist", "memory", "outward", "seconds", "share", "spoken",
    "three",
]  # fmt: skip

NARROW = 0.10  # half-width over estimate up to which ± still reads as "about this much"


def spoken(interval: Interval | None) -> str:
    """An interval as a person reads it: "23.3 ±0.9" while it is narrow, "[17.1, 29.0]" while it is wide.

    The ± is the distance from the estimate to the farther end, rounded up, so that it never promises too much.

    >>> spoken(Interval(estimate=23.3, lower=23.29, upper=24.1))
    '23.3 ±0.8'
    >>> spoken(Interval(estimate=20.0, lower=19.9, upper=30.0))
    '[19.9, 30.0]'
    """
    if interval is None:
        return ABSENT
    middle, low, high = interval.estimate, interval.lower, interval.upper
    if not (math.isfinite(middle) and math.isfinite(low) and math.isfinite(high)):
        return three(middle) if not math.isfinite(middle) else f"[{three(low)}, {three(high)}]"
    reach = max(high - middle, middle - low)
    if reach <= 1e-9 * abs(middle):
        return three(middle)
    if reach > NARROW * abs(middle) or not PLAIN_FROM <= abs(middle) < PLAIN_TO:
        return f"[{outward(low, down=True)}, {outward(high, down=False)}]"
    last = last_digit(middle)
    return f"{three(middle)} ±{written(max(1, math.ceil(reach / last - 1e-6)) * last, decimals(middle))}"


def gist(interval: Interval) -> str:
    """An interval in running text: its estimate while it is narrow, both ends while it is wide."""
    return spoken(interval).split(" ±")[0]


def aligned(cells: Sequence[str]) -> list[str]:
    """Pads texts to one width so that the points of their leading numbers stand below each other.

    >>> aligned(["35.7", "9.80", "1234"])
    ['  35.7 ', '   9.80', '1234   ']
    """
    parts = [_split(cell) for cell in cells]
    left = max((len(head) for head, _ in parts), default=0)
    right = max((len(tail) for _, tail in parts), default=0)
    return [f"{head:>{left}}{tail:<{right}}" for head, tail in parts]


_INTEGER_PART = re.compile(r"\[?-?[\d,]*\d")


def _split(cell: str) -> tuple[str, str]:
    """Cuts a text behind the integer part of its leading number; words and "–" have none and end at the point."""
    match = _INTEGER_PART.match(cell)
    cut = match.end() if match else len(cell)
    return cell[:cut], cell[cut:]


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
