"""Measure the entire network: gradients over depth, the end-to-end map, and growth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import torch

from jacdiag.measure.gradients import GradientProfile, end_of
from jacdiag.records.report import (
    PRODUCT_ALONE,
    UNCOVERED_CALLS,
    Growth,
    Interval,
    NetworkRecord,
    SublayerRecord,
)
from jacdiag.records.signal_propagation import (
    BackwardRecord,
    CutShortcut,
    DeadBranch,
    DeadPath,
    ForwardRecord,
)
from jacdiag.records.stream_range import StreamRange
from jacdiag.spectra import JacobianOperator, independent_dims, top_singular
from jacdiag.spectra.golub_kahan import draw_start
from jacdiag.spectra.operator import draw_cotangents
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.detached import cut_additions
from jacdiag.trace.discovery.independence import independent_between

_SAMPLED = 2  # sub-layers whose independent dimensions are looked at: attention and FFN, mostly


def end_to_end(
    sites: Sites, tol: float, confidence: float, max_products: int, seed: int
) -> Interval | None:
    """Return the spectral norm of d y_N / d x_1 over the main stream, by Lanczos on the chain.

    Args:
        sites: of one recorded forward.
        tol: relative width of the interval that is requested.
        confidence: probability with which the interval holds.
        max_products: budget of products with J and J^T.
        seed: of the random start.

    Returns:
        The interval; None if no sub-layer lies on the main stream.
    """
    groups = [sites.streams.groups[index] for index in sites.streams.main]
    if not groups:
        return None

    # 1. The map from the first shortcut to the stream's end. If a model lies on several devices,
    # the end is brought to the device of the start.
    replayer = sites.replayer
    source = replayer.spot_of(groups[0].shortcut, 0)
    segment = replayer.segment(0, source, replayer.spot_of(end_of(sites), 0))
    first = sites[groups[0].sites[0]]
    device = first.shortcut.device
    generator = torch.Generator().manual_seed(seed)
    with replayer.whole_graph():
        operator = JacobianOperator(lambda x: segment(x).to(device), first.shortcut, batch_dims=())

        # 2. The dimensions over which it is made of independent problems.
        members = chain.from_iterable(group.sites for group in groups)
        dims = _trivially_independent([sites[index] for index in members])
        if dims is None or not _keeps(dims, operator.value.shape):
            dims = _independent_over_depth(sites, groups[0].shortcut, first, operator, generator)
        operator.set_batch_dims(dims)

        # 3. The product that the norm begins with. The first one keeps a graph through the model.
        start = draw_start(operator, generator)
        operator.keep(start)

    # 4. Its norm.
    solution = top_singular(
        operator, tol=tol, confidence=confidence, max_products=max_products, start=start
    )
    interval = solution.interval()
    operator.release()
    return interval


def _independent_over_depth(
    sites: Sites,
    shortcut: int,
    first: Sublayer,
    operator: JacobianOperator,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """Return the dimensions that the chain keeps apart, by its operations if they show it.

    Args:
        sites: of one recorded forward.
        shortcut: value index of the chain's beginning.
        first: the sub-layer there.
        operator: the Jacobian of the chain.
        generator: gives the same numbers either way, so that the solver's start is the same.
    """
    x_shape, y_shape = first.shortcut.shape, operator.value.shape
    dims = independent_between(sites.finder, shortcut, end_of(sites), first.feature_dim)
    if dims is not None:
        draw_cotangents(x_shape, y_shape, first.feature_dim, generator)
        return dims

    x = first.shortcut
    return independent_dims(
        operator.pull_shaped, x_shape, y_shape, first.feature_dim, x.dtype, x.device, generator
    )


def _trivially_independent(members: Sequence[Sublayer]) -> tuple[int, ...] | None:
    """Return the dimensions of size 1, where the first sub-layers leave no others.

    None means that the chain itself must be examined. What a sub-layer mixes, the chain is taken to
    mix: that is always safe, and examining the chain costs two products with all of it.
    """
    shape = members[0].shortcut.shape
    ones = tuple(dim for dim, size in enumerate(shape) if size == 1)
    for site in members[:_SAMPLED]:
        if site.shortcut.shape != shape:
            continue

        # What it leaves independent has size 1 alone.
        if set(ones).issuperset(site.independent(keep=False)):
            return ones

    return None


def _keeps(dims: tuple[int, ...], shape: torch.Size) -> bool:
    """Return whether dimensions of size 1 have size 1 at the stream's end too.

    Some models flatten in between.
    """
    sizes = dict(enumerate(shape))
    return all(sizes.get(dim) == 1 for dim in dims)


def network_record(
    sites: Sites,
    records: Sequence[SublayerRecord],
    profile: GradientProfile | None,
    whole: Interval | None,
    layers: int,
    notes: dict[str, str],
    forward: ForwardRecord | None = None,
    backward: BackwardRecord | None = None,
) -> NetworkRecord:
    """Return the record of the entire network.

    Growth exponents are ln(last / first) / layers. Those of activations go from the first shortcut
    to the stream's end. Those of gradients go from the stream's end down to the first shortcut. So
    both are positive where the norms grow.

    Args:
        sites: of one recorded forward.
        records: of the sub-layers.
        profile: of one forward and backward; None if it was not measured.
        whole: norm of the end-to-end map; None if it was not measured.
        layers: how many there are.
        notes: field -> why it is missing.
        forward: figures of the stream in the forward.
        backward: figures of the gradients.
    """
    # 1. The product of the residual norms, known only if every factor is.
    factors = _residual_norms(sites, records)
    log = None
    if factors:
        log = sum(_log(factor) for factor in factors)
    if factors is None:
        notes = {"gain_product_log": "not every residual norm was measured to its width"} | notes
    elif log is not None and whole is None:
        notes = {**notes, "gain_product_log": PRODUCT_ALONE}
    stream = _stream_range(sites, records)
    if stream is not None and stream.gaps and log is not None:
        why = f"no bound on end_to_end: {stream.gaps_in_words} {UNCOVERED_CALLS}"
        notes = {**notes, "gain_product_log": why, "predicted_gradient_norms": why}
    record = NetworkRecord(
        stream=stream,
        gain_product_log=log,
        end_to_end=whole,
        growth=Growth(),
        forward=forward,
        backward=backward,
        notes=notes,
    )
    if profile is None:
        return record

    # 2. The gradient norms that the factors predict.
    predicted = None
    has_gaps = stream is not None and bool(stream.gaps)
    if factors is not None and not has_gaps:
        predicted = _predicted_norms(profile.norms[-1], factors)

    # 3. Growth over the layers of the stream.
    if stream is not None and stream.is_partial:
        layers = stream.layers
    of_activations = None
    if profile.activations:
        of_activations = _exponent(profile.activations[0], profile.activations[-1], layers)
    of_gradients = _exponent(profile.norms[-1], profile.norms[0], layers)
    return replace(
        record,
        gradient_norms=profile.norms,
        predicted_gradient_norms=predicted,
        growth=Growth(of_activations, of_gradients),
        loss={"kind": profile.kind, "value": profile.loss},
    )


def _stream_range(sites: Sites, records: Sequence[SublayerRecord]) -> StreamRange | None:
    """Return which sub-layers lie on the main stream; None if none does."""
    # 1. Its sub-layers. Those inside another one are a part of it.
    members = []
    for index in sites.streams.main:
        members += [records[member] for member in sites.streams.groups[index].sites]
    if not members:
        return None
    on_stream = [record for record in records if not record.nested]

    # 2. Between which of them the stream is changed by something else.
    gaps = []
    for earlier, later in pairwise(sites.streams.main):
        if not _follows_directly(sites, earlier, later):
            before = sites.streams.groups[earlier].sites[-1]
            after = sites.streams.groups[later].sites[0]
            gaps.append([records[before].name, records[after].name])
    return StreamRange(
        first=members[0].name,
        last=members[-1].name,
        sublayers=len(members),
        of=len(on_stream),
        layers=len({record.depth for record in members}),
        gaps=gaps,
    )


def _follows_directly(sites: Sites, earlier: int, later: int) -> bool:
    """Return whether the residual norm of a sum reaches to the shortcut of the next one."""
    # 1. The residual norm of post-norm includes all that follows the sum.
    groups = sites.streams.groups
    if any(sites[index].after is not None for index in groups[earlier].sites):
        return True

    # 2. Else the sum itself must be the shortcut.
    return sites.finder.is_unchanged(groups[earlier].output, groups[later].shortcut)


def _log(factor: float) -> float:
    """Return the logarithm of a norm, minus infinity for 0."""
    if factor > 0:
        return math.log(factor)

    return -math.inf


def _predicted_norms(last: float, factors: Sequence[float]) -> list[float]:
    """Return the gradient norms that residual norms predict, from the stream's end down.

    Args:
        last: gradient norm at the stream's end.
        factors: residual norm at each shortcut, in the order of the forward.

    Returns:
        One for each shortcut, and that of the end.
    """
    norms = [last]
    for factor in reversed(factors):
        norms.insert(0, norms[0] * factor)

    return norms


def _residual_norms(sites: Sites, records: Sequence[SublayerRecord]) -> list[float] | None:
    """Return the residual norm at each shortcut of the main stream.

    None unless each was measured to its width.
    """
    factors = []
    for index in sites.streams.main:
        factor = _residual_of(records, sites.streams.groups[index].sites)
        # One that is missing makes the product unknown.
        if factor is None:
            return None

        factors.append(factor)

    return factors


def backward_record(
    sites: Sites,
    profile: GradientProfile | None,
    dead: list[DeadPath] | None,
    notes: dict[str, str],
) -> BackwardRecord:
    """Compare the embedding's gradient with the other matrices; list what is dead or not finite.

    Args:
        sites: of one recorded forward.
        profile: None if it was not measured.
        dead: from `find_dead_paths`.
        notes: field -> why it is missing.
    """
    record = _backward_record(sites, profile, dead, notes)
    return replace(record, cut_shortcuts=_cut_shortcuts(sites))


def _cut_shortcuts(sites: Sites) -> list[CutShortcut]:
    """Return the additions whose shortcut was detached.

    A detached branch is a part without a gradient.
    """
    shortcuts = []
    for cut in cut_additions(sites.graph, sites.finder):
        if cut.operand == "shortcut":
            place = cut.module or cut.line
            shortcuts.append(CutShortcut(place, f"detach in {cut.line}"))

    return shortcuts


def _backward_record(
    sites: Sites,
    profile: GradientProfile | None,
    dead: list[DeadPath] | None,
    notes: dict[str, str],
) -> BackwardRecord:
    """Return the record of the gradients, without shortcuts that are cut off."""
    if profile is None:
        return BackwardRecord(notes=notes)

    if dead is None and "dead" not in notes:
        why = "the record does not show that the loss depends on the residual stream"
        notes = {**notes, "dead": why}

    # 1. Where the gradient is NaN or Inf.
    broken = _points_not_finite(sites, profile)
    gradients = profile.parameters
    if gradients is None:
        why = profile.why.get("parameters", "no gradient of a parameter was measured")
        return BackwardRecord(dead=dead, not_finite=broken, notes=_without_embedding(why) | notes)

    broken += [name for name, value in gradients.items() if not math.isfinite(value)]

    # 2. The embedding.
    tables = _embedding_tables(sites, gradients)
    if not tables:
        why = "no embedding lies before the first sub-layer"
        return BackwardRecord(dead=dead, not_finite=broken, notes=_without_embedding(why) | notes)

    table = _main_table(sites, tables)

    # 3. The other matrices.
    median = _median_of_other_matrices(sites, gradients, tables)
    if median is None:
        notes = {**notes, "others_median": "no other matrix has a gradient"}
    return BackwardRecord(table, gradients[table], median, dead, broken, notes)


def _embedding_tables(sites: Sites, gradients: Mapping[str, float]) -> list[str]:
    """Return the matrices among the embeddings whose gradient was measured."""
    measured = [name for name in sites.coverage.embedding if name in gradients]
    return [name for name in measured if sites.skeleton.outlines[name].dim() >= 2]


def _main_table(sites: Sites, tables: Iterable[str]) -> str:
    """Return the embedding that token ids pick from; positions come second."""
    by_ids = _tables_read_by_ids(sites)
    outlines = sites.skeleton.outlines
    return max(tables, key=lambda name: (name in by_ids, outlines[name].numel()))


def _median_of_other_matrices(
    sites: Sites, gradients: Mapping[str, float], tables: Collection[str]
) -> float | None:
    """Return the median gradient norm of all matrices but the embeddings.

    Those without a gradient (experts without tokens) would lower it, and are left out.
    """
    norms = []
    for name, norm in gradients.items():
        is_matrix = sites.skeleton.outlines[name].dim() >= 2
        if not is_matrix or name in tables:
            continue

        # An expert without tokens has no gradient.
        if 0 < norm < math.inf:
            norms.append(norm)

    if not norms:
        return None
    return statistics.median(norms)


def _points_not_finite(sites: Sites, profile: GradientProfile) -> list[str]:
    """Return the points of the main stream whose gradient is NaN or Inf, in words."""
    # 1. The points, as the profile lists them.
    points = []
    for index in sites.streams.main:
        first = sites[sites.streams.groups[index].sites[0]]
        points.append(f"the stream at {first.name}")
    points.append("the stream's end")

    # 2. Those whose norm is not finite.
    norms = zip(points, profile.norms, strict=False)
    return [point for point, norm in norms if not math.isfinite(norm)]


def _without_embedding(why: str) -> dict[str, str]:
    """Return the notes of a record that does not compare the embedding's gradient."""
    return dict.fromkeys(("embedding_norm", "others_median"), why)


def _tables_read_by_ids(sites: Sites) -> set[str]:
    """Return the embeddings whose rows the input picks; positions are picked by constants."""
    graph = sites.graph
    lookups = []
    for node in graph.nodes:
        if node.name != "embedding":
            continue

        # The indices of positions do not depend on the input.
        reads_input = any(graph.values[value].live for value in node.inputs)
        if reads_input:
            lookups.append(node.index)

    return set(parameters_of(graph, lookups, sites.skeleton))


def with_flow(
    records: Sequence[SublayerRecord],
    profile: GradientProfile | None,
    branches: Mapping[int, DeadBranch],
    notes: Mapping[str, str],
) -> list[SublayerRecord]:
    """Return the records with attention, gradient norms of parameters, and dead branches.

    Args:
        records: of sub-layers.
        profile: None if it was not measured.
        branches: from `find_dead_branches`.
        notes: why the profile is missing: the note of "gradient_norms" counts.
    """
    # 1. What was not measured has one reason.
    reasons = [notes.get("gradient_norms"), notes.get("end_to_end")]
    why = next(filter(None, reasons), "the model was not run backward")

    # 2. Every record, with its branch if that is dead.
    completed = []
    for record in records:
        branch = branches.get(record.index)
        if profile is None:
            completed.append(_without_flow(record, branch, why))
        else:
            completed.append(_with_flow(record, profile, branch))

    return completed


def _without_flow(record: SublayerRecord, branch: DeadBranch | None, why: str) -> SublayerRecord:
    """Return a record whose attention and gradient are missing, with the reason."""
    notes = dict(record.notes)
    if record.kind == "attention":
        notes["attention"] = why
    notes["gradient_norm"] = why
    return replace(record, attention=None, gradient_norm=None, dead_branch=branch, notes=notes)


def _with_flow(
    record: SublayerRecord, profile: GradientProfile, branch: DeadBranch | None
) -> SublayerRecord:
    """Return a record with attention, the gradient norm of its parameters, and a dead branch."""
    notes = dict(record.notes)

    # 1. Attention.
    attention = profile.attention.get(str(record.index))
    if attention is None and record.kind == "attention":
        unseen = "no call of scaled_dot_product_attention or softmax over scores was recorded in it"
        notes["attention"] = profile.why.get(f"attention {record.index}", unseen)

    # 2. The gradient of the parameters.
    gradient = _joint_norm(record.parameters, profile.parameters or {})
    if gradient is None:
        unmeasured = "its parameters have no gradient"
        notes["gradient_norm"] = profile.why.get("parameters", unmeasured)
    return replace(
        record, attention=attention, gradient_norm=gradient, dead_branch=branch, notes=notes
    )


def _joint_norm(names: Iterable[str], gradients: Mapping[str, float]) -> float | None:
    """Return the joint norm of the gradients that were measured; None if none was."""
    squares = []
    for name in names:
        if name in gradients:
            squares.append(gradients[name] ** 2)

    if not squares:
        return None
    return math.sqrt(sum(squares))


def _residual_of(records: Sequence[SublayerRecord], members: Sequence[int]) -> float | None:
    """Return the residual norm at one shortcut; None if it was not measured to its width.

    Args:
        records: of all sub-layers.
        members: indices of those on the shortcut; several are parallel branches.
    """
    record = records[members[0]]
    interval = record.residual_norm
    if len(members) > 1:
        interval = record.joint_residual_norm

    # A product of wide intervals would say nothing.
    if interval is None:
        return None
    if not interval.converged:
        return None

    return interval.estimate


def _exponent(first: float, last: float, layers: int) -> float | None:
    """Return the growth from one norm to another for each layer; None if there is none."""
    if layers <= 0:
        return None

    # Neither 0 nor infinity nor NaN has a logarithm.
    have_logarithms = 0 < first < math.inf and 0 < last < math.inf
    if not have_logarithms:
        return None

    return math.log(last / first) / layers
