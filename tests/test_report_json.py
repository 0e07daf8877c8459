"""The JSON report: its schema, and the way there and back."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from render import synthetic

from jacdiag.records import Interval, Report, RuleResult, SublayerRecord

SCHEMA = json.loads(
    (resources.files("jacdiag.records") / "report.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
BUILDERS = [
    synthetic.vanilla,
    synthetic.clean,
    synthetic.post,
    synthetic.trained,
    synthetic.weights_tier,
    synthetic.undecided,
    synthetic.broken,
]
builders = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def plain(report: Report) -> dict[str, Any]:
    return json.loads(report.to_json())


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@builders
def test_reports_keep_the_contract(build: Callable[[], Report]) -> None:
    VALIDATOR.validate(plain(build()))


@builders
def test_report_survives_json_text(build: Callable[[], Report]) -> None:
    text = build().to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert all(isinstance(row, SublayerRecord) for row in again.sublayers)
    assert all(isinstance(rule, RuleResult) for rule in again.rules)


def test_a_whole_report_comes_back_equal() -> None:
    report = synthetic.vanilla()
    assert Report.from_json(report.to_json()) == report


def test_numbers_that_are_not_finite_are_words() -> None:
    interval = Interval(math.nan, -math.inf, math.inf, per_sequence=[math.inf, 1.0])
    data = interval.to_dict()
    assert (data["estimate"], data["lower"], data["upper"]) == ("nan", "-inf", "inf")
    assert data["per_sequence"] == ["inf", 1.0]
    again = Interval.from_dict(data)
    assert math.isnan(again.estimate) and again.lower == -math.inf and again.upper == math.inf
    assert again.per_sequence == [math.inf, 1.0]


def test_no_bare_nan_or_infinity_is_ever_written() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"bare {name} in the JSON")

    json.loads(synthetic.broken().to_json(), parse_constant=refuse)


def test_what_was_not_measured_is_null_and_never_zero() -> None:
    row = plain(synthetic.weights_tier())["sublayers"][0]
    for key in (
        "branch_norm",
        "residual_norm",
        "core_norm",
        "norm_gain",
        "shortcut_std",
        "tightness",
        "token_wise",
    ):
        assert row[key] is None


def test_a_reader_takes_keys_that_it_does_not_know() -> None:
    data = plain(synthetic.clean())
    data["from_the_future"] = {"a": 1}
    data["sublayers"][0]["from_the_future"] = 1
    VALIDATOR.validate(data)
    assert Report.from_json(json.dumps(data)) == synthetic.clean()


def test_a_newer_schema_version_is_refused() -> None:
    data = {**plain(synthetic.clean()), "schema_version": 2}
    with pytest.raises(ValueError, match="schema_version 2"):
        Report.from_json(json.dumps(data))


def test_a_report_holds_no_foreign_object() -> None:
    report = dataclasses.replace(synthetic.clean(), settings={"path": Path("x")})
    with pytest.raises(TypeError, match="PosixPath"):
        report.to_json()


TOP = [key for key in SCHEMA["required"] if key != "schema_version"]
SUBLAYER = SCHEMA["$defs"]["sublayer"]["required"]


@pytest.mark.parametrize("key", ["schema_version", *TOP])
def test_schema_misses_a_top_level_key(key: str) -> None:
    data = plain(synthetic.vanilla())
    del data[key]
    assert not VALIDATOR.is_valid(data)


@pytest.mark.parametrize("key", SUBLAYER)
def test_schema_misses_a_key_of_a_sublayer(key: str) -> None:
    data = plain(synthetic.vanilla())
    del data["sublayers"][3][key]
    assert not VALIDATOR.is_valid(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "ok"),
        (("tier",), "partial"),
        (("schema_version",), 2),
        (("created",), 5),
        (("conditions", "large_shortcut"), "maybe"),
        (("sublayers", 0, "kind"), "linear"),
        (("sublayers", 0, "placement"), "middle"),
        (("sublayers", 0, "bound"), "Infinity"),
        (("sublayers", 0, "branch_norm"), 3.0),
        (("sublayers", 0, "branch_norm", "converged"), "yes"),
        (("sublayers", 0, "branch_norm", "products"), -1),
        (("findings", 0, "code"), "X1"),
        (("findings", 0, "level"), "fatal"),
        (("findings", 0, "where"), "transformer.h.0.attn"),
        (("rules", 0, "status"), "passed"),
        (("cost", "seconds"), "fast"),
        (("probe",), None),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else None,
)
def test_schema_refuses_a_wrong_value(path: tuple[Any, ...], value: Any) -> None:
    data = copy.deepcopy(plain(synthetic.vanilla()))
    inner = data
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    assert not VALIDATOR.is_valid(data)
