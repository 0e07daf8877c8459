"""Find the parts of a layer that no shortcut leads around, as one does in other layers.

Such a part is no sub-layer, so that nothing of it is measured. In the first or last layer its
weights would pass for those of the embedding or the head.

The weights show which part of another layer is the same: each has the name of one there with
another number, and its shape. A part of which only some are the same, as where a stage of a
convolutional network changes the width, may be meant to have none. The record shows that no way
leads around: what the part reads reaches the model's output through its products alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

from jacdiag.trace.discovery.coverage import Coverage, parameters_of
from jacdiag.trace.discovery.residual import Finder
from jacdiag.trace.execution.skeleton import Skeleton
from jacdiag.trace.graph.graph import INPUT, Graph

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a dotted name


@dataclass(frozen=True)
class MissingShortcut:
    """A part of a layer without the shortcut that other layers have around it.

    Attributes:
        part: the module that holds its weights.
        like: the same of a layer that has a shortcut.
        parameters: that its matrix products read.
    """

    part: str
    like: str
    parameters: tuple[str, ...]


@dataclass(frozen=True, order=True)
class _Place:
    """A layer by the name up to its number, and the sub-layer of another one that has its weights.

    Attributes:
        layer: such as "transformer.h.3".
        sublayer: index of the sub-layer.
    """

    layer: str
    sublayer: int


def find_missing_shortcuts(
    graph: Graph, finder: Finder, coverage: Coverage, skeleton: Skeleton
) -> list[MissingShortcut]:
    """Return the parts without a shortcut, in the order of the forward.

    Args:
        graph: what one forward did.
        finder: of the same graph.
        coverage: which parameter belongs where.
        skeleton: the names and shapes of the parameters.
    """
    # 1. The weights of products: those of branches, and the others that another layer has in one.
    in_branches = _weights_in_branches(coverage)
    by_pattern = _by_pattern(in_branches)
    products: defaultdict[_Place, list[int]] = defaultdict(list)
    namesakes: defaultdict[_Place, dict[str, str]] = defaultdict(dict)
    multiplied: set[str] = set()
    for node in finder.products_among(range(len(graph.nodes))):
        for name in parameters_of(graph, (node,), skeleton):
            if name in in_branches:
                multiplied.add(name)
                continue
            found = _namesake(name, by_pattern, skeleton)
            if found is not None:
                layer, namesake = found
                place = _Place(layer, in_branches[namesake])
                products[place].append(node)
                namesakes[place][name] = namesake

    # 2. The parts that are the same as a branch, and that no way leads around.
    missing: list[MissingShortcut] = []
    for place, nodes in products.items():
        names = namesakes[place]
        needed = multiplied.intersection(coverage.sublayers[place.sublayer])
        is_same = needed <= set(names.values())
        if is_same and not _are_passed_by(graph, finder, set(nodes)):
            part, like = _common_module(names), _common_module(names.values())
            missing.append(MissingShortcut(part, like, tuple(names)))
    return missing


def _weights_in_branches(coverage: Coverage) -> dict[str, int]:
    """Return the parameters of sub-layers, each with the index of the first that has it."""
    in_branches: dict[str, int] = {}
    for index, names in coverage.sublayers.items():
        for name in names:
            in_branches.setdefault(name, index)
    return in_branches


def _patterns(name: str) -> Iterator[tuple[str, str]]:
    """Yield a name with one of its numbers left out, and the name up to that number."""
    for number in _NUMBER.finditer(name):
        pattern = f"{name[: number.start()]}*{name[number.end() :]}"
        yield pattern, name[: number.end()]


def _by_pattern(names: Iterable[str]) -> dict[str, str]:
    """Return for each pattern the first name that has it."""
    first: dict[str, str] = {}
    for name in names:
        for pattern, _ in _patterns(name):
            first.setdefault(pattern, name)
    return first


def _namesake(
    name: str, by_pattern: Mapping[str, str], skeleton: Skeleton
) -> tuple[str, str] | None:
    """Return the layer of a parameter, and its namesake of another layer; None without one."""
    outlines = skeleton.outlines
    for pattern, layer in _patterns(name):
        namesake = by_pattern.get(pattern)
        if namesake is None:
            continue

        # That of another size is another thing.
        if outlines[name].shape == outlines[namesake].shape:
            return layer, namesake
    return None


def _are_passed_by(graph: Graph, finder: Finder, products: Set[int]) -> bool:
    """Return whether what some products read reaches the model's output without them.

    Also if they stand at an end of the model: what reads its input as it is, or makes its output,
    needs no shortcut.
    """
    # 1. What reads the model's input.
    read = [value for node in products for value in graph.float_indices(node)]
    if any(graph.values[value].node == INPUT for value in read):
        return True

    # 2. What the part was made of, back to the products before it.
    made = _reached(graph, _outputs_of(graph, products))
    before: set[int] = set()
    stack = read
    while stack:
        value = stack.pop()
        if value in made or value in before:
            continue
        before.add(value)
        node = graph.values[value].node
        if node >= 0 and not finder.is_product(node):
            stack.extend(graph.float_indices(node))

    # 3. Whether it reaches the output without them.
    around = _reached(graph, before, without=products)
    if not around.isdisjoint(graph.outputs):
        return True

    # 4. Whether another product comes after them.
    after = {node for value in made for node in graph.values[value].consumers}
    return not finder.has_product(after - products)


def _outputs_of(graph: Graph, nodes: Iterable[int]) -> list[int]:
    """Return the values that some calls make."""
    return [value for node in nodes for value in graph.nodes[node].outputs]


def _reached(graph: Graph, values: Iterable[int], without: Set[int] = frozenset()) -> set[int]:
    """Return values with all that they reach by differentiable paths.

    Args:
        graph: what one forward did.
        values: where the paths begin.
        without: calls that may not lie on them.
    """
    reached: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in reached:
            continue
        reached.add(value)
        for node in graph.values[value].consumers:
            if node not in without and value in graph.float_indices(node):
                stack.extend(graph.nodes[node].outputs)
    return reached


def _common_module(parameters: Iterable[str]) -> str:
    """Return the name of the smallest module that holds some parameters."""
    # Without the last part, which is the parameter's own.
    paths = [name.split(".")[:-1] for name in parameters]
    common: list[str] = []
    for at_this_depth in zip(*paths, strict=False):
        if len(set(at_this_depth)) > 1:
            break
        common.append(at_this_depth[0])
    return ".".join(common)
