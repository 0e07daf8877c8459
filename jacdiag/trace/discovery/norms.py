"""What a branch is made of: the points that every path passes, its input and output norm, its
placement.

A norm is recognised by what it does, not by its name: its output does not change when its input is
scaled, and is the (centred) input times one number per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacdiag.trace.discovery.norms_by_structure import looks_like_norm
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.execution.replay import Replayer
from jacdiag.trace.execution.tap import Spot, Where
from jacdiag.trace.graph.graph import Graph

FUSED_NORMS = {"layer_norm", "rms_norm"}
PRODUCTS_BY_ELEMENT = {"mul", "__mul__", "__rmul__", "multiply"}


@dataclass(frozen=True)
class Norm:
    """A norm in the dataflow.

    Attributes:
        spot: where its value z (before the learned gain and bias) is met in a re-run of
            `invocation`.
        normalise: the norm as a function of its input, without the learned gain.
        value: z at the recorded input.
        gain: factor per token from the (centred) input to z: 1 / sqrt(var + eps). Shape of z
            without features.
        centred: the mean is taken off first (LayerNorm).
        feature_dim: the dimension of its input that holds the features; -1 for the last, in which
            case z is laid out as the input is. A norm of channels-first data is given a transposed
            one.
        gain_before: the learned gain where it is applied before the division, as in g * (x - mean)
            / (std + eps), one number per feature; the value at `spot` is then gain_before * z. None
            where it comes after z.
    """

    spot: Spot
    normalise: Callable[[Tensor], Tensor]
    value: Tensor
    gain: Tensor
    centred: bool
    feature_dim: int = -1
    gain_before: Tensor | None = None

    def with_gain(self, z: Tensor) -> Tensor:
        """Return the value at `spot` that belongs to z."""
        return z if self.gain_before is None else z * self.gain_before

    @property
    def aligned(self) -> bool:
        """Whether z is laid out as the norm's input is, so that the norm is a map of that space to
        itself.
        """
        return self.feature_dim == -1

    @property
    def closed_form(self) -> bool:
        """Whether its Jacobian is known: torch's own layer_norm or rms_norm, on data that it need
        not transpose.
        """
        return self.spot.where is Where.NORMALISED and self.aligned


def reach(graph: Graph, cone: tuple[int, ...], source: int) -> tuple[int, dict[int, int]]:
    """Returns the last call of the cone that reads the source, and for each call the last that
    reads its results.
    """
    inside = set(cone)
    last = {
        node: max(
            (c for o in graph.nodes[node].outputs for c in _readers(graph, o) if c in inside),
            default=node,
        )
        for node in cone
    }
    return max((c for c in _readers(graph, source) if c in inside), default=-1), last


def _readers(graph: Graph, value: int) -> list[int]:
    """Calls that read a value differentiably."""
    return [
        n
        for n in graph.values[value].consumers
        if any(v.index == value for v in graph.float_inputs(n))
    ]


def waists(graph: Graph, cone: tuple[int, ...], source: int) -> list[int]:
    """Returns the calls that every path through the cone passes (its dominators), ascending."""
    furthest, last = reach(graph, cone, source)
    out = []
    for node in cone:
        if (
            furthest <= node
            and len(graph.nodes[node].outputs) == 1
            and not graph.nodes[node].function
        ):
            out.append(node)
        furthest = max(furthest, last[node])
    return out


def reads_state(graph: Graph, node: int) -> bool:
    """Whether a call reads something made of parameters or buffers alone (a weight, a gain, a
    bias).
    """
    return any(
        graph.values[v].from_state and not graph.values[v].live for v in graph.nodes[node].inputs
    )


class Anatomist:
    """Finds norms around one site. All tests are numerical, on re-runs of the owning module
    call.
    """

    def __init__(self, replayer: Replayer, finder: Finder) -> None:
        self.replayer, self.finder, self.graph = replayer, finder, replayer.graph

    def input_norm(self, site: Site, owner: int, x: Tensor) -> Norm | None:
        """The last point that every path passes, with no parameter before it, that is a norm of the
        shortcut.
        """
        candidates: list[tuple[int, Where, int | None]] = []
        for node in waists(self.graph, site.cone, site.shortcut):
            name = self.graph.nodes[node].name
            before = [n for n in site.cone if n < node and reads_state(self.graph, n)]
            gain_call = self._gain_call(before)
            if before and gain_call is None:
                break
            if name in FUSED_NORMS:
                if not before:
                    candidates.append((node, Where.NORMALISED, None))
                break
            if reads_state(self.graph, node):
                break
            candidates.append((node, Where.RESULT, gain_call))
        source = self.replayer.spot_of(site.shortcut, owner)
        for node, where, gain in reversed(candidates):
            norm = self._norm(owner, source, x, node, where, gain)
            if norm is not None:
                return norm
        return None

    def output_norm(self, site: Site, owner: int, x: Tensor) -> tuple[Norm, Spot] | None:
        """A norm after the last matrix product: returns it and where its input h is met."""
        products = [n for n in site.cone if self.finder.is_product(n)]
        points = [
            n
            for n in waists(self.graph, site.cone, site.shortcut)
            if not products or n >= products[-1]
        ]
        source = self.replayer.spot_of(site.shortcut, owner)
        for node in points:
            if self.graph.nodes[node].name in FUSED_NORMS and node not in products:
                return self._norm_of_operand(owner, source, x, node)
        if len(points) < 2:
            return None
        return self._unfused_after(owner, source, x, points, site.cone)

    def norm_after(self, value: int, until: tuple[int, ...], owner: int, y: Tensor) -> Norm | None:
        """A norm that all of `value` passes before anything else happens to it (post-norm)."""
        cone = self.finder.cone(value, until)
        source = self.replayer.spot_of(value, owner)
        for node in waists(self.graph, cone, value):
            fused = self.graph.nodes[node].name in FUSED_NORMS
            if not fused and reads_state(self.graph, node):
                return None
            before = [n for n in cone if n < node and reads_state(self.graph, n)]
            gain_call = None if fused else self._gain_call(before)
            norm = self._norm(
                owner, source, y, node, Where.NORMALISED if fused else Where.RESULT, gain_call
            )
            if norm is not None or fused:
                return norm
        return None

    def _gain_call(self, reading_state: Sequence[int]) -> int | None:
        """Return the only call that reads a parameter, if it is a product by element: it may apply
        a norm's gain.
        """
        if (
            len(reading_state) != 1
            or self.graph.nodes[reading_state[0]].name not in PRODUCTS_BY_ELEMENT
        ):
            return None
        return reading_state[0]

    def _norm_of_operand(
        self, owner: int, source: Spot, x: Tensor, node: int
    ) -> tuple[Norm, Spot] | None:
        operand = self.replayer.spot_at(Where.OPERAND, node, owner)
        h = self.replayer.run(owner, source, x, operand)
        live = next(iter(self.graph.float_inputs(node)))
        entry = self.replayer.spot_of(live.index, owner)
        norm = self._norm(owner, entry, h, node, Where.NORMALISED)
        return None if norm is None else (norm, entry)

    def _may_normalise(self, before: int, after: int, cone: tuple[int, ...]) -> bool:
        """An unfused norm takes a second path from one waist to the next (the statistics), or is
        one call by itself.
        """
        return any(before < n < after for n in cone) or "norm" in self.graph.nodes[after].name

    def _unfused_after(
        self, owner: int, source: Spot, x: Tensor, points: list[int], cone: tuple[int, ...]
    ) -> tuple[Norm, Spot] | None:
        suspects = [
            (a, b) for a, b in itertools.pairwise(points) if self._may_normalise(a, b, cone)
        ]
        state = next((n for n in points[1:] if reads_state(self.graph, n)), len(self.graph.nodes))
        suspects = [(a, b) for a, b in suspects if b < state]
        # routed rows are no tokens until summed
        for start in dict.fromkeys([points[0], *(a for a, _ in suspects)]):
            later = [b for a, b in suspects if a >= start]
            entry = self.replayer.spot_of(self.graph.nodes[start].outputs[0], owner)
            h = self.replayer.run(owner, source, x, entry) if later else x
            for node in later:
                before = [n for n in cone if start < n < node and reads_state(self.graph, n)]
                norm = self._norm(owner, entry, h, node, Where.RESULT, self._gain_call(before))
                if norm is not None:
                    return norm, entry
        return None

    def _norm(
        self,
        owner: int,
        source: Spot,
        x: Tensor,
        node: int,
        where: Where,
        gain_call: int | None = None,
    ) -> Norm | None:
        """Test whether the value at a call is a norm of x.

        Args:
            owner: module call that is run again.
            source: where x is met.
            x: what may be normalised.
            node: the call.
            where: at the call, which value.
            gain_call: a call before it that multiplies by a learned gain, which is taken off the
                value again.
        """
        spot = self.replayer.spot_at(where, node, owner)
        same = source.key == spot.key and source.occurrence == spot.occurrence
        if same and source.where is not Where.READ:
            return None
        segment = self.replayer.segment(owner, source, spot)
        if gain_call is None:
            return self._tested(x, node, spot, segment)
        gain = self._gain_of(owner, source, x, gain_call)
        if gain is None:
            return None
        norm = self._tested(x, node, spot, lambda x: segment(x) / gain)
        return None if norm is None else replace(norm, gain_before=gain)

    def _gain_of(self, owner: int, source: Spot, x: Tensor, call: int) -> Tensor | None:
        """Return the parameter that a call multiplies by: one number per feature of x, none of them
        0. Else None.
        """
        operands = [self.graph.values[v] for v in self.graph.nodes[call].operands]
        learned = [k for k, value in enumerate(operands) if value.from_state and not value.live]
        if len(operands) != 2 or len(learned) != 1 or operands[learned[0]].shape != x.shape[-1:]:
            return None
        spot = replace(
            self.replayer.spot_at(Where.OPERAND, call, owner, learned[0]), shape=x.shape[-1:]
        )
        with torch.no_grad():
            gain = self.replayer.run(owner, source, x, spot).detach()
        return gain if gain.is_meta or bool((gain != 0).all()) else None

    def _tested(
        self, x: Tensor, node: int, spot: Spot, normalise: Callable[[Tensor], Tensor]
    ) -> Norm | None:
        """Test a function of x, whose value is met at a spot: is it a norm?"""
        with torch.no_grad():
            if not x.is_meta and not bool(torch.isfinite(x).all()):
                return self._norm_without_numbers(x, node, spot, normalise)
            z = normalise(x)
            if z.numel() != x.numel() or not z.is_floating_point():
                return None
            if x.is_meta:
                return self._norm_by_structure(z, spot, normalise, node)
            if spot.where is Where.NORMALISED:
                return self._factor(x, z, spot, normalise)
            # eps must not count
            unit = 2.0**12 / x.double().square().mean().sqrt().clamp_min(1e-30).item()
            big, bigger = (normalise(x * (unit * k)) for k in (1, 2))
        return self._factor(x, z, spot, normalise) if _close(big, bigger, 1e-3) else None

    def _norm_without_numbers(
        self, x: Tensor, node: int, spot: Spot, normalise: Callable[[Tensor], Tensor]
    ) -> Norm | None:
        """A norm of an x with NaN or Inf, tested on random numbers in its place; its gain is not
        known.
        """
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        norm = self._tested(other, node, spot, normalise)
        if norm is None:
            return None
        return replace(norm, value=norm.normalise(x), gain=torch.full_like(norm.gain, math.nan))

    def _norm_by_structure(
        self, z: Tensor, spot: Spot, normalise: Callable[[Tensor], Tensor], node: int
    ) -> Norm | None:
        """A norm as its operations show it, without values; its gain is not known."""
        name = self.graph.nodes[node].name
        found, centred = (
            (True, name == "layer_norm")
            if name in FUSED_NORMS
            else looks_like_norm(self.graph, node)
        )
        return Norm(spot, normalise, z, z.new_empty(z.shape[:-1]), centred) if found else None

    def _factor(
        self, x: Tensor, z: Tensor, spot: Spot, normalise: Callable[[Tensor], Tensor]
    ) -> Norm | None:
        """Checks that z is the (centred) x times one number per token, and returns the numbers.

        A norm of channels-first data works on a transposed x: its features are not in the last
        dimension of x.
        """
        tiny = torch.finfo(torch.float64).tiny
        for dim, centred in itertools.product(range(x.dim() - 1, -1, -1), (True, False)):
            base = x.double().movedim(dim, -1)
            if dim != x.dim() - 1 and base.shape != z.shape:
                continue
            base = base - base.mean(-1, keepdim=True) if centred else base
            flat = z.double().reshape(base.shape)
            gain = (flat * base).sum(-1) / (base * base).sum(-1).clamp_min(tiny)
            if _close(gain.unsqueeze(-1) * base, flat, 1e-3):
                return Norm(
                    spot, normalise, z, gain.abs(), centred, -1 if dim == x.dim() - 1 else dim
                )
        return None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.double(), b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return False
    return bool((a - b).norm() <= tolerance * b.norm()) and bool(b.norm() > 0)
