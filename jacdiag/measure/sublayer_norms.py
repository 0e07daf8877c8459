"""The norms of the sub-layers on one shortcut: one linearisation each, shared by all norms.

A branch with an input norm is core o norm. Both are linearised once, and all norms come from the
same graphs (see `norms.py`). Parallel branches also get the norm of their joint residual map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download
from jacdiag.errors import JacdiagError, SourceError, one_line
from jacdiag.measure.bounds import closed_form_bounds
from jacdiag.measure.branch_norms import Effort, Solver, heads_norm
from jacdiag.measure.linearization import (
    Linearised,
    linearise,
    residual_map,
    start_of_branch,
)
from jacdiag.measure.token_statistics import gain_interval, spread_of_stds, stds_of
from jacdiag.records.report import Interval, SublayerRecord, WeightStats
from jacdiag.sources.foreign_code import is_foreign
from jacdiag.spectra import JacobianOperator, Summed
from jacdiag.spectra.operator import flat
from jacdiag.trace import Sublayer

WeightFigures = Callable[[Sequence[str]], Mapping[str, WeightStats | None]]


def measure_group(
    sites: Sequence[Sublayer],
    effort: Effort,
    token_ids: Tensor | None,
    state: Literal["init", "trained"],
    figures: WeightFigures,
    check: Callable[[Linearised], None] | None = None,
    count: Callable[[int], None] | None = None,
) -> list[SublayerRecord]:
    """Measure the sub-layers that share one shortcut (one, or parallel branches).

    Args:
        sites: the sub-layers.
        effort: see `Effort`.
        token_ids: (B, T) ids of the probe, to name tokens.
        state: Eq. 15 and 20 are given at init only.
        figures: names of weights -> std and spectral norm of each that is a matrix.
        check: is shown every branch once it is linearised.
        count: is given the number of products with the Jacobians of the branches and cores.
    """
    built: list[Linearised] = []
    solved: list[Linearised] = []

    def measure(site: Sublayer) -> SublayerRecord:
        if not site.finite:
            return _blank(site, token_ids, "not finite: NaN or Inf in the shortcut or the branch")

        linearised = linearise(site, effort.seed)
        built.append(linearised)
        if check is not None:
            check(linearised)
        record = _measure(linearised, effort, token_ids, state, figures)
        solved.append(linearised)
        return record

    try:
        # 1. Each sub-layer. One that cannot be measured has a record with the reason.
        records = []
        for site in sites:
            try:
                record = measure(site)
            except Exception as error:
                if not _is_expected(error):
                    raise
                record = _blank(site, token_ids, _why(site, error))
            records.append(record)

        # 2. Parallel branches together, if each of them can be measured.
        are_parallel = len(sites) > 1
        all_solved = len(solved) == len(sites)
        if are_parallel and all_solved and "residual_norm" in effort.norms:
            joint = _joint_residual(solved, effort)
            records = [replace(record, joint_residual_norm=joint) for record in records]
        return records
    finally:
        if count is not None:
            count(sum(linearised.products for linearised in built))
        for linearised in built:
            linearised.release()


def describe_unmeasured(site: Sublayer, token_ids: Tensor | None) -> SublayerRecord:
    """Return the record of a finite sub-layer as it is known before any norm is measured.

    Args:
        site: the sub-layer; unlike `measure_group`, nothing of it is set.
        token_ids: (B, T) ids of the probe, to name tokens.
    """
    return _plain(site, token_ids, ())


def _is_expected(error: Exception) -> bool:
    """Return whether an error says that one sub-layer cannot be measured."""
    # The weights could not be read: nothing that follows could be.
    if isinstance(error, SourceError):
        return False

    # A part of the computation that does not work for this sub-layer.
    if isinstance(error, JacdiagError | RuntimeError | NotImplementedError):
        return True

    # The model's own code may raise anything, such as in a backward.
    return is_foreign(error)


def _measure(
    linearised: Linearised,
    effort: Effort,
    token_ids: Tensor | None,
    state: str,
    figures: WeightFigures,
) -> SublayerRecord:
    """Return the record of one sub-layer with its norms and bounds."""
    # 1. The norms.
    site = linearised.site
    solver = effort.solver or Solver
    norms = solver(linearised, effort, token_ids).norms()
    assert norms.branch is not None
    record = _plain(site, token_ids, linearised.dims)

    # 2. The bounds of the paper. No rule reads Eq. 20, which costs a norm of its own.
    weights = _weights(site, figures)
    heads = None
    is_described = state == "init" and site.placement == "pre"
    if is_described and not effort.early:
        heads = heads_norm(linearised, effort)
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
    tight = None
    if bounds.bound is not None and norms.branch.estimate > 0:
        tight = (bounds.bound - 1) / norms.branch.estimate

    # 3. What it cost: a forward for each Jacobian, and the products with those of the branch.
    forwards = sum(isinstance(operator, JacobianOperator) for operator in linearised.owned)
    products = linearised.products
    if heads is not None:
        forwards += 1
        products += heads.products
    return replace(
        record,
        branch_norm=norms.branch,
        residual_norm=norms.residual,
        core_norm=norms.core,
        bound=bounds.bound,
        bound_norms=bounds.bound_norms,
        tightness=tight,
        weights=weights,
        notes={**record.notes, **linearised.notes, **norms.why, **bounds.notes},
        cost=float(forwards + products),
    )


def _joint_residual(built: Sequence[Linearised], effort: Effort) -> Interval | None:
    """Return |a I + J_1 + J_2 + ...| over the dimensions that are independent for all."""
    site = built[0].site
    shapes = {linearised.site.value.shape for linearised in built}
    if shapes != {site.shortcut.shape}:
        return None

    # 1. The dimensions.
    independent = [set(linearised.dims) for linearised in built]
    dims = tuple(sorted(set.intersection(*independent)))
    operators = chain.from_iterable(linearised.owned for linearised in built)
    for operator in operators:
        operator.set_batch_dims(dims)

    # 2. The map.
    branches = Summed([linearised.branch for linearised in built])
    residual, owned, _ = residual_map(site, branches, dims)
    if residual is None:
        return None

    # 3. Its norm.
    start = flat(start_of_branch(site, effort.seed), dims)
    joint = Linearised(site, residual, None, owned, dims, start=start)
    solver = Solver(joint, effort)
    interval = solver.interval(solver.solve(residual, "joint_residual_norm"))
    joint.release()
    return interval


# -- figures without a solver ----------------------------------------------------------------------
def _plain(site: Sublayer, token_ids: Tensor | None, dims: tuple[int, ...]) -> SublayerRecord:
    """Return the record of what needs no product: spreads, gains of norms, and notes."""
    x = site.shortcut
    notes = dict(site.notes)

    # 1. One number per token of each figure, in one download.
    last_norm = site.output_norm or site.post_norm
    per_token = {"shortcut": stds_of(x, site.feature_dim)}
    if site.input_norm is not None:
        per_token["input norm"] = in_float64(site.input_norm.gain.detach())
    if last_norm is not None:
        per_token["last norm"] = in_float64(last_norm.gain.detach())
    # The spread of the branch is given if its tokens are those of the shortcut.
    if site.value.shape == x.shape:
        per_token["branch"] = stds_of(site.value, site.feature_dim)
    per_token = dict(zip(per_token, download(list(per_token.values())), strict=True))

    # 2. The gains of the norms at both ends of the branch.
    gain = None
    if "input norm" in per_token:
        gain = gain_interval(per_token["input norm"], x.shape, site.feature_dim, token_ids)
    else:
        why = "the branch does not begin with a norm"
        if site.norm_inside:
            why = "no norm was found at the beginning of the branch"
        notes["norm_gain"] = f"{why} (placement {site.placement})"
    out = None
    if "last norm" in per_token:
        out = gain_interval(per_token["last norm"], x.shape, site.feature_dim, None)
    else:
        notes["out_norm_gain"] = "no norm was found at the branch's end or after the sum"

    # 3. The factor on the shortcut.
    shortcut_gain, note = _shortcut_gain(site)
    if note:
        notes["shortcut_gain"] = note

    # 4. The spreads of shortcut and branch.
    spreads = {
        name: spread_of_stds(per_token[name], x.shape, site.feature_dim, token_ids)
        for name in ("shortcut", "branch")
        if name in per_token
    }
    return SublayerRecord(
        name=site.name,
        index=site.index,
        depth=site.depth,
        kind=site.kind,
        placement=site.placement,
        norm_inside=site.norm_inside,
        parallel=site.parallel,
        token_wise=site.token_wise,
        nested=site.nested,
        shortcut_std=spreads["shortcut"],
        branch_std=spreads.get("branch"),
        shortcut_gain=shortcut_gain,
        norm_gain=gain,
        out_norm_gain=out,
        parameters=site.parameters,
        problems=_problems(dims, site),
        notes=notes,
    )


def _shortcut_gain(site: Sublayer) -> tuple[float | None, str]:
    """Return the factor on the shortcut, and a note where it is not one number."""
    gain = site.shortcut_gain
    if gain is None:
        return None, "the shortcut enters the sum through a map that is no diagonal"
    if isinstance(gain, float):
        return gain, ""

    # One number for each feature.
    note = (
        f"a learned diagonal gain: {float(gain.min()):.4g} to {float(gain.max()):.4g}; "
        "its mean is given"
    )
    return float(gain.mean()), note


def _problems(dims: tuple[int, ...], site: Sublayer) -> str:
    """Return which independent problems a sub-layer is made of, in words."""
    if site.splits_tokens(dims):
        return "one per token"

    # Whole sequences, or less.
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


def _weights(site: Sublayer, figures: WeightFigures) -> dict[str, WeightStats]:
    """Return statistics of the branch's matrices by role, in the order of use.

    Roles are W_1, W_gate, W_2 or W_Q, W_K, W_V, W_O.
    """
    by_name = figures(list(site.roles.values()))
    statistics = {}
    for role, name in site.roles.items():
        stats = by_name.get(name)
        # A weight that is no matrix has none.
        if stats is not None:
            statistics[role] = stats

    return statistics
