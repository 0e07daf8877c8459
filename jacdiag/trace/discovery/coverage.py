"""Which parameter belongs where: to a sub-layer, the embedding, the head, or a norm outside."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.graph.graph import STATE, Graph
from jacdiag.trace.graph.ops import FUSED_NORMS, LOOKUPS


@dataclass
class Coverage:
    """Parameter names by where they are used. `uncovered` maps a name to the reason."""

    sublayers: dict[int, list[str]] = field(default_factory=dict)
    embedding: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    uncovered: dict[str, str] = field(default_factory=dict)

    def covered(self) -> set[str]:
        """Return the names of all parameters that have a place."""
        names = {*self.embedding, *self.head, *self.norms}
        return names.union(*self.sublayers.values())

    def leave_out(self, names: Iterable[str], reason: str) -> None:
        """Take parameters outside of sub-layers from their places; they are not covered.

        Args:
            names: of the parameters.
            reason: why they are not covered.
        """
        left_out = set(names)
        self.embedding = _without(self.embedding, left_out)
        self.head = _without(self.head, left_out)
        self.norms = _without(self.norms, left_out)
        self.uncovered.update(dict.fromkeys(names, reason))


def _without(names: Iterable[str], left_out: Container[str]) -> list[str]:
    """Return the names that are not left out, in order."""
    return [name for name in names if name not in left_out]


def parameters_of(graph: Graph, nodes: Iterable[int], skeleton: Skeleton) -> list[str]:
    """Return the parameters that calls read, in order.

    They may read them directly or through values made of parameters alone.

    Args:
        graph: what one forward did.
        nodes: the calls.
        skeleton: the names of the parameters.
    """
    # 1. Parameters and buffers, each once.
    states: dict[str, None] = {}
    for node in nodes:
        states.update(dict.fromkeys(_states_read(graph, node)))

    # 2. The parameters among them.
    parameters = skeleton.params
    return [name for name in states if name in parameters]


def _states_read(graph: Graph, node: int) -> list[str]:
    """Return the parameters and buffers that a call reads, also through values made of them."""
    # What is read first is popped first.
    stack = list(reversed(graph.nodes[node].inputs))
    seen: set[int] = set()
    names: list[str] = []
    while stack:
        value = graph.values[stack.pop()]

        # Several calls may have read the same value.
        if value.index in seen:
            continue
        seen.add(value.index)

        # A parameter or buffer.
        if value.node == STATE:
            names.append(value.name)
            continue

        # What was made of some. What depends on the input is not.
        is_computed = value.node >= 0
        if is_computed and not value.live:
            stack.extend(graph.nodes[value.node].inputs)
    return names


def cover(
    graph: Graph, finder: Finder, sites: list[Site], homes: list[int], skeleton: Skeleton
) -> Coverage:
    """Assign every parameter of the model to the place where it is used.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        sites: the sub-layers.
        homes: for each of them, the innermost module call that makes its products.
        skeleton: the model's code and the names of its parameters.
    """
    # 1. The sub-layers.
    result = Coverage()
    for index, (site, home) in enumerate(zip(sites, homes, strict=True)):
        calls = _calls_of(graph, finder, site, home)
        result.sublayers[index] = parameters_of(graph, calls, skeleton)

    # 2. What lies outside them. Without sub-layers there is nothing to lie before or after.
    if not sites:
        result.uncovered.update(dict.fromkeys(skeleton.params, "no sub-layer was found"))
        return result
    _cover_outside(graph, finder, sites, skeleton, result)
    _note_unread(graph, skeleton, result)
    return result


def _calls_of(graph: Graph, finder: Finder, site: Site, home: int) -> list[int]:
    """Return the calls whose parameters belong to a sub-layer."""
    # 1. Those of the branch, and all of a module that is the branch's alone.
    calls = list(site.calls)
    own = _own_module(graph, site, home)
    if own is not None:
        calls += _span(graph, own)

    # 2. Those that scale the shortcut.
    if site.scaled:
        addition, position = site.carrier
        terms = graph.nodes[addition].terms or ()
        calls += finder.cone(site.shortcut, terms[position].values)
    return calls


def _cover_outside(
    graph: Graph, finder: Finder, sites: list[Site], skeleton: Skeleton, result: Coverage
) -> None:
    """Assign the parameters that calls outside the sub-layers read, by where the call stands."""
    # 1. Where the first sub-layer begins and the last one ends.
    first, last = _ends_of_stream(graph, sites)

    # 2. The parameters of every call, unless one before it has claimed them.
    claimed = result.covered()
    for node in graph.nodes:
        read = parameters_of(graph, (node.index,), skeleton)
        names = [name for name in read if name not in claimed]
        if not names:
            continue
        claimed.update(names)

        # 3. Their place.
        is_norm = node.name in FUSED_NORMS or not finder.is_product(node.index)
        if node.index <= first or node.name in LOOKUPS:
            result.embedding += names
        elif is_norm:
            result.norms += names
        elif node.index > last:
            result.head += names
        else:
            result.uncovered.update(dict.fromkeys(names, "read between sub-layers, by no branch"))


def _ends_of_stream(graph: Graph, sites: list[Site]) -> tuple[int, int]:
    """Return the call before the first sub-layer, and the one that makes the last sum.

    Both are the number of calls if all sub-layers are nested.
    """
    # 1. The sub-layers on the stream.
    outer = [site for site in sites if not site.nested]
    if not outer:
        return len(graph.nodes), len(graph.nodes)

    # 2. The calls that make their shortcuts and their sums.
    makers_of_shortcuts = [graph.values[site.shortcut].node for site in outer]
    makers_of_sums = [graph.values[site.output].node for site in outer]

    # 3. The first shortcut and the last sum.
    return min(makers_of_shortcuts), max(makers_of_sums)


def _note_unread(graph: Graph, skeleton: Skeleton, result: Coverage) -> None:
    """Note the parameters that no recorded call read, each with the reason."""
    assigned = result.covered() | set(result.uncovered)
    for name in skeleton.params:
        # 1. It has a place, or a reason.
        if name in assigned:
            continue

        # 2. Code that the record does not show may have read it.
        reason = "not read in this forward"
        if name in graph.used_state:
            reason = "read, but not by a recorded call"
        result.uncovered[name] = reason


def _own_module(graph: Graph, site: Site, home: int) -> int | None:
    """Return the module call that is the branch's alone, if the addition is made outside it."""
    around_addition = graph.ancestors(graph.nodes[site.addition].invocation)
    if home in around_addition:
        return None
    return home


def _span(graph: Graph, invocation: int) -> range:
    call = graph.invocations[invocation]
    return range(call.start, call.end)
