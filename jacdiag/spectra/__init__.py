"""Linear algebra of Jacobians: operators known by their products, norms with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jacdiag.errors import UsageError
from jacdiag.records.number_format import between
from jacdiag.records.option_ranges import check_ranges
from jacdiag.spectra.algebra import Composed, DenseOperator, NormJacobian, Shifted, Summed
from jacdiag.spectra.dense import dense_jacobian, dense_norm
from jacdiag.spectra.operator import JacobianOperator, Operator, independent_dims, products_together
from jacdiag.spectra.solution import Solution, Stop
from jacdiag.spectra.solve import Aim, Question, in_step, inherited, top_singular

__all__ = [
    "Aim",
    "Composed",
    "DenseOperator",
    "JacobianOperator",
    "NormJacobian",
    "Operator",
    "Question",
    "Shifted",
    "Solution",
    "SpectralNorm",
    "Stop",
    "Summed",
    "dense_jacobian",
    "dense_norm",
    "in_step",
    "independent_dims",
    "inherited",
    "products_together",
    "spectral_norm",
    "top_singular",
]


_PRINTED = 8  # norms that `print` lists


@dataclass(frozen=True)
class SpectralNorm:
    """Norms of Jacobians, one per problem, each with its interval.

    Attributes:
        estimate, lower, upper: of the sizes of the batch dimensions.
        confidence: probability with which the upper ends hold.
        products: how many products with J and J^T were made.
        converged: the width that was requested, or the exact value, was reached.
        stop: why the solver stopped.
    """

    estimate: Tensor
    lower: Tensor
    upper: Tensor
    confidence: float
    products: int
    converged: bool
    stop: str

    def __str__(self) -> str:
        """Return the interval of every norm (of many, the largest), and why the solver stopped."""
        lowers, uppers = self.lower.flatten().tolist(), self.upper.flatten().tolist()
        ends = [between(low, high) for low, high in zip(lowers, uppers, strict=True)]
        if len(ends) > _PRINTED:
            shown = f"{len(ends)} norms, the largest {between(max(lowers), max(uppers))}"
        else:
            shown = ", ".join(ends)
        return f"{shown} (confidence {self.confidence:g}, {self.products} products): {self.stop}"


def spectral_norm(
    fn: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tol: float = 0.01,
    confidence: float = 0.999,
    batch_dims: Sequence[int] = (0,),
    max_products: int = 400,
    generator: torch.Generator | None = None,
) -> SpectralNorm:
    """Return the spectral norm of the Jacobian of `fn` at `x`, per batch element.

    Args:
        fn: a function of one tensor, independent over the batch dimensions.
        x: the point; float32 or float64.
        tol: relative width of the interval of the largest norm at which the solver stops.
        confidence: probability with which the upper ends hold.
        batch_dims: dimensions over which `fn` is independent; () makes one problem of everything.
        max_products: budget of products with J and J^T.
        generator: of the random start; seeded with 0 if not given.

    Returns:
        `estimate`, `lower` and `upper` have the sizes of the batch dimensions.

    Raises:
        UsageError: a width, confidence or budget out of its range.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
        >>> norm = spectral_norm(lambda x: x**2, x)
        >>> norm.estimate.round(decimals=4)
        tensor([4., 6.], dtype=torch.float64)
    """
    # 1. Check the arguments.
    check_ranges(tol=tol, confidence=confidence, max_products=max_products)
    _check_point(fn, x, batch_dims)
    operator = JacobianOperator(fn, x, batch_dims)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        got = f"type {type(generator).__name__}"
        raise UsageError("generator is of the wrong type", got=got, hint="torch.Generator")

    # 2. Solve.
    solution = top_singular(
        operator, tol=tol, confidence=confidence, max_products=max_products, generator=generator
    )

    # 3. One norm for each index of the batch dimensions.
    lead = [x.shape[d] for d in operator.dims]
    return SpectralNorm(
        estimate=torch.from_numpy(solution.estimate.copy()).reshape(lead),
        lower=torch.from_numpy(solution.lower.copy()).reshape(lead),
        upper=torch.from_numpy(solution.upper.copy()).reshape(lead),
        confidence=confidence,
        products=solution.products,
        converged=solution.converged,
        stop=solution.sentence,
    )


def _check_point(fn: Callable[[Tensor], Tensor], x: Tensor, batch_dims: Sequence[int]) -> None:
    """Raise unless there is a function of one floating tensor that has values."""
    # 1. The function.
    if not callable(fn):
        hint = "spectral_norm(lambda x: ..., x); jacdiag.audit takes models and files"
        raise UsageError("fn is no function", got=f"type {type(fn).__name__}", hint=hint)

    # 2. The point.
    if not isinstance(x, Tensor):
        raise UsageError(
            "x is no tensor", got=f"type {type(x).__name__}", hint="a float32 or float64 tensor"
        )
    got = ""
    if x.is_meta:
        got = "the meta device"
    elif x.dtype not in (torch.float32, torch.float64):
        got = str(x.dtype)
    if got:
        raise UsageError(
            "x cannot be differentiated by", got=got, hint="x.float(), on a device with values"
        )
    if not x.numel():
        raise UsageError("x is empty", got=f"shape {tuple(x.shape)}")

    # 3. The dimensions.
    is_sequence = isinstance(batch_dims, Sequence)
    if not is_sequence or not all(isinstance(d, int) for d in batch_dims):
        raise UsageError(
            "batch_dims is a tuple of dimensions", got=repr(batch_dims), hint="(0,), or () for none"
        )
