"""The options of an audit: one record, checked, with the arguments of `jacdiag.audit`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.pipeline.options import AuditOptions

FIELDS = {field.name: field for field in dataclasses.fields(AuditOptions)}


def test_the_function_takes_what_the_record_holds() -> None:
    parameters = dict(inspect.signature(jacdiag.audit).parameters)
    del parameters["source"]
    assert parameters.keys() == FIELDS.keys()
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        name: field.default for name, field in FIELDS.items()
    }


def test_every_option_is_for_all_ranks_or_named_as_not() -> None:
    shared = AuditOptions().shared_by_ranks()
    assert {"batch", "seed", "tol", "confidence", "contract", "trust_pickle"} <= shared.keys()
    assert not {"device", "progress", "ranks", "optimizer"} & shared.keys()


def test_a_record_is_not_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AuditOptions().tol = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"confidence_all": 0.99, "remedies": "first"},
        {"dtype": torch.float64, "device": torch.device("cpu"), "select": "JD1, JD2"},
        {"declared": {"attention": {"shortcut": "a", "branch": "b"}}, "contract": {"W_O": 0.02}},
    ],
)
def test_replacing_nothing_changes_nothing(values: dict[str, Any]) -> None:
    options = AuditOptions(**values)
    assert dataclasses.replace(options) == options


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"against": "a.pt", "products": False}, "against compares norms"),
        ({"replay": "flight-1", "tokens": "t.txt"}, "the probe is given twice"),
        ({"inputs": torch.zeros(1), "tokens": "t.txt"}, "the probe is given twice"),
        ({"inputs": torch.zeros(1), "probes": 2}, "--probes needs an input that varies"),
        ({"products": False, "probes": 2}, "--probes has nothing to repeat"),
        ({"confidence": 0.9, "confidence_all": 0.9}, "the confidence is given twice"),
        ({"remedies": "some"}, "unknown way of trying remedies"),
    ],
)
def test_options_that_contradict_each_other(values: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        AuditOptions(**values)
