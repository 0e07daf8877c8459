"""The cause that is named for an inconsistent Jacobian is the true one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jacdiag.spectra import DenseOperator, JacobianOperator, Operator, Stop, top_singular


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 3 * g


class Overflowing(Operator):
    """A diagonal whose products clip at the range of float32 on the way to J u, not on the way to
    J^T w.
    """

    problems, domain, codomain, dtype, device = 1, 4, 4, torch.float32, torch.device("cpu")

    def _push(self, u: Tensor) -> Tensor:
        return (u * 3e38).clamp(-1e38, 1e38) / 1e38

    def _pull(self, w: Tensor) -> Tensor:
        return 3 * w


def test_once_differentiable_is_named_for_what_it_does() -> None:
    operator = JacobianOperator(lambda x: Once.apply(x) + x, torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="once_differentiable") as refused:
        top_singular(operator)
    assert "float64" not in str(refused.value)


class Halved(DenseOperator):
    """Products with A are half of what the transpose of the others is."""

    def _push(self, u: Tensor) -> Tensor:
        return 0.5 * super()._push(u)


def test_a_problem_of_zeros_changes_nothing_of_the_cause() -> None:
    matrices = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    matrices[1] = 0
    with pytest.raises(RuntimeError, match="once_differentiable") as refused:
        top_singular(Halved(matrices))
    assert "float64" not in str(refused.value)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_the_check_of_the_products_does_not_depend_on_their_size(size: float) -> None:
    matrix = size * torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(0))
    truth = torch.linalg.svdvals(matrix.double())[:, 0].max()
    found = top_singular(DenseOperator(matrix), tol=1e-3)
    assert found.lower.max() <= truth <= found.upper.max()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        top_singular(Halved(matrix))


def test_products_that_are_not_finite_have_no_top_vector() -> None:
    matrices = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    matrices[1, 0, 0] = float("nan")
    solution = top_singular(DenseOperator(matrices))
    assert solution.stop is Stop.NON_FINITE
    assert (solution.left == 0).all() and solution.left.shape == (3, 8)


def test_a_product_out_of_range_is_named_so() -> None:
    with pytest.raises(
        RuntimeError, match=r"leaves the range of float32.*--dtype float64"
    ) as refused:
        top_singular(Overflowing())
    assert "once_differentiable" not in str(refused.value)


def test_overflow_to_inf_is_no_matter_of_derivatives() -> None:
    operator = JacobianOperator(lambda x: x * 1e30 * 1e30, torch.randn(1, 4))
    solution = top_singular(operator)
    assert solution.stop is Stop.NON_FINITE
    assert "float64" in solution.sentence
    wide = JacobianOperator(lambda x: x * 1e30 * 1e30, torch.randn(1, 4, dtype=torch.float64))
    assert top_singular(wide).converged


def test_a_backward_that_is_cut_off_entirely_is_no_map_of_norm_zero() -> None:
    cut_off = JacobianOperator(lambda x: Once.apply(x), torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        top_singular(cut_off)


def test_a_map_of_norm_zero_is_found_with_the_first_product() -> None:
    constant = JacobianOperator(lambda x: 0 * x, torch.randn(1, 4))
    solution = top_singular(constant)
    assert solution.stop is Stop.EXACT and solution.products == 1
    assert solution.upper[0] == 0
