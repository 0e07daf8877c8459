"""What a value carries: the values that it is a copy or a mixture of.

A shortcut may be scaled, cast, reshaped or mixed with parallel streams on its way into the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from jacdiag.trace.graph.additions import FORMS, Term
from jacdiag.trace.graph.ops import CARRIERS, SCALINGS, SCATTERS
from jacdiag.trace.graph.reachability import Walks

_MOST_CARRIERS = 8  # calls that a value is followed back through
_MOST_VALUES = 256  # that a search for streams visits


class Carriers(Walks):
    """Finds what the values of one graph are copies or mixtures of."""

    def carriers(self, value: int) -> Iterable[int]:
        """Yield a value and what it is a scaled, cast or reshaped copy of.

        Args:
            value: its index.
        """
        for _ in range(_MOST_CARRIERS):
            yield value
            source = self._carried_value(value)
            if source is None:
                return

            # Go on from what it is a copy of.
            value = source

    def _carried_value(self, value: int) -> int | None:
        """Return what a value is a scaled, cast or reshaped copy of; None if of nothing."""
        # 1. An input, a parameter or a constant is no copy.
        node = self.graph.values[value].node
        if node < 0:
            return None

        # 2. The result of a call that passes a value on.
        if not self._carries(node):
            return None
        return self.only_float_input(node)

    def only_float_input(self, node: int) -> int | None:
        """Return the one live value that a call reads; None if it reads several, or none."""
        live = self.graph.float_indices(node)
        if len(live) != 1:
            return None
        return live[0]

    def _carries(self, node: int) -> bool:
        """Return whether a call passes a value on: scaled, cast, reshaped, or plus a constant.

        `sum()` of Python begins by adding to 0.
        """
        # 1. Indexing that keeps everything, as in y[:, :] += f(x).
        record = self.graph.nodes[node]
        if record.name == "__getitem__":
            indexed = self.graph.values[record.inputs[0]]
            return self.graph.values[record.outputs[0]].shape == indexed.shape

        # 2. A sum at chosen positions changes the value there.
        if record.name in SCATTERS:
            return False

        # 3. Any other sum passes its value on if the rest is a constant.
        if record.name in FORMS:
            return self._adds_a_constant(record.terms or ())

        # 4. With running statistics, and in eval mode, a batch norm is a gain and a bias per
        # channel.
        if record.name == "batch_norm":
            return self._count_states_read(node) >= 4

        # 5. Scalings, casts and reshapes, by their names.
        return record.name in CARRIERS

    def _count_states_read(self, node: int) -> int:
        """Return how many values a call reads that depend on parameters or buffers."""
        return sum(value.from_state for value in self.graph.values_read(node))

    def is_unchanged(self, source: int, value: int) -> bool:
        """Return whether a value is another one itself, reshaped, cast or plus a constant.

        The Jacobian from one to the other is a permutation then.

        Args:
            source: index of the earlier value.
            value: index of the later one.
        """
        current: int | None = value
        while current is not None and current != source:
            current = self._same_value_before(current)
        return current == source

    def _same_value_before(self, value: int) -> int | None:
        """Return the value that a value is, up to its shape, its dtype and a constant."""
        # 1. An input, a parameter or a constant.
        node = self.graph.values[value].node
        if node < 0 or not self._carries(node):
            return None

        # 2. Scalings and batch norms change a value.
        record = self.graph.nodes[node]
        if record.name in SCALINGS or record.name == "batch_norm":
            return None

        # 3. So does a sum that scales its term.
        source = self.only_float_input(node)
        if record.name in FORMS and not _adds_plainly(record.terms or (), source):
            return None
        return source

    def _adds_a_constant(self, terms: Iterable[Term]) -> bool:
        """Return whether an addition has one live term at most, and that one is a plain value."""
        # 1. Two live terms make a sum.
        live = [term for term in terms if self._is_live(term)]
        if len(live) > 1:
            return False

        # 2. Without a live term there is nothing to be mixed.
        if not live:
            return True

        # 3. One live term, which may still be a product.
        return _is_one_value(live[0])

    def _is_live(self, term: Term) -> bool:
        """Return whether a term depends on the model's input."""
        return any(self.graph.values[index].live for index in term.values)

    def mixed_streams(self, value: int) -> Iterable[int]:
        """Yield the parallel streams (B, T, S, d) that a value mixes by small matrices.

        Hyper-connections have such streams.
        """
        shape = self.graph.values[value].shape
        if len(shape) < 4:
            return

        # Walk back from the value, breadth first.
        queue = [value]
        seen = {value}
        while queue and len(seen) < _MOST_VALUES:
            current = queue.pop(0)
            is_stream = self.graph.values[current].shape == shape
            if is_stream and current != value:
                yield current

            # What the current value is made of, each once.
            for index in self._sources_of_mixture(current, shape):
                if index not in seen:
                    seen.add(index)
                    queue.append(index)

    def _sources_of_mixture(self, value: int, shape: tuple[int, ...]) -> list[int]:
        """Return what a value is made of; [] if a product made it that is no mixture of streams.

        Args:
            value: its index.
            shape: (B, T, S, d) of the streams.
        """
        # 1. An input, a parameter or a constant.
        node = self.graph.values[value].node
        if node < 0:
            return []

        # 2. A product that makes something other than a mixture.
        ends_the_streams = self.is_product(node) and not self._mixes(node, shape)
        if ends_the_streams:
            return []

        # 3. Any other call.
        return self.graph.float_indices(node)

    def _mixes(self, node: int, shape: tuple[int, ...]) -> bool:
        """Return whether a product mixes the streams by a small matrix and keeps their shape.

        The matrix is no larger than the number of streams squared.
        """
        # 1. Rows of an image (B, C, H, W) are no streams.
        record = self.graph.nodes[node]
        if record.name.startswith("conv"):
            return False

        # 2. The matrix is small.
        streams = shape[-2]
        if self._largest_weight(node) > streams**2:
            return False

        # 3. The streams come in and go out in the same shape.
        shapes_made = [self.graph.values[index].shape for index in record.outputs]
        return shape in self._live_shapes(node) and shape in shapes_made

    def _largest_weight(self, node: int) -> int:
        """Return how many numbers the largest weight has that a call reads; 0 if it reads none."""
        largest = 0
        for value in self.graph.values_read(node):
            # What the stream is multiplied by.
            if value.is_weight:
                largest = max(largest, math.prod(value.shape))
        return largest

    def _live_shapes(self, node: int) -> set[tuple[int, ...]]:
        """Return the shapes of what a call reads that depends on the model's input."""
        return {self.graph.values[index].shape for index in self.graph.live_inputs(node)}


def _adds_plainly(terms: Iterable[Term], value: int | None) -> bool:
    """Return whether a value is a term of an addition as it is, without a factor."""
    return any(term.operand is not None and term.operand == value for term in terms)


def _is_one_value(term: Term) -> bool:
    """Return whether a term is one value, perhaps times a number, and no product by a matrix."""
    return not term.product and len(term.values) == 1
