"""Figures of the whole network: the gradient at every depth, the end-to-end map, growth, and the check of replay."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jacdiag.errors import MeasureError
from jacdiag.report.record import Record
from jacdiag.report.schema import PRODUCT_ALONE, Growth, Interval, NetworkRecord, SublayerRecord
from jacdiag.spectra import JacobianOperator, independent_dims, top_singular
from jacdiag.trace import Sites, Sublayer
from jacdiag.trace.tap import Spot, Where
from jacdiag.trace.tensors import collect_deep

_ASKED = 2  # sub-layers that are asked what they mix: attention and FFN, mostly


@dataclass(frozen=True)
class GradientProfile(Record):
    """Norm of dL/dx along the main stream (first shortcut first, the stream's end last), from one backward."""

    norms: list[float]
    activations: list[float]
    kind: str
    loss: float


def language_model_loss(output: Any, token_ids: Tensor | None, seed: int = 0) -> tuple[Tensor, str]:
    """Returns a scalar loss and what it is.

    Next-token cross entropy where the output holds logits over a vocabulary for (B, T) token ids; for a model that
    gives logits of the last position only, cross entropy against random tokens; else a random linear functional.
    """
    logits = _logits(output)
    if logits is None:
        raise MeasureError("the model's output holds no floating tensor: it has no loss")
    generator = torch.Generator().manual_seed(seed)
    if token_ids is not None and logits.dim() == 3 and logits.shape[0] == token_ids.shape[0]:
        if logits.shape[1] == token_ids.shape[1] > 1 and int(token_ids.max()) < logits.shape[2]:
            targets = token_ids[:, 1:].reshape(-1).to(logits.device).long()
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets), "next-token cross entropy"
        if logits.shape[1] == 1:
            targets = torch.randint(logits.shape[2], (logits.shape[0],), generator=generator).to(logits.device)
            return torch.nn.functional.cross_entropy(logits[:, 0], targets), "cross entropy of the last position"
    weight = torch.randn(logits.shape, generator=generator).to(logits)
    return (weight * logits).sum() / logits.numel() ** 0.5, "random linear functional of the output"


def _logits(output: Any) -> Tensor | None:
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    found: list[Tensor] = []
    collect_deep(output, found)
    return next((t for t in found if t.is_floating_point() and t.dim() >= 1), None)


def gradient_profile(sites: Sites, token_ids: Tensor | None) -> GradientProfile | None:
    """Runs the model forward and backward once and reads the gradient at each depth of the main stream."""
    groups = [sites.streams.groups[k] for k in sites.streams.main]
    if not groups:
        return None
    values = list(dict.fromkeys([*(g.shortcut for g in groups), _end_of(sites)]))
    met: dict[int, Tensor] = {}
    spots = {v: sites.replayer.spot_of(v, 0) for v in values}
    order = {id(spot): v for v, spot in spots.items()}
    first = values[0]

    def visit(spot: Spot, tensor: Tensor) -> Tensor:
        value = order[id(spot)]
        if value != first:
            met[value] = tensor
            return tensor
        met[value] = tensor.detach().requires_grad_()
        return met[value].clone()

    replaced: dict[int, Tensor] = {}
    if spots[first].where is Where.ARGUMENT:
        met[first] = sites.replayer.calls[0].tensors[first].detach().clone().requires_grad_()
        replaced[first] = met[first]
    results = [spot for spot in spots.values() if spot.where is not Where.ARGUMENT]
    with torch.enable_grad(), sites.replayer.whole_graph():
        output = sites.replayer.tapped(results, visit, replaced=replaced)
        loss, kind = language_model_loss(output, token_ids)
        held = [v for v in values if v in met and met[v].requires_grad]
        if not loss.requires_grad or not held:
            return None
        grads = torch.autograd.grad(loss, [met[v] for v in held], allow_unused=True)
    by_value = dict(zip(held, grads, strict=True))
    norms = [_norm(g) if (g := by_value.get(v)) is not None else math.nan for v in values]
    return GradientProfile(norms, [_norm(met[v].detach()) for v in values if v in met], kind, float(loss.detach()))


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t.detach().double()))


def end_to_end(sites: Sites, tol: float, confidence: float, max_products: int, seed: int) -> Interval | None:
    """Spectral norm of d y_N / d x_1 over the main stream, by Lanczos on the chain itself."""
    groups = [sites.streams.groups[k] for k in sites.streams.main]
    if not groups:
        return None
    source = sites.replayer.spot_of(groups[0].shortcut, 0)
    segment = sites.replayer.segment(0, source, sites.replayer.spot_of(_end_of(sites), 0))
    first = sites[groups[0].sites[0]]
    generator = torch.Generator().manual_seed(seed)
    with sites.replayer.whole_graph():
        operator = JacobianOperator(segment, first.shortcut, batch_dims=())
    dims = _trivially_independent([sites[k] for group in groups for k in group.sites])
    if dims is None or not _keeps(dims, operator.value.shape):
        dims = independent_dims(operator.pull_shaped, first.shortcut.shape, operator.value.shape, first.feature_dim,
                                first.shortcut.dtype, first.shortcut.device, generator)  # fmt: skip
    operator.set_batch_dims(dims)
    solution = top_singular(operator, tol=tol, confidence=confidence, max_products=max_products, generator=generator)
    interval = solution.interval()
    operator.release()
    return interval


def _trivially_independent(members: Sequence[Sublayer]) -> tuple[int, ...] | None:
    """The dimensions of size 1, where the first sub-layers leave no others; None where the chain itself must be asked.

    What a sub-layer mixes, the chain is taken to mix: that is always safe, and asking the chain costs two products
    with all of it.
    """
    shape = members[0].shortcut.shape
    ones = tuple(d for d in range(len(shape)) if shape[d] == 1)
    for site in members[:_ASKED]:
        if site.shortcut.shape == shape and set(site.independent(keep=False)) <= set(ones):
            return ones
    return None


def _keeps(dims: tuple[int, ...], shape: torch.Size) -> bool:
    """Whether dimensions of size 1 have size 1 at the stream's end too: some models flatten in between."""
    return all(d < len(shape) and shape[d] == 1 for d in dims)


def _end_of(sites: Sites) -> int:
    """The end of the main stream: the last sum, or the norm behind it for post-norm (a final norm is the head's)."""
    last = sites.streams.groups[sites.streams.main[-1]]
    return last.after if any(sites[k].post_norm is not None for k in last.sites) else last.output


def network_record(
    sites: Sites, records: Sequence[SublayerRecord], profile: GradientProfile | None, whole: Interval | None,
    layers: int, notes: dict[str, str],
) -> NetworkRecord:  # fmt: skip
    """Puts the network's figures together.

    Growth exponents are ln(last / first) / layers: of activations from the first shortcut to the stream's end, of
    gradients from the stream's end down to the first shortcut, so that both are positive where things grow.
    """
    factors = [_residual_of(records, sites.streams.groups[k].sites) for k in sites.streams.main]
    known = [f for f in factors if f is not None]
    if len(known) < len(factors):
        notes = {"gain_product_log": "not every residual norm was measured to its width"} | notes
    log = sum(math.log(f) if f > 0 else -math.inf for f in known) if factors and len(known) == len(factors) else None
    if log is not None and whole is None:
        notes = {**notes, "gain_product_log": PRODUCT_ALONE}
    predicted = growth = None
    if profile is not None:
        if len(known) == len(factors):
            predicted = [profile.norms[-1]]
            for factor in reversed(known):
                predicted.insert(0, predicted[0] * factor)
        growth = Growth(
            _exponent(profile.activations[0], profile.activations[-1], layers),
            _exponent(profile.norms[-1], profile.norms[0], layers),
        )
    return NetworkRecord(
        gain_product_log=log,
        end_to_end=whole,
        gradient_norms=profile.norms if profile else None,
        predicted_gradient_norms=predicted,
        growth=growth or Growth(),
        loss={"kind": profile.kind, "value": profile.loss} if profile else None,
        notes=notes,
    )


def _residual_of(records: Sequence[SublayerRecord], members: Sequence[int]) -> float | None:
    record = records[members[0]]
    interval = record.joint_residual_norm if len(members) > 1 else record.residual_norm
    return None if interval is None or not interval.converged else interval.estimate


def _exponent(first: float, last: float, layers: int) -> float | None:
    if not (first > 0 and last > 0 and layers > 0 and math.isfinite(first) and math.isfinite(last)):
        return None
    return math.log(last / first) / layers


def verify_replay(sites: Sites, seed: int = 0, only: Collection[int] | None = None) -> dict[str, float]:
    """Compares J^T w of every branch with that of a whole-model re-run; returns the relative error by name.

    In the whole-model run each shortcut is a tensor to differentiate by, so that one forward and one backward through
    each branch suffice. A recorded cache, or a value that reaches the branch past its shortcut, shows here alone.

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
                pulled[key] = _pull(tensor, leaf, _cotangent(sites[key], seed).reshape(tensor.shape))
                (cut_off.discard if tensor.requires_grad else cut_off.add)(key)
            return tensor
        # A shortcut may lie on another's way into its branch (a norm of the stream with a branch of its own).
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
        errors[site.name] = math.inf if mine is None else _relative(mine, _own_pull(site, _cotangent(site, seed)))
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
