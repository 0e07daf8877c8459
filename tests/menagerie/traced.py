"""The sites of each specimen, recorded once for all tests that only read them."""

from __future__ import annotations

from functools import cache

import torch

import jacdiag
from jacdiag.trace import Sites
from menagerie import ALL


@cache
def traced(name: str, dtype: torch.dtype = torch.float64) -> Sites:
    """Return the sites of a specimen.

    Args:
        name: of the specimen.
        dtype: in which the model is run.
    """
    specimen = next(specimen for specimen in ALL if specimen.name == name)
    args, kwargs = specimen.arguments()
    return jacdiag.sites(specimen.build(), *args, dtype=dtype, **kwargs)
