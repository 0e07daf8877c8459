"""The roles of vectors: gains and biases of norms, other biases, scales, positions.

A vector has its role from the first call that reads it together with something live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.trace.discovery.parameter_use import ParameterUse
from jacdiag.trace.graph.graph import STATE, Graph, Node
from jacdiag.trace.graph.ops import (
    CHANGE_A_NUMBER,
    DIVISIONS,
    KEEP_THE_SIZE,
    LENGTHS,
    LOOKUPS,
    NORMALISING,
    NORMS_WITH_GAIN,
    TIMES,
)
from jacdiag.trace.site_list import Sites


def lookups_in(graph: Graph) -> list[int]:
    """Return the calls that look rows of a table up."""
    return [node.index for node in graph.nodes if node.name in LOOKUPS]


def use_of_vector(sites: Sites, name: str) -> ParameterUse:
    """Return the use of a vector: the gain or bias of a norm, a bias, a scale, positions.

    It is what the first call that reads it makes of it.

    Args:
        sites: the sub-layers of the model.
        name: of the parameter.

    Returns:
        Its use; the role is "" for a matrix, and for a vector that nothing reads.
    """
    # 1. A table, or a matrix.
    graph = sites.graph
    if _is_looked_up(graph, name):
        return ParameterUse("positions")
    if _is_matrix(sites.skeleton.outlines[name].shape):
        return ParameterUse("")

    # 2. A vector that no call reads together with something live.
    use = first_use(graph, name)
    if use is None:
        return ParameterUse("")

    # 3. A vector of a fused norm, or one that multiplies.
    operation = graph.nodes[use.node].name
    if operation in NORMS_WITH_GAIN:
        return _use_in_fused_norm(graph, use, name)
    if operation in TIMES | DIVISIONS:
        return _use_as_factor(sites, use)

    # 4. Anything else adds a bias.
    return ParameterUse("bias")


def _is_matrix(shape: Sequence[int]) -> bool:
    """Return whether a parameter has rows and columns; a vector may be stored as one row."""
    return len(shape) >= 2 and min(shape) > 1


def _use_in_fused_norm(graph: Graph, use: FirstUse, name: str) -> ParameterUse:
    """Return the use of a vector that a fused norm reads: its gain or its bias."""
    if _is_gain(graph, use.node, name):
        return ParameterUse("norm_gain", offset=use.added)

    # The other vector, if it takes two.
    return ParameterUse("bias")


def _use_as_factor(sites: Sites, use: FirstUse) -> ParameterUse:
    """Return the use of a vector that multiplies by element: a norm's gain or a scale."""
    # 1. What is added to it before it multiplies.
    offset = use.added + _times_one_more(sites.graph, use.node)

    # 2. A gain of a norm multiplies what was just normalised, without a function before.
    is_gain_of_norm = _in_norm(sites, use.node) and not use.changed
    if is_gain_of_norm:
        return ParameterUse("norm_gain", offset=offset)
    return ParameterUse("scale", offset=offset)


def _is_looked_up(graph: Graph, name: str) -> bool:
    """Return whether a parameter is a lookup table."""
    return any(name in _state_read(graph, lookup) for lookup in lookups_in(graph))


def _is_gain(graph: Graph, node: int, name: str) -> bool:
    """Return whether a parameter is the gain of a fused norm, which comes before the bias.

    Running statistics, which a batch norm reads too, come before both.
    """
    # 1. The weights among the operands. The gain is the last but one, or the only one.
    vectors = _weights_among_operands(graph, node)
    position_of_gain = max(0, len(vectors) - 2)

    # 2. The first of them that is made of the parameter.
    for position, vector in enumerate(vectors):
        if _made_of(graph, vector, name):
            return position == position_of_gain
    return False


def _weights_among_operands(graph: Graph, node: int) -> list[int]:
    """Return the operands of a call that are made of parameters or buffers alone."""
    return [value for value in graph.nodes[node].operands if graph.values[value].is_weight]


def _state_read(graph: Graph, node: int) -> set[str]:
    """Return the names of the parameters and buffers that a call reads itself."""
    return {value.name for value in graph.values_read(node) if value.node == STATE}


@dataclass(frozen=True)
class FirstUse:
    """The first call that reads a parameter together with something live.

    Attributes:
        node: the call.
        added: the number that was added to the parameter before.
        changed: it passed through a function before (exp, softplus), or was multiplied.
    """

    node: int
    added: float
    changed: bool


@dataclass(frozen=True)
class _Derived:
    """A value that is a parameter, or was made of it alone.

    Attributes:
        value: its index.
        added: the number that was added to the parameter.
        changed: it passed through a function, or was multiplied.
    """

    value: int
    added: float = 0.0
    changed: bool = False

    def results_of(self, call: Node, seen: set[int]) -> list[_Derived]:
        """Return what a call makes of it, without the values that were seen before.

        Args:
            call: a call that reads the value.
            seen: values that were made of the parameter; those of the call are added.
        """
        # 1. What happens to the parameter in the call.
        added = self.added + call.added
        changed = self.changed or call.name in CHANGE_A_NUMBER

        # 2. The values that the call makes.
        results: list[_Derived] = []
        for output in call.outputs:
            if output not in seen:
                results.append(_Derived(output, added, changed))
        seen.update(call.outputs)
        return results


def first_use(graph: Graph, name: str) -> FirstUse | None:
    """Return the first call that reads a parameter together with something live.

    The parameter is followed through the calls that read nothing live, such as casts and
    `1 + weight`.

    Args:
        graph: of the forward.
        name: of the parameter.
    """
    # 1. The parameter itself.
    waiting: list[_Derived] = []
    for value in graph.values:
        if value.node == STATE and value.name == name:
            waiting.append(_Derived(value.index))

    # 2. What calls make of it, until one reads something live as well.
    seen: set[int] = set()
    while waiting:
        derived = waiting.pop(0)
        for node in graph.values[derived.value].consumers:
            if graph.live_inputs(node):
                return FirstUse(node, derived.added, derived.changed)
            waiting += derived.results_of(graph.nodes[node], seen)
    return None


def _times_one_more(graph: Graph, node: int) -> float:
    """Return 1 if a product is added to what it multiplied, as in `x + x * weight`, else 0."""
    record = graph.nodes[node]
    if record.name not in TIMES:
        return 0.0

    # What the weight multiplies.
    live_operands = [value for value in record.operands if graph.values[value].live]
    multiplied = set(live_operands)

    # The sum has two terms: the product, and what it multiplied.
    for output in record.outputs:
        if _is_added_to(graph, output, multiplied):
            return 1.0
    return 0.0


def _is_added_to(graph: Graph, value: int, others: set[int]) -> bool:
    """Return whether a call adds a value to others, and to nothing else."""
    terms_of_such_a_sum = {value} | others

    # Whatever reads the value may be the sum.
    consumers = graph.values[value].consumers
    return any(_operands_added(graph, node) == terms_of_such_a_sum for node in consumers)


def _operands_added(graph: Graph, node: int) -> set[int | None]:
    """Return the operands that a call adds, with None for a term that is no plain operand."""
    return {term.operand for term in graph.nodes[node].terms or ()}


def _made_of(graph: Graph, value: int, name: str) -> bool:
    """Return whether a value is a parameter, or was computed from it."""
    # 1. A parameter or buffer.
    record = graph.values[value]
    if record.node == STATE:
        return record.name == name

    # 2. An input or a constant, which no call made.
    if record.node < 0:
        return False

    # 3. The result of a call.
    return any(_made_of(graph, index, name) for index in graph.nodes[record.node].inputs)


def _in_norm(sites: Sites, node: int) -> bool:
    """Return whether what a call multiplies was just normalised.

    That is by a mean or a norm, with no matrix and no sum of two values since.
    """
    graph = sites.graph
    waiting = graph.live_inputs(node)
    seen: set[int] = set()
    while waiting:
        maker = graph.values[waiting.pop()].node
        if maker < 0 or maker in seen:
            continue
        seen.add(maker)

        # A call that normalises answers the question; one that ends the norm is not passed.
        if graph.nodes[maker].name in NORMALISING:
            return True
        if not _ends_norm(sites, maker):
            waiting += graph.live_inputs(maker)
    return False


def _ends_norm(sites: Sites, node: int) -> bool:
    """Return whether nothing before a call is of one norm with what follows it."""
    # 1. A gain or a bias ends the norm.
    if sites.graph.reads_weight(node):
        return True

    # 2. So does a product, such as a Fourier transform.
    if sites.finder.is_product(node):
        return True

    # 3. So does a sum of two values. A norm subtracts the mean, but adds nothing.
    record = sites.graph.nodes[node]
    return record.terms is not None and "sub" not in record.name


def length_divided_by(graph: Graph, name: str) -> int | None:
    """Return how many numbers the norm of a gain divides by their length; None for any other norm.

    A norm by the mean square, or one that multiplies by a constant too, is another norm.

    Args:
        graph: of the forward.
        name: of the gain.

    Returns:
        The size of the last dimension of what is divided.
    """
    use = first_use(graph, name)
    if use is None or use.changed:
        return None

    # Walk back from the gain to where a length is computed.
    waiting = graph.live_inputs(use.node)
    seen: set[int] = set()
    numbers = None
    while waiting:
        maker = graph.values[waiting.pop()].node
        if maker < 0 or maker in seen:
            continue
        seen.add(maker)

        # The length of the first live value that the call reads.
        live = graph.live_inputs(maker)
        if live and graph.nodes[maker].name in LENGTHS:
            numbers = graph.values[live[0]].shape[-1]
        elif _keeps_the_size(graph, maker):
            waiting += live
    return numbers


def _keeps_the_size(graph: Graph, node: int) -> bool:
    """Return whether what a call returns is as large as what it reads, but for a length.

    A call that may change the size ends the way to a length, since the norm is another.
    """
    # 1. A division by a length; one by a weight is none.
    name = graph.nodes[node].name
    if name in DIVISIONS:
        return len(graph.live_inputs(node)) == 2

    # 2. Any other call.
    return name in KEEP_THE_SIZE
