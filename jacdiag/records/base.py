"""The base of all records: a frozen dataclass to plain JSON values, and back.

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
    """A base class whose `to_dict` and `from_dict` follow the dataclass fields."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; None stays None, non-finite floats become strings."""
        return {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a record from plain JSON values.

        Unknown keys are ignored, so that an older reader takes a newer report. Fields without a key
        get their defaults, so that a newer reader takes an older report.

        Args:
            data: what `to_dict` returned.
        """
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values = {}
        for name, value in data.items():
            if name in names:
                values[name] = _decode(hints[name], value)
        return cls(**values)


def _encode(value: Any) -> Any:
    """Return a value of a record as plain JSON values."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return _name_of_non_finite(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_encode(item) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def _name_of_non_finite(number: float) -> str:
    """Return "nan", "inf" or "-inf"."""
    if math.isnan(number):
        return "nan"
    return "inf" if number > 0 else "-inf"


def _decode(hint: Any, value: Any) -> Any:
    """Turn a JSON value back into what the type hint of its field says."""
    if value is None:
        return None

    # 1. Types with parameters: `T | None`, lists and dictionaries.
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        type_of_value = next(arg for arg in args if arg is not type(None))
        return _decode(type_of_value, value)
    if origin is list:
        return [_decode(args[0], item) for item in value]
    if origin is dict:
        return {key: _decode(args[1], item) for key, item in value.items()}

    # 2. Single values.
    if isinstance(hint, type) and issubclass(hint, Record):
        value = hint.from_dict(value)
    elif hint is float and isinstance(value, (str, int)):
        value = float(value)
    return value
