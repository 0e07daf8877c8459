"""The Jacobian of a branch and its factors, built once and shared by all norms of a sub-layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from jacdiag.spectra import Composed, JacobianOperator, NormJacobian, Operator, Shifted, Summed
from jacdiag.trace import Sublayer

Local = JacobianOperator | NormJacobian  # operators that can be told anew what is independent


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
        return self.site.shortcut.shape

    def release(self) -> None:
        for operator in self.owned:
            operator.release()


def linearise(site: Sublayer) -> Linearised:
    """Build the Jacobian of a branch at its recorded shortcut.

    It is core o norm where the branch begins with a norm.
    """
    x = site.shortcut
    norm = site.input_norm
    factored = norm is not None and norm.aligned and norm.value.shape == x.shape
    main = (
        JacobianOperator(site.core, site.normalized, ())
        if factored
        else JacobianOperator(site.branch, x, ())
    )
    owned: list[Local] = [main]
    dims = site.independent(main.pull_shaped)
    pulls = main.products
    if factored:
        owned.append(_norm_jacobian(site))
    notes = {}
    if site.has_input_norm and not factored:
        notes["core_norm"] = (
            "the norm's output has another shape than the shortcut, or is laid out otherwise"
        )
    for operator in owned:
        operator.set_batch_dims(dims)
    branch: Operator = Composed(owned[0], owned[1]) if factored else main
    core: Operator | None = main if factored else None
    if not site.has_input_norm:
        if site.placement == "reordered" and site.before_output_norm is not None:
            inner = JacobianOperator(site.before_output_norm, x, ())
            inner.set_batch_dims(dims)
            owned.append(inner)
            core = inner
        else:
            core = main
    return Linearised(site, branch, core, owned, dims, notes, pulls)


def _norm_jacobian(site: Sublayer) -> Local:
    norm = site.input_norm
    assert norm is not None
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
    operator, owned = _with_shortcut(site, branch, dims)
    if site.after is None or site.total is None:
        return operator, owned, ""
    behind = JacobianOperator(site.after, site.total, ())
    owned = [*owned, behind]
    if behind.value.shape != site.total.shape:
        return None, owned, "the norm behind the sum changes the shape"
    behind.set_batch_dims(dims)
    return Composed(behind, operator), owned, ""


def _with_shortcut(
    site: Sublayer, branch: Operator, dims: tuple[int, ...]
) -> tuple[Operator, list[Local]]:
    gain = site.shortcut_gain
    if isinstance(gain, float):
        return Shifted(branch, gain), []
    assert site.carry is not None
    carry = JacobianOperator(site.carry, site.shortcut, ())
    carry.set_batch_dims(dims)
    return Summed([carry, branch]), [carry]
