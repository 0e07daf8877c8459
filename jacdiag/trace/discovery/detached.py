"""Residual additions with a detached operand, and parameters that a detach cuts off."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jacdiag.trace.discovery.residual import Finder
from jacdiag.trace.graph.graph import STATE, Graph, Node
from jacdiag.trace.graph.ops import CUTS, DETACHES

_MOST_MAKERS = 4  # calls that a value is followed back through


@dataclass(frozen=True)
class CutAddition:
    """An addition of a value and a function of it, one of which passes a detach.

    Attributes:
        operand: "shortcut" or "branch".
        module: the module that makes the addition, "" for the model itself.
        line: "file.py:12" of the detach.
    """

    operand: str
    module: str
    line: str


def cut_additions(graph: Graph, finder: Finder) -> list[CutAddition]:
    """Return the additions that would be residual if one operand were not detached.

    A straight-through estimator, x + (q - x).detach(), is none: no matrix product with a parameter
    lies on its way.

    Args:
        graph: what one forward did.
        finder: of the same graph.
    """
    additions: list[CutAddition] = []
    for node in graph.nodes:
        # 1. The call adds two values.
        operands = node.operands_added
        if len(operands) != 2:
            continue
        first, second = operands

        # 2. One of them is detached, and one of the two is a function of the other.
        cut = _cut_of(graph, finder, node, detached=first, other=second)
        if cut is None:
            cut = _cut_of(graph, finder, node, detached=second, other=first)
        if cut is not None:
            additions.append(cut)
    return additions


def _cut_of(
    graph: Graph, finder: Finder, addition: Node, detached: int, other: int
) -> CutAddition | None:
    """Return an addition as one of a detached operand and another; None if it is none.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        addition: the call.
        detached: the operand that may be detached.
        other: the other operand.
    """
    detach = _detach_before(graph, detached)
    if detach is None:
        return None
    source = graph.nodes[detach].inputs[0]
    operand = _operand_that_was_cut(finder, source, other)
    if not operand:
        return None
    return CutAddition(operand, graph.path(addition.invocation), _line_of(graph, detach))


def cut_off_parts(graph: Graph, names: Collection[str]) -> list[list[str]]:
    """Return the parameters whose every way to the output passes a detach, a list for each part.

    A part is a set of calls that read one another's results. It ends where the value of another
    call comes in.

    Args:
        graph: what one forward did.
        names: parameters that may be listed.
    """
    # 1. Split the calls that lead to the output by whether a way without a detach is left.
    with_gradient = _calls_before(graph, graph.outputs, closed=CUTS)
    cut_off = _calls_before(graph, graph.outputs, closed=CUTS - DETACHES) - with_gradient

    # 2. A parameter that a call with a gradient reads too is not cut off.
    live_calls = [call for call in with_gradient if graph.nodes[call].name not in CUTS]
    may_be_listed = set(names) - set(_parameters_read(graph, live_calls))

    # 3. The parameters of each part.
    parts: list[list[str]] = []
    for calls in _connected_calls(graph, cut_off):
        read = _parameters_read(graph, sorted(calls))
        listed = [name for name in read if name in may_be_listed]
        if listed:
            parts.append(listed)
    return parts


def _calls_before(graph: Graph, values: Iterable[int], *, closed: Collection[str]) -> set[int]:
    """Return the calls that lead to values by floats.

    Args:
        graph: what one forward did.
        values: the values.
        closed: names of the calls that end a way.
    """
    calls: set[int] = set()
    stack = list(values)
    while stack:
        call = graph.values[stack.pop()].node
        if call < 0 or call in calls:
            continue
        calls.add(call)

        # Go back to the floats that the call reads.
        if graph.nodes[call].name not in closed:
            read = graph.values_read(call)
            stack += [value.index for value in read if value.is_float]
    return calls


def _connected_calls(graph: Graph, calls: Collection[int]) -> list[set[int]]:
    """Return groups of calls that read one another's results."""
    groups: list[set[int]] = []
    for call in sorted(calls):
        makers = {graph.values[index].node for index in graph.nodes[call].inputs}

        # The call joins the groups whose results it reads.
        separate: list[set[int]] = []
        joined = {call}
        for group in groups:
            if group & makers:
                joined |= group
            else:
                separate.append(group)
        groups = [*separate, joined]
    return groups


def _parameters_read(graph: Graph, calls: Iterable[int]) -> list[str]:
    """Return the names of the parameters and buffers that calls read themselves, in order."""
    names: dict[str, None] = {}
    for call in calls:
        for value in graph.values_read(call):
            # An input and a constant have no name.
            if value.node == STATE:
                names[value.name] = None
    return list(names)


def _operand_that_was_cut(finder: Finder, source: int, other: int) -> str:
    """Return which operand a detached value is, "" if the addition is not residual."""
    # 1. The detached value is the shortcut: the other operand is a function of it.
    if _is_function_of_carried(finder, other, source):
        return "shortcut"

    # 2. The detached value is the branch: a function of the other operand.
    if _is_function_of_carried(finder, source, other):
        return "branch"

    # 3. Neither is a function of the other.
    return ""


def _is_function_of_carried(finder: Finder, value: int, source: int) -> bool:
    """Return whether a value is a function of what another is a scaled or cast copy of."""
    for origin in finder.carriers(source):
        # 1. Two copies of one value are no function of each other.
        if origin == value:
            continue

        # 2. The other one is made of it by a product.
        if _is_function_of(finder, value, origin):
            return True
    return False


def _is_function_of(finder: Finder, value: int, source: int) -> bool:
    """Return whether every way from a source to a value passes a product with a parameter."""
    # There has to be a way at all.
    if not finder.reaches(source, [value], through_products=True):
        return False

    # None of them goes around all products, but for a statistic.
    return not finder.reaches(source, [value], through_products=False, statistics=False)


def _detach_before(graph: Graph, value: int) -> int | None:
    """Return the detach that made a value, perhaps cast or scaled since."""
    makers = _makers(graph, value)
    return next((maker for maker in makers if graph.nodes[maker].name in DETACHES), None)


def _makers(graph: Graph, value: int) -> Iterator[int]:
    """Yield the call that made a value, then those before it, at most four.

    It ends at a call that reads more than one live value.
    """
    for _ in range(_MOST_MAKERS):
        # 1. An input, a parameter or a constant has no maker.
        maker = graph.values[value].node
        if maker < 0:
            return
        yield maker

        # 2. Go back to the only live value that it reads.
        live = graph.live_inputs(maker)
        if len(live) != 1:
            return
        value = live[0]


def _line_of(graph: Graph, node: int) -> str:
    """Return "file.py:12" of a call, by the path inside its package or below the current folder."""
    _, file, number = graph.nodes[node].key
    _, installed, inside = file.rpartition("site-packages/")

    # The file is the model's own.
    if not installed:
        inside = file.removeprefix(f"{Path.cwd()}/")
    return f"{inside}:{number}"
