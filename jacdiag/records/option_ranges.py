"""The ranges of the options that are numbers, for everyone who calls from Python; the command line
has the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from jacdiag.errors import UsageError


@dataclass(frozen=True)
class Range:
    """What a number may be; `open` leaves its ends out, `whole` asks for an integer."""

    least: float
    most: float = math.inf
    open: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        inside = self.least < number < self.most if self.open else self.least <= number <= self.most
        return inside and math.isfinite(number)

    def __str__(self) -> str:
        if self.most < math.inf:
            kind = "an integer" if self.whole else "a number"
            return f"{kind} between {self.least:g} and {self.most:g}"
        kind = "an integer" if self.whole else "a number"
        return f"{kind} above {self.least:g}" if self.open else f"{kind} from {self.least:g} on"


_ABOVE_0, _SHARE = Range(0, open=True), Range(0, 1, open=True)
RANGES = {
    "tol": _ABOVE_0,
    "confidence": _SHARE,
    "confidence_all": _SHARE,
    "max_products": Range(4, whole=True),
    "probes": Range(1, whole=True),
    "batch": Range(1, whole=True),
    "seq": Range(1, whole=True),
    "seed": Range(0, 2**62, whole=True),
    "lr": _ABOVE_0,
    "warmup": Range(0, whole=True),
    "clip": _ABOVE_0,
    "beta2": _SHARE,
}


def check_ranges(**given: Any) -> None:
    """Checks options by their names; None is one that was not given.

    Raises:
        UsageError: one is out of its range, with the range.

    Example:
        >>> check_ranges(tol=0.05, lr=None)
        >>> check_ranges(confidence=1.5)
        Traceback (most recent call last):
        ...
        jacdiag.errors.UsageError: confidence cannot be 1.5
        a number between 0 and 1
    """
    for name, value in given.items():
        if value is not None and value not in RANGES[name]:
            raise UsageError(f"{name} cannot be {value!r}", hint=str(RANGES[name]))
