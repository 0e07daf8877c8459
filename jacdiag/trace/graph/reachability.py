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
        name = self.graph.nodes[node].name
        if name in PRODUCTS:
            # One factor has to be a weight, and the other has to depend on the input. A product of
            # two values of the stream is no matrix of the model.
            return self.graph.reads_weight(node) and self.graph.reads_stream(node)

        # A Fourier transform counts as a product, although it has no parameter.
        return name in MIXERS

    def products_among(self, calls: Iterable[int]) -> list[int]:
        """Return the matrix products among some calls, in their order."""
        return [node for node in calls if self.is_product(node)]

    def has_product(self, calls: Iterable[int]) -> bool:
        """Return whether a matrix product is among some calls."""
        return any(self.is_product(node) for node in calls)

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
            if self._is_statistic(index, size_of_statistic):
                continue
            seen.add(node)

            # Go on with what the call reads.
            is_closed = not through_products and self.is_product(node)
            if not is_closed:
                stack.extend(self.graph.float_indices(node))
        return False

    def _is_statistic(self, value: int, size: int) -> bool:
        """Return whether a value is the result of a reduction to `size` numbers or fewer."""
        record = self.graph.values[value]
        if self.graph.nodes[record.node].name not in REDUCTIONS:
            return False
        return math.prod(record.shape) <= size

    def cone(self, ancestor: int, values: Iterable[int]) -> tuple[int, ...]:
        """Return the calls that depend on `ancestor` and lead to `values`, ascending."""
        leading = self._calls_leading_to(values, since=ancestor)
        return tuple(self.calls_reached(ancestor, sorted(leading)))

    def _calls_leading_to(self, values: Iterable[int], *, since: int) -> set[int]:
        """Return the calls that lead to values and were made after the value `since`."""
        # A call before it cannot depend on it.
        floor = max(self.graph.values[since].node, -1)

        # Walk back from the values.
        leading: set[int] = set()
        stack = list(values)
        while stack:
            node = self.graph.values[stack.pop()].node
            is_new = node > floor and node not in leading
            if is_new:
                leading.add(node)
                stack.extend(self.graph.float_indices(node))
        return leading

    def calls_reached(self, ancestor: int, calls: Iterable[int]) -> list[int]:
        """Return those of some calls, in ascending order, that a value reaches through them."""
        reached = {ancestor}
        cone: list[int] = []
        for node in calls:
            # The call depends on the value if it reads the result of a call that does.
            if not reached.isdisjoint(self.graph.float_indices(node)):
                cone.append(node)
                reached.update(self.graph.nodes[node].outputs)
        return cone


def _numbers_of_statistic(shape: tuple[int, ...]) -> int:
    """Return how many numbers a value of one number per token has; -1 for a scalar stream."""
    if not shape:
        return -1

    # The features are in the last dimension.
    return math.prod(shape) // max(1, shape[-1])
