"""Numbers inside the sentences of findings."""

from __future__ import annotations

import math

from jacdiag.records import Interval
from jacdiag.records.number_format import between


def plain(value: float | None) -> str:
    """Return three significant digits, without an exponent where a person would not use one."""
    # 1. What was not measured.
    if value is None:
        return "?"

    # 2. What has no digits.
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"

    # 3. Sizes that need an exponent.
    size = abs(value)
    needs_exponent = not 1e-4 <= size < 1e6
    if needs_exponent:
        return f"{value:.2e}"

    # 4. Whole numbers from a thousand on.
    if size >= 1000:
        return f"{value:,.0f}"

    # 5. Else as many decimals as three digits need.
    decimals = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:.{decimals}f}"


def span(interval: Interval) -> str:
    """Return an interval as its ends, rounded outward; one number if it has no width."""
    has_no_width = interval.lower == interval.upper
    if has_no_width:
        return plain(interval.estimate)

    return between(interval.lower, interval.upper)
