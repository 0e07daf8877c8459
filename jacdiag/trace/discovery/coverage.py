"""Which parameter belongs where: to a sub-layer, the embedding, the head, a norm outside, or to
nothing seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jacdiag.trace.discovery.norms import FUSED_NORMS
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.graph.graph import STATE, Graph


@dataclass
class Coverage:
    """Parameter names by where they are used. `uncovered` maps a name to the reason."""

    sublayers: dict[int, list[str]] = field(default_factory=dict)
    embedding: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    uncovered: dict[str, str] = field(default_factory=dict)

    def covered(self) -> set[str]:
        inside = {name for names in self.sublayers.values() for name in names}
        return inside | set(self.embedding) | set(self.head) | set(self.norms)


def parameters_of(graph: Graph, nodes: Iterable[int], skeleton: Skeleton) -> list[str]:
    """Returns the parameters that calls read, directly or through values made of parameters alone,
    in order.
    """
    names: dict[str, None] = {}
    for node in nodes:
        # the first read is the first popped
        stack, seen = list(reversed(graph.nodes[node].inputs)), set()
        while stack:
            value = graph.values[stack.pop()]
            if value.index in seen or (value.live and value.node != STATE):
                continue
            seen.add(value.index)
            if value.node == STATE and value.name in skeleton.params:
                names[value.name] = None
            elif value.node >= 0:
                stack.extend(graph.nodes[value.node].inputs)
    return list(names)


def cover(
    graph: Graph, finder: Finder, sites: list[Site], homes: list[int], skeleton: Skeleton
) -> Coverage:
    """Assigns every parameter of the model."""
    result = Coverage()
    for index, (site, home) in enumerate(zip(sites, homes, strict=True)):
        own = _own_module(graph, site, home)
        nodes = site.calls if own is None else (*site.calls, *_span(graph, own))
        if site.scaled:
            carried = graph.nodes[site.carrier[0]].terms or ()
            nodes = (*nodes, *finder.cone(site.shortcut, carried[site.carrier[1]].values))
        result.sublayers[index] = parameters_of(graph, nodes, skeleton)
    if not sites:  # nothing to be before or behind
        result.uncovered.update(dict.fromkeys(skeleton.params, "no sub-layer was found"))
        return result
    claimed = result.covered()
    first = min(
        (graph.values[s.shortcut].node for s in sites if not s.nested), default=len(graph.nodes)
    )
    last = max(
        (graph.values[s.output].node for s in sites if not s.nested), default=len(graph.nodes)
    )
    for node in graph.nodes:
        names = [
            name for name in parameters_of(graph, (node.index,), skeleton) if name not in claimed
        ]
        if not names:
            continue
        claimed.update(names)
        if node.index <= first or node.name == "embedding":
            result.embedding += names
        elif node.name in FUSED_NORMS or not finder.is_product(node.index):
            result.norms += names
        elif node.index > last:
            result.head += names
        else:
            result.uncovered.update(dict.fromkeys(names, "read between sub-layers, by no branch"))
    for name in skeleton.params:
        if name not in claimed and name not in result.uncovered:
            used = name in graph.used_state
            result.uncovered[name] = (
                "read, but not by a recorded call" if used else "not read in this forward"
            )
    return result


def _own_module(graph: Graph, site: Site, home: int) -> int | None:
    """The module call that is the branch's alone, if the addition is made outside it."""
    return None if home in set(graph.ancestors(graph.nodes[site.addition].invocation)) else home


def _span(graph: Graph, invocation: int) -> range:
    call = graph.invocations[invocation]
    return range(call.start, call.end)
