"""Calls without a derivative on the ways from one value to others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import METADATA_ONLY


def is_read(graph: Graph, source: int, values: Sequence[int]) -> bool:
    """Return whether the numbers of a value lead to others, with or without a gradient.

    Args:
        graph: what one forward did.
        source: index of the value.
        values: indices of the others.
    """
    stack = list(values)
    seen = set(stack)
    first = graph.values[source].node
    while stack:
        value = stack.pop()
        if value == source:
            return True

        # Go back to what made it. What came before the source does not read it.
        maker = graph.values[value].node
        if maker <= first or graph.nodes[maker].name in METADATA_ONLY:
            continue
        earlier = [index for index in graph.nodes[maker].inputs if index not in seen]
        seen.update(earlier)
        stack += earlier
    return False


def find_blocking_calls(
    graph: Graph, source: int, values: Sequence[int], names: Collection[str]
) -> list[int]:
    """Return the last calls of some names on the ways from a value to others.

    Args:
        graph: what one forward did.
        source: index of the value.
        values: indices of the others.
        names: of the calls, which have no derivative.

    Returns:
        The calls; none if a way of floats passes no such call.
    """
    calls: list[int] = []
    stack = list(values)
    seen = set(stack)
    first = graph.values[source].node
    while stack:
        # 1. A way without such a call.
        value = stack.pop()
        if value == source:
            return []
        maker = graph.values[value].node
        if maker <= first:
            continue

        # 2. Such a call ends the way, if the source is on it.
        record = graph.nodes[maker]
        if record.name in names:
            if maker not in calls and is_read(graph, source, record.inputs):
                calls.append(maker)
            continue

        # 3. Go back to the floats that any other call reads.
        floats = [read.index for read in graph.values_read(maker) if read.is_float]
        earlier = [index for index in floats if index not in seen]
        seen.update(earlier)
        stack += earlier
    return sorted(calls)


def name_call(graph: Graph, node: int) -> str:
    """Return a call with its place, such as "sign in model.py:12"."""
    record = graph.nodes[node]
    return f"{record.name} in {Path(record.source_line).name}"
