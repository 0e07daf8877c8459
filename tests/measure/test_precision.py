"""Models in bfloat16 and float16: measured in float32 or float64, and never copied as a whole."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import jacdiag
from jacdiag.measure import network
from jacdiag.sources import gpt
from jacdiag.sources.factory import seeded
from jacdiag.spectra import JacobianOperator

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "block_size": 8}


SHORT = {
    (torch.bfloat16, "float32", "vanilla"),
    (torch.float16, "float64", "vanilla"),
    (torch.bfloat16, "float64", "embed-ln"),
    (torch.float16, "float32", "embed-detach"),
}


def low_model(dtype: torch.dtype, recipe: str = "vanilla", **sizes: int) -> gpt.GPT:
    with seeded(0):
        return gpt.build(recipe, **{**SIZES, **sizes}).to(dtype)


def ids_for(model: gpt.GPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (2, model.config.block_size), generator=generator)


# Each recipe, each low precision and each precision of the audit; the other pairs are long.
PRECISIONS = [
    pytest.param(
        low, dtype, recipe, marks=[] if (low, dtype, recipe) in SHORT else pytest.mark.long
    )
    for recipe in ("vanilla", "embed-ln", "embed-detach")
    for dtype in ("float32", "float64")
    for low in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("low", "dtype", "recipe"), PRECISIONS)
def test_figures_are_those_of_the_raised_model(low: torch.dtype, dtype: Any, recipe: str) -> None:
    model = low_model(low, recipe)
    raised = copy.deepcopy(model).to(getattr(torch, dtype))
    mine, theirs = (
        jacdiag.audit(m, ids_for(model), dtype=dtype, state="init") for m in (model, raised)
    )
    accuracy = 1e-4 if dtype == "float32" else 1e-9
    assert mine.network is not None and theirs.network is not None
    for a, b in zip(mine.sublayers, theirs.sublayers, strict=True):
        for field in ("branch_norm", "core_norm", "residual_norm", "norm_gain"):
            assert getattr(a, field).estimate == pytest.approx(
                getattr(b, field).estimate, rel=accuracy
            ), field
    assert mine.network.gradient_norms == pytest.approx(theirs.network.gradient_norms, rel=accuracy)
    assert mine.network.end_to_end.estimate == pytest.approx(
        theirs.network.end_to_end.estimate, rel=accuracy
    )
    assert {p.dtype for p in model.parameters()} == {low}


class _Heap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> Callable[[], float]:
    """MB that are allocated and not freed, by the C library's own count."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("the C library does not count what it has allocated")
    libc.mallinfo2.restype = _Heap

    def count() -> float:
        gc.collect()
        heap = libc.mallinfo2()
        return (heap.uordblks + heap.hblkhd) / 2**20

    return count


def test_a_graph_through_the_whole_model_holds_no_raised_copy_of_it() -> None:
    model = low_model(torch.bfloat16, n_layer=8, n_embd=256, n_head=4)
    copied = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    count, sites = allocated(), jacdiag.sites(model, ids_for(model))
    before = count()
    kept: list[Any] = []

    class Kept(JacobianOperator):
        def release(self) -> None:
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "JacobianOperator", Kept)
        assert network.end_to_end(sites, 0.05, 0.999, 40, 0) is not None
    [operator] = kept
    assert operator.products > 0
    assert copied > 24
    assert count() - before < 0.3 * copied
