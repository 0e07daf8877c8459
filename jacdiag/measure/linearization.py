"""The Jacobian of a branch and its factors, built once and shared by all norms of a sub-layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from jacdiag.spectra import Composed, JacobianOperator, NormJacobian, Operator, Shifted, Summed
from jacdiag.trace import Sublayer

Local = JacobianOperator | NormJacobian  # operators whose independent dimensions can be set again


@dataclass
class Linearised:
    """A branch's Jacobian and its factors, built once.

    `pulls` products were spent to find out what is independent.
    """

    site: Sublayer
    branch: Operator
    core: Operator | None
    owned: list[Local]
    dims: tuple[int, ...]
    notes: dict[str, str] = field(default_factory=dict)
    pulls: int = 0

    @property
    def shape(self) -> torch.Size:
        """The shape of the shortcut."""
        return self.site.shortcut.shape

    def release(self) -> None:
        """Free the graphs that the operators hold."""
        for operator in self.owned:
            operator.release()


def linearise(site: Sublayer) -> Linearised:
    """Build the Jacobian of a branch at its recorded shortcut.

    It is core o norm where the branch begins with a norm.
    """
    # 1. Build the branch as core o norm, or as one map. The first operator that is built says
    # which dimensions are independent.
    if _is_factored(site):
        main = JacobianOperator(site.core, site.normalized, ())
        dims = site.independent(main.pull_shaped)
        pulls = main.products
        owned: list[Local] = [main, _norm_jacobian(site)]
        branch: Operator = Composed(owned[0], owned[1])
        core: Operator | None = main
    else:
        main = JacobianOperator(site.branch, site.shortcut, ())
        dims = site.independent(main.pull_shaped)
        pulls = main.products
        owned = [main]
        branch = main
        core = None
    for operator in owned:
        operator.set_batch_dims(dims)
    if core is not None:
        return Linearised(site, branch, core, owned, dims, {}, pulls)

    # 2. The branch begins with a norm that cannot be taken apart from it.
    if site.has_input_norm:
        reason = "the norm's output has another shape than the shortcut, or is laid out otherwise"
        return Linearised(site, branch, None, owned, dims, {"core_norm": reason}, pulls)

    # 3. Without a norm at its beginning, the branch is its own core, up to a norm at its end.
    if site.placement == "reordered" and site.before_output_norm is not None:
        inner = JacobianOperator(site.before_output_norm, site.shortcut, ())
        inner.set_batch_dims(dims)
        owned.append(inner)
        return Linearised(site, branch, inner, owned, dims, {}, pulls)

    return Linearised(site, branch, main, owned, dims, {}, pulls)


def _is_factored(site: Sublayer) -> bool:
    """Return whether the branch begins with a norm whose output is laid out as the shortcut."""
    norm = site.input_norm
    if norm is None:
        return False

    has_same_shape = norm.value.shape == site.shortcut.shape
    return norm.aligned and has_same_shape


def _norm_jacobian(site: Sublayer) -> Local:
    """Return the Jacobian of the norm at the beginning of a branch."""
    norm = site.input_norm
    assert norm is not None
    # Without a gain and a bias that are known, it is differentiated like any other map.
    if norm.closed_form:
        return NormJacobian(norm.value, norm.gain, centred=norm.centred, batch_dims=())

    return JacobianOperator(site.norm, site.shortcut, ())


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
