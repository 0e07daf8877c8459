"""The Jacobian of a branch and its factors, built once and shared by all norms of a sub-layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor

from jacdiag.spectra import Composed, JacobianOperator, NormJacobian, Operator, Shifted, Summed
from jacdiag.spectra.operator import flat
from jacdiag.trace import Sublayer

_ROUNDINGS = 64  # by which two ways to compute a product may differ
Local = JacobianOperator | NormJacobian  # operators whose independent dimensions can be set again


@dataclass
class Linearised:
    """A branch's Jacobian and its factors, built once.

    `norm` is the Jacobian of the norm at the beginning, if it is in closed form. The norms of the
    sub-layer begin at `start`, a random (P, m). Its product with the branch's Jacobian, or that of
    its core, is kept.
    """

    site: Sublayer
    branch: Operator
    core: Operator | None
    owned: list[Local]
    dims: tuple[int, ...]
    notes: dict[str, str] = field(default_factory=dict)
    norm: NormJacobian | None = None
    start: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the shortcut."""
        return self.site.shortcut.shape

    @property
    def products(self) -> int:
        """How many products were made with the Jacobians of the branch and of its core."""
        own: set[JacobianOperator] = set()
        for operator in (self.branch, self.core):
            if isinstance(operator, JacobianOperator):
                own.add(operator)

        return sum(jacobian.products for jacobian in own)

    def release(self) -> None:
        """Free the graphs that the operators hold."""
        for operator in self.owned:
            operator.release()


def linearise(site: Sublayer, seed: int = 0) -> Linearised:
    """Build the Jacobian of a branch at its recorded shortcut.

    It is core o norm where the branch begins with a norm.

    Args:
        site: the sub-layer.
        seed: of the start of its norms.
    """
    # 1. Build the branch as core o norm, or as one map. The first operator that is built says
    # which dimensions are independent.
    norm: NormJacobian | None = None
    if _is_factored(site):
        main = JacobianOperator(site.core, site.normalized, ())
        dims = site.independent(main.pull_shaped)
        of_norm = _norm_jacobian(site)
        owned: list[Local] = [main, of_norm]
        branch: Operator = Composed(main, of_norm)
        if isinstance(of_norm, NormJacobian):
            norm = of_norm
        core: Operator | None = main
    else:
        main = JacobianOperator(site.branch, site.shortcut, ())
        dims = site.independent(main.pull_shaped)
        owned = [main]
        branch = main
        core = None
    for operator in owned:
        operator.set_batch_dims(dims)

    # 2. The product that the norms begin with, unless a map ends in a norm of its own.
    start = flat(start_of_branch(site, seed), dims)
    main.keep(start)
    linearised = Linearised(site, branch, core, owned, dims, norm=norm, start=start)
    if core is not None:
        return linearised

    # 3. The branch begins with a norm that cannot be taken apart from it.
    if site.has_input_norm:
        linearised.notes["core_norm"] = (
            "the norm's output has another shape than the shortcut, or is laid out otherwise"
        )
        return linearised

    # 4. Without a norm at its beginning, the branch is its own core, up to a norm at its end.
    linearised.core = main
    if site.placement == "reordered" and site.before_output_norm is not None:
        inner = JacobianOperator(site.before_output_norm, site.shortcut, ())
        inner.set_batch_dims(dims)
        owned.append(inner)
        linearised.core = inner
    return linearised


def start_of_branch(site: Sublayer, seed: int) -> Tensor:
    """Draw the vector at which the norms of a sub-layer begin, in the shape of its branch."""
    generator = generator_of(seed, site.name, "start")
    start = torch.randn(site.value.shape, generator=generator, dtype=torch.float32)
    return start.to(site.value)


def generator_of(seed: int, *names: str) -> torch.Generator:
    """Return the random numbers of one sub-layer and figure, the same in any order of work."""
    words = "/".join((str(seed), *names))
    return torch.Generator().manual_seed(crc32(words.encode()) & (2**31 - 1))


def _is_factored(site: Sublayer) -> bool:
    """Return whether the branch begins with a norm whose output is laid out as the shortcut."""
    norm = site.input_norm
    if norm is None:
        return False

    has_same_shape = norm.value.shape == site.shortcut.shape
    return norm.aligned and has_same_shape


def _norm_jacobian(site: Sublayer) -> Local:
    """Return the Jacobian of the norm at the beginning of a branch, if possible in closed form."""
    # 1. One of torch's own norms.
    norm = site.input_norm
    assert norm is not None
    closed = NormJacobian(norm.value, norm.gain, centred=norm.centred, batch_dims=())
    if norm.closed_form:
        return closed

    # 2. One that is written out is differentiated like any other map, unless that is the same.
    built = JacobianOperator(site.norm, site.shortcut, ())
    if not _are_same(closed, built, norm.gain):
        return built
    built.release()
    return closed


def _are_same(closed: NormJacobian, built: JacobianOperator, gain: Tensor) -> bool:
    """Return whether the closed form is the Jacobian of a norm, up to rounding.

    Two matrices that differ give different products with a random vector. What two norms differ in,
    such as the place of eps, lies along z or along the mean: these directions are looked at, too.

    Args:
        closed: g (I - 1 1^T / d - z z^T / d) of each token.
        built: the Jacobian of the norm by autograd.
        gain: g of each token.
    """
    if built.value.shape != closed.z.shape:
        return False

    # 1. The vectors.
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(closed.z.shape, generator=generator, dtype=torch.float64).to(closed.z)
    vectors = [random, closed.z, torch.ones_like(closed.z)]

    # 2. The difference of the products with each, over gain times length.
    allowed = _ROUNDINGS * torch.finfo(closed.dtype).eps
    same = torch.ones((), dtype=torch.bool, device=closed.device)
    for vector in vectors:
        difference = built.pull_shaped(vector) - closed.pull(flat(vector, ())).reshape(vector.shape)
        length = torch.linalg.vector_norm(vector, dim=-1)
        same &= (torch.linalg.vector_norm(difference, dim=-1) <= allowed * gain * length).all()
    return bool(same)


def residual_map(
    site: Sublayer, branch: Operator, dims: tuple[int, ...]
) -> tuple[Operator | None, list[Local], str]:
    """Return the map to the next shortcut, the operators made for it, and why there is none.

    The map is a I + J, and the norm after it for post-norm.
    """
    if site.value.shape != site.shortcut.shape:
        return None, [], "branch and shortcut have different shapes"

    # 1. The sum of shortcut and branch.
    operator, owned = _with_shortcut(site, branch, dims)
    if site.after is None or site.total is None:
        return operator, owned, ""

    # 2. The norm after the sum.
    post_norm = JacobianOperator(site.after, site.total, ())
    owned = [*owned, post_norm]
    if post_norm.value.shape != site.total.shape:
        return None, owned, "the norm after the sum changes the shape"

    post_norm.set_batch_dims(dims)
    return Composed(post_norm, operator), owned, ""


def _with_shortcut(
    site: Sublayer, branch: Operator, dims: tuple[int, ...]
) -> tuple[Operator, list[Local]]:
    """Return a branch with its shortcut, and the operators made for it."""
    gain = site.shortcut_gain
    if isinstance(gain, float):
        return Shifted(branch, gain), []

    # The shortcut enters the sum through a map of its own.
    assert site.carry is not None
    carry = JacobianOperator(site.carry, site.shortcut, ())
    carry.set_batch_dims(dims)
    return Summed([carry, branch]), [carry]
