"""Walks through a record: what is a matrix product, what reaches what, what lies between."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import MIXERS, PRODUCTS, REDUCTIONS


class Walks:
    """Answers questions about the paths of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def is_product(self, node: int) -> bool:
        """Return whether a call multiplies the stream by a matrix made of parameters alone."""
        record = self.graph.nodes[node]
        if record.name in MIXERS:
            return True
        if record.name not in PRODUCTS:
            return False
        values = [self.graph.values[v] for v in record.inputs]
        reads_weight = any(v.from_state and not v.live for v in values)
        return reads_weight and any(v.live and v.is_float for v in values)

    def reaches(
        self,
        ancestor: int,
        values: Iterable[int],
        *,
        through_products: bool,
        statistics: bool = True,
    ) -> bool:
        """Return whether a differentiable path leads from a value to one of `values`.

        Args:
            ancestor: where the path begins.
            values: where it may end.
            through_products: whether a product with a parameter may lie on it.
            statistics: whether it may pass a mean or norm of one number per token. No shortcut
                fits there.
        """
        floor = self.graph.values[ancestor].node
        shape = self.graph.values[ancestor].shape
        most_of_statistic = -1
        if not statistics and shape:
            most_of_statistic = math.prod(shape) // max(1, shape[-1])
        stack, seen = list(values), set()
        while stack:
            index = stack.pop()
            if index == ancestor:
                return True
            node = self.graph.values[index].node
            if node <= floor or node < 0 or node in seen:
                continue
            is_reduction = self.graph.nodes[node].name in REDUCTIONS
            if is_reduction and math.prod(self.graph.values[index].shape) <= most_of_statistic:
                continue
            seen.add(node)
            if not through_products and self.is_product(node):
                continue
            stack.extend(v.index for v in self.graph.float_inputs(node))
        return False

    def cone(self, ancestor: int, values: Iterable[int]) -> tuple[int, ...]:
        """Return the calls that depend on `ancestor` and lead to `values`, ascending."""
        # 1. Backward: the calls that lead to the values.
        floor = self.graph.values[ancestor].node
        leading: set[int] = set()
        stack = list(values)
        while stack:
            node = self.graph.values[stack.pop()].node
            if node > floor and node >= 0 and node not in leading:
                leading.add(node)
                stack.extend(v.index for v in self.graph.float_inputs(node))

        # 2. Forward: those of them that the ancestor reaches.
        live = {ancestor}
        cone = []
        for node in sorted(leading):
            if any(v.index in live for v in self.graph.float_inputs(node)):
                cone.append(node)
                live.update(self.graph.nodes[node].outputs)
        return tuple(cone)
