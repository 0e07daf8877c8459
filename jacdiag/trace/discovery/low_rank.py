"""Find low-rank additions to a weight by what the forward does: W x + B (A x).

The two factors are matrices of which the first narrows what it reads. Nothing but scaling, dropout
and changes of shape stands between them. Their product is added to that of a larger matrix, which
reads the same value. No name is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.graph.graph import Node
from jacdiag.trace.graph.ops import CARRIERS
from jacdiag.trace.site_list import Sites

_MOST_SUMS = 8  # that are followed from one addition to those before it: several additions in turn


@dataclass(frozen=True)
class LowRankPair:
    """The names of two factors, and of the weight that they are added to.

    Attributes:
        first: The factor that reads the input.
        second: The factor that writes the output.
        base: The weight.
    """

    first: str
    second: str
    base: str


@dataclass(frozen=True)
class _LinearMap:
    """One call that multiplies a value by one matrix.

    Attributes:
        parameter: The name of the matrix.
        source: The value that it reads, before scaling, dropout and changes of shape.
        fan_in, fan_out: How many features go in and come out.
    """

    parameter: str
    source: int
    fan_in: int
    fan_out: int


def find_low_rank_pairs(sites: Sites) -> list[LowRankPair]:
    """Return the factors of low-rank additions in a recorded model, each pair once.

    Args:
        sites: The sub-layers of the model.
    """
    maps = _linear_maps(sites)
    pairs: dict[LowRankPair, None] = {}
    for node in sites.graph.nodes:
        # 1. The maps whose results a call adds.
        if len(node.operands_added) < 2:
            continue
        added: list[_LinearMap] = []
        for operand in node.operands_added:
            added += _maps_before(sites, maps, operand)

        # 2. Those of two factors, next to a larger matrix that reads the same.
        for second in added:
            first = maps.get(second.source)
            if first is None:
                continue
            for base in added:
                if _is_low_rank_addition(first, second, base):
                    pair = LowRankPair(first.parameter, second.parameter, base.parameter)
                    pairs[pair] = None

    return list(pairs)


def _is_low_rank_addition(first: _LinearMap, second: _LinearMap, base: _LinearMap) -> bool:
    """Return whether two maps, one after the other, do the same as a larger one at lower rank."""
    # 1. They read what the larger one reads, and write as much.
    if base.source != first.source:
        return False
    has_same_sizes = (first.fan_in, second.fan_out) == (base.fan_in, base.fan_out)
    if not has_same_sizes:
        return False

    # 2. The rank is below that of the larger one.
    return first.fan_out < min(base.fan_in, base.fan_out)


def _linear_maps(sites: Sites) -> dict[int, _LinearMap]:
    """Return the maps by one matrix, by the value that each makes."""
    maps: dict[int, _LinearMap] = {}
    for node in sites.graph.nodes:
        if sites.finder.is_product(node.index):
            linear_map = _linear_map(sites, node)
            if linear_map is not None:
                maps[node.outputs[0]] = linear_map

    return maps


def _linear_map(sites: Sites, node: Node) -> _LinearMap | None:
    """Return the map of one product; None if it is not that of one matrix and one value."""
    # 1. One value, and one matrix.
    read = parameters_of(sites.graph, (node.index,), sites.skeleton)
    outlines = sites.skeleton.outlines
    matrices = [name for name in read if outlines[name].dim() == 2]
    inputs = sites.graph.float_inputs(node.index)
    if len(matrices) != 1 or len(inputs) != 1:
        return None

    # 2. The sizes of the matrix are those of the map.
    (matrix,) = matrices
    fan_in = inputs[0].features
    fan_out = sites.graph.values[node.outputs[0]].features
    if fan_in is None or fan_out is None:
        return None
    if sorted(outlines[matrix].shape) != sorted((fan_in, fan_out)):
        return None

    source = _before_carriers(sites, inputs[0].index)
    return _LinearMap(matrix, source, fan_in, fan_out)


def _before_carriers(sites: Sites, value: int) -> int:
    """Return the value that was scaled, dropped out or reshaped into another one."""
    graph = sites.graph
    while graph.values[value].node >= 0:
        node = graph.nodes[graph.values[value].node]
        inputs = graph.float_indices(node.index)
        if node.name not in CARRIERS or len(inputs) != 1:
            break
        (value,) = inputs

    return value


def _maps_before(sites: Sites, maps: dict[int, _LinearMap], value: int) -> Iterator[_LinearMap]:
    """Yield the maps whose results a value is, or is the sum of."""
    graph = sites.graph
    stack = [value]
    sums = 0
    while stack:
        # 1. A map.
        source = _before_carriers(sites, stack.pop())
        if source in maps:
            yield maps[source]
            continue

        # 2. A sum before this one, as where several additions follow each other.
        node = graph.values[source].node
        if node >= 0 and graph.nodes[node].terms and sums < _MOST_SUMS:
            sums += 1
            stack += graph.nodes[node].operands_added
