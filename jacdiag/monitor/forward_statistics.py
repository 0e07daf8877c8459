"""Statistics of the probe's forward: activations, attention, routers and stable ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jacdiag.measure.attention import attention_records
from jacdiag.monitor.router_statistics import Routing, routing_of
from jacdiag.monitor.square_sums import square_sums
from jacdiag.records.signal_propagation import AttentionRecord
from jacdiag.trace import Sites


@dataclass(frozen=True, kw_only=True)
class ForwardFigures:
    """What one forward on the probe shows.

    Attributes:
        figures: figure -> sub-layer -> value, None where it could not be read. `shortcut_std` and
            `branch_std` are medians over tokens, `max_activation` the largest element of either.
            `logit` is the largest score that enters a softmax over visible keys,
            `attention_entropy` the mean entropy of attention as a share of uniform attention. For a
            mixture of experts: `router_entropy` (a share of log of the experts), `router_imbalance`
            (the largest load over the mean) and `unused_experts` (without a token of the probe).
        heads: sub-layer -> the largest score of each head.
        experts: sub-layer -> each expert's share of the choices.
    """

    figures: dict[str, dict[str, float | None]]
    heads: dict[str, list[float]] = field(default_factory=dict)
    experts: dict[str, list[float]] = field(default_factory=dict)


def forward_figures(sites: Sites) -> ForwardFigures:
    """Measure what the probe's forward shows of every sub-layer."""
    # 1. One number for each sub-layer.
    figures = _size_figures(sites)
    attention = attention_records(sites)
    figures |= _attention_figures(sites, attention)
    routing = routing_of(sites)
    figures |= _router_figures(routing)

    # 2. One for each head, and for each expert.
    heads: dict[str, list[float]] = {}
    for name, record in attention.items():
        if record.head_logits:
            heads[name] = record.head_logits
    experts = {name: router.load for name, router in routing.items()}
    return ForwardFigures(figures=figures, heads=heads, experts=experts)


def _size_figures(sites: Sites) -> dict[str, dict[str, float | None]]:
    """Measure the sizes of shortcuts and branches."""
    shortcut_std: dict[str, float | None] = {}
    branch_std: dict[str, float | None] = {}
    max_activation: dict[str, float | None] = {}
    for site in sites:
        # 1. The standard deviations. A branch that is broadcast has none.
        shortcut, branch = site.shortcut.detach(), site.value.detach()
        shortcut_std[site.name] = _median_std(shortcut, site.feature_dim)
        branch_std[site.name] = None
        if branch.shape == shortcut.shape:
            branch_std[site.name] = _median_std(branch, site.feature_dim)

        # 2. The largest element.
        largest = torch.maximum(shortcut.abs().max(), branch.abs().max())
        max_activation[site.name] = float(largest)
    return {
        "shortcut_std": shortcut_std,
        "branch_std": branch_std,
        "max_activation": max_activation,
    }


def _attention_figures(
    sites: Sites, attention: Mapping[str, AttentionRecord]
) -> dict[str, dict[str, float | None]]:
    """Return the logits and the entropy of each attention; None if they could not be read."""
    logits: dict[str, float | None] = {}
    entropies: dict[str, float | None] = {}
    for site in sites:
        if site.kind != "attention":
            continue
        logits[site.name] = None
        entropies[site.name] = None
        record = attention.get(site.name)
        if record is not None:
            logits[site.name] = record.max_logit
            entropies[site.name] = record.entropy_share
    return {"logit": logits, "attention_entropy": entropies}


def _router_figures(routing: Mapping[str, Routing]) -> dict[str, dict[str, float | None]]:
    """Return how the routers choose; empty if the model has none."""
    if not routing:
        return {}
    entropies: dict[str, float | None] = {}
    imbalances: dict[str, float | None] = {}
    unused: dict[str, float | None] = {}
    for name, router in routing.items():
        entropies[name] = router.entropy
        imbalances[name] = router.imbalance
        unused[name] = float(router.unused)
    return {
        "router_entropy": entropies,
        "router_imbalance": imbalances,
        "unused_experts": unused,
    }


def _median_std(x: Tensor, feature_dim: int) -> float:
    """Return the standard deviation over the features, as a median over tokens."""
    return float(x.float().std(dim=feature_dim, correction=0).median())


def _matrices_of(sites: Sites) -> list[str]:
    """Return the names of the matrices that the sub-layers multiply by, each once."""
    outlines = sites.skeleton.outlines
    names: dict[str, None] = {}  # a set that keeps its order
    for site in sites:
        for name in site.products:
            if outlines[name].dim() == 2:
                names[name] = None
    return list(names)


class StableRanks:
    """Stable ranks |W|_F^2 / |W|_2^2 of the matrices of all sub-layers.

    |W|_2 comes from power iteration that goes on from the vectors of the last look.

    Attributes:
        tops: name of a weight -> its top right singular vector so far.
    """

    def __init__(self) -> None:
        """Begin without vectors."""
        self.tops: dict[str, Tensor] = {}

    def look(self, sites: Sites) -> dict[str, float]:
        """Return the stable rank of each matrix by its name, without those that are not finite."""
        params = sites.skeleton.params
        ranks: dict[str, float] = {}
        # One matrix at a time: they may not all be in memory.
        for name in _matrices_of(sites):
            weight = params[name].detach()
            square = float(square_sums([weight]))
            top = self._spectral_norm(name, weight)

            # A matrix of zeros has no rank to speak of, and one that is not finite has none.
            is_known = top > 0 and math.isfinite(square)
            if is_known:
                ranks[name] = square / top**2
        return ranks

    def _spectral_norm(self, name: str, weight: Tensor) -> float:
        """Estimate the spectral norm by a few rounds of power iteration."""
        # 1. Go on from the last vector. A random one needs more rounds.
        vector = self.tops.get(name)
        rounds = 2
        if vector is None or vector.shape[0] != weight.shape[1]:
            generator = torch.Generator().manual_seed(0)
            vector = torch.randn(weight.shape[1], generator=generator).to(weight)
            rounds = 12

        # 2. Power iteration. The norm of a zero matrix is not divided by.
        smallest = torch.finfo(weight.dtype).tiny
        size = weight.new_zeros(())
        for _ in range(rounds):
            image = weight @ (vector / vector.norm().clamp_min(smallest))
            size = image.norm()
            vector = weight.T @ image
        self.tops[name] = vector / vector.norm().clamp_min(smallest)
        return float(size)
