"""Residual additions with a detached operand, and parameters that a detach cuts off."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jacdiag.trace.discovery.residual import Finder
from jacdiag.trace.graph.graph import STATE, Graph
from jacdiag.trace.graph.ops import CUTS, DETACHES


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
    additions = []
    for node in graph.nodes:
        operands = [term.operand for term in node.terms or () if term.operand is not None]
        if len(operands) != 2:
            continue
        for detached, other in (operands, operands[::-1]):
            detach = _detach_before(graph, detached)
            if detach is None:
                continue
            source = graph.nodes[detach].inputs[0]
            operand = _operand_that_was_cut(finder, source, other)
            if operand:
                module = graph.path(node.invocation)
                additions.append(CutAddition(operand, module, _line_of(graph, detach)))
                break
    return additions


def cut_off_parts(graph: Graph, names: Collection[str]) -> list[list[str]]:
    """Return the parameters whose every way to the output passes a detach, a list for each part.

    A part is a set of calls that read one another's results. It ends where the value of another
    call comes in.

    Args:
        graph: what one forward did.
        names: parameters that may be listed.
    """
    # 1. Split the calls that lead to the output by whether a way without a detach is left.
    with_gradient = _calls_before(graph, graph.outputs, through_detach=False)
    cut_off = _calls_before(graph, graph.outputs, through_detach=True) - with_gradient
    if not cut_off:
        return []

    # 2. A parameter that a call with a gradient reads too is not cut off.
    live_calls = [call for call in with_gradient if graph.nodes[call].name not in CUTS]
    reached = set(_parameters_read(graph, live_calls))
    parts = [_parameters_read(graph, sorted(part)) for part in _connected_calls(graph, cut_off)]
    listed = [[name for name in part if name in names and name not in reached] for part in parts]
    return [part for part in listed if part]


def _calls_before(graph: Graph, values: Iterable[int], *, through_detach: bool) -> set[int]:
    """Return the calls that lead to values by floats; a call without a derivative ends a way."""
    calls: set[int] = set()
    stack = list(values)
    while stack:
        call = graph.values[stack.pop()].node
        if call < 0 or call in calls:
            continue
        calls.add(call)
        name = graph.nodes[call].name
        is_open = name not in CUTS or (through_detach and name in DETACHES)
        if is_open:
            stack += [value for value in graph.nodes[call].inputs if graph.values[value].is_float]
    return calls


def _connected_calls(graph: Graph, calls: Collection[int]) -> list[set[int]]:
    """Return groups of calls that read one another's results."""
    groups: list[set[int]] = []
    for call in sorted(calls):
        makers = {graph.values[value].node for value in graph.nodes[call].inputs}
        joined = {call}
        for group in [group for group in groups if group & makers]:
            joined |= group
            groups.remove(group)
        groups.append(joined)
    return groups


def _parameters_read(graph: Graph, calls: Iterable[int]) -> list[str]:
    """Return the names of the parameters and buffers that calls read themselves, in order."""
    read = [graph.values[value] for call in calls for value in graph.nodes[call].inputs]
    return list(dict.fromkeys(value.name for value in read if value.node == STATE))


def _operand_that_was_cut(finder: Finder, source: int, other: int) -> str:
    """Return which operand a detached value is, "" if the addition is not residual."""
    for value in finder.carriers(source):
        if value != other and _is_function_of(finder, other, value):
            return "shortcut"
    for value in finder.carriers(other):
        if value != source and _is_function_of(finder, source, value):
            return "branch"
    return ""


def _is_function_of(finder: Finder, value: int, source: int) -> bool:
    """Return whether every way from a source to a value passes a product with a parameter."""
    if not finder.reaches(source, [value], through_products=True):
        return False
    return not finder.reaches(source, [value], through_products=False, statistics=False)


def _detach_before(graph: Graph, value: int) -> int | None:
    """Return the detach that made a value, perhaps cast or scaled since."""
    for maker in _makers(graph, value):
        if graph.nodes[maker].name in DETACHES:
            return maker
    return None


def _makers(graph: Graph, value: int) -> Iterator[int]:
    """Yield the call that made a value, then those before it, at most four.

    It ends at a call that reads more than one live value.
    """
    for _ in range(4):
        maker = graph.values[value].node
        if maker < 0:
            return
        yield maker
        live = [v for v in graph.nodes[maker].inputs if graph.values[v].live]
        if len(live) != 1:
            return
        value = live[0]


def _line_of(graph: Graph, node: int) -> str:
    """Return "file.py:12" of a call, by the path inside its package or below the current folder."""
    _, file, number = graph.nodes[node].key
    _, installed, inside = file.rpartition("site-packages/")
    if not installed:
        inside = file.removeprefix(f"{Path.cwd()}/")
    return f"{inside}:{number}"
