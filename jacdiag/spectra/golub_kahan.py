"""Batched Golub-Kahan-Lanczos bidiagonalisation, reorthogonalised in full."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jacdiag.sources.accelerators import widest
from jacdiag.spectra.interval import Array
from jacdiag.spectra.operator import Operator, Way


class Bidiagonalisation:
    """A bidiagonalisation of P problems at once.

    A v_j = beta_{j-1} u_{j-1} + alpha_j u_j, A^T u_j = alpha_j v_j + beta_j v_{j+1}.

    A coefficient below 10 u sqrt(max(m, n)) of the largest one seen is a breakdown: it is set to 0
    and the problem is frozen, because an invariant subspace has been found.
    """

    def __init__(self, operator: Operator, generator: torch.Generator | None) -> None:
        self.operator = operator
        shape = (operator.problems, operator.domain)
        start = torch.randn(shape, generator=generator).to(operator.device, operator.dtype)
        self.v = start / norms(start).unsqueeze(1).to(start)
        self.u = torch.zeros(
            operator.problems, operator.codomain, dtype=operator.dtype, device=operator.device
        )
        self.right = _stored(self.v.new_empty(operator.problems, 0, operator.domain), 0, self.v)
        self.left = self.u.new_empty(operator.problems, 0, operator.codomain)
        self.steps = self.products = 0
        self.alphas = np.zeros((operator.problems, 0))
        self.betas = np.zeros((operator.problems, 0))
        self.exact = np.zeros(operator.problems, dtype=bool)
        self.scale = np.zeros(operator.problems)
        largest = max(operator.domain, operator.codomain)
        self.tiny = 10 * torch.finfo(operator.dtype).eps / 2 * largest**0.5

    def step(self) -> None:
        """Make a product with A and one with A^T."""
        self.advance()
        self.advance()

    def advance(self) -> None:
        """Make the next product: A v_k, or A^T u_k."""
        way, vector = self.wanted
        self.take(self.operator.push(vector) if way == "push" else self.operator.pull(vector))

    @property
    def wanted(self) -> tuple[Way, Tensor]:
        """The next product: which way, and of what."""
        return ("pull", self.u) if self.betas.shape[1] < self.steps else ("push", self.v)

    def take(self, product: Tensor) -> None:
        """Go on with the product that was `wanted`."""
        self.products += 1
        if self.betas.shape[1] < self.steps:
            self._pulled(product)
        else:
            self._pushed(product)

    def _pushed(self, w: Tensor) -> None:
        """Take w = A v_k: alpha_k and u_k."""
        # 1. Take off what lies along the last u, then along all before it.
        k = self.steps
        if k:
            w -= self._column(self.betas[:, -1]) * self.u
        w = _reorthogonalised(w, self.left, k)

        # 2. The rest gives the coefficient and the next direction.
        alpha = self._coefficient(w, last=k >= self.operator.codomain)
        self.u = self._direction(w, alpha)
        self.left = _stored(self.left, k, self.u)
        self.alphas = np.concatenate([self.alphas, alpha[:, None]], axis=1)
        self.steps += 1

    def _pulled(self, z: Tensor) -> None:
        """Take z = A^T u_k: beta_k and v_{k+1}."""
        k, alpha = self.steps, self.alphas[:, -1]
        if k == 1:
            self._check_adjoint(alpha, z)

        # 1. Take off what lies along the last v, then along all before it.
        z = z - self._column(alpha) * self.v
        z = _reorthogonalised(z, self.right, k)

        # 2. The rest gives the coefficient and the next direction.
        beta = self._coefficient(z, last=k >= self.operator.domain)
        self.v = self._direction(z, beta)
        self.right = _stored(self.right, k, self.v)
        self.betas = np.concatenate([self.betas, beta[:, None]], axis=1)

    def _check_adjoint(self, alpha: Array, pulled: Tensor) -> None:
        """Raise unless <v, A^T u> = alpha = <A v, u>, which costs no product.

        If A v = 0, one more product shows whether A^T is 0 too.

        A backward marked @once_differentiable is cut off in silence when it is differentiated, and
        A v comes out too small: without this check a wrong norm would be certified.
        """
        # 1. At such a product the solver stops, and says that it was not finite.
        if not np.isfinite(alpha).all() or not bool(torch.isfinite(pulled).all()):
            return

        # 2. Compare the two inner products.
        if not alpha.any():
            probe = torch.ones_like(self.u).cumsum(1).cos()
            self.products += 1
            differs = bool(self.operator.pull(probe).abs().max() > 0)
        else:
            wide = widest(pulled.device)
            inner = (self.v.to(wide) * pulled.to(wide)).sum(1).cpu().numpy()
            size = torch.linalg.vector_norm(pulled, dim=1, dtype=wide).cpu().numpy()
            differs = bool((np.abs(inner - alpha) > 1e-3 * np.maximum(size, alpha)).any())
        if differs:
            raise RuntimeError(self._adjoint_cause())

    def _adjoint_cause(self) -> str:
        """Return why J u and J^T w do not belong to one matrix, as far as it can be known.

        A linear map scales with its argument. One that does not has left the range of its dtype on
        the way.
        """
        # 1. Compare J v with the product of a v scaled down.
        small = self.v * _SHRUNK
        wide = widest(self.operator.device)
        pushed = self.operator.push(self.v).to(wide)
        scaled = self.operator.push(small).to(wide) / _SHRUNK
        self.products += 2
        difference = float((pushed - scaled).abs().max())
        is_linear = difference <= 1e-2 * float(pushed.abs().max())  # False for NaN

        # 2. The cause.
        event = "J u and J^T w do not belong to one matrix"
        if is_linear:
            return (
                f"{event}: a backward in it has no derivative (@once_differentiable), or depends "
                "on more than its input"
            )
        name = str(self.operator.dtype).removeprefix("torch.")
        advice = "" if name == "float64" else "; --dtype float64 may hold it"
        return f"{event}: a product leaves the range of {name} on the way{advice}"

    def _coefficient(self, w: Tensor, last: bool) -> Array:
        """Return the norm of a new direction; 0 at a breakdown, which makes the problem exact."""
        # 1. The norm. A problem that is exact gets no further direction.
        value = norms(w).cpu().double().numpy()
        value[self.exact] = 0.0

        # 2. Breakdowns: what is no more than rounding of the largest one.
        self.scale = np.maximum(self.scale, np.where(np.isfinite(value), value, self.scale))
        broken = (value <= self.tiny * self.scale) | last
        value[broken] = 0.0
        self.exact |= broken
        return value

    @property
    def finite(self) -> bool:
        """Whether the last coefficients are finite."""
        has_finite_alphas = np.isfinite(self.alphas[:, -1]).all()
        return bool(has_finite_alphas and np.isfinite(self.betas[:, -1:]).all())

    def _direction(self, w: Tensor, norm: Array) -> Tensor:
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0)
        return w * self._column(inverse)

    def _column(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self.v).unsqueeze(1)


_CHUNK = 1024
_SMALL = 1e-12


def norms(w: Tensor) -> Tensor:
    """Return the norms of the rows of (P, n) in the widest type of their device.

    Chunks are summed in the dtype of w where they divide n, for speed; not where a square might
    leave its range.
    """
    # 1. By chunks.
    if w.shape[1] and w.shape[1] % _CHUNK == 0:
        chunks = torch.linalg.vector_norm(w.reshape(w.shape[0], -1, _CHUNK), dim=2)
        sizes: Tensor = torch.linalg.vector_norm(chunks, dim=1, dtype=widest(w.device))
        is_in_range = (sizes > _SMALL) & (sizes < 1 / _SMALL)
        if bool(is_in_range.all()):
            return sizes

    # 2. In the widest type.
    exact: Tensor = torch.linalg.vector_norm(w, dim=1, dtype=widest(w.device))
    return exact


def _stored(basis: Tensor, k: int, vector: Tensor) -> Tensor:
    """Write vector k into a (P, capacity, n) basis, which doubles when full."""
    if k == basis.shape[1]:
        grown = basis.new_empty(basis.shape[0], max(8, 2 * k), basis.shape[2])
        grown[:, :k] = basis[:, :k]
        basis = grown
    basis[:, k] = vector
    return basis


def _reorthogonalised(w: Tensor, basis: Tensor, k: int) -> Tensor:
    """Return w by classical Gram-Schmidt against the first k vectors, in one pass or two.

    The second pass is made if the first took much away.

    Rounding leaves what is u |before| / |after| of the result inside the basis, so that one pass is
    enough where the norm did not fall much, and two always are (Daniel, Gragg, Kaufman, Stewart
    1976). One alone is measurably not.
    """
    if k == 0:
        return w

    # Row times matrix is ten times faster on a CPU than matrix times column.
    span, row = basis[:, :k], w.unsqueeze(1)
    before = norms(w)
    row = torch.baddbmm(row, torch.bmm(row, span.transpose(1, 2)), span, alpha=-1)

    # A second pass, unless the norm did not fall much.
    if not bool((norms(row.squeeze(1)) >= _MUCH * before).all()):
        row = torch.baddbmm(row, torch.bmm(row, span.transpose(1, 2)), span, alpha=-1)
    return row.squeeze(1)


_MUCH = 0.5**0.5
_SHRUNK = 2.0**-20  # a power of two: scaling by it rounds nothing
