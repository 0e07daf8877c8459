"""Tables of the reference: keys of the configuration, thresholds, fields of the JSON report."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any

from jacdiag_cli.config import all_options

from jacdiag.records import Report
from jacdiag.records.base import Record
from scripts.docs import command_pages
from scripts.docs.repository_files import ROOT

_ATTRIBUTE = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", re.MULTILINE)
# `[name]   # what is compared`, as thresholds.toml has it.
_FIGURE = re.compile(r"^\[(\w+)\] +# (.+)$", re.MULTILINE)
_OF_A_LEVEL = ("info", "warning", "error")


def configuration_options() -> str:
    """Return the options that `[tool.jacdiag]` may set."""
    return command_pages.options_table(sorted(set(all_options())))


def thresholds() -> str:
    """Return the thresholds of the rules, with the origin of each."""
    path = ROOT / "jacdiag" / "rules" / "thresholds.toml"
    text = path.read_text(encoding="utf-8")
    figures = dict(_FIGURE.findall(text))
    rows: list[str] = []
    for name, values in tomllib.loads(text).items():
        rows += _threshold_rows(name, values, {"figure": figures.get(name, "")})
    head = "| name | info | warning | error | figure and origin |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])


def _threshold_rows(name: str, values: Any, outer: Mapping[str, Any]) -> list[str]:
    """Return a row for each table that holds a threshold. Inner tables inherit the origin."""
    if not isinstance(values, dict):
        return []
    known = {**outer, **{key: values[key] for key in ("origin", "source") if key in values}}
    rows = []
    if any(level in values for level in _OF_A_LEVEL):
        cells = [str(values.get(level, "")) for level in _OF_A_LEVEL]
        origin = f"{known.get('origin', '')}: {known.get('source', '')}"
        if known["figure"]:
            origin = f"{known['figure']}. {origin}"
        origin = origin.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        rows.append(f"| `{name}` | {' | '.join(cells)} | {origin} |")
    for key, value in values.items():
        rows += _threshold_rows(f"{name}.{key}", value, known)
    return rows


def report_fields() -> str:
    """Return a table for each record of the JSON report, the report itself first."""
    parts = []
    for record in _records_in(Report):
        title = "Report" if record is Report else record.__name__
        explained = _explained_fields(record)
        rows = []
        for field in dataclasses.fields(record):
            kind = _kind(typing.get_type_hints(record)[field.name])
            key = "class" if (title, field.name) == ("ModelRecord", "name") else field.name
            rows.append(f"| `{key}` | {kind} | {explained.get(field.name, '')} |")
        text = _introduction(record)
        head = "| key | value | meaning |\n|---|---|---|"
        parts.append("\n".join([f"### {title}", "", text, "", head, *rows]))
    return "\n\n".join(parts)


def _records_in(record: type[Record]) -> list[type[Record]]:
    """Return a record and all that its fields hold, each once, outermost first."""
    order: list[type[Record]] = []
    waiting = [record]
    while waiting:
        current = waiting.pop(0)
        if current in order:
            continue
        order.append(current)
        for hint in typing.get_type_hints(current).values():
            waiting += _records_of(hint)
    return order


def _records_of(hint: Any) -> list[type[Record]]:
    """Return the records that a type hint names."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return [hint] if issubclass(hint, Record) else []
    records = []
    for argument in typing.get_args(hint):
        records += _records_of(argument)
    return records


def _kind(hint: Any) -> str:
    """Return what a JSON value is, in words, with a link to its record."""
    arguments = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join([*map(_kind, arguments), "null"])
    if origin is typing.Literal:
        return ", ".join(f'`"{value}"`' for value in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"object of {_kind(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, Record):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    names = {str: "string", int: "integer", float: "number", bool: "true or false"}
    return names.get(hint, "any value")


def _explained_fields(record: type[Record]) -> dict[str, str]:
    """Return what the docstring says of each field."""
    _, _, attributes = (record.__doc__ or "").partition("Attributes:\n")
    explained = {}
    for match in _ATTRIBUTE.finditer(attributes):
        text = " ".join(match[2].split()).replace("|", "\\|").replace("<", "&lt;")
        for name in match[1].split(", "):
            explained[name] = text
    return explained


def _introduction(record: type[Record]) -> str:
    """Return what the docstring says before it lists the fields."""
    before, _, _ = (record.__doc__ or "").partition("Attributes:")
    paragraphs = [" ".join(part.split()) for part in before.split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph).replace("<", "&lt;")
