"""What makes a frozen dataclass a record: plain JSON values in both directions, nothing written by
hand twice.

A number that is not finite is written as the string "inf", "-inf" or "nan"; None is null.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Self

SCHEMA_VERSION = 1  # of every file that a record is written to


class Record:
    """Base of the records: `to_dict` and `from_dict` follow the dataclass fields."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; None stays None, non-finite floats become strings."""
        return {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuilds a record; unknown keys are ignored, so that an older reader takes a newer
        report.
        """
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(
            **{name: _decode(hints[name], value) for name, value in data.items() if name in known}
        )


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_encode(item) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def _decode(hint: Any, value: Any) -> Any:
    """Turns a JSON value back into what the type hint of its field says."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _decode(next(arg for arg in args if arg is not type(None)), value)
    if origin is list:
        return [_decode(args[0], item) for item in value]
    if origin is dict:
        return {key: _decode(args[1], item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_dict(value)
    if hint is float and isinstance(value, (str, int)):
        return float(value)
    return value
