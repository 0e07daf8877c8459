"""Every record survives the way to JSON and back, and older and newer files are handled."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import types
import typing
from pathlib import Path
from typing import Any

import pytest

import jacdiag.records
from jacdiag.errors import SourceError
from jacdiag.records import SCHEMA_VERSION, FiguresRecord, NewerSchemaError, Report
from jacdiag.records.backtest import BacktestReport
from jacdiag.records.base import Record
from jacdiag.records.heartbeat import HEARTBEAT_FILE, Heartbeat, read_heartbeat
from jacdiag.records.run_log import RUN_FILE, RUN_SCHEMA_VERSION, Alert, read_run, to_line


def record_classes() -> list[type[Record]]:
    """Return all record classes of the folder."""
    classes: set[type[Record]] = set()
    for module in pkgutil.iter_modules(jacdiag.records.__path__):
        members = vars(importlib.import_module(f"jacdiag.records.{module.name}")).values()
        for member in members:
            if isinstance(member, type) and issubclass(member, Record) and member is not Record:
                classes.add(member)
    return sorted(classes, key=lambda each: each.__name__ + each.__module__)


def example_of(hint: Any) -> Any:
    """Return a value of a type that is no default: every optional field is filled."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return arguments[-1]
    if origin in (typing.Union, types.UnionType):
        return example_of(next(argument for argument in arguments if argument is not type(None)))
    if origin is list:
        return [example_of(arguments[0])] * 2
    if origin is dict:
        return {"key": example_of(arguments[1])}
    if hint is Any:
        return {"nested": [1, "text", None]}
    if isinstance(hint, type) and issubclass(hint, Record):
        return example_record(hint)
    return {float: -math.inf, int: 7, str: "text", bool: True}[hint]


def example_record(cls: type[Record]) -> Any:
    """Return a record with a value in every field."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    values = {field.name: example_of(hints[field.name]) for field in fields}
    if "schema_version" in values:
        values["schema_version"] = SCHEMA_VERSION  # others may be refused
    return cls(**values)


@pytest.mark.parametrize("cls", record_classes(), ids=lambda cls: cls.__qualname__)
def test_every_record_survives_json(cls: type[Record]) -> None:
    record = example_record(cls)
    text = json.dumps(record.to_dict(), allow_nan=False)
    assert cls.from_dict(json.loads(text)) == record


@pytest.mark.parametrize("cls", record_classes(), ids=lambda cls: cls.__qualname__)
def test_older_and_newer_files_load(cls: type[Record]) -> None:
    """A file without the fields that have a default, and one with a field of a later version."""
    record = example_record(cls)
    data = record.to_dict()
    defaults = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.default is not dataclasses.MISSING
        or field.default_factory is not dataclasses.MISSING
    ]
    required = {key: value for key, value in data.items() if key not in defaults}
    older = cls.from_dict(required)
    assert {key: older.to_dict()[key] for key in required} == required
    assert cls.from_dict({**data, "of_a_later_version": 1}) == record


def test_all_records_are_covered() -> None:
    names = {cls.__name__ for cls in record_classes()}
    assert {"Report", "ContractRecord", "BacktestReport", "ReplayRecord", "RiskTable"} <= names
    assert len(names) > 40


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, f"{SCHEMA_VERSION + 1}.0"])
@pytest.mark.parametrize("cls", [Report, FiguresRecord, BacktestReport])
def test_a_file_of_a_newer_version_is_refused(cls: type[Record], version: object) -> None:
    """The sentence says which version the file has, and what to do."""
    data = {**example_record(cls).to_dict(), "schema_version": version}
    with pytest.raises(NewerSchemaError) as caught:
        cls.from_dict(data)
    assert "was written by a newer jacdiag" in caught.value.what
    assert caught.value.got == f"schema_version {version}"
    assert f"reads schema_version {SCHEMA_VERSION}; update it" in str(caught.value.hint)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION, f"{SCHEMA_VERSION}.7", None])
def test_a_file_of_an_older_version_is_read(version: object) -> None:
    """So is one of a newer minor version: its new keys are ignored."""
    record = example_record(Report)
    data = {**record.to_dict(), "schema_version": version, "of_a_later_version": 1}
    again = Report.from_dict(data)
    assert dataclasses.replace(again, schema_version=SCHEMA_VERSION) == record


def test_a_part_of_a_report_has_no_version() -> None:
    data = {**example_record(Alert).to_dict(), "schema_version": SCHEMA_VERSION + 1}
    assert Alert.from_dict(data) == example_record(Alert)


def test_the_json_of_a_report_has_a_version() -> None:
    data = example_record(Report).to_dict()
    newer = json.dumps({**data, "schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(NewerSchemaError, match=f"schema_version {SCHEMA_VERSION + 1}"):
        Report.from_json(newer)
    without = json.dumps({**data, "schema_version": None})
    with pytest.raises(ValueError, match="schema_version None; this jacdiag reads"):
        Report.from_json(without)
    with pytest.raises(ValueError, match="a report is a JSON object"):
        Report.from_json("[]")


def test_a_run_log_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    line = json.loads(to_line("run", {"model": "m"}))
    line["v"] = RUN_SCHEMA_VERSION + 1
    (tmp_path / RUN_FILE).write_text(json.dumps(line) + "\n")
    with pytest.raises(SourceError, match="written by a newer jacdiag"):
        read_run(tmp_path)


def test_a_heartbeat_and_back(tmp_path: Path) -> None:
    """It survives the way to its file; an older file lacks the fields with a default."""
    beat = Heartbeat(
        session="s", pid=1, born="2", host="h", place="p", started=1.0, time=2.0, step=3
    )
    file = tmp_path / HEARTBEAT_FILE
    assert read_heartbeat(tmp_path) is None
    file.write_bytes(beat.to_bytes())
    assert read_heartbeat(tmp_path) == beat
    data = json.loads(beat.to_bytes())
    del data["step"]
    file.write_text(json.dumps(data))
    assert read_heartbeat(tmp_path) == dataclasses.replace(beat, step=None)


def test_a_heartbeat_of_another_version(tmp_path: Path) -> None:
    """A newer one is refused, an older one is read."""
    beat = Heartbeat(session="s", pid=1, born="2", host="h", place="p", started=1.0, time=2.0)
    data = json.loads(beat.to_bytes())
    file = tmp_path / HEARTBEAT_FILE
    file.write_text(json.dumps({**data, "schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(NewerSchemaError, match="the heartbeat was written by a newer jacdiag"):
        read_heartbeat(tmp_path)
    del data["schema_version"]
    file.write_text(json.dumps(data))
    assert read_heartbeat(tmp_path) == beat
