"""Name the residual sums of a record that are not listed as sub-layers, each with a reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import Graph, Node
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
    not_open = listed | {node for site in sites for node in site.cone}
    reasons: dict[int, str] = {}
    for node in graph.nodes:
        if node.terms is None or node.function or node.index in not_open:
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
        return terms if len(terms) == 2 else []

    def adds_to_another(self, node: int) -> bool:
        """Return whether a sum adds a function of something else to a stream that goes on."""
        record, terms = self.graph.nodes[node], self._two_terms(node)
        if not terms or not record.outputs or not self.goes_on(record.outputs[0]):
            return False
        for shortcut, branch in (terms, terms[::-1]):
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
        terms = self._two_terms(node)
        if not terms:
            return False
        for shortcut, branch in (terms, terms[::-1]):
            product = self._last_product(shortcut.values)
            if product is None or self._made_by(product, branch.values):
                continue
            if any(
                self._passes_product(read.index, branch.values)
                for read in self.graph.float_inputs(product)
            ):
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
        record, terms = self.graph.nodes[node], self._two_terms(node)
        if not terms or not record.outputs:
            return False
        shape = self.graph.values[record.outputs[0]].shape
        for shortcut, branch in (terms, terms[::-1]):
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
            if value.shape == shape and value.live and value.is_float:
                yield value.index
            if value.node < 0 or value.node in self.sums or self.finder.is_product(value.node):
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
        terms = self._two_terms(node)
        if not terms or not self._is_written_back(node):
            return False
        for shortcut, branch in (terms, terms[::-1]):
            if shortcut.operand is None:
                continue
            maker = self.graph.values[shortcut.operand].node
            if maker < 0 or self.graph.nodes[maker].name not in SELECT_POSITIONS:
                continue
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
        operands = [self.graph.values[index] for index in self.graph.nodes[node].operands]
        stacked = [value for value in operands if value.is_differentiable]
        shapes = {value.shape for value in stacked}
        if len(stacked) < 2 or len(shapes) != 1:
            return False

        # 2. The later ones are made from the first.
        first, *later = [value.index for value in stacked]
        between = self.finder.cone(first, later)
        if not any(self.finder.is_product(call) for call in between):
            return False

        # 3. The sum that the stack leads to.
        output = self._reduced(self.graph.nodes[node].outputs[0], shapes.pop())
        if output is None:
            return False
        return self.goes_on(output) or any(self.is_stream(index) for index in (first, *later))

    def _reduced(self, value: int, shape: tuple[int, ...]) -> int | None:
        """Return the first sum of that shape that a stack leads to; no product lies between."""
        stack = [value]
        for _ in range(_MOST_VALUES):
            if not stack:
                return None
            for node in self.graph.values[stack.pop(0)].consumers:
                record = self.graph.nodes[node]
                if self.finder.is_product(node):
                    continue
                for output in record.outputs:
                    is_sum = record.name in SUMS_OF_A_STACK
                    if is_sum and self.graph.values[output].shape == shape:
                        return output
                    stack.append(output)
        return None

    def goes_on(self, output: int) -> bool:
        """Return whether a listed shortcut continues a value with no product between."""
        shape = self.graph.values[output].shape
        later = [
            site.shortcut for site in self.sites if self.graph.values[site.shortcut].shape == shape
        ]
        return bool(later) and self.finder.reaches(
            output, later, through_products=False, statistics=False
        )

    def is_stream(self, value: int) -> bool:
        """Return whether a value continues the output of a listed sum with no product between."""
        shape = self.graph.values[value].shape
        for site in self.sites:
            same = self.graph.values[site.output].shape == shape
            if same and self.finder.reaches(
                site.output, (value,), through_products=False, statistics=False
            ):
                return True
        return False

    def _is_function(self, shortcut: int, branch: tuple[int, ...]) -> bool:
        """Return whether a branch is made by a product and does not depend on the shortcut."""
        if self.finder.reaches(shortcut, branch, through_products=True):
            return False
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
