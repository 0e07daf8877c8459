"""A NaN in one weight: sub-layers after it keep their names, kinds and placements.

Structure and stand-ins for the values show them.
"""

from __future__ import annotations

import math

import pytest
import torch
from menagerie import CORE, Specimen
from menagerie.traced import traced
from torch import nn

import jacdiag
from jacdiag.trace import Sites


def described(sites: Sites) -> list[tuple[str, str, str, int]]:
    return [(site.name, site.kind, site.placement, site.depth) for site in sites]


def traced_with_nan(specimen: Specimen, parameter: str) -> Sites:
    """Return the sites of the specimen, with a NaN as the first number of a parameter."""
    args, kwargs = specimen.arguments()
    model = specimen.build()
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = math.nan
    return jacdiag.sites(model, *args, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("specimen", CORE, ids=str)
def test_sublayers_after_a_nan_are_described_as_without_it(specimen: Specimen) -> None:
    clean = traced(specimen.name)
    broken = traced_with_nan(specimen, next(name for site in clean for name in site.products))
    assert any(not site.finite for site in broken)
    assert described(broken) == described(clean)


def test_norm_gain_after_a_nan_is_unknown() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True, dropout=0.0)
    with torch.no_grad():
        layer.self_attn.out_proj.weight[0, 0] = math.nan
    attention, mlp = jacdiag.sites(layer, torch.randn(2, 4, 8))
    assert attention.input_norm is not None and bool(
        torch.isfinite(attention.input_norm.gain).all()
    )
    assert (
        mlp.input_norm is not None
        and bool(mlp.input_norm.gain.isnan().all())
        and mlp.placement == "pre"
    )
