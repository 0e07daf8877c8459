"""Options that are numbers, out of their ranges: refused from Python as on the command line."""

from __future__ import annotations

import math
from typing import Any

import click
import numpy as np
import pytest
import torch
from jacdiag_cli.options import GATE, JUDGEMENT, PROBE, PROBES, SOLVER, TOGETHER, add
from torch import nn

import jacdiag
from jacdiag.errors import UsageError
from jacdiag.records.option_ranges import RANGES, check_ranges

WRONG = [
    ("confidence", 2),
    ("confidence", 0),
    ("confidence", 1.0),
    ("tol", -1),
    ("tol", 0),
    ("tol", math.nan),
    ("tol", math.inf),
    ("tol", "0.1"),
    ("max_products", 0),
    ("max_products", 3),
    ("max_products", 8.5),
    ("max_products", True),
]
PLAN = [
    ("batch", 0),
    ("seq", 0),
    ("seed", -1),
    ("lr", 0),
    ("warmup", -1),
    ("clip", 0.0),
    ("beta2", 1),
    ("probes", 0),
    ("probes", 1.5),
    ("confidence_all", 1),
    ("confidence_all", 0.0),
]


@pytest.mark.parametrize(("name", "value"), [*WRONG, *PLAN])
def test_audit_refuses_options_out_of_range(name: str, value: Any) -> None:
    asked: dict[str, Any] = {name: value}
    with pytest.raises(UsageError) as refused:
        jacdiag.audit(nn.Linear(2, 2), torch.ones(1, 2), **asked)
    assert refused.value.what == f"{name} cannot be {value!r}" and str(RANGES[name]) in str(
        refused.value
    )


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_spectral_norm_refuses_options_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} cannot be"):
        jacdiag.spectral_norm(torch.square, torch.ones(1, 2), **{name: value})


def test_what_lies_inside_is_taken() -> None:
    check_ranges(
        tol=np.float32(0.1), confidence=0.999, max_products=np.int64(4), seq=None, warmup=0, clip=1
    )


def test_the_command_line_has_the_same_ranges() -> None:
    command = click.command()(add(SOLVER, TOGETHER, JUDGEMENT, PROBE, PROBES, GATE)(lambda: None))
    found = {
        p.name: p.type
        for p in command.params
        if isinstance(p.type, click.IntRange | click.FloatRange)
    }
    assert set(found) == set(RANGES)
    for name, kind in found.items():
        limits = RANGES[name]
        most = math.inf if kind.max is None else kind.max
        assert (kind.min, most, kind.min_open) == (limits.least, most, limits.open), name
        assert most == limits.most and isinstance(kind, click.IntRange) == limits.whole, name


@pytest.mark.parametrize("dtype", ["float64", torch.float64])
def test_a_precision_is_given_by_name_or_as_torch_has_it(dtype: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
    assert jacdiag.audit(layer, torch.randn(1, 3, 8), dtype=dtype).settings["dtype"] == "float64"
    with pytest.raises(UsageError, match="float32, float64"):
        jacdiag.audit(layer, dtype=torch.bfloat16)  # type: ignore[arg-type]
