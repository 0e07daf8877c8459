"""Figures of the whole network: the gradient at every depth, the end-to-end map, growth, and the
check of replay.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jacdiag.measure.gradients import GradientProfile, end_of
from jacdiag.records.report import PRODUCT_ALONE, Growth, Interval, NetworkRecord, SublayerRecord
from jacdiag.records.signal_propagation import (
    BackwardRecord,
    CutShortcut,
    DeadBranch,
    DeadPath,
    ForwardRecord,
)
from jacdiag.spectra import JacobianOperator, independent_dims, top_singular
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.detached import cut_additions
from jacdiag.trace.execution.tap import Spot, Where

_ASKED = 2  # sub-layers that are asked what they mix: attention and FFN, mostly


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t.detach().double()))


def end_to_end(
    sites: Sites, tol: float, confidence: float, max_products: int, seed: int
) -> Interval | None:
    """Spectral norm of d y_N / d x_1 over the main stream, by Lanczos on the chain itself."""
    groups = [sites.streams.groups[k] for k in sites.streams.main]
    if not groups:
        return None
    source = sites.replayer.spot_of(groups[0].shortcut, 0)
    segment = sites.replayer.segment(0, source, sites.replayer.spot_of(end_of(sites), 0))
    first = sites[groups[0].sites[0]]
    generator = torch.Generator().manual_seed(seed)
    with sites.replayer.whole_graph():
        operator = JacobianOperator(segment, first.shortcut, batch_dims=())
    dims = _trivially_independent([sites[k] for group in groups for k in group.sites])
    if dims is None or not _keeps(dims, operator.value.shape):
        dims = independent_dims(
            operator.pull_shaped,
            first.shortcut.shape,
            operator.value.shape,
            first.feature_dim,
            first.shortcut.dtype,
            first.shortcut.device,
            generator,
        )
    operator.set_batch_dims(dims)
    solution = top_singular(
        operator, tol=tol, confidence=confidence, max_products=max_products, generator=generator
    )
    interval = solution.interval()
    operator.release()
    return interval


def _trivially_independent(members: Sequence[Sublayer]) -> tuple[int, ...] | None:
    """The dimensions of size 1, where the first sub-layers leave no others; None where the chain
    itself must be asked.

    What a sub-layer mixes, the chain is taken to mix: that is always safe, and asking the chain
    costs two products with all of it.
    """
    shape = members[0].shortcut.shape
    ones = tuple(d for d in range(len(shape)) if shape[d] == 1)
    for site in members[:_ASKED]:
        if site.shortcut.shape == shape and set(site.independent(keep=False)) <= set(ones):
            return ones
    return None


def _keeps(dims: tuple[int, ...], shape: torch.Size) -> bool:
    """Whether dimensions of size 1 have size 1 at the stream's end too: some models flatten in
    between.
    """
    return all(d < len(shape) and shape[d] == 1 for d in dims)


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
    """Puts the network's figures together.

    Growth exponents are ln(last / first) / layers: of activations from the first shortcut to the
    stream's end, of gradients from the stream's end down to the first shortcut, so that both are
    positive where things grow.
    """
    factors = [_residual_of(records, sites.streams.groups[k].sites) for k in sites.streams.main]
    known = [f for f in factors if f is not None]
    if len(known) < len(factors):
        notes = {"gain_product_log": "not every residual norm was measured to its width"} | notes
    log = (
        sum(math.log(f) if f > 0 else -math.inf for f in known)
        if factors and len(known) == len(factors)
        else None
    )
    if log is not None and whole is None:
        notes = {**notes, "gain_product_log": PRODUCT_ALONE}
    predicted = growth = None
    if profile is not None:
        if len(known) == len(factors):
            predicted = [profile.norms[-1]]
            for factor in reversed(known):
                predicted.insert(0, predicted[0] * factor)
        growth = Growth(
            _exponent(profile.activations[0], profile.activations[-1], layers)
            if profile.activations
            else None,
            _exponent(profile.norms[-1], profile.norms[0], layers),
        )
    return NetworkRecord(
        gain_product_log=log,
        end_to_end=whole,
        gradient_norms=profile.norms if profile else None,
        predicted_gradient_norms=predicted,
        growth=growth or Growth(),
        loss={"kind": profile.kind, "value": profile.loss} if profile else None,
        forward=forward,
        backward=backward,
        notes=notes,
    )


def backward_record(
    sites: Sites,
    profile: GradientProfile | None,
    dead: list[DeadPath] | None,
    notes: dict[str, str],
) -> BackwardRecord:
    """Compare the embedding's gradient with those of the other matrices; list what is dead or not
    finite.

    Args:
        sites: of one recorded forward.
        profile: None if it was not measured.
        dead: from `find_dead_paths`.
        notes: field -> why it is missing.
    """
    return replace(
        _backward_record(sites, profile, dead, notes), cut_shortcuts=_cut_shortcuts(sites)
    )


def _cut_shortcuts(sites: Sites) -> list[CutShortcut]:
    """Return the additions whose shortcut was detached; a detached branch is a part without a
    gradient.
    """
    return [
        CutShortcut(cut.module or cut.line, f"detach in {cut.line}")
        for cut in cut_additions(sites.graph, sites.finder)
        if cut.operand == "shortcut"
    ]


def _backward_record(
    sites: Sites,
    profile: GradientProfile | None,
    dead: list[DeadPath] | None,
    notes: dict[str, str],
) -> BackwardRecord:
    if profile is None:
        return BackwardRecord(notes=notes)
    if dead is None and "dead" not in notes:
        notes = {
            **notes,
            "dead": "the record does not show that the loss depends on the residual stream",
        }
    points = [sites[sites.streams.groups[k].sites[0]].name for k in sites.streams.main]
    places = [*(f"the stream at {name}" for name in points), "the stream's end"]
    broken = [
        place
        for place, value in zip(places, profile.norms, strict=False)
        if not math.isfinite(value)
    ]
    gradients = profile.parameters
    if gradients is None:
        why = profile.why.get("parameters", "no gradient of a parameter was measured")
        missing = dict.fromkeys(("embedding_norm", "others_median"), why)
        return BackwardRecord(dead=dead, not_finite=broken, notes={**missing, **notes})

    broken += [name for name, value in gradients.items() if not math.isfinite(value)]
    outlines = sites.skeleton.outlines
    # The embedding is the table that token ids pick from; positions come second.
    tables = [
        name for name in sites.coverage.embedding if name in gradients and outlines[name].dim() >= 2
    ]
    if not tables:
        missing = dict.fromkeys(
            ("embedding_norm", "others_median"), "no embedding lies before the first sub-layer"
        )
        return BackwardRecord(dead=dead, not_finite=broken, notes={**missing, **notes})
    by_ids = _tables_read_by_ids(sites)
    table = max(tables, key=lambda name: (name in by_ids, outlines[name].numel()))
    # Matrices without a gradient (experts without tokens) would lower the median.
    others = [
        value
        for name, value in gradients.items()
        if name not in tables and outlines[name].dim() >= 2 and value > 0 and math.isfinite(value)
    ]
    median = statistics.median(others) if others else None
    if median is None:
        notes = {**notes, "others_median": "no other matrix has a gradient"}
    return BackwardRecord(table, gradients[table], median, dead, broken, notes)


def _tables_read_by_ids(sites: Sites) -> set[str]:
    """Return the embeddings whose rows the input picks; positions are picked by constants."""
    graph = sites.graph
    picked = [node.index for node in graph.nodes if node.name == "embedding"]
    live = [
        node
        for node in picked
        if any(graph.values[value].live for value in graph.nodes[node].inputs)
    ]
    return set(parameters_of(graph, live, sites.skeleton))


def with_flow(
    records: Sequence[SublayerRecord],
    profile: GradientProfile | None,
    branches: Mapping[int, DeadBranch],
    notes: Mapping[str, str],
) -> list[SublayerRecord]:
    """Return the records with attention figures, gradient norms of parameters, and branches that
    are zero.

    Args:
        records: of sub-layers.
        profile: None if it was not measured.
        branches: from `find_dead_branches`.
        notes: why the profile is missing: the note of "gradient_norms" counts.
    """
    missing = (
        notes.get("gradient_norms") or notes.get("end_to_end") or "the model was not run backward"
    )
    return [_with_flow(record, profile, branches.get(record.index), missing) for record in records]


def _with_flow(
    record: SublayerRecord, profile: GradientProfile | None, branch: DeadBranch | None, missing: str
) -> SublayerRecord:
    notes = dict(record.notes)
    attention = None
    gradient = None
    if profile is not None:
        attention = profile.attention.get(str(record.index))
        if profile.parameters is not None:
            squares = [
                profile.parameters[name] ** 2
                for name in record.parameters
                if name in profile.parameters
            ]
            gradient = math.sqrt(sum(squares)) if squares else None
    if attention is None and record.kind == "attention":
        unseen = "no call of scaled_dot_product_attention or softmax over scores was recorded in it"
        reason = unseen if profile is not None else missing
        notes["attention"] = (
            reason if profile is None else profile.why.get(f"attention {record.index}", reason)
        )
    if gradient is None:
        none = "its parameters have no gradient" if profile is not None else missing
        notes["gradient_norm"] = none if profile is None else profile.why.get("parameters", none)
    return replace(
        record, attention=attention, gradient_norm=gradient, dead_branch=branch, notes=notes
    )


def _residual_of(records: Sequence[SublayerRecord], members: Sequence[int]) -> float | None:
    record = records[members[0]]
    interval = record.joint_residual_norm if len(members) > 1 else record.residual_norm
    return None if interval is None or not interval.converged else interval.estimate


def _exponent(first: float, last: float, layers: int) -> float | None:
    if not (first > 0 and last > 0 and layers > 0 and math.isfinite(first) and math.isfinite(last)):
        return None
    return math.log(last / first) / layers


def verify_replay(
    sites: Sites, seed: int = 0, only: Collection[int] | None = None
) -> dict[str, float]:
    """Compares J^T w of every branch with that of a whole-model re-run; returns the relative error
    by name.

    In the whole-model run each shortcut is a tensor to differentiate by, so that one forward and
    one backward through each branch suffice. A recorded cache, or a value that reaches the branch
    past its shortcut, shows here alone.

    Args:
        sites: of one recorded forward.
        seed: of the cotangents; each sub-layer has its own.
        only: indices of the sub-layers to look at; all if not given.
    """
    chosen = [k for k, site in enumerate(sites) if not site.nested and (only is None or k in only)]
    if not chosen:
        return {}
    raw = sites.raw
    leaves: dict[int, Tensor] = {}
    pulled: dict[int, Tensor] = {}
    cut_off: set[int] = set()  # branches that the model runs under no_grad
    cuts = {raw[k].shortcut: sites.replayer.spot_of(raw[k].shortcut, 0) for k in chosen}
    terms = {k: sites.replayer.end_of(raw[k], 0) for k in chosen}
    keys: dict[int, tuple[str, int]] = {id(s): ("cut", v) for v, s in cuts.items()}
    keys |= {id(s): ("term", k) for k, s in terms.items()}

    def visit(spot: Spot, tensor: Tensor) -> Tensor:
        kind, key = keys[id(spot)]
        if kind == "term":  # at once: code that adds in place spoils the graph a moment later
            leaf = leaves.get(raw[key].shortcut)
            if leaf is not None and (key not in pulled or key in cut_off):
                pulled[key] = _pull(
                    tensor, leaf, _cotangent(sites[key], seed).reshape(tensor.shape)
                )
                (cut_off.discard if tensor.requires_grad else cut_off.add)(key)
            return tensor
        # A shortcut may lie on another's way into its branch (a norm of the stream with a branch of
        # its own).
        leaves[key] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return leaves[key].clone()

    replaced: dict[int, Tensor] = {}
    for value, spot in cuts.items():
        if spot.where is Where.ARGUMENT:
            leaves[value] = sites.replayer.calls[0].tensors[value].detach().clone().requires_grad_()
            replaced[value] = leaves[value]
    spots = [s for s in (*cuts.values(), *terms.values()) if s.where is not Where.ARGUMENT]
    with torch.enable_grad(), sites.replayer.whole_graph():
        sites.replayer.tapped(spots, visit, replaced=replaced)
        if cut_off:
            sites.replayer.tapped(spots, visit, replaced=replaced, grad=True)
    errors = {}
    for k in chosen:
        site, mine = sites[k], pulled.get(k)
        errors[site.name] = (
            math.inf if mine is None else _relative(mine, _own_pull(site, _cotangent(site, seed)))
        )
    return errors


def _cotangent(site: Sublayer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + site.index)
    return torch.randn(site.value.shape, generator=generator, dtype=torch.float64).to(site.value)


def _pull(value: Tensor, leaf: Tensor, w: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (g,) = torch.autograd.grad(value, leaf, w, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if g is None else g


def _own_pull(site: Any, w: Tensor) -> Tensor:
    with torch.enable_grad():
        x = site.shortcut.detach().clone().requires_grad_()
        return _pull(site.branch(x), x, w.reshape(site.value.shape))


def _relative(a: Tensor, b: Tensor) -> float:
    scale = max(_norm(a), _norm(b))
    return _norm(a - b) / scale if scale > 0 else 0.0
