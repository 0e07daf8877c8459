"""The ranges and choices of options, for Python callers and for the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from jacdiag.errors import UsageError

STATES = ("init", "trained")
DTYPES = ("float32", "float64")
REMEDY_CHOICES = ("none", "first", "all", "begun")


@dataclass(frozen=True)
class Range:
    """The range of a number.

    Attributes:
        least: its lower end.
        most: its upper end.
        open: whether the ends are left out.
        whole: whether it is an integer.
    """

    least: float
    most: float = math.inf
    open: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        """Return whether a value is a finite number, not a boolean, in this range."""
        # 1. The type. A bool is an integer in Python, but no number to a user.
        kind = Integral if self.whole else Real
        if isinstance(value, bool):
            return False
        if not isinstance(value, kind):
            return False

        # 2. The value.
        number = float(value)
        if not math.isfinite(number):
            return False
        if self.open:
            return self.least < number < self.most
        return self.least <= number <= self.most

    def __str__(self) -> str:
        """Return the range in words."""
        kind = "an integer" if self.whole else "a number"

        # A range without an upper end is said by its lower one.
        if self.most < math.inf:
            return f"{kind} between {self.least:g} and {self.most:g}"
        if self.open:
            return f"{kind} above {self.least:g}"
        return f"{kind} from {self.least:g} on"


_ABOVE_0 = Range(0, open=True)
_SHARE = Range(0, 1, open=True)
RANGES = {
    # of the solver
    "tol": _ABOVE_0,
    "confidence": _SHARE,
    "confidence_all": _SHARE,
    "max_products": Range(4, whole=True),
    # of the probe
    "probes": Range(1, whole=True),
    "batch": Range(1, whole=True),
    "seq": Range(1, whole=True),
    "seed": Range(0, 2**62, whole=True),
    # of the planned run
    "lr": _ABOVE_0,
    "warmup": Range(0, whole=True),
    "clip": _ABOVE_0,
    "beta2": _SHARE,
    # of a gate
    "seeds": Range(1, whole=True),
    "budget": _ABOVE_0,
}


def check_ranges(**values: Any) -> None:
    """Raise unless every option is in its range.

    Args:
        **values: options by their names; None is one that was not given.

    Raises:
        UsageError: one is out of its range; the message says the range.

    Example:
        >>> check_ranges(tol=0.05, lr=None)
        >>> check_ranges(confidence=1.5)
        Traceback (most recent call last):
        ...
        jacdiag.errors.UsageError: confidence cannot be 1.5
        a number between 0 and 1
    """
    for name, value in values.items():
        if value is None:
            continue
        allowed = RANGES[name]
        if value not in allowed:
            raise UsageError(f"{name} cannot be {value!r}", hint=str(allowed))
