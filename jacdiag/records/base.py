"""The base of all records: a frozen dataclass to plain JSON values, and back.

A number that is not finite is written as the string "inf", "-inf" or "nan"; None is null.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from jacdiag.errors import SourceError

SCHEMA_VERSION = 1  # of every file that a record is written to

_UNIONS = (typing.Union, types.UnionType)


class NewerSchemaError(SourceError, ValueError):
    """A file was written by a newer jacdiag, whose keys may mean something else.

    It is a `ValueError` too, which readers of a report always had to expect.
    """


class Record:
    """A base class whose `to_dict` and `from_dict` follow the dataclass fields."""

    # What a file of this record is called; empty for a record that is a part of another.
    _document: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; None stays None, non-finite floats become strings."""
        return {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a record from plain JSON values.

        Unknown keys are ignored, so that an older reader takes the keys that a newer version added.
        Fields without a key get their defaults, so that a newer reader takes an older report.

        Args:
            data: what `to_dict` returned.

        Raises:
            NewerSchemaError: the record is a file of its own, of a newer schema version.
        """
        # 1. Keys of a newer schema may have another meaning.
        if cls._document:
            check_schema(data, cls._document)

        # 2. Decode the values of the known fields.
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values = {}
        for name, value in data.items():
            if name in names:
                values[name] = _decode(hints[name], value)
        return cls(**values)


def check_schema(data: Mapping[str, Any], document: str) -> None:
    """Raise if a file was written with a newer schema than this version reads.

    Args:
        data: the decoded file. A file without a version is an old one.
        document: what the file is called in the message, such as "report".

    Raises:
        NewerSchemaError: with the version of the file, and what to do.

    Example:
        >>> check_schema({"schema_version": 1}, "report")
        >>> check_schema({"schema_version": 2}, "report")
        Traceback (most recent call last):
        ...
        jacdiag.records.base.NewerSchemaError: the report was written by a newer jacdiag
        schema_version 2
        this one reads schema_version 1; update it: install a newer jacdiag
    """
    version = data.get("schema_version")
    if _major_number(version) <= SCHEMA_VERSION:
        return
    raise NewerSchemaError(
        f"the {document} was written by a newer jacdiag",
        got=f"schema_version {version}",
        hint=f"this one reads schema_version {SCHEMA_VERSION}; update it: install a newer jacdiag",
    )


def _major_number(version: object) -> int:
    """Return the number before the point of a version; 0 if it has none."""
    before_point = str(version).partition(".")[0]
    try:
        return int(before_point)
    except ValueError:
        return 0


# -- values of fields to JSON ----------------------------------------------------------------------
def _encode(value: Any) -> Any:
    """Return a value of a record as plain JSON values."""
    # 1. What JSON has too. A bool is an int.
    if value is None:
        return None
    if isinstance(value, int | str):
        return value

    # 2. Numbers, and records inside this one.
    if isinstance(value, float):
        return _encode_float(value)
    if isinstance(value, Record):
        return value.to_dict()

    # 3. Containers of such values.
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_encode(item) for item in value]
    raise TypeError(f"a report cannot hold a {type(value).__name__}")


def _encode_float(number: float) -> float | str:
    """Return a number; one that JSON cannot hold as "nan", "inf" or "-inf"."""
    if math.isfinite(number):
        return number
    return str(float(number))


# -- JSON to values of fields ----------------------------------------------------------------------
def _decode(hint: Any, value: Any) -> Any:
    """Turn a JSON value back into what the type hint of its field says."""
    if value is None:
        return None

    # 1. Types with parameters: lists, dictionaries and `T | None`.
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is list:
        return [_decode(args[0], item) for item in value]
    if origin is dict:
        return {key: _decode(args[1], item) for key, item in value.items()}
    if origin in _UNIONS:
        return _decode(_first_type(args), value)

    # 2. Types without.
    return _decode_single(hint, value)


def _first_type(args: tuple[Any, ...]) -> Any:
    """Return the first type of a union that is not None."""
    return next(arg for arg in args if arg is not type(None))


def _decode_single(hint: Any, value: Any) -> Any:
    """Turn a JSON value into a record or a float, if its hint says so."""
    is_record = isinstance(hint, type) and issubclass(hint, Record)
    if is_record:
        return hint.from_dict(value)

    # JSON writes 1.0 as 1, and `_encode_float` writes a name for what is not finite.
    if hint is float and isinstance(value, (str, int)):
        return float(value)
    return value
