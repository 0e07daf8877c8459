"""The operator's products against dense Jacobians; adjointness; which dimensions are
independent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import jacdiag
from jacdiag.spectra import (
    Composed,
    DenseOperator,
    JacobianOperator,
    NormJacobian,
    Operator,
    Shifted,
    Summed,
    dense_jacobian,
    independent_dims,
    top_singular,
)
from jacdiag.spectra.operator import Way, flat

pytestmark = pytest.mark.check("spectra")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixing(x: Tensor) -> Tensor:
    """Couples tokens and features, not sequences."""
    scores = torch.softmax(x @ x.transpose(1, 2), -1)
    return torch.sin(scores @ x)


class OldStyleSquare(torch.autograd.Function):
    """A custom function without setup_context: torch.func refuses it."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 2 * x * grad


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mixing": mixing,
    "custom function": lambda x: OldStyleSquare.apply(x).cumsum(-1),
    "narrower": lambda x: x[..., :2] * x.sum(-1, keepdim=True),
    "constant": lambda x: torch.ones_like(x),
    "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(mixing, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dims", [(0,), ()])
def test_products_equal_the_dense_jacobian(name: str, dims: tuple[int, ...]) -> None:
    fn = FUNCTIONS[name]
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator())
    operator = JacobianOperator(fn, x, dims)
    assert torch.equal(operator.value, fn(x))
    rows = [
        operator.pull(e.reshape(operator.problems, -1)).reshape(-1)
        for e in torch.eye(operator.value.numel(), dtype=torch.float64)
    ]
    columns = [
        operator.push(e.reshape(operator.problems, -1)).reshape(-1)
        for e in torch.eye(x.numel(), dtype=torch.float64)
    ]
    by_pull, by_push = torch.stack(rows), torch.stack(columns, 1)
    assert torch.allclose(by_pull, by_push, atol=1e-13)
    assert operator.products == x.numel() + operator.value.numel()
    if name != "custom function" and name != "checkpointed":
        assert torch.allclose(by_pull, dense_jacobian(fn, x), atol=1e-13)


def test_products_do_not_depend_on_the_grad_mode_of_the_caller() -> None:
    x = torch.randn(2, 3, 4, generator=generator())
    u = torch.randn(2, 12, generator=generator(1))
    plain = JacobianOperator(mixing, x).push(u)
    with torch.no_grad():
        assert torch.equal(JacobianOperator(mixing, x).push(u), plain)
    with torch.inference_mode():
        assert torch.equal(JacobianOperator(mixing, x.clone()).push(u), plain)


def operators(seed: int) -> dict[str, Operator]:
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator(seed))
    inner, outer = JacobianOperator(mixing, x), JacobianOperator(lambda x: x.tanh().flip(-1), x)
    return {
        "jacobian": inner,
        "composed": Composed(outer, inner),
        "shifted": Shifted(inner, -0.7),
        "shifted by a diagonal": Shifted(
            inner, torch.randn(2, 12, dtype=torch.float64, generator=generator(seed + 1))
        ),
        "summed": Summed([inner, outer]),
        "dense": DenseOperator(
            torch.randn(2, 5, 7, dtype=torch.float64, generator=generator(seed))
        ),
    }


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_forward_and_transposed_products_are_adjoint(seed: int) -> None:
    for name, op in operators(seed).items():
        u = torch.randn(op.problems, op.domain, dtype=torch.float64, generator=generator(seed + 2))
        w = torch.randn(
            op.problems, op.codomain, dtype=torch.float64, generator=generator(seed + 3)
        )
        ju, jw = op.push(u), op.pull(w)
        gap = ((ju * w).sum() - (u * jw).sum()).abs()
        assert gap <= 1e-12 * (ju.norm() * w.norm() + 1e-12), name


def test_norm_of_a_function_against_a_dense_svd() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator())
    norm = jacdiag.spectral_norm(mixing, x, tol=1e-8)
    truth = torch.stack(
        [torch.linalg.svdvals(dense_jacobian(lambda v: mixing(v[None])[0], row))[0] for row in x]
    )
    assert norm.converged
    assert bool((norm.lower <= truth).all()) and bool((truth <= norm.upper).all())
    assert torch.allclose(norm.estimate, truth, rtol=1e-6)


def test_largest_singular_value_equals_scipy_svds() -> None:
    from scipy.sparse.linalg import LinearOperator, svds

    x = torch.randn(1, 6, 8, dtype=torch.float64, generator=generator(4))
    op = JacobianOperator(mixing, x)
    plain = LinearOperator(
        (48, 48),
        matvec=lambda v: op.push(torch.from_numpy(v.reshape(1, -1).copy()))[0].numpy(),
        rmatvec=lambda v: op.pull(torch.from_numpy(v.reshape(1, -1).copy()))[0].numpy(),
    )
    truth = float(svds(plain, k=1, return_singular_vectors=False, random_state=0)[0])
    assert top_singular(op, tol=1e-8, generator=generator()).estimate[0] == pytest.approx(
        truth, rel=1e-8
    )


def _dims(
    fn: Callable[[Tensor], Tensor], shape: tuple[int, ...], feature_dim: int = -1
) -> tuple[int, ...]:
    x = torch.randn(shape, dtype=torch.float64, generator=generator(9))
    op = JacobianOperator(fn, x, ())
    return independent_dims(
        op.pull_shaped, x.shape, op.value.shape, feature_dim, x.dtype, x.device, generator()
    )


@pytest.mark.parametrize("dims", [(), (0,), (0, 2), (0, 2, 3)])
@pytest.mark.parametrize("shape", [(1, 4, 5, 5), (2, 4, 5, 5), (1, 4, 1, 7), (1, 4, 1, 1)])
def test_products_do_not_depend_on_how_vectors_are_laid_out(
    shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    """The backward of a batch norm in eval mode misreads a gradient with the strides of a permuted
    view.
    """
    norm = nn.BatchNorm2d(4).double().eval()
    norm.running_var.copy_(torch.rand(4, dtype=torch.float64, generator=generator(1)) + 0.5)
    norm.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, generator=generator(2))
    scales = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, 4, 1, 1)

    op = JacobianOperator(norm, x, dims)
    w = torch.randn(shape, dtype=torch.float64, generator=generator(3))
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 0, 1), (0, 3, 1, 2)):
        back = tuple(torch.tensor(order).argsort().tolist())
        vector = w.permute(order).contiguous().permute(back)
        assert torch.allclose(op.pull_shaped(vector), w * scales)
        rows = flat(vector, dims)
        assert torch.allclose(op.pull(rows), flat(w * scales, dims))
        assert torch.allclose(op.push(rows), flat(w * scales, dims))
        several = op.products_of("pull", [rows, -rows])
        assert torch.allclose(several[0], flat(w * scales, dims))
        assert torch.equal(several[1], -several[0])


def test_independent_dimensions_are_found() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64, generator=generator())
    causal = torch.ones(5, 5, dtype=torch.float64).tril()

    def masked(x: Tensor) -> Tensor:
        return (causal @ x) @ weight

    assert _dims(lambda x: (x @ weight).relu(), (3, 5, 6)) == (0, 1)
    assert _dims(masked, (3, 5, 6)) == (0,)
    assert _dims(lambda x: x.flip(1).cumsum(1).flip(1) @ weight, (3, 5, 6)) == (0,)
    assert _dims(lambda x: masked(x.transpose(0, 1)).transpose(0, 1), (5, 3, 6)) == (1,)
    assert _dims(lambda x: masked(x.view(3, 5, 6)).view(15, 6), (15, 6)) == ()
    assert _dims(lambda x: x @ weight, (1, 5, 6)) == (0, 1)
    norm = nn.BatchNorm1d(6).double().train()
    assert _dims(lambda x: norm(x.transpose(1, 2)).transpose(1, 2), (3, 5, 6)) == ()
    conv = nn.Conv2d(6, 6, 3, padding=1).double()
    assert _dims(conv, (3, 6, 5, 5), feature_dim=1) == (0,)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dims", [(), (0,), (0, 1)])
def test_norm_jacobian_is_that_of_autograd(centred: bool, dims: tuple[int, ...]) -> None:
    # small, so that eps counts
    x = 0.03 * torch.randn(2, 3, 8, dtype=torch.float64, generator=generator())

    def norm(x: torch.Tensor) -> torch.Tensor:
        shape = (8,)
        if centred:
            return torch.nn.functional.layer_norm(x, shape, eps=1e-3)
        return torch.nn.functional.rms_norm(x, shape, eps=1e-3)

    moment = x.var(-1, correction=0) if centred else x.square().mean(-1)
    closed = NormJacobian(norm(x), (moment + 1e-3).rsqrt(), centred=centred, batch_dims=dims)
    built = JacobianOperator(norm, x, dims)
    assert (closed.problems, closed.domain, closed.codomain) == (
        built.problems,
        built.domain,
        built.codomain,
    )
    u = torch.randn(built.problems, built.domain, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(closed.push(u), built.push(u), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(closed.pull(u), built.pull(u), rtol=1e-10, atol=1e-12)
    assert closed.products == 2


class WithoutSetup(torch.autograd.Function):
    """a * b in the old form, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return gradient * b, gradient * a


class RefusedWhenTransposed(torch.autograd.Function):
    """Tanh, whose backward is made of a function that torch.func refuses."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return WithoutSetup.apply(gradients[0], 1 - x.tanh() ** 2)


@pytest.mark.parametrize("first", ["push", "pull"])
def test_a_function_that_torch_func_refuses_late_has_the_same_products(first: str) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator())
    operator = JacobianOperator(lambda x: mixing(RefusedWhenTransposed.apply(x)), x)
    plain = JacobianOperator(lambda x: mixing(x.tanh()), x)
    vectors = [torch.randn(2, 12, dtype=torch.float64, generator=generator(k)) for k in range(3)]
    ways: tuple[Way, Way] = ("push", "pull") if first == "push" else ("pull", "push")
    for way in ways:
        expected = plain.products_of(way, vectors)
        for product, other in zip(operator.products_of(way, vectors), expected, strict=True):
            torch.testing.assert_close(product, other)


def test_a_product_that_is_kept_is_made_once() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator())
    operator = JacobianOperator(mixing, x)
    w = torch.randn(2, 12, dtype=torch.float64, generator=generator(1))
    operator.keep(w)
    assert operator.products == 1
    expected = JacobianOperator(mixing, x).pull(w)
    for product in operator.products_of("pull", [w, w.clone(), w]):
        torch.testing.assert_close(product, expected)
    assert operator.products == 2, "a copy is another vector"
    pushed = JacobianOperator(mixing, x).push(w)
    torch.testing.assert_close(operator.push(w), pushed)
    assert operator.products == 3, "the other way is another product"

    # Rows of other problems are another vector, too.
    operator.set_batch_dims(())
    row = w.reshape(1, -1)
    torch.testing.assert_close(operator.pull(row), expected.reshape(1, -1))
    assert operator.products == 4


def test_a_checkpointed_function_has_products_in_any_mode() -> None:
    x = torch.randn(2, 3, 4, generator=generator())
    vectors = [torch.randn(2, 12, generator=generator(k)) for k in range(2)]
    expected = JacobianOperator(mixing, x).products_of("pull", vectors)
    with torch.inference_mode():
        operator = JacobianOperator(FUNCTIONS["checkpointed"], x)
        for vector, product in zip(vectors, expected, strict=True):
            torch.testing.assert_close(operator.pull(vector), product)


def test_norms_of_pixels_after_a_batch_norm_hold_the_dense_norm() -> None:
    """The vectors of one image's pixels have strides that the backward of a batch norm misreads."""
    channels = 6
    mix, mean = torch.randn(2, channels, channels, dtype=torch.float64, generator=generator())
    var = torch.rand(channels, dtype=torch.float64, generator=generator()) + 0.5

    def fn(x: Tensor) -> Tensor:
        mixed = torch.einsum("ij,bjhw->bihw", mix, x)
        return nn.functional.batch_norm(mixed, mean[0], var)

    x = torch.randn(1, channels, 3, 4, dtype=torch.float64, generator=generator(1))
    true = float(torch.linalg.svdvals(dense_jacobian(fn, x))[0])
    for batch_dims in ((0,), (0, 2, 3), ()):
        norm = jacdiag.spectral_norm(fn, x, batch_dims=batch_dims)
        assert float(norm.lower.max()) <= true <= float(norm.upper.max()), batch_dims


class WritesIntoItsGradient(torch.autograd.Function):
    """3 x, whose backward writes into the gradient that it is given, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, only_without_graph: bool) -> Tensor:
        ctx.only_without_graph = only_without_graph
        return 3 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.only_without_graph and torch.is_grad_enabled():
            return 3 * gradient, None
        return gradient.mul_(3), None


@pytest.mark.parametrize("only_without_graph", [False, True])
def test_a_backward_that_writes_into_its_gradient_spoils_no_direction(
    only_without_graph: bool,
) -> None:
    x = torch.randn(1, 12, dtype=torch.float64, generator=generator(0))
    weight = torch.randn(12, 12, dtype=torch.float64, generator=generator(1))
    operator = JacobianOperator(
        lambda x: WritesIntoItsGradient.apply(x @ weight, only_without_graph), x
    )

    # 1. The products, and the vector that they are made of.
    vector = torch.randn(1, 12, dtype=torch.float64, generator=generator(2))
    before = vector.clone()
    for _ in range(2):
        torch.testing.assert_close(operator.pull(vector), 3 * vector @ weight.T)
        torch.testing.assert_close(operator.pull_shaped(vector), 3 * vector @ weight.T)
        torch.testing.assert_close(operator.push(vector), 3 * vector @ weight)
        assert torch.equal(vector, before)

    # 2. The norms.
    for map_, matrix in ((operator, 3 * weight), (Shifted(operator), torch.eye(12) + 3 * weight)):
        truth = float(torch.linalg.matrix_norm(matrix, 2))
        solution = top_singular(map_, tol=1e-6)
        assert solution.lower[0] <= truth <= solution.upper[0]


def test_the_closed_form_of_a_norm_takes_vectors_of_a_wider_stream() -> None:
    x = torch.randn(2, 3, 8, generator=generator(0))
    z = nn.functional.layer_norm(x, (8,))
    gain = (x.var(-1, correction=0) + 1e-5).rsqrt()
    vector = torch.randn(2, 24, dtype=torch.float64, generator=generator(1))
    wide = NormJacobian(z.double(), gain, centred=True).push(vector)
    found = NormJacobian(z, gain, centred=True).push(vector)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wide, rtol=1e-6, atol=1e-6)
