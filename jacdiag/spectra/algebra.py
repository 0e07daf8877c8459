"""Operators in closed form, and operators made of others: composed, summed, shifted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jacdiag.spectra.operator import JacobianOperator, Operator, Steps, Way, flat, shaped


class NormJacobian(Operator):
    """The Jacobian of a LayerNorm or RMSNorm without its learned gain, in closed form.

    It is g (I - 1 1^T / d - z z^T / d).

    Eq. 12 with eps kept, which is inside g = 1 / sqrt(var + eps); without the term 1 1^T / d for
    RMSNorm. It is symmetric, and block diagonal over tokens.

    Args:
        z: the norm's output, features last.
        gain: g per token, in the order of z without its features.
        centred: LayerNorm rather than RMSNorm.
        batch_dims: as in `JacobianOperator`.

    Example:
        >>> op = NormJacobian(torch.tensor([[1.0, -1.0]]), torch.tensor([0.5]), centred=True)
        >>> op.push(torch.tensor([[1.0, 0.0]]))
        tensor([[0., 0.]])
    """

    def __init__(
        self, z: Tensor, gain: Tensor, *, centred: bool, batch_dims: Sequence[int] = (0,)
    ) -> None:
        self.z, self.centred = z, centred
        self.gain = gain.to(z).reshape(*z.shape[:-1], 1)
        if centred:
            self._input, self._mean = z / self.gain, torch.zeros_like(self.gain)
        self.dtype, self.device = z.dtype, z.device
        self.set_batch_dims(batch_dims)

    def set_batch_dims(self, dims: Sequence[int]) -> None:
        """Set which dimensions are independent, without rebuilding the operator."""
        self.dims = tuple(sorted(d % self.z.dim() for d in dims))
        self.problems = math.prod(self.z.shape[d] for d in self.dims)
        self.domain = self.codomain = self.z.numel() // self.problems

    def _push(self, u: Tensor) -> Tensor:
        u = shaped(u, self.dims, self.z.shape)
        if self.centred:
            image = self._centred(u)
        else:
            inner = (self.z * u).mean(-1, keepdim=True)
            image = torch.addcmul(u, self.z, inner, value=-1).mul_(self.gain)
        return flat(image, self.dims)

    def _centred(self, u: Tensor) -> Tensor:
        """Return g (I - 1 1^T / d - z z^T / d) u.

        That is the backward of a layer norm at z / g, if its mean is taken for 0 and 1 / spread for
        g. torch makes it in one pass.
        """
        # A stream may be wider than its norms.
        x, mean, gain = (t.to(u.dtype) for t in (self._input, self._mean, self.gain))
        image: Tensor = torch.ops.aten.native_layer_norm_backward(
            u, x, x.shape[-1:], mean, gain, None, None, [True, False, False]
        )[0]
        return image

    def _pull(self, w: Tensor) -> Tensor:
        return self._push(w)


class Made(Operator):
    """An operator made of others; a subclass defines the generator `steps` only."""

    parts: tuple[Operator, ...]

    @property
    def problems(self) -> int:  # type: ignore[override]
        """P, the number of independent matrices."""
        return self.parts[-1].problems

    @property
    def domain(self) -> int:  # type: ignore[override]
        """n, the number of columns of one matrix."""
        return self.parts[-1].domain

    @property
    def codomain(self) -> int:  # type: ignore[override]
        """m, the number of rows of one matrix."""
        return self.parts[0].codomain

    @property
    def jacobians(self) -> tuple[JacobianOperator, ...]:
        """The linearised functions in the parts, in order."""
        return tuple(leaf for part in self.parts for leaf in part.jacobians)

    def _push(self, u: Tensor) -> Tensor:
        return _run(self.steps("push", u), "push")

    def _pull(self, w: Tensor) -> Tensor:
        return _run(self.steps("pull", w), "pull")


def _run(steps: Steps, way: Way) -> Tensor:
    """Run a generator of steps alone: each Jacobian that it needs makes its product at once."""
    try:
        leaf, vector = next(steps)
        while True:
            leaf, vector = steps.send(leaf.push(vector) if way == "push" else leaf.pull(vector))
    except StopIteration as end:
        result: Tensor = end.value
        return result


class Composed(Made):
    """outer o inner: J u = outer(inner u)."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.parts = (outer, inner)
        self.dtype, self.device = inner.dtype, inner.device

    def steps(self, way: Way, vector: Tensor) -> Steps:
        """Make the product with each part: a push begins with the inner one."""
        parts = self.parts
        if way == "push":
            parts = parts[::-1]
        for part in parts:
            vector = yield from part.steps(way, vector)
        return vector


class Summed(Made):
    """The sum of operators on the same spaces."""

    def __init__(self, terms: Sequence[Operator]) -> None:
        self.parts = tuple(terms)
        self.dtype, self.device = terms[0].dtype, terms[0].device

    def steps(self, way: Way, vector: Tensor) -> Steps:
        """Make the product with each term, and add them."""
        first, *others = self.parts
        total = yield from first.steps(way, vector)
        for part in others:
            total = total + (yield from part.steps(way, vector))
        return total


class Shifted(Made):
    """gain * I + J, the gain a number or a (P, n) diagonal."""

    def __init__(self, operator: Operator, gain: float | Tensor = 1.0) -> None:
        self.parts = (operator,)
        self.dtype, self.device = operator.dtype, operator.device
        self.gain = gain

    def steps(self, way: Way, vector: Tensor) -> Steps:
        """Make the product with J, and add that with gain * I."""
        image = yield from self.parts[0].steps(way, vector)
        return image + self.gain * vector


class DenseOperator(Operator):
    """Matrices (P, m, n) or (m, n), for weights and for tests with a chosen spectrum."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix if matrix.dim() == 3 else matrix.unsqueeze(0)
        self.problems, self.codomain, self.domain = self.matrix.shape
        self.dtype, self.device = matrix.dtype, matrix.device

    def _push(self, u: Tensor) -> Tensor:
        return torch.bmm(self.matrix, u.unsqueeze(2)).squeeze(2)

    def _pull(self, w: Tensor) -> Tensor:
        return torch.bmm(w.unsqueeze(1), self.matrix).squeeze(1)
