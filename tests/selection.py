"""Which cases of a large family of tests run in `make test`; the rest of them run in `make
test-long`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def every_third(
    values: Iterable[Any],
    *,
    always: Callable[[Any], bool] = lambda value: False,
    only: Callable[[Any], bool] = lambda value: True,
) -> list[Any]:
    """Return the values as parameters of a test, two of three of them marked as long.

    Args:
        values: in the order in which they are counted.
        always: whether a value belongs to `make test` wherever it stands.
        only: whether a value is a parameter at all; the others are counted and left out.
    """
    parameters = []
    for place, value in enumerate(values):
        if not only(value):
            continue
        is_short = place % 3 == 0 or always(value)
        parameters.append(value if is_short else pytest.param(value, marks=pytest.mark.long))
    return parameters
