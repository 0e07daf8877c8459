"""`Expected` notices each wrong answer about a sub-layer, one field at a time.

The menagerie of the tests and the families of `benchmarks/coverage.py` are judged by it alone.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from menagerie import SublayerTruth
from torch import Tensor, nn

import jacdiag
from benchmarks._coverage.expected import FIELDS, Expected

RIGHT: dict[str, Any] = {
    "name": "layers.0.attn",
    "kind": "attention",
    "placement": "pre",
    "token_wise": False,
    "parallel": False,
    "nested": True,
}
WRONG: dict[str, Any] = {
    "name": "layers.1.attn",
    "kind": "mlp",
    "placement": "post",
    "token_wise": True,
    "parallel": True,
    "nested": False,
}

each_field = pytest.mark.parametrize("field", FIELDS)


def reported(**changes: Any) -> Any:
    """Return a sub-layer as the tracer might report it: the right one, with these changes."""
    return SimpleNamespace(**{**RIGHT, **changes})


def test_every_answer_of_expected_is_compared() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(Expected)}
    assert RIGHT.keys() == WRONG.keys() == set(FIELDS)


def test_right_answer_has_no_differences() -> None:
    assert Expected(**RIGHT).differences(reported()) == []


@each_field
def test_wrong_field_is_named_and_no_other(field: str) -> None:
    site = reported(**{field: WRONG[field]})
    (line,) = Expected(**RIGHT).differences(site)
    assert line == f"{site.name}: {field} is {WRONG[field]}, not {RIGHT[field]}"


@each_field
def test_flag_that_was_not_determined_differs_from_false_and_true(field: str) -> None:
    """None of the tracer is an answer of its own. Only None of the truth compares nothing."""
    assert len(Expected(**RIGHT).differences(reported(**{field: None}))) == 1
    unknown = Expected(**{**RIGHT, field: None})
    assert unknown.differences(reported(**{field: WRONG[field]})) == []


def test_all_wrong_fields_are_listed() -> None:
    lines = Expected(**RIGHT).differences(SimpleNamespace(**WRONG))
    assert [line.split()[1] for line in lines] == list(FIELDS)


@each_field
def test_truth_of_a_specimen_compares_the_same_fields(field: str) -> None:
    """`SublayerTruth` gives the fields defaults of its own, and none of them is "not compared"."""
    truth = SublayerTruth("layers.0", "mlp", "pre")
    right = {name: getattr(truth, name) for name in FIELDS}
    assert None not in right.values()
    wrong = {**right, field: WRONG[field] if WRONG[field] != right[field] else RIGHT[field]}
    assert truth.differences(SimpleNamespace(**right)) == []
    assert len(truth.differences(SimpleNamespace(**wrong))) == 1


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@each_field
def test_wrong_field_is_noticed_on_a_traced_sublayer(field: str) -> None:
    """The fields are those that `jacdiag.sites` reports under the same names."""
    (site,) = jacdiag.sites(_Block(), torch.randn(1, 3, 4))
    right = Expected("mlp", "mlp", "pre", token_wise=True, parallel=False, nested=False)
    assert right.differences(site) == []
    value = getattr(right, field)
    wrong = (not value) if isinstance(value, bool) else "other"
    assert len(dataclasses.replace(right, **{field: wrong}).differences(site)) == 1
