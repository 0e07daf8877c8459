"""Measure the entire network: gradients over depth, the end-to-end map, growth, and replay."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.devices.packed_download import download
from jacdiag.measure.gradients import GradientProfile, end_of
from jacdiag.measure.linearization import Linearised
from jacdiag.records.report import PRODUCT_ALONE, Growth, Interval, NetworkRecord, SublayerRecord
from jacdiag.records.signal_propagation import (
    BackwardRecord,
    CutShortcut,
    DeadBranch,
    DeadPath,
    ForwardRecord,
)
from jacdiag.spectra import JacobianOperator, independent_dims, top_singular
from jacdiag.spectra.operator import draw_cotangents, flat, shaped
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.detached import cut_additions
from jacdiag.trace.discovery.independence import independent_between
from jacdiag.trace.execution.tap import Spot, Where

# The largest relative error of J^T w of a branch that is run alone.
REPLAY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_BEYOND_ROUNDING = 0.01
_SAMPLED = 2  # sub-layers whose independent dimensions are looked at: attention and FFN, mostly


def _norm(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm in float64."""
    size: Tensor = torch.linalg.vector_norm(in_float64(tensor.detach()))
    return size


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

    # 3. Its norm.
    solution = top_singular(
        operator, tol=tol, confidence=confidence, max_products=max_products, generator=generator
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
    dims = independent_between(sites.graph, shortcut, end_of(sites), first.feature_dim)
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
    record = NetworkRecord(
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
    if factors is not None:
        predicted = _predicted_norms(profile.norms[-1], factors)

    # 3. Growth over depth.
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


def verify_replay(
    sites: Sites, seed: int = 0, only: Collection[int] | None = None
) -> dict[str, float]:
    """Compare J^T w of every branch with that of a re-run of the entire model.

    Args:
        sites: of one recorded forward.
        seed: of the cotangents; each sub-layer has its own.
        only: indices of the sub-layers to look at; all if not given.

    Returns:
        Name of each sub-layer -> relative error.
    """
    return ReplayCheck(sites, seed, only).finish()


class ReplayCheck:
    """Compares J^T w of every branch with that of a re-run of the entire model.

    In the run of the model each shortcut is a tensor to differentiate by, so that one forward and
    one backward through each branch suffice. A recorded cache, or a value that reaches the branch
    past its shortcut, shows here alone. A branch that is linearised for its norms is compared by
    that Jacobian. If it is not, or if that rounds otherwise, the branch is run by itself.

    Args:
        sites: of one recorded forward.
        seed: of the cotangents; each sub-layer has its own.
        only: indices of the sub-layers to look at; all if not given.
    """

    def __init__(self, sites: Sites, seed: int = 0, only: Collection[int] | None = None) -> None:
        self._sites = sites
        self._seed = seed
        self._errors: dict[str, float] = {}

        # 1. A nested sub-layer is part of another one.
        chosen = [index for index, site in enumerate(sites) if not site.nested]
        if only is not None:
            chosen = [index for index in chosen if index in only]
        self._waiting = dict.fromkeys(chosen)
        self._pulled: dict[int, Tensor] = {}
        if not chosen:
            return

        # 2. Run the model, and again with gradients for the branches that it runs under no_grad.
        pulls = _ModelPulls(sites, chosen, seed)
        with torch.enable_grad(), sites.replayer.whole_graph():
            pulls.run()
            if pulls.cut_off:
                pulls.run(grad=True)
        self._pulled = pulls.pulled

    def compare(self, linearised: Linearised) -> None:
        """Compare the Jacobian of a branch that was linearised, which takes one product."""
        site = linearised.site
        expected = self._pulled.get(site.index)
        if expected is None or site.index not in self._waiting:
            return

        # 1. The norm at its beginning is in closed form there, which rounds otherwise.
        cotangent = _cotangent(site, self._seed)
        rows = linearised.branch.pull(flat(cotangent, linearised.dims))
        pulled = shaped(rows, linearised.dims, site.shortcut.shape)
        error = _relative(expected, pulled)

        # 2. More than rounding is an error of what is measured, whatever the branch itself gives.
        is_same = error <= REPLAY_TOLERANCE[self._sites.dtype]
        is_wrong = not error <= _BEYOND_ROUNDING
        if is_same or is_wrong:
            self._note(site, error)

    def finish(self) -> dict[str, float]:
        """Compare the branches that are left; return name of each sub-layer -> relative error."""
        for index in list(self._waiting):
            site = self._sites[index]
            expected = self._pulled.get(index)
            error = math.inf  # the run of the model did not meet it
            if expected is not None:
                error = _relative(expected, _own_pull(site, _cotangent(site, self._seed)))
            self._note(site, error)
        return self._errors

    def _note(self, site: Sublayer, error: float) -> None:
        """Note the error of a sub-layer, which need not be looked at again."""
        self._errors[site.name] = error
        self._pulled.pop(site.index, None)
        del self._waiting[site.index]


class _ModelPulls:
    """J^T w of branches in a run of the entire model.

    Attributes:
        pulled: index of a sub-layer -> its J^T w.
        cut_off: sub-layers that the model runs under no_grad.
    """

    def __init__(self, sites: Sites, chosen: Sequence[int], seed: int) -> None:
        self.sites = sites
        self.seed = seed
        self.pulled: dict[int, Tensor] = {}
        self.cut_off: set[int] = set()
        self._leaves: dict[int, Tensor] = {}  # by value index of the shortcut

        # 1. The points to stop at: shortcuts by value index, ends of branches by sub-layer.
        replayer = sites.replayer
        shortcuts = [sites.raw[index].shortcut for index in chosen]
        self._starts = {value: replayer.spot_of(value, 0) for value in shortcuts}
        self._ends = {index: replayer.end_of(sites.raw[index], 0) for index in chosen}
        self._value_of = {id(spot): value for value, spot in self._starts.items()}
        self._sublayer_of = {id(spot): index for index, spot in self._ends.items()}

        # 2. Shortcuts that are inputs of the model are replaced before it runs.
        self._replaced: dict[int, Tensor] = {}
        for value, spot in self._starts.items():
            if spot.where is Where.ARGUMENT:
                leaf = replayer.calls[0].tensors[value].detach().clone().requires_grad_()
                self._leaves[value] = leaf
                self._replaced[value] = leaf

    def run(self, grad: bool = False) -> None:
        """Run the model once; `grad` is that of `Replayer.tapped`."""
        spots = []
        for spot in (*self._starts.values(), *self._ends.values()):
            # Inputs of the model are replaced, and not met.
            is_input = spot.where is Where.ARGUMENT
            if not is_input:
                spots.append(spot)

        self.sites.replayer.tapped(spots, self._visit, replaced=self._replaced, grad=grad)

    def _visit(self, spot: Spot, tensor: Tensor) -> Tensor:
        """Pull back from the end of a branch, and put a leaf in the place of a shortcut."""
        index = self._sublayer_of.get(id(spot))
        if index is not None:
            # At once: code that adds in place spoils the graph a moment later.
            self._pull_back(index, tensor)
            return tensor

        # A shortcut may lie on another's way into its branch (a norm of the stream with a branch of
        # its own).
        value = self._value_of[id(spot)]
        leaf = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        self._leaves[value] = leaf
        return leaf.clone()

    def _pull_back(self, index: int, term: Tensor) -> None:
        """Pull the cotangent of one branch back to its shortcut."""
        # 1. A second run is for the branches alone that the first one cut off.
        leaf = self._leaves.get(self.sites.raw[index].shortcut)
        is_done = index in self.pulled and index not in self.cut_off
        if leaf is None or is_done:
            return

        # 2. The pull, and whether the branch ran under no_grad.
        cotangent = _cotangent(self.sites[index], self.seed).reshape(term.shape)
        self.pulled[index] = _pull(term, leaf, cotangent)
        if term.requires_grad:
            self.cut_off.discard(index)
        else:
            self.cut_off.add(index)


def _cotangent(site: Sublayer, seed: int) -> Tensor:
    """Return a random cotangent of a branch, the same in both runs."""
    generator = torch.Generator().manual_seed(seed + site.index)
    return torch.randn(site.value.shape, generator=generator, dtype=torch.float64).to(site.value)


def _pull(value: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    """Return J^T w of the map from a leaf to a value; zeros if the value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)

    (gradient,) = torch.autograd.grad(value, leaf, cotangent, retain_graph=True, allow_unused=True)
    # Something else has a gradient.
    if gradient is None:
        return torch.zeros_like(leaf)

    return gradient


def _own_pull(site: Any, cotangent: Tensor) -> Tensor:
    """Return J^T w of a branch that is run by itself."""
    with torch.enable_grad():
        x = site.shortcut.detach().clone().requires_grad_()
        return _pull(site.branch(x), x, cotangent.reshape(site.value.shape))


def _relative(a: Tensor, b: Tensor) -> float:
    """Return the norm of a difference, over the larger of the two norms."""
    numbers = download([_norm(a), _norm(b), _norm(a - b)])
    first, second, difference = (float(number) for number in numbers)
    scale = max(first, second)
    has_scale = scale > 0
    if not has_scale:
        return 0.0

    return difference / scale
