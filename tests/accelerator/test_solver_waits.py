"""A solve on an accelerator has the digits of the CPU, and the host seldom waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from spectra.test_inconsistent_jacobian import Once
from torch import Tensor

import jacdiag
from accelerator.pretended import NAME, Counts, pretended_device
from jacdiag.devices.packed_download import download
from jacdiag.sources.gpt import build
from jacdiag.spectra import (
    DenseOperator,
    JacobianOperator,
    Operator,
    Question,
    Solution,
    Stop,
    in_step,
    top_singular,
)


@pytest.fixture
def counts() -> Iterator[Counts]:
    with pretended_device() as counts:
        yield counts


def start(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix_of(kind: str) -> Tensor:
    """A stack of matrices that leads through one of the ways of a step."""
    random = torch.randn(2, 70, 1024, generator=start(0))
    if kind == "rows beyond the range of squares":
        return random * 1e-25
    if kind == "decaying":
        decay = torch.logspace(0, -7, 60)
        return torch.diag(decay)[None].repeat(2, 1, 1)
    return random


def assert_same(one: Solution, other: Solution) -> None:
    for field in ("lower", "upper", "estimate", "alphas", "betas"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    assert (one.products, one.stop) == (other.products, other.stop)


@pytest.mark.parametrize("kind", ["random", "rows beyond the range of squares", "decaying"])
def test_a_solve_has_the_digits_of_the_cpu_and_few_waits(counts: Counts, kind: str) -> None:
    matrix = matrix_of(kind)
    expected = top_singular(DenseOperator(matrix), tol=1e-3, generator=start(1))
    there = DenseOperator(matrix.to(NAME))
    counts.clear()
    solution = top_singular(there, tol=1e-3, generator=start(1))
    assert_same(solution, expected)
    assert counts.uploads == 1, "the start"
    assert counts.waits <= 2 + solution.products / 2


def test_runs_in_step_are_read_together(counts: Counts) -> None:
    matrices = [torch.randn(1, 40, 40, generator=start(k)).to(NAME) for k in range(4)]
    counts.clear()
    solutions = in_step([Question(DenseOperator(m), start(9)) for m in matrices], tol=0.01)
    assert counts.downloads <= max(solution.products for solution in solutions)


def test_an_invariant_subspace_is_found_late_and_is_exact(counts: Counts) -> None:
    matrix = torch.zeros(1, 30, 30)
    matrix[0, 0, 0] = 3.0
    there = top_singular(DenseOperator(matrix.to(NAME)), tol=1e-9, generator=start(0))
    here = top_singular(DenseOperator(matrix), tol=1e-9, generator=start(0))
    assert there.stop is here.stop is Stop.EXACT
    assert here.products <= there.products <= here.products + 3
    assert there.estimate[0] == pytest.approx(3.0, rel=1e-6)


def test_a_product_that_is_not_finite_ends_the_run(counts: Counts) -> None:
    broken = torch.full((1, 8, 8), torch.nan).to(NAME)
    assert top_singular(DenseOperator(broken), generator=start(0)).stop is Stop.NON_FINITE


@pytest.mark.parametrize("fn", [Once.apply, lambda x: Once.apply(x) + x])
def test_products_of_two_matrices_are_refused(
    counts: Counts, fn: Callable[[Tensor], Tensor]
) -> None:
    operator: Operator = JacobianOperator(fn, torch.randn(1, 40).to(NAME))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        top_singular(operator)


def test_an_audit_waits_less_than_once_a_product(counts: Counts) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64, "block_size": 32}
    torch.manual_seed(0)
    model = build("vanilla", **sizes).eval()
    ids = torch.randint(0, 64, (2, 16))
    expected = jacdiag.audit(model, ids)
    model, ids = model.to(NAME), ids.to(NAME)
    counts.clear()
    report = jacdiag.audit(model, ids)
    assert report.cost is not None and report.cost.products is not None
    assert counts.waits <= report.cost.products + 30 * len(report.sublayers)
    for on_device, on_cpu in zip(report.sublayers, expected.sublayers, strict=True):
        assert on_device.branch_norm == on_cpu.branch_norm
        assert on_device.shortcut_std == on_cpu.shortcut_std
        assert on_device.weights == on_cpu.weights


def test_a_packed_download_keeps_shapes_types_and_digits(counts: Counts) -> None:
    tensors = [
        torch.tensor(True),
        torch.tensor([[2**40 + 1, -3]]),
        torch.tensor([0.1, float("inf")]),
        torch.randn(2, 3, dtype=torch.float64, generator=start(0)),
        torch.ones(2).bfloat16(),
    ]
    there = [tensor.to(NAME) for tensor in tensors]
    counts.clear()
    arrived = download([tensors[0], *there])
    assert counts.waits == 1
    for tensor, copy in zip([tensors[0], *tensors], arrived, strict=True):
        assert copy.device.type == "cpu" and copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_a_device_without_float64_sends_long_integers_on_their_own() -> None:
    with pretended_device(float64=False) as counts:
        there = [torch.tensor([2**40 + 1]).to(NAME), torch.tensor([0.1]).to(NAME)]
        counts.clear()
        integers, numbers = download(there)
        assert counts.waits == 2
        assert integers.tolist() == [2**40 + 1] and numbers.dtype == torch.float32
