"""The norms of a branch: at its beginning, at its end, and after the sum.

A norm is recognised by what it does, not by its name: its output does not change when its input is
scaled, and is the (centred) input times one number per token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jacdiag.devices.accelerators import in_float64
from jacdiag.trace.discovery.norms_by_structure import looks_like_norm
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.execution.replay import Replayer
from jacdiag.trace.execution.routes import Endpoint
from jacdiag.trace.execution.tap import Where
from jacdiag.trace.graph.graph import Graph, Node
from jacdiag.trace.graph.ops import FUSED_NORMS, PRODUCTS_BY_ELEMENT


@dataclass(frozen=True)
class Norm:
    """A norm in the dataflow.

    Attributes:
        endpoint: where its value z is met, before the learned gain and bias.
        normalise: the norm as a function of its input, without the learned gain.
        value: z at the recorded input.
        gain: factor per token from the (centred) input to z: 1 / sqrt(var + eps). Shape of z
            without features.
        centred: the mean is taken off first (LayerNorm).
        feature_dim: the dimension of its input that holds the features; -1 for the last, in which
            case z is laid out as the input is. A norm of channels-first data is given a transposed
            one.
        gain_before: the learned gain where it is applied before the division, as in g * (x - mean)
            / (std + eps), one number per feature; the value at `endpoint` is then gain_before * z.
            None where it comes after z.
    """

    endpoint: Endpoint
    normalise: Callable[[Tensor], Tensor]
    value: Tensor
    gain: Tensor
    centred: bool
    feature_dim: int = -1
    gain_before: Tensor | None = None

    def with_gain(self, z: Tensor) -> Tensor:
        """Return the value at `endpoint` that belongs to z."""
        return z if self.gain_before is None else z * self.gain_before

    @property
    def aligned(self) -> bool:
        """Whether z is laid out as the norm's input is: the norm maps that space to itself."""
        return self.feature_dim == -1

    @property
    def closed_form(self) -> bool:
        """Whether its Jacobian is known.

        That is so for torch's own layer_norm or rms_norm, on data that it need not transpose.
        """
        return self.endpoint.where is Where.NORMALISED and self.aligned


def reach(graph: Graph, cone: tuple[int, ...], source: int) -> tuple[int, dict[int, int]]:
    """Return the last call of the cone that reads the source, and the last reader of each call.

    Args:
        graph: what one forward did.
        cone: calls, ascending.
        source: index of a value.

    Returns:
        The last reader of the source, -1 if none reads it; for every call of the cone the last call
        that reads its results, or the call itself.
    """
    # 1. The last reader of each call's results.
    inside = set(cone)
    last: dict[int, int] = {}
    for node in cone:
        reader = _last_reader(graph, graph.nodes[node].outputs, inside)
        last[node] = max(reader, node)

    # 2. The last reader of the source.
    return _last_reader(graph, (source,), inside), last


def _last_reader(graph: Graph, values: Iterable[int], inside: Collection[int]) -> int:
    """Return the last of some calls that reads one of the values differentiably; -1 if none."""
    last = -1
    for value in values:
        for consumer in graph.values[value].consumers:
            # 1. Later ones only, since the readers of two values are not in order.
            if consumer <= last or consumer not in inside:
                continue

            # 2. A call without a derivative is no reader.
            if value in graph.float_indices(consumer):
                last = consumer
    return last


def waists(graph: Graph, cone: tuple[int, ...], source: int) -> list[int]:
    """Return the calls that every path through the cone passes (its dominators), ascending.

    Args:
        graph: what one forward did.
        cone: calls, ascending.
        source: index of the value at which the paths begin.
    """
    furthest, last = reach(graph, cone, source)
    waists: list[int] = []
    for node in cone:
        # No path goes around a call that nothing before it is read after.
        nothing_goes_around = furthest <= node
        if nothing_goes_around and _can_be_replaced(graph.nodes[node]):
            waists.append(node)
        furthest = max(furthest, last[node])
    return waists


def _can_be_replaced(record: Node) -> bool:
    """Return whether a call has one result, which a re-run can replace.

    Nothing inside a custom autograd.Function can be replaced.
    """
    return len(record.outputs) == 1 and not record.function


@dataclass(frozen=True)
class _Candidate:
    """A call whose value may be a norm.

    Attributes:
        node: the call.
        where: at the call, which value.
        gain_call: a call before it that multiplies by a learned gain, which is taken off the value
            again.
    """

    node: int
    where: Where
    gain_call: int | None = None

    def endpoint(self, graph: Graph) -> Endpoint:
        """Return where its value is met."""
        if self.where is Where.NORMALISED:
            return Endpoint(self.where, self.node)

        # The call has one result.
        (value,) = graph.nodes[self.node].outputs
        return Endpoint.of_value(graph, value)


class Anatomist:
    """Finds norms around one site, by numerical tests on re-runs of module calls."""

    def __init__(self, replayer: Replayer, finder: Finder) -> None:
        self.replayer, self.finder, self.graph = replayer, finder, replayer.graph

    def input_norm(self, site: Site, owner: int, x: Tensor) -> Norm | None:
        """Return the norm at the beginning of a branch, if any.

        It is the last point that every path passes, with no parameter before it but a gain, that
        is a norm of the shortcut.
        """
        for candidate in reversed(self._input_candidates(site)):
            norm = self._norm(owner, site.shortcut, x, candidate)
            if norm is not None:
                return norm
        return None

    def _input_candidates(self, site: Site) -> list[_Candidate]:
        """Return the points of a branch that may be its input norm, in order."""
        candidates: list[_Candidate] = []
        for node in waists(self.graph, site.cone, site.shortcut):
            # 1. No parameter may lie before the norm, but one gain.
            before = self._calls_reading_state(site.cone, until=node)
            gain_call = self._gain_call(before)
            if before and gain_call is None:
                break

            # 2. A fused norm is the last point.
            is_fused_norm = self._is_fused_norm(node)
            if is_fused_norm and not before:
                candidates.append(_Candidate(node, Where.NORMALISED))
            if is_fused_norm:
                break

            # 3. So is another call that reads a parameter.
            if self.graph.reads_weight(node):
                break
            candidates.append(_Candidate(node, Where.RESULT, gain_call))
        return candidates

    def _is_fused_norm(self, node: int) -> bool:
        """Return whether a call is one of torch's norms of each token."""
        return self.graph.nodes[node].name in FUSED_NORMS

    def output_norm(self, site: Site, owner: int, x: Tensor) -> tuple[Norm, Endpoint] | None:
        """Return a norm after the last matrix product, and where its input h is met.

        Args:
            site: the sub-layer.
            owner: module call that holds the branch.
            x: the shortcut's tensor.
        """
        # 1. The points that every path passes, from the last product on.
        products = self.finder.products_among(site.cone)
        points = self._points_from_last_product(site, products)

        # 2. A fused norm.
        source = Endpoint.of_value(self.graph, site.shortcut)
        for node in points:
            if self._is_fused_norm(node) and node not in products:
                return self._norm_of_operand(owner, source, x, node)

        # 3. A norm of several calls, between two points.
        if len(points) < 2:
            return None
        return self._unfused_after(owner, source, x, points, site.cone)

    def _points_from_last_product(self, site: Site, products: Sequence[int]) -> list[int]:
        """Return the calls that every path through a branch passes, from its last product on."""
        points = waists(self.graph, site.cone, site.shortcut)

        # Without a product among its calls, the addition itself multiplies (addmm).
        last_product = max(products, default=-1)
        return [node for node in points if node >= last_product]

    def norm_after(self, value: int, until: tuple[int, ...], owner: int, y: Tensor) -> Norm | None:
        """Return a norm that all of `value` passes before anything else happens to it.

        Args:
            value: a sum on the stream.
            until: the values that the stream then becomes.
            owner: module call that holds both.
            y: the value's tensor.
        """
        cone = self.finder.cone(value, until)
        for node in waists(self.graph, cone, value):
            # 1. A fused norm.
            if self._is_fused_norm(node):
                return self._norm(owner, value, y, _Candidate(node, Where.NORMALISED))

            # 2. Any other call that reads a parameter ends the search.
            if self.graph.reads_weight(node):
                return None

            # 3. The last call of a norm of several calls.
            before = self._calls_reading_state(cone, until=node)
            candidate = _Candidate(node, Where.RESULT, self._gain_call(before))
            norm = self._norm(owner, value, y, candidate)
            if norm is not None:
                return norm
        return None

    def _calls_reading_state(
        self, cone: tuple[int, ...], *, until: int, after: int = -1
    ) -> list[int]:
        """Return the calls of a cone between two others that read parameters or buffers."""
        between = [node for node in cone if after < node < until]
        return [node for node in between if self.graph.reads_weight(node)]

    def _gain_call(self, reading_state: Sequence[int]) -> int | None:
        """Return the only call that reads a parameter, if it is a product by element.

        It may apply a norm's gain.
        """
        if len(reading_state) != 1:
            return None

        # A gain multiplies; a bias or a matrix is none.
        (call,) = reading_state
        if self.graph.nodes[call].name not in PRODUCTS_BY_ELEMENT:
            return None
        return call

    def _norm_of_operand(
        self, owner: int, source: Endpoint, x: Tensor, node: int
    ) -> tuple[Norm, Endpoint] | None:
        """Return a fused norm as a norm of its own operand, and where that is met."""
        # 1. The operand, met in a run.
        operand = Endpoint(Where.OPERAND, node)
        h = self.replayer.between(owner, source, operand)(x)

        # 2. The norm of it.
        live = self.graph.float_inputs(node)[0]
        norm = self._norm(owner, live.index, h, _Candidate(node, Where.NORMALISED))
        if norm is None:
            return None
        return norm, Endpoint.of_value(self.graph, live.index)

    def _may_normalise(self, before: int, after: int, cone: tuple[int, ...]) -> bool:
        """Return whether a norm that is no fused call may lie between two waists.

        It takes a second path from one to the next (the statistics), or is one call by itself.
        """
        has_second_path = any(before < node < after for node in cone)
        return has_second_path or "norm" in self.graph.nodes[after].name

    def _unfused_after(
        self, owner: int, source: Endpoint, x: Tensor, points: list[int], cone: tuple[int, ...]
    ) -> tuple[Norm, Endpoint] | None:
        """Return a norm between two points of a branch, and where its input is met."""
        # 1. Pairs of neighbouring points that may hold a norm.
        suspects = self._pairs_that_may_normalise(points, cone)
        if not suspects:
            return None

        # 2. Test what lies between a point and each later one. Routed rows are no tokens until
        # summed.
        starts = [points[0], *(start for start, _ in suspects)]
        for start in dict.fromkeys(starts):
            value = self.graph.nodes[start].outputs[0]
            entry = Endpoint.of_value(self.graph, value)
            h = self.replayer.between(owner, source, entry)(x)
            stops = [stop for first, stop in suspects if first >= start]
            for stop in stops:
                between = self._calls_reading_state(cone, after=start, until=stop)
                candidate = _Candidate(stop, Where.RESULT, self._gain_call(between))
                norm = self._norm(owner, value, h, candidate)
                if norm is not None:
                    return norm, entry
        return None

    def _pairs_that_may_normalise(
        self, points: list[int], cone: tuple[int, ...]
    ) -> list[tuple[int, int]]:
        """Return neighbouring points between which a norm may lie, until a parameter is read."""
        pairs: list[tuple[int, int]] = []
        for start, stop in itertools.pairwise(points):
            # A norm has no parameter but its gain, which comes later.
            if self.graph.reads_weight(stop):
                break
            if self._may_normalise(start, stop, cone):
                pairs.append((start, stop))
        return pairs

    def _norm(self, owner: int, value: int, x: Tensor, candidate: _Candidate) -> Norm | None:
        """Return the norm at a call, if its value is a norm of x.

        Args:
            owner: module call that holds the branch.
            value: what may be normalised.
            x: its tensor.
            candidate: the call.
        """
        # 1. The function from x to the value. There is none if the call itself makes x.
        node = candidate.node
        if self.graph.values[value].node == node:
            return None
        source = Endpoint.of_value(self.graph, value)
        endpoint = candidate.endpoint(self.graph)
        segment = self.replayer.between(owner, source, endpoint)

        # 2. Its gain comes after the value.
        if candidate.gain_call is None:
            return self._tested(x, node, endpoint, segment)

        # 3. Its gain came before, and is taken off again.
        gain = self._gain_of(owner, source, x, candidate.gain_call)
        if gain is None:
            return None

        norm = self._tested(x, node, endpoint, lambda x: segment(x) / gain)
        if norm is None:
            return None
        return replace(norm, gain_before=gain)

    def _gain_of(self, owner: int, source: Endpoint, x: Tensor, call: int) -> Tensor | None:
        """Return the gain that a call multiplies by: one number per feature of x, none of them 0.

        None is returned if it multiplies by anything else.
        """
        # 1. The learned factor has one number per feature.
        features = x.shape[-1:]
        position = self._position_of_learned_factor(call)
        if position is None:
            return None
        learned = self.graph.nodes[call].operands[position]
        if self.graph.values[learned].shape != features:
            return None

        # 2. Its value, met in a run.
        factor = Endpoint(Where.OPERAND, call, position)
        with torch.no_grad():
            gain = self.replayer.between(owner, source, factor)(x).detach()

        # 3. What was multiplied by 0 cannot be divided again.
        if gain.is_meta or bool((gain != 0).all()):
            return gain
        return None

    def _position_of_learned_factor(self, call: int) -> int | None:
        """Return which of a call's two operands is learned; None unless it is one of two."""
        operands = [self.graph.values[index] for index in self.graph.nodes[call].operands]
        is_learned = [value.is_weight for value in operands]

        # A product of two live values has no gain, nor has one of two weights.
        if len(operands) != 2 or is_learned.count(True) != 1:
            return None
        return is_learned.index(True)

    def _tested(
        self, x: Tensor, node: int, endpoint: Endpoint, normalise: Callable[[Tensor], Tensor]
    ) -> Norm | None:
        """Return a function of x, whose value is met at a place, as a norm; None if it is none."""
        with torch.no_grad():
            # 1. Without numbers to test it on.
            if not x.is_meta and not bool(torch.isfinite(x).all()):
                return self._norm_without_numbers(x, node, endpoint, normalise)

            # 2. It has to return as many floats as it is given.
            z = normalise(x)
            if z.numel() != x.numel() or not z.is_floating_point():
                return None

            # 3. A norm whose operations are known needs no test of its scale.
            if x.is_meta:
                return self._norm_by_structure(z, endpoint, normalise, node)
            if endpoint.where is Where.NORMALISED:
                return self._factor(x, z, endpoint, normalise)

            # 4. The value of any other does not change with the scale of x.
            if not _ignores_scale(normalise, x):
                return None
        return self._factor(x, z, endpoint, normalise)

    def _norm_without_numbers(
        self, x: Tensor, node: int, endpoint: Endpoint, normalise: Callable[[Tensor], Tensor]
    ) -> Norm | None:
        """Return a norm of an x with NaN or Inf, tested on random numbers; its gain is unknown."""
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        norm = self._tested(other, node, endpoint, normalise)
        if norm is None:
            return None
        return replace(norm, value=norm.normalise(x), gain=torch.full_like(norm.gain, math.nan))

    def _norm_by_structure(
        self, z: Tensor, endpoint: Endpoint, normalise: Callable[[Tensor], Tensor], node: int
    ) -> Norm | None:
        """Return a norm as its operations show it, without values; its gain is unknown."""
        # 1. A fused norm says by its name what it is.
        unknown_gain = z.new_empty(z.shape[:-1])
        if self._is_fused_norm(node):
            is_layer_norm = self.graph.nodes[node].name == "layer_norm"
            return Norm(endpoint, normalise, z, unknown_gain, centred=is_layer_norm)

        # 2. One of several calls.
        is_norm, centred = looks_like_norm(self.graph, node)
        if not is_norm:
            return None
        return Norm(endpoint, normalise, z, unknown_gain, centred)

    def _factor(
        self, x: Tensor, z: Tensor, endpoint: Endpoint, normalise: Callable[[Tensor], Tensor]
    ) -> Norm | None:
        """Return the norm if z is the (centred) x times one number per token.

        A norm of channels-first data works on a transposed x: its features are not in the last
        dimension of x.
        """
        tiny = torch.finfo(torch.float64).tiny
        last = x.dim() - 1
        for dim, centred in itertools.product(range(last, -1, -1), (True, False)):
            # 1. x with the features last, centred or not.
            base = in_float64(x).movedim(dim, -1)
            if dim != last and base.shape != z.shape:
                continue
            if centred:
                base = base - base.mean(-1, keepdim=True)

            # 2. The number per token that fits best.
            flat = in_float64(z).reshape(base.shape)
            gain = (flat * base).sum(-1) / (base * base).sum(-1).clamp_min(tiny)

            # 3. Whether it fits.
            if not _close(gain.unsqueeze(-1) * base, flat, 1e-3):
                continue
            feature_dim = -1 if dim == last else dim
            norm = Norm(endpoint, normalise, z, gain.abs(), centred, feature_dim)

            # 4. A token whose features are all the same has no factor: 0 / 0, or rounding.
            features = in_float64(x).movedim(dim, -1)
            rounding = 8 * torch.finfo(x.dtype).eps * features.norm(dim=-1)
            is_flat = base.norm(dim=-1) <= rounding
            if bool(is_flat.any()):
                norm = replace(norm, gain=_gain_of_flat_tokens(norm, x, is_flat))
            return norm
        return None


def _gain_of_flat_tokens(norm: Norm, x: Tensor, is_flat: Tensor) -> Tensor:
    """Return the gains of a norm, those of flat tokens by its gradient.

    Its Jacobian there is the gain times a projection: J^T w = gain * P w.

    Args:
        norm: with the gains of the other tokens.
        x: what the norm was given.
        is_flat: which tokens have features that are all the same.
    """
    # 1. J^T w.
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        z = norm.normalise(leaf)
        if not z.requires_grad:
            return norm.gain
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)
        (pulled,) = torch.autograd.grad(z, leaf, w)

    # 2. P w, and the factor between them. NaN, as of an RMSNorm without eps, stays unknown.
    along = in_float64(pulled).movedim(norm.feature_dim, -1)
    projected = in_float64(w).reshape(along.shape)
    if norm.centred:
        projected = projected - projected.mean(-1, keepdim=True)
    by_gradient = along.norm(dim=-1) / projected.norm(dim=-1)
    is_known = is_flat & torch.isfinite(by_gradient)
    return torch.where(is_known, by_gradient.reshape(is_flat.shape).to(norm.gain), norm.gain)


def _ignores_scale(normalise: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Return whether the value of a function does not change with the scale of x.

    x is made so large that the eps of a norm does not count.
    """
    unit = 2.0**12 / in_float64(x).square().mean().sqrt().clamp_min(1e-30).item()
    large = normalise(x * unit)
    twice_as_large = normalise(x * (unit * 2))
    return _close(large, twice_as_large, 1e-3)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether two tensors are finite and equal to a relative tolerance, and not zero."""
    # 1. NaN and Inf are equal to nothing.
    a, b = in_float64(a), in_float64(b)
    are_finite = torch.isfinite(a).all() & torch.isfinite(b).all()

    # 2. Zeros are equal to everything at no tolerance, and show nothing.
    size = b.norm()
    is_within_tolerance = (a - b).norm() <= tolerance * size
    return bool(are_finite & is_within_tolerance & (size > 0))
