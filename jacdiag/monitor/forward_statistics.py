"""Figures of the probe's forward: sizes of shortcut and branch, activations, attention, routers,
stable ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jacdiag.measure.attention import attention_records
from jacdiag.monitor.router_statistics import routing_of
from jacdiag.monitor.square_sums import square_sums
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
    figures: dict[str, dict[str, float | None]] = {
        "shortcut_std": {},
        "branch_std": {},
        "max_activation": {},
    }
    # 1. Sizes.
    for site in sites:
        x, f = site.shortcut.detach(), site.value.detach()
        figures["shortcut_std"][site.name] = _spread(x, site.feature_dim)
        figures["branch_std"][site.name] = (
            _spread(f, site.feature_dim) if f.shape == x.shape else None
        )
        figures["max_activation"][site.name] = float(torch.maximum(x.abs().max(), f.abs().max()))

    # 2. Attention.
    attention = attention_records(sites)
    names = [site.name for site in sites if site.kind == "attention"]
    figures["logit"] = {
        name: attention[name].max_logit if name in attention else None for name in names
    }
    shares = {name: record.entropy_share for name, record in attention.items()}
    figures["attention_entropy"] = {name: shares.get(name) for name in names}
    heads = {name: record.head_logits for name, record in attention.items() if record.head_logits}

    # 3. Routers.
    routing = routing_of(sites)
    if routing:
        figures["router_entropy"] = {name: router.entropy for name, router in routing.items()}
        figures["router_imbalance"] = {name: router.imbalance for name, router in routing.items()}
        figures["unused_experts"] = {name: float(router.unused) for name, router in routing.items()}
    experts = {name: router.load for name, router in routing.items()}
    return ForwardFigures(figures=figures, heads=heads, experts=experts)


def _spread(x: Tensor, feature_dim: int) -> float:
    return float(x.float().std(dim=feature_dim, correction=0).median())


class StableRanks:
    """|W|_F^2 / |W|_2^2 of the matrices of all sub-layers; |W|_2 by power iteration that goes on
    where it was.
    """

    def __init__(self) -> None:
        self.tops: dict[str, Tensor] = {}

    def look(self, sites: Sites) -> dict[str, float]:
        params, outlines = sites.skeleton.params, sites.skeleton.outlines
        names = [
            n for n in dict.fromkeys(n for s in sites for n in s.products) if outlines[n].dim() == 2
        ]
        found = {}
        for name in names:  # one matrix at a time: they may not all be in memory
            w = params[name].detach()
            square, top = float(square_sums([w])), self._top(name, w)
            if top > 0 and math.isfinite(square):
                found[name] = square / top**2
        return found

    def _top(self, name: str, w: Tensor) -> float:
        v = self.tops.get(name)
        rounds = 2
        if v is None or v.shape[0] != w.shape[1]:
            generator = torch.Generator().manual_seed(0)
            v, rounds = torch.randn(w.shape[1], generator=generator).to(w), 12
        size = w.new_zeros(())
        for _ in range(rounds):
            u = w @ (v / v.norm().clamp_min(torch.finfo(w.dtype).tiny))
            size = u.norm()
            v = w.T @ u
        self.tops[name] = v / v.norm().clamp_min(torch.finfo(w.dtype).tiny)
        return float(size)
