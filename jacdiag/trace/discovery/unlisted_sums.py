"""Name the residual sums of a record that are not listed as sub-layers, each with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import Graph, Node, Value
from jacdiag.trace.graph.ops import SELECT_POSITIONS, SUMS_OF_A_STACK, WRITE_POSITIONS

_MOST_STEPS = 64  # of a walk back from a term
_MOST_VALUES = 32  # that a walk on from a stack visits


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One residual sum that is not a sub-layer.

    Attributes:
        module: name of the module call that makes the sum, "" for the model itself.
        line: source file and line of the addition.
        reason: why it is not listed.
    """

    module: str
    line: str
    reason: str

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} at {self.line}: {self.reason}"


def left_out(graph: Graph, finder: Finder, sites: Sequence[Site]) -> list[LeftOut]:
    """Return the residual sums that are not listed, in the order of the forward.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        sites: the sub-layers that are listed.
    """
    # 1. The calls that belong to a listed sub-layer.
    streams = _Streams(graph, finder, sites)
    listed: set[int] = set()
    for site in sites:
        listed |= {site.addition, site.carrier[0], graph.values[site.output].node}

    # 2. Pairs that were not taken, and sums with a gate.
    reasons = _dropped_pairs(finder, streams, listed)
    reasons |= _gated_sums(graph, sites, streams, listed)

    # 3. Other calls on a stream.
    for node in graph.nodes:
        if node.index in listed or node.index in reasons or node.function:
            continue
        reason = _reason_of_unpaired(node, streams)
        if reason:
            reasons[node.index] = reason
    return [_described(graph, node, reasons[node]) for node in sorted(reasons)]


def _dropped_pairs(finder: Finder, streams: _Streams, listed: set[int]) -> dict[int, str]:
    """Return the reasons of pairs that were recognised and then not taken, by their addition."""
    reasons: dict[int, str] = {}
    for site, reason in finder.dropped:
        on_stream = streams.goes_on(site.output) or streams.is_stream(site.shortcut)
        if site.addition not in listed and on_stream:
            reasons[site.addition] = reason
    return reasons


def _gated_sums(
    graph: Graph, sites: Sequence[Site], streams: _Streams, listed: set[int]
) -> dict[int, str]:
    """Return the reasons of sums whose shortcut is gated; one inside a branch is part of that."""
    # 1. The calls that have a place already.
    assigned = set(listed)
    for site in sites:
        assigned.update(site.cone)

    # 2. The other sums.
    reasons: dict[int, str] = {}
    for node in graph.nodes:
        is_visible_sum = node.terms is not None and not node.function
        if not is_visible_sum or node.index in assigned:
            continue
        if streams.gates_its_shortcut(node.index):
            reasons[node.index] = (
                "a gate or another function changes the shortcut on its way into the sum"
            )
    return reasons


def _reason_of_unpaired(node: Node, streams: _Streams) -> str:
    """Return why a call on a stream makes no pair, "" if it does not belong to a stream."""
    if node.terms is not None:
        if streams.adds_to_another(node.index):
            if streams.projects_its_shortcut(node.index):
                return "a product with weights changes the shortcut on its way into the sum"
            return "the branch does not read this sum's own shortcut"
        if streams.adds_to_part(node.index):
            return "the branch is added to some positions only, which are then written back"
    if node.name == "stack" and streams.mixes(node.index):
        count = len(node.operands)
        return f"a weighted sum of {count} earlier outputs, not a shortcut and a branch"
    return ""


def _described(graph: Graph, node: int, reason: str) -> LeftOut:
    record = graph.nodes[node]
    line = record.line or f"{record.key[1]}:{record.key[2]}"
    return LeftOut(graph.path(record.invocation), line, reason)


class _Streams:
    """Where the listed sub-layers begin and end, to tell sums on a stream from other additions."""

    def __init__(self, graph: Graph, finder: Finder, sites: Sequence[Site]) -> None:
        self.graph = graph
        self.finder = finder
        self.sites = [*sites, *(site for site, _ in finder.dropped)]
        self.sums = {graph.values[site.output].node for site in self.sites}
        self.lines = {graph.nodes[node].line for node in self.sums}

    def _two_terms(self, node: int) -> list[Term]:
        """Return the terms of a sum of two values of its own shape; [] if it is none."""
        record = self.graph.nodes[node]
        terms = [term for term in record.terms or () if self.finder.is_full(node, term)]
        if len(terms) != 2:
            return []
        return terms

    def _pairs(self, node: int) -> list[tuple[Term, Term]]:
        """Return a sum's two terms as (shortcut, branch), either way around; [] if it has not two.

        Which of them is the shortcut has to be tested.
        """
        terms = self._two_terms(node)
        if not terms:
            return []
        first, second = terms
        return [(first, second), (second, first)]

    def adds_to_another(self, node: int) -> bool:
        """Return whether a sum adds a function of something else to a stream that goes on."""
        # 1. The sum goes on.
        record, pairs = self.graph.nodes[node], self._pairs(node)
        if not pairs or not record.outputs:
            return False
        if not self.goes_on(record.outputs[0]):
            return False

        # 2. One term is on the stream, the other is a function of something else.
        for shortcut, branch in pairs:
            if shortcut.operand is None or shortcut.product:
                continue
            # The first pass through a loop or a layer class has no sum before it, but the same
            # source line.
            on_stream = self.is_stream(shortcut.operand) or record.line in self.lines
            if on_stream and self._is_function(shortcut.operand, branch.values):
                return True
        return False

    def projects_its_shortcut(self, node: int) -> bool:
        """Return whether both terms are products of one value with weights.

        A ResNet block that changes width has such terms.
        """
        for shortcut, branch in self._pairs(node):
            product = self._last_product(shortcut.values)
            if product is None or self._made_by(product, branch.values):
                continue

            # The branch is a product of what the shortcut's own product reads.
            for read in self.graph.float_inputs(product):
                if self._passes_product(read.index, branch.values):
                    return True
        return False

    def _made_by(self, node: int, values: Sequence[int]) -> bool:
        """Return whether a call's results lead to one of `values`."""
        results = self.graph.nodes[node].outputs
        return any(self.finder.reaches(result, values, through_products=True) for result in results)

    def _last_product(self, values: Sequence[int]) -> int | None:
        """Return the nearest product before `values`; None if a sum of the stream is nearer."""
        queue, seen = list(values), set(values)
        while queue:
            maker = self.graph.values[queue.pop(0)].node
            if maker < 0 or maker in self.sums:
                return None
            if self.finder.is_product(maker):
                return maker
            for read in self.graph.float_inputs(maker):
                if read.index not in seen:
                    seen.add(read.index)
                    queue.append(read.index)
        return None

    def gates_its_shortcut(self, node: int) -> bool:
        """Return whether one value reaches a term by elementwise functions, the other by a branch.

        An example is a highway gate, x * (1 - g) + g * f(x).
        """
        record, pairs = self.graph.nodes[node], self._pairs(node)
        if not pairs or not record.outputs:
            return False
        shape = self.graph.values[record.outputs[0]].shape
        for shortcut, branch in pairs:
            for source in self._elementwise_sources(shortcut.values, shape):
                if source not in branch.values and self._passes_product(source, branch.values):
                    return True
        return False

    def _elementwise_sources(self, values: Sequence[int], shape: tuple[int, ...]) -> Iterator[int]:
        """Yield the values of a shape that lead to `values` with no product between.

        The nearest comes first.
        """
        queue, seen = list(values), set(values)
        steps = 0
        while queue and steps < _MOST_STEPS:
            steps += 1
            value = self.graph.values[queue.pop(0)]
            if value.shape == shape and value.is_differentiable:
                yield value.index

            # Go back, but through no product and no sum of the stream.
            if value.node < 0 or value.node in self.sums:
                continue
            if self.finder.is_product(value.node):
                continue
            for read in self.graph.float_inputs(value.node):
                if read.index not in seen:
                    seen.add(read.index)
                    queue.append(read.index)

    def _passes_product(self, source: int, values: Sequence[int]) -> bool:
        """Return whether a path from a value to `values` passes a product with a parameter."""
        if not self.finder.reaches(source, values, through_products=True):
            return False
        return any(self.finder.is_product(call) for call in self.finder.cone(source, values))

    def adds_to_part(self, node: int) -> bool:
        """Return whether a branch is added to some positions of its shortcut and written back."""
        pairs = self._pairs(node)
        if not pairs or not self._is_written_back(node):
            return False
        for shortcut, branch in pairs:
            # 1. The shortcut is a selection of positions.
            if shortcut.operand is None:
                continue
            maker = self.graph.values[shortcut.operand].node
            if maker < 0 or self.graph.nodes[maker].name not in SELECT_POSITIONS:
                continue

            # 2. The branch is a function of all positions.
            all_positions = self.graph.nodes[maker].inputs[0]
            if self.finder.is_branch(all_positions, branch):
                return True
        return False

    def _is_written_back(self, node: int) -> bool:
        """Return whether a call that writes to positions reads a result of another call."""
        for output in self.graph.nodes[node].outputs:
            for reader in self.graph.values[output].consumers:
                if self.graph.nodes[reader].name in WRITE_POSITIONS:
                    return True
        return False

    def mixes(self, node: int) -> bool:
        """Return whether outputs of one shape are stacked and then summed into the stream again."""
        # 1. What is stacked: earlier outputs of one shape.
        record = self.graph.nodes[node]
        stacked = self._differentiable(record.operands)
        shapes = {value.shape for value in stacked}
        if len(stacked) < 2 or len(shapes) != 1:
            return False
        (shape,) = shapes

        # 2. The later ones are made from the first.
        first, *later = [value.index for value in stacked]
        between = self.finder.cone(first, later)
        if not any(self.finder.is_product(call) for call in between):
            return False

        # 3. The sum that the stack leads to continues the stream, or what is stacked does.
        output = self._reduced(record.outputs[0], shape)
        if output is None:
            return False
        if self.goes_on(output):
            return True
        return any(self.is_stream(index) for index in (first, *later))

    def _differentiable(self, indices: Sequence[int]) -> list[Value]:
        """Return those values that depend on the model's input and are floating-point."""
        values = [self.graph.values[index] for index in indices]
        return [value for value in values if value.is_differentiable]

    def _reduced(self, value: int, shape: tuple[int, ...]) -> int | None:
        """Return the first sum of that shape that a stack leads to; no product lies between."""
        stack = [value]
        for _ in range(_MOST_VALUES):
            if not stack:
                return None
            for node in self.graph.values[stack.pop(0)].consumers:
                if self.finder.is_product(node):
                    continue
                record = self.graph.nodes[node]
                is_sum = record.name in SUMS_OF_A_STACK
                for output in record.outputs:
                    if is_sum and self.graph.values[output].shape == shape:
                        return output
                    stack.append(output)
        return None

    def goes_on(self, output: int) -> bool:
        """Return whether a listed shortcut continues a value with no product between."""
        shape = self.graph.values[output].shape
        shortcuts = [site.shortcut for site in self.sites]
        later = [index for index in shortcuts if self.graph.values[index].shape == shape]
        if not later:
            return False
        return self.finder.reaches(output, later, through_products=False, statistics=False)

    def is_stream(self, value: int) -> bool:
        """Return whether a value continues the output of a listed sum with no product between."""
        shape = self.graph.values[value].shape
        for site in self.sites:
            if self.graph.values[site.output].shape != shape:
                continue
            if self.finder.reaches(site.output, (value,), through_products=False, statistics=False):
                return True
        return False

    def _is_function(self, shortcut: int, branch: tuple[int, ...]) -> bool:
        """Return whether a branch is made by a product and does not depend on the shortcut."""
        # 1. It does not depend on the shortcut.
        if self.finder.reaches(shortcut, branch, through_products=True):
            return False

        # 2. A product lies before it, nearer than a sum of the stream.
        stack, seen = list(branch), set()
        while stack:
            node = self.graph.values[stack.pop()].node
            if node < 0 or node in seen:
                continue
            seen.add(node)
            if self.finder.is_product(node):
                return True
            if node in self.sums:
                continue
            stack.extend(value.index for value in self.graph.float_inputs(node))
        return False
