"""Three significant digits, and ends of intervals rounded outward, for findings and renderings."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

ABSENT = "–"
EXACT = 1e-9  # relative width below which an interval is the rounding of one number
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
    """Return a number with so many digits after the point.

    From 10,000 on it is grouped, and rounded before the point instead.
    """
    if abs(value) >= 1e4:
        return f"{float(f'{value:.2e}'):,.0f}"
    return f"{value:.{digits}f}"


def decimals(value: float) -> int:
    """Return how many digits after the point make three significant ones.

    The rounded value counts: 9.999 has one less.
    """
    if value == 0 or not math.isfinite(value):
        return 0
    exponent = int(f"{value:.2e}".split("e")[1])
    return max(0, 2 - exponent)


def outward(value: float, *, down: bool) -> str:
    """Return a number with three digits, rounded away from the inside of its interval.

    The printed end never lies inside of the true one: `float(outward(x, down=True)) <= x`.

    Args:
        value: an end of an interval.
        down: whether it is the lower end.

    >>> outward(2.057, down=True), outward(10.31, down=False), outward(2.511e19, down=False)
    ('2.05', '10.4', '2.52e19')
    >>> outward(9.999, down=True), outward(9.999, down=False), outward(5.8, down=True)
    ('9.99', '10.0', '5.80')
    """
    if value == 0 or not math.isfinite(value):
        return three(value)

    # Decimal arithmetic on the shortest digits of the number: 5.8 stays 5.80, although it is stored
    # as 5.79999...
    exact = Decimal(repr(float(value)))
    last = Decimal(1).scaleb(exact.adjusted() - 2)
    if 1e3 <= abs(value) < 1e4:
        last = Decimal(1)  # 1234 is written whole, as by `three`
    rounded = exact.quantize(last, rounding=ROUND_FLOOR if down else ROUND_CEILING)
    return three(float(rounded))


def between(lower: float, upper: float) -> str:
    """Return an interval as a person reads it: both ends with three digits, rounded outward.

    An interval without width, such as that of a closed form, is one number.

    >>> between(5.803, 6.0412), between(0.4561, 0.502), between(14.5, 14.5), between(8.4, math.inf)
    ('5.80 to 6.05', '0.456 to 0.502', '14.5', '8.40 to inf')
    """
    if math.isnan(lower) or math.isnan(upper):
        return three(math.nan)
    is_one_number = lower == upper or (math.isfinite(upper) and upper - lower <= EXACT * abs(upper))
    if is_one_number:
        return three(upper)
    return f"{outward(lower, down=True)} to {outward(upper, down=False)}"
