"""Name the residual sums of a record that are not listed as sub-layers, each with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jacdiag.trace.discovery.blocking_calls import find_blocking_calls, is_read, name_call
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import Graph, Node, Value
from jacdiag.trace.graph.ops import (
    CUT_INTO_PIECES,
    CUTS,
    DETACHES,
    FLAT,
    SELECT_POSITIONS,
    SUMS_OF_A_STACK,
    WRITE_POSITIONS,
)

_MOST_STEPS = 64  # of a walk back from a term
_MOST_VALUES = 32  # that a walk on from a stack visits
_ADDS_IN_PLACE = ("add_", "__iadd__", "sub_", "__isub__")
_JOINS = ("cat", "concat", "concatenate", "hstack", "vstack")


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
        has_place = node.index in listed or node.index in reasons
        if has_place or node.function:
            continue
        reason = _reason_of_unpaired(node, streams)
        if reason:
            reasons[node.index] = reason

    # 4. In the order of the forward.
    return [_described(graph, node, reasons[node]) for node in sorted(reasons)]


def _dropped_pairs(finder: Finder, streams: _Streams, listed: set[int]) -> dict[int, str]:
    """Return the reasons of pairs that were recognised and then not taken, by their addition."""
    reasons: dict[int, str] = {}
    for site, reason in finder.dropped:
        # Another pair of the same addition may be listed.
        if site.addition in listed:
            continue

        # A sum that begins and ends apart from every stream is not worth a line.
        if streams.goes_on(site.output) or streams.is_stream(site.shortcut):
            reasons[site.addition] = reason
    return reasons


def _gated_sums(
    graph: Graph, sites: Sequence[Site], streams: _Streams, listed: set[int]
) -> dict[int, str]:
    """Return the reasons of sums whose shortcut is gated; one inside a branch is part of that."""
    # 1. The calls that have a place already.
    assigned = listed.union(*(site.cone for site in sites))

    # 2. The other sums that autograd sees.
    reasons: dict[int, str] = {}
    for node in graph.nodes:
        if node.terms is None or node.function:
            continue
        if node.index in assigned:
            continue

        # 3. Those whose shortcut is gated.
        if streams.gates_its_shortcut(node.index):
            reasons[node.index] = (
                "a gate or another function changes the shortcut on its way into the sum"
            )
    return reasons


def _reason_of_unpaired(node: Node, streams: _Streams) -> str:
    """Return why a call on a stream makes no pair, "" if it does not belong to a stream."""
    # 1. A sum.
    if node.terms is not None:
        return _reason_of_sum(node.index, streams)

    # 2. A stack, which a later call sums.
    if node.name == "stack" and streams.mixes(node.index):
        count = len(node.operands)
        return f"a weighted sum of {count} earlier outputs, not a shortcut and a branch"
    return ""


def _reason_of_sum(node: int, streams: _Streams) -> str:
    """Return why a sum on a stream makes no pair, "" if it does not belong to a stream."""
    # 1. One term is on the stream, the other is a function of something else.
    if streams.adds_to_another(node):
        if streams.projects_its_shortcut(node):
            return "a product with weights changes the shortcut on its way into the sum"
        return streams.relation_to_shortcut(node)

    # 2. One term is a part of the stream.
    if streams.adds_to_part(node):
        return "the branch is added to a part of the stream only, which is then put back"
    return ""


def _described(graph: Graph, node: int, reason: str) -> LeftOut:
    """Return a sum with the module and the line that make it."""
    record = graph.nodes[node]
    return LeftOut(graph.path(record.invocation), record.source_line, reason)


class _Queue:
    """Values that a walk has still to visit, the nearest first and each once.

    Attributes:
        waiting: the values, by index.
    """

    def __init__(self, values: Iterable[int]) -> None:
        self.waiting = list(values)
        self._seen = set(self.waiting)

    def next(self) -> int:
        """Return the nearest value, which waits no longer."""
        return self.waiting.pop(0)

    def add(self, values: Iterable[int]) -> None:
        """Append the values that have not been added before."""
        for value in values:
            if value not in self._seen:
                self._seen.add(value)
                self.waiting.append(value)


class _Streams:
    """Where the listed sub-layers begin and end, to tell sums on a stream from other additions."""

    def __init__(self, graph: Graph, finder: Finder, sites: Sequence[Site]) -> None:
        self.graph = graph
        self.finder = finder
        dropped = [site for site, _ in finder.dropped]
        self.sites = [*sites, *dropped]

        # The calls that make their sums, and the source lines of those.
        self.sums = {graph.values[site.output].node for site in self.sites}
        self.lines = {graph.nodes[node].line for node in self.sums}

    def _two_terms(self, node: int) -> list[Term]:
        """Return the terms of a sum of two values of its own shape; [] if it is none."""
        full_terms: list[Term] = []
        for term in self.graph.nodes[node].terms or ():
            # A bias has another shape.
            if self.finder.is_full(node, term):
                full_terms.append(term)

        # A sum of three is taken apart elsewhere.
        if len(full_terms) != 2:
            return []
        return full_terms

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
        pairs = self._pairs(node)
        if not pairs:
            return False
        record = self.graph.nodes[node]
        if not self.goes_on(record.outputs[0]):
            return False

        # 2. One term is on the stream, the other is a function of something else.
        for shortcut, branch in pairs:
            start = shortcut.operand
            if start is None or not self._is_on_stream(start, record.line):
                continue
            if self._is_function(start, branch.values):
                return True
        return False

    def relation_to_shortcut(self, node: int) -> str:
        """Return how a branch reads the shortcut of a sum that no gradient gets to from there.

        Args:
            node: a sum that `adds_to_another` found.
        """
        # 1. The sum's shortcut does not pass on a gradient itself.
        record = self.graph.nodes[node]
        for shortcut, branch in self._pairs(node):
            detach = self._detach_before(shortcut.operand)
            if detach is None:
                continue
            source = self.graph.nodes[detach].inputs[0]
            if self.finder.reaches(source, branch.values, through_products=True):
                return (
                    f"its shortcut passes {name_call(self.graph, detach)}, which takes its gradient"
                )

        # 2. The branch reads the shortcut, but by calls without a derivative.
        for shortcut, branch in self._pairs(node):
            start = shortcut.operand
            if start is None or not self._is_on_stream(start, record.line):
                continue
            if is_read(self.graph, start, branch.values):
                return self._reason_without_gradient(start, branch)

        # 3. It does not read it.
        return "the branch does not read this sum's own shortcut"

    def _reason_without_gradient(self, start: int, branch: Term) -> str:
        """Return how a branch reads the shortcut of its sum although no gradient gets there."""
        calls = find_blocking_calls(self.graph, start, branch.values, CUTS)
        if not calls:
            return "no gradient passes from the branch to this sum's own shortcut"

        # What the calls do to a gradient.
        names = ", ".join(dict.fromkeys(name_call(self.graph, call) for call in calls))
        effect = "no gradient passes there"
        if all(self.graph.nodes[call].name in FLAT for call in calls):
            effect = "its derivative is zero there"
        return f"the branch reads this sum's own shortcut through {names} alone, and {effect}"

    def _detach_before(self, value: int | None) -> int | None:
        """Return the detach that made a value; None if none did."""
        if value is None:
            return None
        maker = self.graph.values[value].node
        if maker < 0 or self.graph.nodes[maker].name not in DETACHES:
            return None
        return maker

    def _is_on_stream(self, value: int, line: str) -> bool:
        """Return whether a value that is added at a source line is on a stream.

        The first pass through a loop or a layer class has no sum before it, but the same source
        line as the listed sums of the other passes.
        """
        return self.is_stream(value) or line in self.lines

    def projects_its_shortcut(self, node: int) -> bool:
        """Return whether both terms are products of one value with weights.

        A ResNet block that changes width has such terms.
        """
        for shortcut, branch in self._pairs(node):
            # 1. The shortcut's own product, which is not part of the branch.
            product = self._last_product(shortcut.values)
            if product is None or self._made_by(product, branch.values):
                continue

            # 2. The branch is a product of what the shortcut's own product reads.
            for source in self.graph.float_indices(product):
                if self._passes_product(source, branch.values):
                    return True
        return False

    def _made_by(self, node: int, values: Sequence[int]) -> bool:
        """Return whether a call's results lead to one of `values`."""
        for result in self.graph.nodes[node].outputs:
            # Whatever lies between.
            is_made = self.finder.reaches(result, values, through_products=True)
            if is_made:
                return True
        return False

    def _last_product(self, values: Sequence[int]) -> int | None:
        """Return the nearest product before `values`; None if a sum of the stream is nearer."""
        queue = _Queue(values)
        while queue.waiting:
            # 1. The call that made the next value.
            maker = self.graph.values[queue.next()].node
            if maker < 0 or maker in self.sums:
                return None
            if self.finder.is_product(maker):
                return maker

            # 2. Go back to what it reads.
            queue.add(self.graph.float_indices(maker))
        return None

    def gates_its_shortcut(self, node: int) -> bool:
        """Return whether one value reaches a term by elementwise functions, the other by a branch.

        An example is a highway gate, x * (1 - g) + g * f(x).
        """
        pairs = self._pairs(node)
        if not pairs:
            return False

        # The values on the stream have the shape of the sum.
        shape = self.graph.values[self.graph.nodes[node].outputs[0]].shape

        # Either term may be the gated shortcut.
        return any(self._is_gated(shortcut, branch, shape) for shortcut, branch in pairs)

    def _is_gated(self, shortcut: Term, branch: Term, shape: tuple[int, ...]) -> bool:
        """Return whether a value of a shape leads to a term by gates and to another by a branch."""
        for source in self._elementwise_sources(shortcut.values, shape):
            # 1. The branch has to be a function of the source, not the source itself.
            if source in branch.values:
                continue

            # 2. A function with a product.
            if self._passes_product(source, branch.values):
                return True
        return False

    def _elementwise_sources(self, values: Sequence[int], shape: tuple[int, ...]) -> Iterator[int]:
        """Yield the values of a shape that lead to `values` with no product between.

        The nearest comes first.
        """
        queue = _Queue(values)
        steps = 0
        while queue.waiting and steps < _MOST_STEPS:
            # 1. The next value.
            steps += 1
            value = self.graph.values[queue.next()]
            if value.is_differentiable and value.shape == shape:
                yield value.index

            # 2. Go back, but through no product and no sum of the stream.
            if not self._ends_a_way(value.node):
                queue.add(self.graph.float_indices(value.node))

    def _ends_a_way(self, maker: int) -> bool:
        """Return whether a walk back ends at what made a value.

        Args:
            maker: a call, or below 0 for an input, a parameter or a constant.
        """
        # 1. Nothing made it, or a sum of the stream did.
        if maker < 0 or maker in self.sums:
            return True

        # 2. A product makes something else of what it reads.
        return self.finder.is_product(maker)

    def _passes_product(self, source: int, values: Sequence[int]) -> bool:
        """Return whether a path from a value to `values` passes a product with a parameter."""
        if not self.finder.reaches(source, values, through_products=True):
            return False
        calls_between = self.finder.cone(source, values)
        return self.finder.has_product(calls_between)

    def adds_to_part(self, node: int) -> bool:
        """Return whether a branch is added to a part of its shortcut, which is then put back."""
        # The branch is a function of all of the shortcut.
        for shortcut, branch in self._pairs(node):
            for whole in self._wholes_of(shortcut.operand):
                if self.finder.is_branch(whole, branch) and self._is_put_back(node, whole):
                    return True
        return False

    def _wholes_of(self, value: int | None) -> list[int]:
        """Return the value that another is a part of, and what that is a copy of; [] if of none."""
        if value is None:
            return []

        # An input, a parameter or a constant was not selected from anything.
        maker = self.graph.values[value].node
        if maker < 0:
            return []

        # A selection reads what it selects from first.
        record = self.graph.nodes[maker]
        if record.name not in SELECT_POSITIONS | CUT_INTO_PIECES:
            return []
        wholes = [record.inputs[0]]

        # A copy is written to where the original must stay.
        maker = self.graph.values[wholes[0]].node
        is_copy = maker >= 0 and self.graph.nodes[maker].name == "clone"
        if is_copy:
            wholes.append(self.graph.nodes[maker].inputs[0])
        return wholes

    def _is_put_back(self, node: int, whole: int) -> bool:
        """Return whether a sum takes its place in the value that its shortcut is a part of.

        Args:
            node: the sum.
            whole: what the shortcut was selected from.
        """
        # 1. It is written to the memory of a part.
        record = self.graph.nodes[node]
        if record.name in _ADDS_IN_PLACE:
            return True

        # 2. A later call writes it back, or joins the parts again.
        shape = self.graph.values[whole].shape
        for output in record.outputs:
            for reader in self.graph.values[output].consumers:
                call = self.graph.nodes[reader]
                if call.name in WRITE_POSITIONS:
                    return True
                if call.name in _JOINS and self._output_of_shape(call, shape) is not None:
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
        if not self.finder.has_product(self.finder.cone(first, later)):
            return False

        # 3. A call sums the stack.
        output = self._reduced(record.outputs[0], shape)
        if output is None:
            return False

        # 4. The sum continues the stream, or what is stacked does.
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

            # What the next value becomes.
            for node in self._readers_without_product(stack.pop(0)):
                record = self.graph.nodes[node]
                if record.name in SUMS_OF_A_STACK:
                    result = self._output_of_shape(record, shape)
                    if result is not None:
                        return result
                stack.extend(record.outputs)
        return None

    def _readers_without_product(self, value: int) -> list[int]:
        """Return the calls that read a value and multiply by no matrix of parameters."""
        readers = self.graph.values[value].consumers
        return [node for node in readers if not self.finder.is_product(node)]

    def _output_of_shape(self, record: Node, shape: tuple[int, ...]) -> int | None:
        """Return the first result of a call that has a shape; None if none has."""
        for output in record.outputs:
            # The shape of one of the stacked values.
            output_shape = self.graph.values[output].shape
            if output_shape == shape:
                return output
        return None

    def goes_on(self, output: int) -> bool:
        """Return whether a listed shortcut continues a value with no product between."""
        # 1. Only a value of the same shape can be of the stream.
        shape = self.graph.values[output].shape
        later: list[int] = []
        for site in self.sites:
            if self.graph.values[site.shortcut].shape == shape:
                later.append(site.shortcut)

        # 2. One of them is reached from the value.
        return self.finder.reaches(output, later, through_products=False, statistics=False)

    def is_stream(self, value: int) -> bool:
        """Return whether a value continues the output of a listed sum with no product between."""
        shape = self.graph.values[value].shape
        for site in self.sites:
            # Only a sum of the same shape can be of the stream.
            output = site.output
            if self.graph.values[output].shape != shape:
                continue

            # The value is that sum, perhaps cast or normalised since.
            if self.finder.reaches(output, (value,), through_products=False, statistics=False):
                return True

        # No sum leads to it.
        return False

    def _is_function(self, shortcut: int, branch: tuple[int, ...]) -> bool:
        """Return whether a branch is made by a product and does not depend on the shortcut."""
        # 1. It does not depend on the shortcut.
        if self.finder.reaches(shortcut, branch, through_products=True):
            return False

        # 2. A product lies before it, nearer than a sum of the stream.
        queue = _Queue(branch)
        while queue.waiting:
            maker = self.graph.values[queue.next()].node
            if maker < 0:
                continue
            if self.finder.is_product(maker):
                return True

            # Go back, but through no sum of the stream.
            if maker not in self.sums:
                queue.add(self.graph.float_indices(maker))
        return False
