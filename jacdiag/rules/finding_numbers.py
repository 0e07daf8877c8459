"""Numbers inside the sentences of findings."""

from __future__ import annotations

import math

from jacdiag.records import Interval
from jacdiag.records.number_format import between


def plain(value: float | None) -> str:
    """Three significant digits, without an exponent where a person would not use one."""
    if value is None:
        return "?"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def span(interval: Interval) -> str:
    """Return an interval as its ends, rounded outward; one number if it has no width."""
    if interval.lower == interval.upper:
        return plain(interval.estimate)
    return between(interval.lower, interval.upper)
