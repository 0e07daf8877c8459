"""Numbers as a person writes them: in findings, in summaries and in every rendering."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Protocol

ABSENT = "–"
EXACT = 1e-9  # relative width below which an interval is the rounding of one number
PLAIN_FROM, PLAIN_TO = 1e-4, 1e6  # outside of these a person writes a power of ten too


def three(value: float | None) -> str:
    """Three significant digits, no scientific notation where a person would not use it.

    >>> [three(v) for v in (0.0283, 9.8, 35.66, 1234.5, 44842.0, 2.5e19, None)]
    ['0.0283', '9.80', '35.7', '1234', '44,800', '2.50e19', '–']
    """
    # 1. What has no digits.
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(float(value))  # "nan", "inf" or "-inf"
    if value == 0:
        return "0"

    # 2. Very large and very small numbers have a power of ten.
    if PLAIN_FROM <= abs(value) < PLAIN_TO:
        return written(value, decimals(value))
    return _with_power(value)


def _with_power(value: float) -> str:
    """Return three digits and a power of ten: "2.50e19" where Python writes "2.50e+19"."""
    mantissa, power = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(power)}"


def written(value: float, digits: int) -> str:
    """Write a number with a given count of digits after the point.

    From 10,000 on digits are grouped, and zeros stand in place of the last ones.
    """
    if abs(value) >= 1e4:
        three_digits = float(f"{value:.2e}")
        return f"{three_digits:,.0f}"
    return f"{value:.{digits}f}"


def decimals(value: float) -> int:
    """Return how many digits after the point make three significant ones.

    The rounded value counts: 9.999 has one digit less.
    """
    if value == 0 or not math.isfinite(value):
        return 0
    _, power = f"{value:.2e}".split("e")
    return max(0, 2 - int(power))


def outward(value: float, *, down: bool) -> str:
    """Return a bound with three digits, rounded away from the inside of its interval.

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

    # 1. Decimal arithmetic on the shortest digits of the number: 5.8 stays 5.80, although it is
    # stored as 5.79999...
    exact = Decimal(repr(float(value)))

    # 2. The unit of the last digit. 1234 is written in full, as by `three`.
    unit = Decimal(1).scaleb(exact.adjusted() - 2)
    if 1e3 <= abs(value) < 1e4:
        unit = Decimal(1)

    # 3. Round away from the inside.
    rounding = ROUND_FLOOR if down else ROUND_CEILING
    rounded = exact.quantize(unit, rounding=rounding)
    return three(float(rounded))


def between(lower: float, upper: float) -> str:
    """Return an interval as a person reads it: both ends with three digits, rounded outward.

    An interval without width, such as that of a closed form, is one number.

    >>> between(5.803, 6.0412), between(0.4561, 0.502), between(14.5, 14.5), between(8.4, math.inf)
    ('5.80 to 6.05', '0.456 to 0.502', '14.5', '8.40 to inf')
    """
    has_nan = math.isnan(lower) or math.isnan(upper)
    if has_nan:
        return three(math.nan)
    if _is_one_number(lower, upper):
        return three(upper)
    return f"{outward(lower, down=True)} to {outward(upper, down=False)}"


def _is_one_number(lower: float, upper: float) -> bool:
    """Return whether an interval is only as wide as the rounding of one number."""
    if lower == upper:
        return True
    if not math.isfinite(upper):
        return False
    return upper - lower <= EXACT * abs(upper)


class _Ends(Protocol):
    """What `spoken` reads of an interval; `jacdiag.records.Interval` has it."""

    @property
    def estimate(self) -> float: ...

    @property
    def lower(self) -> float: ...

    @property
    def upper(self) -> float: ...


def spoken(interval: _Ends | None) -> str:
    """Return an interval as its two ends, or as one number if it has no width.

    Args:
        interval: with `estimate`, `lower` and `upper`; None if it was not measured.

    >>> from jacdiag.records import Interval
    >>> spoken(Interval(estimate=23.3, lower=23.29, upper=24.1))
    '23.2 to 24.1'
    >>> spoken(Interval.exact(0.0283)), spoken(None)
    ('0.0283', '–')
    """
    if interval is None:
        return ABSENT

    # A norm that is nan or inf has no interval.
    has_ends = math.isfinite(interval.estimate)
    if not has_ends:
        return three(interval.estimate)
    return between(interval.lower, interval.upper)


def two(value: float) -> str:
    """Return two significant digits, enough for a comparison between models.

    >>> two(21.7), two(397.0), two(0.001)
    ('22', '400', '0.00100')
    """
    if 0.01 < abs(value) < 1e6:
        two_digits = float(f"{value:.1e}")
        return f"{two_digits:g}"
    return three(value)


def counted(number: int) -> str:
    """Return a count of parameters with a unit.

    >>> counted(124_439_808), counted(1_300_000_000), counted(51_000), counted(12)
    ('124M', '1.30B', '51.0k', '12')
    """
    # The largest unit of which there is one or more.
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{three(number / unit)}{name}"
    return str(number)


def share(part: int, whole: int) -> str:
    """Return a share in percent: 100% only for everything, 0% only for nothing.

    >>> share(999_999, 1_000_000), share(7, 7), share(1, 3)
    ('99.99%', '100%', '33.3%')
    """
    # 1. Nothing, and everything.
    if whole <= 0:
        return ABSENT
    if part >= whole:
        return "100%"
    if part <= 0:
        return "0%"

    # 2. Close to either end, two digits keep the share apart from it.
    percent = 100 * part / whole
    shown = min(max(percent, 0.01), 99.99)
    if percent > 99.9 or percent < 0.1:
        return f"{shown:.2f}%"
    return f"{shown:.1f}%"


def level(probability: float) -> str:
    """Return a confidence in percent, rounded down so that it is never overstated.

    >>> level(0.999), level(0.9999767), level(0.95), level(1 - 1e-9)
    ('99.9%', '99.9976%', '95%', '99.9999999%')
    """
    if not 0 < probability < 1:
        return f"{100 * probability:g}%"

    # 1. Keep two digits of the chance to miss, of the decimals that the number is written with.
    percent = Decimal(repr(probability)) * 100
    places = max(0, 1 - (100 - percent).adjusted())
    rounded = percent.quantize(Decimal(1).scaleb(-places), rounding=ROUND_FLOOR)

    # 2. Write it without zeros at the end: 95%, not 95.0%.
    text = f"{rounded:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text}%"


def seconds(value: float | None) -> str:
    """Return a time span: "0.8 s", "41 s", "3 min 20 s", "2 h 5 min"."""
    if value is None:
        return ABSENT
    if value < 10:
        return f"{value:.1f} s"

    # Rounded before it is split, so that 59.7 s is "1 min 0 s" and not "60 s".
    rounded = round(value)
    minutes, seconds_left = divmod(rounded, 60)
    hours, minutes_left = divmod(minutes, 60)

    # The two largest units are enough.
    if hours:
        return f"{hours} h {minutes_left} min"
    if minutes:
        return f"{minutes} min {seconds_left} s"
    return f"{rounded} s"


def memory(megabytes: float | None) -> str:
    """Return an amount of memory: "810 MB", "1.9 GB"."""
    if megabytes is None:
        return ABSENT
    if megabytes < 1000:
        return f"{megabytes:.0f} MB"
    return f"{megabytes / 1000:.1f} GB"


def of_step_time(ratio: float) -> str:
    """Return how long something takes, compared with the steps of the run in the same time.

    Args:
        ratio: its time over that of the steps.

    >>> of_step_time(0.042), of_step_time(5.483)
    ('4.2% of the time of the steps', '5.5 times the time of the steps')
    """
    if ratio < 1:
        return f"{ratio:.1%} of the time of the steps"
    return f"{ratio:.1f} times the time of the steps"
