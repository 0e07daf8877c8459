"""The norms of the sub-layers on one shortcut: one linearisation each, shared by all norms.

A branch with an input norm is core o norm. Both are linearised once, and all norms come from the
same graphs (see `norms.py`). Parallel branches also get the norm of their joint residual map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from jacdiag.errors import JacdiagError, SourceError, one_line
from jacdiag.measure.bounds import closed_form_bounds
from jacdiag.measure.branch_norms import Effort, Solver, heads_norm
from jacdiag.measure.linearization import Linearised, linearise, residual_map
from jacdiag.measure.token_statistics import gain_interval, spread_of
from jacdiag.records.report import Interval, SublayerRecord, WeightStats
from jacdiag.sources.foreign_code import is_foreign
from jacdiag.spectra import JacobianOperator, Summed
from jacdiag.trace import Sublayer


def measure_group(
    sites: Sequence[Sublayer],
    effort: Effort,
    token_ids: Tensor | None,
    state: Literal["init", "trained"],
    figures: Callable[[str], WeightStats | None],
) -> list[SublayerRecord]:
    """Measure the sub-layers that share one shortcut (one, or parallel branches).

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
                if not site.finite:
                    records.append(
                        _blank(
                            site, token_ids, "not finite: NaN or Inf in the shortcut or the branch"
                        )
                    )
                    continue
                linearised = linearise(site)
                built.append(linearised)
                records.append(_measure(linearised, effort, token_ids, state, figures))
            except SourceError:  # the weights could not be read: nothing that follows could be
                raise
            except (JacdiagError, RuntimeError, NotImplementedError) as error:
                records.append(_blank(site, token_ids, _why(site, error)))
            except Exception as error:  # in the model's own code: a backward that raises
                if not is_foreign(error):
                    raise
                records.append(_blank(site, token_ids, _why(site, error)))
        if len(sites) > 1 and len(built) == len(sites):
            joint = _joint_residual(built, effort)
            records = [replace(r, joint_residual_norm=joint) for r in records]
        return records
    finally:
        for linearised in built:
            linearised.release()


def _measure(
    linearised: Linearised, effort: Effort, token_ids: Tensor | None, state: str, figures: Any
) -> SublayerRecord:
    site = linearised.site
    norms = (effort.solver or Solver)(linearised, effort, token_ids).norms()
    assert norms.branch is not None
    record = _plain(site, token_ids, linearised.dims)
    notes = {**record.notes, **linearised.notes, **norms.why}
    weights = _weights(site, figures)
    # no rule reads Eq. 20
    is_heads_norm_wanted = state == "init" and site.placement == "pre" and not effort.early
    heads = heads_norm(linearised, effort) if is_heads_norm_wanted else None
    bounds = closed_form_bounds(
        kind=site.kind,
        placement=site.placement,
        state=state,
        weights=weights,
        activations=site.activations,
        shortcut_std=record.shortcut_std,
        norm_gain=record.norm_gain,
        heads_norm=heads,
    )
    notes |= bounds.notes
    tight = None
    if bounds.bound is not None and norms.branch.estimate > 0:
        tight = (bounds.bound - 1) / norms.branch.estimate
    built = sum(isinstance(operator, JacobianOperator) for operator in linearised.owned) + (
        heads is not None
    )
    spent = norms.products + (heads.products if heads is not None else 0)
    return replace(
        record,
        branch_norm=norms.branch,
        residual_norm=norms.residual,
        core_norm=norms.core,
        bound=bounds.bound,
        bound_norms=bounds.bound_norms,
        tightness=tight,
        weights=weights,
        notes=notes,
        cost=float(spent + linearised.pulls + 2 * built),
    )


def _joint_residual(built: Sequence[Linearised], effort: Effort) -> Interval | None:
    """Return |a I + J_1 + J_2 + ...| over the dimensions that are independent for all."""
    dims = tuple(sorted(set.intersection(*(set(linearised.dims) for linearised in built))))
    first = built[0]
    if any(linearised.site.value.shape != first.site.shortcut.shape for linearised in built):
        return None
    for linearised in built:
        for operator in linearised.owned:
            operator.set_batch_dims(dims)
    residual, owned, _ = residual_map(
        first.site, Summed([linearised.branch for linearised in built]), dims
    )
    if residual is None:
        return None
    joint = Linearised(first.site, residual, None, owned, dims)
    solver = Solver(joint, effort)
    interval = solver.interval(solver.solve(residual, "joint_residual_norm"))
    joint.release()
    return interval


# -- figures without a solver ----------------------------------------------------------------------
def _plain(site: Sublayer, token_ids: Tensor | None, dims: tuple[int, ...]) -> SublayerRecord:
    """Return the record of what needs no product: spreads, gains of norms, and notes."""
    x = site.shortcut
    notes = dict(site.notes)

    # 1. The gains of the norms at both ends of the branch.
    gain = None
    if site.input_norm is not None:
        gain = gain_interval(site.input_norm.gain, x.shape, site.feature_dim, token_ids)
    else:
        notes["norm_gain"] = f"the branch does not begin with a norm (placement {site.placement})"
    last_norm = site.output_norm or site.post_norm
    out = None
    if last_norm is not None:
        out = gain_interval(last_norm.gain, x.shape, site.feature_dim, None)
    else:
        notes["out_norm_gain"] = "no norm at the branch's end or after the sum"

    # 2. The factor on the shortcut.
    carried = site.shortcut_gain
    shortcut_gain = carried if isinstance(carried, float) else None
    if isinstance(carried, Tensor):
        shortcut_gain = float(carried.mean())
        notes["shortcut_gain"] = (
            f"a learned diagonal gain: {float(carried.min()):.4g} to {float(carried.max()):.4g}; "
            "its mean is given"
        )
    elif carried is None:
        notes["shortcut_gain"] = "the shortcut enters the sum through a map that is no diagonal"

    # 3. The spread of the branch, if its tokens are those of the shortcut.
    branch_std = None
    if site.value.shape == x.shape:
        branch_std = spread_of(site.value, site.feature_dim, token_ids)
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
        branch_std=branch_std,
        shortcut_gain=shortcut_gain,
        norm_gain=gain,
        out_norm_gain=out,
        parameters=site.parameters,
        problems=_problems(dims, site),
        notes=notes,
    )


def _problems(dims: tuple[int, ...], site: Sublayer) -> str:
    if site.splits_tokens(dims):
        return "one per token"
    if not dims:
        return "one for the whole batch: its elements are coupled"
    if len(dims) == 1:
        return "one per sequence"
    return "one per independent index"


def _why(site: Sublayer, error: Exception) -> str:
    """Return the error's first line.

    A custom autograd.Function in the branch is the first suspect.
    """
    message = one_line(error)
    if not site.functions:
        return message
    names = ", ".join(site.functions)
    return (
        f"{message} (in it: {names}, a custom autograd.Function; a plain PyTorch version of it "
        "can be measured)"
    )


def _blank(site: Sublayer, token_ids: Tensor | None, why: str) -> SublayerRecord:
    """Return a record without norms, with the reason why each is null."""
    site.dims = site.dims or ()
    notes = dict.fromkeys(("branch_norm", "residual_norm", "core_norm"), why)
    if not site.finite:
        return SublayerRecord(
            site.name,
            site.index,
            site.depth,
            site.kind,
            site.placement,
            site.parallel,
            None,
            site.nested,
            shortcut_gain=None,
            parameters=site.parameters,
            notes=notes,
        )
    return replace(_plain(site, token_ids, ()), notes=notes)


def _weights(
    site: Sublayer, figures: Callable[[str], WeightStats | None]
) -> dict[str, WeightStats]:
    """Return statistics of the branch's matrices by role, in the order of use.

    Roles are W_1, W_gate, W_2 or W_Q, W_K, W_V, W_O.
    """
    statistics = {}
    for role, name in site.roles.items():
        stats = figures(name)
        if stats is not None:
            statistics[role] = stats
    return statistics
