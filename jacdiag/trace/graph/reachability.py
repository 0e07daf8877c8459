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

        # One factor has to be a weight, the other has to depend on the input.
        values = [self.graph.values[index] for index in record.inputs]
        reads_weight = any(value.is_weight for value in values)
        reads_stream = any(value.is_differentiable for value in values)
        return reads_weight and reads_stream

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
        # 1. What ends a path: a call before the ancestor was made, a value of few numbers.
        floor = max(self.graph.values[ancestor].node, -1)
        size_of_statistic = -1
        if not statistics:
            size_of_statistic = _numbers_of_statistic(self.graph.values[ancestor].shape)

        # 2. Walk back from the values.
        stack = list(values)
        seen: set[int] = set()
        while stack:
            index = stack.pop()
            if index == ancestor:
                return True
            node = self.graph.values[index].node
            if node <= floor or node in seen:
                continue

            # Another result of the same reduction may be large enough, so it is not yet seen.
            is_reduction = self.graph.nodes[node].name in REDUCTIONS
            if is_reduction and math.prod(self.graph.values[index].shape) <= size_of_statistic:
                continue
            seen.add(node)
            if not through_products and self.is_product(node):
                continue
            stack.extend(value.index for value in self.graph.float_inputs(node))
        return False

    def cone(self, ancestor: int, values: Iterable[int]) -> tuple[int, ...]:
        """Return the calls that depend on `ancestor` and lead to `values`, ascending."""
        # 1. Backward: the calls that lead to the values, down to where the ancestor was made.
        floor = max(self.graph.values[ancestor].node, -1)
        leading: set[int] = set()
        stack = list(values)
        while stack:
            node = self.graph.values[stack.pop()].node
            if node <= floor or node in leading:
                continue
            leading.add(node)
            stack.extend(value.index for value in self.graph.float_inputs(node))

        # 2. Forward: those of them that the ancestor reaches.
        live = {ancestor}
        cone: list[int] = []
        for node in sorted(leading):
            reads_live = any(value.index in live for value in self.graph.float_inputs(node))
            if reads_live:
                cone.append(node)
                live.update(self.graph.nodes[node].outputs)
        return tuple(cone)


def _numbers_of_statistic(shape: tuple[int, ...]) -> int:
    """Return how many numbers a value of one number per token has; -1 for a scalar stream."""
    if not shape:
        return -1
    return math.prod(shape) // max(1, shape[-1])
