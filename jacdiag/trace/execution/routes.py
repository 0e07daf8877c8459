"""Choose the module calls that are run again for a segment, so that little else is computed.

A *segment* is the function from one place of the record to another. The innermost module call that
holds all of it, its *owner*, can be run again for it. Mostly that computes more: a block that is
run for its FFN computes the attention before it. A *route* is a chain of smaller module calls, each
of which is run alone. In a block that computes `x + mlp(norm(x))` it is the norm, from x to v, and
then the MLP, from v to f(x).

A module call can be run alone if everything that it reads is at hand: its arguments, its own
weights, constants. Of the source it may know by one argument only, which takes another value in
every run. Whatever is in doubt is left to the owner.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jacdiag.trace.execution.tap import Where
from jacdiag.trace.graph.graph import STATE, Graph, Invocation
from jacdiag.trace.graph.ops import MIXERS, PRODUCTS, SCALED_DOT_PRODUCT

_WORK = PRODUCTS | SCALED_DOT_PRODUCT | MIXERS


@dataclass(frozen=True)
class Endpoint:
    """A place of the record, where a segment begins or ends.

    Attributes:
        where: what of the call is meant.
        node: the call. Of a value, the one that made it.
        position: among the call's operands or terms.
        value: index of the value. None for what is no value of the record, such as the term of an
            addition.
    """

    where: Where
    node: int
    position: int = 0
    value: int | None = None

    @classmethod
    def of_value(cls, graph: Graph, value: int) -> Endpoint:
        """Return the place of a value: where it is made, or given to the module call that runs."""
        return cls(Where.RESULT, graph.values[value].node, value=value)


@dataclass(frozen=True)
class Leg:
    """One module call of a route, which is run from one place to another."""

    invocation: int
    source: Endpoint
    sink: Endpoint


@dataclass(frozen=True)
class Route:
    """The module calls through which a segment is run.

    Attributes:
        legs: the module calls, each of which goes on where the one before it ends.
        products: how many matrix products they make.
        calls: how many torch calls they make.
    """

    legs: tuple[Leg, ...] = ()
    products: int = 0
    calls: int = 0

    @property
    def cost(self) -> tuple[int, int, int]:
        """What decides between two routes: every module call takes time of its own."""
        return self.products, len(self.legs), self.calls


class Routes:
    """Finds the routes of one record.

    Args:
        graph: what one forward did.
        aliases: every name of a tensor of the state -> the name that it has in the record.
        with_modules_from_outside: modules that call modules which are registered elsewhere.
    """

    def __init__(
        self, graph: Graph, aliases: Mapping[str, str], with_modules_from_outside: Collection[str]
    ) -> None:
        self.graph = graph
        self._with_modules_from_outside = with_modules_from_outside
        self._products = [node.index for node in graph.nodes if node.name in _WORK]

        # Every name of a tensor, by the one in the record.
        self._names: dict[str, list[str]] = {}
        for name, first in aliases.items():
            self._names.setdefault(first, []).append(name)

    def find(
        self, owner: int, source: Endpoint, sink: Endpoint, available: Collection[int] | None = None
    ) -> Route:
        """Return the route of a segment that makes the fewest matrix products.

        Args:
            owner: the module call that holds the segment. It is run if nothing else can be.
            source: where the segment begins.
            sink: where it ends.
            available: the module calls that can be made again; all of them if not given.
        """
        return _Search(self, owner, source, sink, available).best(sink)

    def count_products(self, start: int, last: int) -> int:
        """Return how many matrix products lie between two calls, both included."""
        return bisect_right(self._products, last) - bisect_left(self._products, start)

    def runs_as_recorded(self, call: Invocation) -> bool:
        """Return whether nothing but its arguments and weights shapes what a module call does."""
        # 1. It has ended, and what it runs is registered in it.
        if call.end < 0 or call.module in self._with_modules_from_outside:
            return False

        # 2. A module on which the run left something may have read it there.
        written = self.graph.modules_written_to
        return not any(is_inside(module, call.module) for module in written)

    def is_at_hand(self, value: int, call: Invocation) -> bool:
        """Return whether a run of a module call alone has a value that was made before it."""
        # 1. A weight has to be the module's own.
        record = self.graph.values[value]
        if record.node == STATE:
            return any(is_inside(name, call.module) for name in self._names.get(record.name, ()))

        # 2. An argument, or what a module holds before any run.
        return value in call.arguments or value in self.graph.constants_of_modules


class _Search:
    """The search for the route of one segment.

    Attributes:
        changed: the values that depend on the source.
        leading: the calls that lead to the sink.
        first_question: the call that made the first value of `changed` that Python read numbers of.
    """

    def __init__(
        self,
        routes: Routes,
        owner: int,
        source: Endpoint,
        sink: Endpoint,
        available: Collection[int] | None,
    ) -> None:
        self.routes = routes
        self.graph = routes.graph
        self.owner = self.graph.invocations[owner]
        self.source = source
        self.sink = sink
        self.available = available
        self.changed = self._values_after_source()
        self.leading = self._calls_before_sink()
        self.first_question = self._first_question()
        self._routes: dict[Endpoint, Route] = {}

    # -- the dataflow of the segment ---------------------------------------------------------------
    def _values_after_source(self) -> set[int]:
        """Return the source's value and all that is computed from it up to the sink.

        Indices and masks count, although no gradient passes them.
        """
        # 1. Where it begins: a value, or what a call makes.
        if self.source.value is not None:
            changed = {self.source.value}
        else:
            changed = set(self.graph.nodes[self.source.node].outputs)

        # 2. What reads it. An input of the model was made before the first call.
        first = max(self.source.node + 1, 0)
        for node in self.graph.nodes[first : self.sink.node + 1]:
            if not changed.isdisjoint(node.inputs):
                changed.update(node.outputs)
        return changed

    def _calls_before_sink(self) -> set[int]:
        """Return the calls after the source that what is met at the sink is computed by."""
        leading: set[int] = set()
        stack = list(self._values_at_sink())
        while stack:
            node = self.graph.values[stack.pop()].node
            if node > self.source.node and node not in leading:
                leading.add(node)
                stack.extend(self.graph.nodes[node].inputs)
        return leading

    def _first_question(self) -> int:
        """Return the first call whose result depends on the source and was read by Python.

        Numbers that Python reads are not in the record. A module call after it may be given them.
        """
        values = [self.graph.values[index] for index in self.changed]
        asked = [value.node for value in values if value.read_by_python]
        return min(asked, default=len(self.graph.nodes))

    def _values_at_sink(self) -> tuple[int, ...]:
        """Return the values that what is met at the sink is made of."""
        node = self.graph.nodes[self.sink.node]
        if self.sink.value is not None:
            return (self.sink.value,)
        if self.sink.where is Where.TERM:
            assert node.terms is not None
            return node.terms[self.sink.position].values
        if self.sink.where is Where.OPERAND:
            return (node.operands[self.sink.position],)
        return node.inputs

    # -- routes ------------------------------------------------------------------------------------
    def best(self, sink: Endpoint) -> Route:
        """Return the best route from the source to a place on the way to the sink."""
        if sink in self._routes:
            return self._routes[sink]

        # 1. The owner does it in any case.
        route = self._extended(Route(), self.owner, self.source, sink)

        # 2. The module calls inside it.
        for end in self._ends_at(sink):
            for call in self._calls_around(end.node):
                other = self._route_by(call, end)
                if other is not None and other.cost < route.cost:
                    route = other
        self._routes[sink] = route
        return route

    def _route_by(self, call: Invocation, end: Endpoint) -> Route | None:
        """Return the best route whose last module call is a given one; None if there is none."""
        # 1. Where the module call meets the source, or what became of it.
        is_available = self.available is None or call.index in self.available
        if not is_available or not self.routes.runs_as_recorded(call):
            return None

        # Autocast is switched by the code around it.
        if call.autocast != self.owner.autocast:
            return None
        entry = self._entry_of(call, end)
        if entry is None:
            return None

        # 2. The way to that place.
        before = Route()
        if entry != self.source:
            before = self.best(entry)
        return self._extended(before, call, entry, end)

    def _extended(self, route: Route, call: Invocation, source: Endpoint, sink: Endpoint) -> Route:
        """Return a route with one more module call."""
        products = self.routes.count_products(call.start, sink.node)
        return Route(
            (*route.legs, Leg(call.index, source, sink)),
            route.products + products,
            route.calls + sink.node + 1 - call.start,
        )

    def _calls_around(self, node: int) -> list[Invocation]:
        """Return the module calls in the owner that make a call, innermost first."""
        calls: list[Invocation] = []
        for index in self.graph.ancestors(self.graph.nodes[node].invocation):
            if index == self.owner.index:
                return calls
            calls.append(self.graph.invocations[index])

        # The owner does not make the call.
        return []

    def _ends_at(self, sink: Endpoint) -> list[Endpoint]:
        """Return the places at which the sink's value is met.

        A term that is a plain operand is the operand itself, which is made before the addition.
        """
        ends = [sink]
        if sink.where is not Where.TERM:
            return ends

        # 1. The operand.
        addition = self.graph.nodes[sink.node]
        assert addition.terms is not None
        operand = addition.terms[sink.position].operand
        if operand is None:
            return ends

        # 2. It is met as it is: not raised by the addition, and with a gradient.
        record = self.graph.values[operand]
        total = self.graph.values[addition.outputs[0]]
        is_raised = record.dtype != total.dtype
        if record.node >= 0 and not is_raised and not self.graph.nodes[record.node].function:
            ends.append(Endpoint.of_value(self.graph, operand))
        return ends

    # -- where a module call meets the source ------------------------------------------------------
    def _entry_of(self, call: Invocation, end: Endpoint) -> Endpoint | None:
        """Return the place by which a module call depends on the source.

        Returns:
            The source itself or an argument of the call; None if the call cannot be run alone.
        """
        # 1. A number that Python read before is no value.
        if self.first_question < call.start:
            return None

        # 2. What the call reads from outside. Of that, what depends on the source may change alone.
        entries: set[int] = set()
        for node in range(call.start, end.node + 1):
            leading = self._reads_that_lead(node)
            for value in self.graph.nodes[node].inputs:
                is_made_inside = self.graph.values[value].node >= call.start
                if is_made_inside:
                    continue
                if value in leading and value in self.changed:
                    entries.add(value)
                elif not self.routes.is_at_hand(value, call):
                    return None

        # 3. The source, if the call makes it.
        if self.source.node >= call.start:
            return self.source

        # 4. The only argument.
        if len(entries) != 1:
            return None
        (value,) = entries
        return self._argument(value, call)

    def _reads_that_lead(self, node: int) -> tuple[int, ...]:
        """Return the values that a call reads on the way to the sink."""
        is_sink = node == self.sink.node and self.sink.value is None
        if is_sink:
            return self._values_at_sink()
        if node in self.leading:
            return self.graph.nodes[node].inputs
        return ()

    def _argument(self, value: int, call: Invocation) -> Endpoint | None:
        """Return the place of an argument that a run may replace; None if it may not."""
        if value not in call.arguments:
            return None

        # 1. An argument that the model writes to later has to be copied. That is done for norms.
        record = self.graph.values[value]
        others = [self.graph.values[index] for index in call.arguments if index != value]
        is_norm = self.routes.count_products(call.start, call.end - 1) == 0
        if any(other.mutated for other in others) or (record.mutated and not is_norm):
            return None

        # 2. The source itself.
        if value == self.source.value:
            return self.source

        # 3. What became of it, where a run meets it with a gradient and nobody writes to it.
        if record.mutated or self.graph.nodes[record.node].function:
            return None
        return Endpoint.of_value(self.graph, value)


def is_inside(name: str, module: str) -> bool:
    """Return whether a module or a tensor is a module or lies in it, by name."""
    # The model itself has no name.
    if not module:
        return True
    return f"{name}.".startswith(f"{module}.")
