"""The norms of the sub-layers on one shortcut: one linearisation each, shared by all norms.

A branch with an input norm is core o norm. Both are linearised once; branch_norm, residual_norm and core_norm are then
three Lanczos runs over the same graphs. Parallel branches also get the norm of their joint residual map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from jacdiag.errors import JacdiagError
from jacdiag.measure.bounds import closed_form_bounds
from jacdiag.measure.figures import gain_interval, spread_of
from jacdiag.report.schema import Interval, SublayerRecord, WeightStats
from jacdiag.spectra import Composed, JacobianOperator, Operator, Shifted, Solution, Summed, independent_dims, top_singular
from jacdiag.trace import Sublayer

Decide = Callable[[float, float], bool]


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        tol: relative width of an interval that is asked for.
        confidence: probability with which an upper end holds.
        max_products: budget of products per norm.
        seed: of the random starts; each norm draws its own, so that results do not depend on the order of work.
        decided: field name -> predicate on (lower, upper): the rules need no more. None: go on to `tol`.
    """

    tol: float = 0.05
    confidence: float = 0.999
    max_products: int = 200
    seed: int = 0
    decided: Callable[[Sublayer], Mapping[str, Decide]] | None = None


@dataclass
class Linearised:
    """A branch's Jacobian and its factors, built once."""

    site: Sublayer
    branch: Operator
    core: Operator | None
    owned: list[JacobianOperator]
    dims: tuple[int, ...]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        return self.site.shortcut.shape

    def release(self) -> None:
        for operator in self.owned:
            operator.release()


def linearise(site: Sublayer, generator: torch.Generator) -> Linearised:
    """Builds the Jacobian of a branch at its recorded shortcut, as core o norm where it begins with a norm."""
    x = site.shortcut
    factored = site.has_input_norm and site.normalized.shape == x.shape
    main = JacobianOperator(site.core, site.normalized, ()) if factored else JacobianOperator(site.branch, x, ())
    owned = [main]
    dims = independent_dims(main.pull_shaped, x.shape, main.value.shape, site.feature_dim, x.dtype, x.device, generator)
    if factored:
        owned.append(JacobianOperator(site.norm, x, ()))
    notes = {}
    if site.has_input_norm and not factored:
        notes["core_norm"] = "the norm's output has another shape than the shortcut"
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
    site._token_wise = set(dims) >= set(range(x.dim())) - {site.feature_dim % x.dim()}
    return Linearised(site, branch, core, owned, dims, notes)


def measure_group(
    sites: Sequence[Sublayer],
    effort: Effort,
    token_ids: Tensor | None,
    state: Literal["init", "trained"],
    figures: Callable[[str], WeightStats | None],
) -> list[SublayerRecord]:
    """Measures the sub-layers that share one shortcut (one, or parallel branches).

    Args:
        sites: the sub-layers.
        effort: see `Effort`.
        token_ids: (B, T) ids of the probe, to name tokens.
        state: Eq. 15 and 20 are given at init only.
        figures: weight matrix name -> its std and spectral norm.
    """
    built: list[Linearised] = []
    try:
        records = []
        for site in sites:
            try:
                if not _finite(site):
                    records.append(_blank(site, token_ids, "not finite: NaN or Inf in the shortcut or the branch"))
                    continue
                one = linearise(site, _generator(effort, site, "dims"))
                built.append(one)
                records.append(_measure(one, effort, token_ids, state, figures))
            except (JacdiagError, RuntimeError, NotImplementedError) as error:
                records.append(_blank(site, token_ids, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
        if len(sites) > 1 and len(built) == len(sites):
            joint = _joint_residual(built, effort)
            records = [replace(r, joint_residual_norm=joint) for r in records]
        return records
    finally:
        for one in built:
            one.release()


def _measure(one: Linearised, effort: Effort, token_ids: Tensor | None, state: str, figures: Any) -> SublayerRecord:
    site = one.site
    decided = effort.decided(site) if effort.decided is not None else {}
    solve = partial(_solve, one, effort, token_ids)
    branch = solve(one.branch, "branch_norm", decided.get("branch_norm"))
    operator, owned, why = _residual_operator(one)
    residual = None if operator is None else solve(operator, "residual_norm", decided.get("residual_norm"))
    for inner in owned:
        inner.release()
    same = one.core is one.branch
    core = None if one.core is None else branch if same else solve(one.core, "core_norm", decided.get("core_norm"))
    record = _plain(site, token_ids, one.dims)
    notes = {**record.notes, **one.notes, **({"residual_norm": why} if why else {})}
    weights = _weights(site, figures)
    heads = _heads_norm(one, effort) if state == "init" and site.placement == "pre" else None
    bounds = closed_form_bounds(
        kind=site.kind, placement=site.placement, state=state, weights=weights,
        activations=site.activations, shortcut_std=record.shortcut_std, norm_gain=record.norm_gain, heads_norm=heads,
    )  # fmt: skip
    notes |= bounds.notes
    tight = None
    if bounds.bound is not None and branch.estimate > 0:
        tight = (bounds.bound - 1) / branch.estimate
    spent = [i for i in (branch, residual, None if same else core) if i is not None]
    return replace(
        record,
        branch_norm=branch,
        residual_norm=residual,
        core_norm=core,
        bound=bounds.bound,
        bound_norms=bounds.bound_norms,
        tightness=tight,
        weights=weights,
        notes=notes,
        cost=float(sum(i.products for i in spent) + 2 * len(one.owned)),
    )


def _solve(one: Linearised, effort: Effort, token_ids: Tensor | None, operator: Operator, name: str,
           decide: Decide | None) -> Interval:  # fmt: skip
    solution: Solution = top_singular(
        operator,
        tol=effort.tol,
        confidence=effort.confidence,
        max_products=effort.max_products,
        generator=_generator(effort, one.site, name),
        decide=decide,
    )
    lead = tuple(n for d, n in enumerate(one.shape) if d in one.dims)
    return solution.interval(lead, token_ids=token_ids)


def _residual_operator(one: Linearised) -> tuple[Operator | None, list[JacobianOperator], str]:
    """The map to the next shortcut: a I + J, and the norm behind it for post-norm. Parallel branches: this one alone."""
    site = one.site
    if site.value.shape != site.shortcut.shape:
        return None, [], "branch and shortcut have different shapes"
    operator, owned, why = _with_shortcut(site, one.branch, one.dims)
    if operator is None or site.after is None or site.total is None:
        return operator, owned, why
    behind = JacobianOperator(site.after, site.total, ())
    if behind.value.shape != site.total.shape:
        behind.release()
        return None, owned, "the norm behind the sum changes the shape"
    behind.set_batch_dims(one.dims)
    return Composed(behind, operator), [*owned, behind], why


def _with_shortcut(site: Sublayer, branch: Operator, dims: tuple[int, ...]
                   ) -> tuple[Operator | None, list[JacobianOperator], str]:  # fmt: skip
    gain = site.shortcut_gain
    if isinstance(gain, float):
        return Shifted(branch, gain), [], ""
    assert site.carry is not None
    carry = JacobianOperator(site.carry, site.shortcut, ())
    carry.set_batch_dims(dims)
    return Summed([carry, branch]), [carry], ""


def _joint_residual(built: Sequence[Linearised], effort: Effort) -> Interval | None:
    """|a I + J_1 + J_2 + ...| over the dimensions that are independent for all of them."""
    dims = tuple(sorted(set.intersection(*(set(one.dims) for one in built))))
    first = built[0]
    if any(one.site.value.shape != first.site.shortcut.shape for one in built):
        return None
    for one in built:
        for operator in one.owned:
            operator.set_batch_dims(dims)
    operator, owned, _ = _with_shortcut(first.site, Summed([one.branch for one in built]), dims)
    if operator is None:
        return None
    if first.site.after is not None and first.site.total is not None:
        behind = JacobianOperator(first.site.after, first.site.total, ())
        behind.set_batch_dims(dims)
        operator, owned = Composed(behind, operator), [*owned, behind]
    whole = Linearised(first.site, operator, None, owned, dims)
    interval = _solve(whole, effort, None, operator, "joint_residual_norm", None)
    for inner in owned:
        inner.release()
    return interval


def _heads_norm(one: Linearised, effort: Effort) -> Interval | None:
    """|J^Z|, the Jacobian of the concatenated heads behind the input norm (Eq. 20), to 20%."""
    site = one.site
    if site.heads is None:
        return None
    operator = JacobianOperator(site.heads, site.normalized, ())
    try:
        operator.set_batch_dims((0,) if 0 in one.dims and operator.value.shape[0] == one.shape[0] else ())
        coarse = replace(effort, tol=max(effort.tol, 0.2))
        return _solve(one, coarse, None, operator, "heads_norm", None)
    finally:
        operator.release()


# -- figures without a solver -----------------------------------------------------------------------------------------
def _plain(site: Sublayer, token_ids: Tensor | None, dims: tuple[int, ...]) -> SublayerRecord:
    x, notes = site.shortcut, dict(site.notes)
    gain = None
    if site.input_norm is not None:
        gain = gain_interval(site.input_norm.gain, x.shape, site.feature_dim, token_ids)
    else:
        notes["norm_gain"] = f"the branch does not begin with a norm (placement {site.placement})"
    behind = site.output_norm or site.post_norm
    out = None
    if behind is not None:
        out = gain_interval(behind.gain, x.shape, site.feature_dim, None)
    else:
        notes["out_norm_gain"] = "no norm at the branch's end or behind the sum"
    carried = site.shortcut_gain
    if isinstance(carried, Tensor):
        notes["shortcut_gain"] = (
            f"a learned diagonal gain: {float(carried.min()):.4g} to {float(carried.max()):.4g}; its mean is given"
        )
    elif carried is None:
        notes["shortcut_gain"] = "the shortcut enters the sum through a map that is no diagonal"
    return SublayerRecord(
        name=site.name,
        index=site.index,
        depth=site.depth,
        kind=site.kind,
        placement=site.placement,
        parallel=site.parallel,
        token_wise=site.token_wise,
        nested=site.nested,
        shortcut_std=spread_of(x, site.feature_dim, token_ids),
        branch_std=spread_of(site.value, site.feature_dim, token_ids) if site.value.shape == x.shape else None,
        shortcut_gain=float(carried.mean()) if isinstance(carried, Tensor) else carried,
        norm_gain=gain,
        out_norm_gain=out,
        parameters=site.parameters,
        problems=_problems(dims, x, site.feature_dim),
        notes=notes,
    )


def _problems(dims: tuple[int, ...], x: Tensor, feature_dim: int) -> str:
    if set(dims) >= set(range(x.dim())) - {feature_dim % x.dim()}:
        return "one per token"
    if not dims:
        return "one for the whole batch: its elements are coupled"
    return "one per sequence" if len(dims) == 1 else "one per independent index"


def _blank(site: Sublayer, token_ids: Tensor | None, why: str) -> SublayerRecord:
    """A record without norms: what could not be measured is null, with the reason."""
    site._token_wise = site._token_wise or False
    notes = {name: why for name in ("branch_norm", "residual_norm", "core_norm")}
    if not _finite(site):
        return SublayerRecord(
            site.name, site.index, site.depth, site.kind, site.placement, site.parallel, None, site.nested,
            shortcut_gain=None, parameters=site.parameters, notes=notes,
        )  # fmt: skip
    return replace(_plain(site, token_ids, ()), notes=notes)


def _finite(site: Sublayer) -> bool:
    return bool(torch.isfinite(site.shortcut).all() and torch.isfinite(site.value).all())


def _weights(site: Sublayer, figures: Callable[[str], WeightStats | None]) -> dict[str, WeightStats]:
    """Statistics of the branch's matrices by role: W_1, W_gate, W_2 or W_Q, W_K, W_V, W_O, from the order of use."""
    found = {}
    for role, name in site.roles.items():
        stats = figures(name)
        if stats is not None:
            found[role] = stats
    return found


def _generator(effort: Effort, site: Sublayer, name: str) -> torch.Generator:
    """A start of its own for each sub-layer and norm, whatever order they are measured in."""
    mixed = hash_name(f"{effort.seed}/{site.name}/{name}")
    return torch.Generator().manual_seed(mixed)


def hash_name(text: str) -> int:
    from zlib import crc32

    return crc32(text.encode()) & math.floor(2**31 - 1)
