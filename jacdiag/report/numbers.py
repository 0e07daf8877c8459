"""Three significant digits, and ends of intervals rounded outward: the same in findings and in renderings."""

from __future__ import annotations

import math

ABSENT = "–"
PLAIN_FROM, PLAIN_TO = 1e-4, 1e6  # outside of these a person writes a power of ten too


def three(value: float | None) -> str:
    """Three significant digits, no scientific notation where a person would not use it.

    >>> [three(v) for v in (0.0283, 9.8, 35.66, 1234.5, 44842.0, 2.5e19, None)]
    ['0.0283', '9.80', '35.7', '1234', '44,800', '2.50e19', '–']
    """
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value == 0:
        return "0"
    if not PLAIN_FROM <= abs(value) < PLAIN_TO:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(power)}"
    return written(value, decimals(value))


def written(value: float, digits: int) -> str:
    """A number with so many digits behind the point; from 10,000 on grouped, with zeros in front of it instead."""
    if abs(value) >= 1e4:
        return f"{float(f'{value:.2e}'):,.0f}"
    return f"{value:.{digits}f}"


def decimals(value: float) -> int:
    """How many digits behind the point make three significant ones (of the rounded value: 9.999 has one less)."""
    if value == 0 or not math.isfinite(value):
        return 0
    exponent = int(f"{value:.2e}".split("e")[1])
    return max(0, 2 - exponent)


def outward(value: float, *, down: bool) -> str:
    """Three digits rounded away from the inside of an interval, so that the printed one contains the real one.

    >>> outward(2.057, down=True), outward(10.31, down=False), outward(2.511e19, down=False)
    ('2.05', '10.4', '2.52e19')
    """
    if value == 0 or not math.isfinite(value):
        return three(value)
    last = last_digit(value)
    rounded = (math.floor(value / last + 1e-6) if down else math.ceil(value / last - 1e-6)) * last
    return written(rounded, decimals(value)) if PLAIN_FROM <= abs(value) < PLAIN_TO else three(rounded)


def last_digit(value: float) -> float:
    """The worth of the last digit that is written of a value."""
    return 10.0 ** (math.floor(math.log10(abs(value))) - 2) if abs(value) >= 1e4 else 10.0 ** -decimals(value)
