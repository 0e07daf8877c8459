"""Figures of the probe's forward: sizes of shortcut and branch, largest activation, attention logits, stable ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jacdiag.trace import Sites
from jacdiag.trace.tap import Spot, Where
from jacdiag.watching.norms import square_sums

_ATTENTION = "scaled_dot_product_attention"


def forward_figures(sites: Sites) -> dict[str, dict[str, float | None]]:
    """Returns figure -> sub-layer -> value.

    `shortcut_std` and `branch_std` are medians over tokens, `max_activation` the largest element of either. `logit` is
    the largest q k / sqrt(d_head) over heads, queries and keys (those behind a causal mask included), or the largest
    element that a softmax of the branch reads; null where a kernel hides it.
    """
    found: dict[str, dict[str, float | None]] = {"shortcut_std": {}, "branch_std": {}, "max_activation": {}}
    for site in sites:
        x, f = site.shortcut.detach(), site.value.detach()
        found["shortcut_std"][site.name] = _spread(x, site.feature_dim)
        found["branch_std"][site.name] = _spread(f, site.feature_dim) if f.shape == x.shape else None
        found["max_activation"][site.name] = float(torch.maximum(x.abs().max(), f.abs().max()))
    found["logit"] = dict(attention_logits(sites))
    return found


def _spread(x: Tensor, feature_dim: int) -> float:
    return float(x.float().std(dim=feature_dim, correction=0).median())


def attention_logits(sites: Sites) -> dict[str, float | None]:
    """The largest attention logit of every attention sub-layer, from one more run of the model."""
    wanted: dict[Spot, tuple[str, str]] = {}
    for site, raw in zip(sites, sites.raw, strict=True):
        if site.kind != "attention":
            continue
        for index in raw.cone:
            node = sites.graph.nodes[index]
            if node.name == _ATTENTION:
                for position, what in ((0, "query"), (1, "key")):
                    wanted[sites.replayer.spot_at(Where.OPERAND, index, 0, position)] = (site.name, what)
            elif node.name == "softmax":
                wanted[sites.replayer.spot_at(Where.OPERAND, index, 0)] = (site.name, "logits")
    found: dict[str, float | None] = {site.name: None for site in sites if site.kind == "attention"}
    queries: dict[str, Tensor] = {}

    def visit(spot: Spot, tensor: Tensor) -> Tensor:
        name, what = wanted[spot]
        with torch._C.DisableTorchFunction():
            if what == "query":
                queries[name] = tensor
                return tensor
            top = _largest(tensor) if what == "logits" else _product(queries.pop(name), tensor)
            found[name] = max(top, found[name] or -math.inf)
        return tensor

    if wanted:
        with torch.no_grad():
            sites.replayer.tapped(list(wanted), visit)
    return found


def _largest(logits: Tensor) -> float:
    return float(logits.detach().float().max())


def _product(q: Tensor, k: Tensor) -> float:
    q, k = q.detach().float(), k.detach().float()
    if q.dim() == 4 and k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return float((q @ k.transpose(-1, -2)).max() / math.sqrt(q.shape[-1]))


class StableRanks:
    """|W|_F^2 / |W|_2^2 of the matrices of all sub-layers; |W|_2 by power iteration that goes on where it was."""

    def __init__(self) -> None:
        self.tops: dict[str, Tensor] = {}

    def look(self, sites: Sites) -> dict[str, float]:
        params, outlines = sites.skeleton.params, sites.skeleton.outlines
        names = [n for n in dict.fromkeys(n for s in sites for n in s.products) if outlines[n].dim() == 2]
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
