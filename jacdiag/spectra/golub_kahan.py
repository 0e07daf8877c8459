"""Batched Golub-Kahan-Lanczos bidiagonalisation, reorthogonalised on the side of the start.

The interval rests on the spectral measure of the start, which lies on the left. So the directions
on the left are kept and reorthogonalised. If there are no more rows than columns, that is enough:
the coefficients are those of a matrix that differs from A by rounding (Barlow 2013,
"Reorthogonalization for the Golub-Kahan-Lanczos bidiagonal reduction", after Simon and Zha 2000).
The directions on the right are dropped after use, which halves the memory. Of a matrix with fewer
columns than rows both are kept: a run ends there when all columns are used up, and the norm is
exact only if the directions on the right are orthogonal too.

Nothing in a step depends on the value of a coefficient, so that an accelerator is never waited for:
coefficients, breakdowns and the check of the products stay on the device of the vectors. The host
reads the coefficients that it has not seen in one download, when it needs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jacdiag.devices.accelerators import widest
from jacdiag.devices.packed_download import download
from jacdiag.spectra.interval import Array
from jacdiag.spectra.operator import Operator, Way


class Bidiagonalisation:
    """A bidiagonalisation of P problems at once.

    A^T u_j = beta_{j-1} v_{j-1} + alpha_j v_j, A v_j = alpha_j u_j + beta_j u_{j+1}.

    It begins on the left, with A^T u. A Jacobian makes A v by the graph of such a product, so that
    none is made for the graph alone.

    A coefficient below 10 u sqrt(max(m, n)) of the largest one seen is a breakdown: it is set to 0
    and the problem is frozen, because an invariant subspace has been found.

    Attributes:
        operator: P matrices A of shape (m, n).
        u: (P, m), the last direction on the left.
        v: (P, n), the last direction on the right.
        products: how many products were made.

    Args:
        operator: the matrices.
        start: (P, m) random numbers of a normal distribution, as `draw_start` gives. The first
            product is made with this very object.
    """

    def __init__(self, operator: Operator, start: Tensor) -> None:
        # 1. The start.
        self.operator = operator
        problems, domain, codomain = operator.problems, operator.domain, operator.codomain
        self._start = start
        self._start_size = norms(start)
        self.u = start / self._start_size.unsqueeze(1).to(start)
        self.v = self.u.new_zeros(problems, domain)

        # 2. The directions so far. Each of them lies in one piece, for all problems.
        self._left = _with_room(self.u.new_empty(0, problems, codomain), 0)
        self._left[0] = self.u
        self._right: Tensor | None = None
        if domain < codomain:
            self._right = self.v.new_empty(0, problems, domain)

        # 3. The coefficients so far: alpha_1, beta_1, alpha_2, and so on.
        self.products = 0
        self._count = 0
        self._unread: list[Tensor] = []  # each (P,), on the device
        self._read: list[Array] = []  # each (P,), on the host
        self._last = self.u.new_zeros(problems, dtype=widest(operator.device))

        # 4. Breakdowns: what is no more than rounding of the largest coefficient.
        self._tiny = 10 * torch.finfo(operator.dtype).eps / 2 * max(domain, codomain) ** 0.5
        self._least = torch.full_like(self._last, torch.finfo(self._last.dtype).tiny)
        self._frozen = torch.zeros_like(self._last, dtype=torch.bool)
        self._exact = np.zeros(problems, dtype=bool)
        self._finite = True

        # 5. The check of the first two products, until it was read.
        self._differs: Tensor | None = None

    # -- products ----------------------------------------------------------------------------------
    def step(self) -> None:
        """Make a product with A^T and one with A."""
        self.advance()
        self.advance()

    def advance(self) -> None:
        """Make the next product: A^T u_k, or A v_k."""
        way, vector = self.wanted
        self.take(self.operator.push(vector) if way == "push" else self.operator.pull(vector))

    @property
    def wanted(self) -> tuple[Way, Tensor]:
        """The next product: which way, and of what."""
        if self._count == 0:
            return "pull", self._start

        # They take turns.
        return ("pull", self.u) if self._count % 2 == 0 else ("push", self.v)

    @property
    def steps(self) -> int:
        """How many products with A^T were made; the last product with A may be missing."""
        return (self._count + 1) // 2

    def take(self, product: Tensor) -> None:
        """Go on with the product that was `wanted`."""
        self.products += 1
        if self._count == 0:
            self._pulled(product / self._start_size.unsqueeze(1).to(product))
        elif self._count % 2 == 0:
            self._pulled(product)
        else:
            self._pushed(product)

    def _pulled(self, z: Tensor) -> None:
        """Take z = A^T u_k: alpha_k and v_k."""
        # 1. Take off what lies along the last v.
        k = self._count // 2
        if k:
            z = torch.addcmul(z, self._column(self._last), self.v, value=-1)

        # 2. The rest gives the coefficient and the next direction.
        is_last = k >= self.operator.domain
        if self._right is None:
            self.v = self._direction(z, norms(z), is_last)
            return

        # 3. The same, if the directions on the right are kept.
        self._right = _with_room(self._right, k)
        self.v = self._right[k].copy_(z)
        self._direction(self.v, _reorthogonalise(self._right, k), is_last)

    def _pushed(self, w: Tensor) -> None:
        """Take w = A v_k: beta_k and u_{k+1}."""
        k = self.steps
        if k == 1:
            self._differs = self._inner_products_differ(w)

        # 1. Take off what lies along the last u, then along all before it.
        self._left = _with_room(self._left, k)
        place = self._left[k]
        torch.addcmul(w, self._column(self._last), self.u, value=-1, out=place)
        self.u = place
        size = _reorthogonalise(self._left, k)

        # 2. The rest gives the coefficient and the next direction.
        self._direction(self.u, size, k >= self.operator.codomain)

    def _direction(self, w: Tensor, size: Tensor, is_last: bool) -> Tensor:
        """Divide w by |w|, and keep |w| as the next coefficient; 0 in their places at a breakdown.

        Args:
            w: (P, m) or (P, n), what is left of a product. It is written to.
            size: (P,), its norm.
            is_last: it has as many directions before it as the space has.

        Returns:
            w.
        """
        # 1. Breakdowns. Neither NaN nor Inf is one: no number is less than the least then.
        self._least = torch.fmax(self._least, size * self._tiny)
        self._frozen = self._frozen | (size < self._least)
        if is_last:
            self._frozen = torch.ones_like(self._frozen)

        # 2. A problem that is frozen gets no further direction.
        self._last = size.masked_fill(self._frozen, 0.0)
        self._unread.append(self._last)
        self._count += 1
        factors = self._column(size.reciprocal().masked_fill(self._frozen, 0.0))
        return w.mul_(factors)

    def _column(self, values: Tensor) -> Tensor:
        return values.to(self.u.dtype).unsqueeze(1)

    @property
    def left(self) -> Tensor:
        """(P, capacity, m), all directions on the left; what is beyond them is not set."""
        return self._left.transpose(0, 1)

    @property
    def right(self) -> Tensor | None:
        """(P, capacity, n), those on the right where they are kept."""
        return None if self._right is None else self._right.transpose(0, 1)

    # -- what the host knows -----------------------------------------------------------------------
    @property
    def reads_are_free(self) -> bool:
        """Whether the host need not wait for a coefficient."""
        return _is_free_to_read(self._last)

    @property
    def alphas(self) -> Array:
        """(P, k) coefficients of A^T U = V B. Reading one downloads all that are new."""
        self._download()
        return self._side_by_side(self._read[0::2])

    @property
    def betas(self) -> Array:
        """(P, k - 1) after A^T u_k, or (P, k) after A v_k."""
        self._download()
        return self._side_by_side(self._read[1::2])

    @property
    def exact(self) -> NDArray[np.bool_]:
        """(P,) problems with a breakdown: the largest Ritz value is the norm."""
        self._download()
        return self._exact

    @property
    def finite(self) -> bool:
        """Whether all coefficients are finite."""
        self._download()
        return self._finite

    def _side_by_side(self, columns: list[Array]) -> Array:
        """Return (P, k) of k columns; there may be none."""
        return np.array(columns).reshape(len(columns), self.operator.problems).T.copy()

    def _download(self) -> None:
        """Read the coefficients that are new, and the check of the products."""
        if self._unread:
            read_together([self])

    def unread(self) -> list[Tensor]:
        """Return what the host has not read yet, each (P,): coefficients, then the check."""
        if self._differs is None:
            return self._unread
        return [*self._unread, self._differs]

    def accept(self, arrived: list[Tensor]) -> None:
        """Take what was `unread`, now on the CPU.

        Raises:
            RuntimeError: J u and J^T w do not belong to one matrix.
        """
        # 1. The coefficients. Those that are 0 are breakdowns.
        count = len(self._unread)
        for column in arrived[:count]:
            values = column.double().numpy()
            self._read.append(values)
            self._exact = self._exact | (values == 0)
            self._finite = self._finite and bool(np.isfinite(values).all())

        # 2. The check.
        differs = any(bool(flags.any()) for flags in arrived[count:])
        self._unread = []
        self._differs = None
        if differs:
            raise RuntimeError(self._adjoint_cause())

    # -- whether the products belong to one matrix -------------------------------------------------
    def _inner_products_differ(self, pushed: Tensor) -> Tensor:
        """Return for which problems <u, A v> is not alpha = <A^T u, v>, which costs no product.

        A backward marked @once_differentiable is cut off in silence when it is differentiated, and
        A v comes out too small: without this check a wrong norm would be certified.
        """
        # 1. Compare the two inner products. That of directions does not leave the range of a type.
        alpha, size = self._last, norms(pushed)
        least = torch.finfo(self.u.dtype).tiny
        direction = pushed / self._column(size).clamp_min(least)
        inner = (self.u * direction).sum(1).to(alpha.dtype) * size
        differs = (inner - alpha).abs() > 1e-3 * torch.maximum(size, alpha)

        # 2. At a product that is not finite the solver stops, and says so.
        return differs & torch.isfinite(alpha).all() & torch.isfinite(pushed).all()

    def _adjoint_cause(self) -> str:
        """Return why J u and J^T w do not belong to one matrix, as far as it can be known.

        A linear map scales with its argument. One that does not has left the range of its dtype on
        the way.
        """
        # 1. Compare J v with the product of a v scaled down, where v is the first one.
        pulled = self.operator.pull(self._left[0])
        least = torch.finfo(pulled.dtype).tiny  # a problem of zeros stays one
        first = pulled / self._column(norms(pulled)).clamp_min(least)
        pushed = self.operator.push(first).to(widest(first.device))
        scaled = self.operator.push(first * _SHRUNK).to(pushed.dtype) / _SHRUNK
        self.products += 3
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


def draw_start(operator: Operator, generator: torch.Generator | None) -> Tensor:
    """Draw a random start, (P, m), on the CPU: it has the same digits on every device."""
    shape = (operator.problems, operator.codomain)
    start = torch.randn(shape, generator=generator, dtype=torch.float32)
    return start.to(operator.device, operator.dtype)


def read_together(runs: Sequence[Bidiagonalisation]) -> None:
    """Bring the new coefficients of several runs to the host in one download.

    Args:
        runs: any number of them.

    Raises:
        RuntimeError: J u and J^T w of a run do not belong to one matrix.
    """
    columns = [run.unread() for run in runs]
    arrived = iter(download(list(chain.from_iterable(columns))))
    for run, own in zip(runs, columns, strict=True):
        if own:
            run.accept([next(arrived) for _ in own])


_CAPACITY = 16  # directions for which a basis has room at first: an interval of 5% takes fewer
_SHORTEST_CHUNK, _LONGEST_CHUNK = 64, 1024
_SMALL = 1e-12


def norms(w: Tensor) -> Tensor:
    """Return the norms of the rows of (P, n) in the widest type of their device.

    If n is a multiple of 64, chunks are summed in the dtype of w, for speed; not where a square
    might leave its range.
    """
    # 1. By chunks.
    sizes: Tensor | None = None
    chunk = math.gcd(w.shape[1], _LONGEST_CHUNK)
    if w.shape[1] and chunk >= _SHORTEST_CHUNK:
        chunks = torch.linalg.vector_norm(w.reshape(w.shape[0], -1, chunk), dim=2)
        sizes = torch.linalg.vector_norm(chunks, dim=1, dtype=widest(w.device))
        is_in_range = (sizes.clamp(_SMALL, 1 / _SMALL) == sizes).all()  # False for NaN
        if _is_free_to_read(is_in_range) and bool(is_in_range):
            return sizes

    # 2. In the widest type.
    exact: Tensor = torch.linalg.vector_norm(w, dim=1, dtype=widest(w.device))
    if sizes is None or _is_free_to_read(exact):
        return exact
    return torch.where(is_in_range, sizes, exact)


def _with_room(basis: Tensor, k: int) -> Tensor:
    """Return a (capacity, P, n) basis that has room for direction k; a full one is doubled."""
    if k < len(basis):
        return basis

    grown = basis.new_empty(max(_CAPACITY, 2 * k), *basis.shape[1:])
    grown[:k] = basis
    return grown


def _reorthogonalise(basis: Tensor, k: int) -> Tensor:
    """Take from vector k of a basis what lies along the k directions before it, in place.

    By classical Gram-Schmidt: one pass is made, or two if the first took much away. Rounding leaves
    what is u |before| / |after| of the result inside the basis, so that one pass is enough where
    the norm did not fall much, and two always are (Daniel, Gragg, Kaufman, Stewart 1976). One alone
    is measurably not.

    Args:
        basis: (capacity, P, n).
        k: how many directions it holds; the vector comes after them.

    Returns:
        (P,), the norm of what is left.
    """
    if k == 0:
        return norms(basis[0])

    # 1. One pass. Row times matrix is ten times faster on a CPU than matrix times column.
    span, vector = basis[:k].transpose(0, 1), basis[k].unsqueeze(1)
    across = span.transpose(1, 2)
    components = torch.bmm(vector, across)
    vector.baddbmm_(components, span, alpha=-1)
    size = norms(basis[k])

    # 2. That is enough if the norm did not fall below sqrt(1/2) of what it was: by Pythagoras, if
    # what is left is no shorter than what was taken off. In units of what is left, no square
    # leaves the range of its type. A CPU looks.
    least = torch.finfo(components.dtype).tiny
    ratios = components / size.to(components).clamp_min(least)[:, None, None]
    is_enough = (torch.linalg.vector_norm(ratios, dim=(1, 2)) <= 1).all()  # False for NaN
    if _is_free_to_read(is_enough) and bool(is_enough):
        return size

    # 3. A second pass. Where nobody looks, it is made in any case, and taken if it is needed.
    twice = torch.baddbmm(vector, torch.bmm(vector, across), span, alpha=-1)
    if not _is_free_to_read(is_enough):
        twice = torch.where(is_enough, vector, twice)
    vector.copy_(twice)
    return norms(basis[k])


def _is_free_to_read(flag: Tensor) -> bool:
    """Return whether the host can look at a flag at once.

    It would have to wait for another device, which takes longer than to compute both alternatives.
    """
    return flag.device.type == "cpu"


_SHRUNK = 2.0**-20  # a power of two: scaling by it rounds nothing
