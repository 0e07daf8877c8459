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
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from posixpath import commonpath

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


@dataclass
class _Part:
    """Products outside of branches whose weights another layer has in one.

    Attributes:
        products: the calls.
        namesakes: each of their weights -> the same of the other layer.
    """

    products: set[int] = field(default_factory=set)
    namesakes: dict[str, str] = field(default_factory=dict)

    def missing(self) -> MissingShortcut:
        """Return what is said of it."""
        part = _common_module(self.namesakes)
        like = _common_module(self.namesakes.values())
        return MissingShortcut(part, like, tuple(self.namesakes))


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
    weights = _weights_of_products(graph, finder, skeleton)
    parts = _parts_like_branches(weights, coverage, skeleton)
    missing: list[MissingShortcut] = []
    for part in parts:
        walk = _Around(graph, finder, part.products)
        is_inside = not walk.reads_input() and walk.is_followed_by_product()
        if is_inside and not walk.is_passed_by():
            missing.append(part.missing())

    return missing


def _weights_of_products(graph: Graph, finder: Finder, skeleton: Skeleton) -> dict[int, list[str]]:
    """Return the parameters that each matrix product reads."""
    products = finder.products_among(range(len(graph.nodes)))
    return {node: parameters_of(graph, (node,), skeleton) for node in products}


def _parts_like_branches(
    weights: Mapping[int, Sequence[str]], coverage: Coverage, skeleton: Skeleton
) -> list[_Part]:
    """Return the parts outside of branches that have all the weights of a branch.

    Args:
        weights: product -> the parameters that it reads.
        coverage: which parameter belongs to which sub-layer.
        skeleton: the shapes of the parameters.
    """
    # 1. The weights of each layer that a branch of another one has, by that branch.
    owners = _owners(coverage)
    by_pattern = _by_pattern(owners)
    parts: defaultdict[tuple[str, int], _Part] = defaultdict(_Part)
    for product, name in _outside(weights, owners):
        found = _namesake(name, by_pattern, skeleton)
        if found is None:
            continue
        layer, namesake = found
        part = parts[layer, owners[namesake]]
        part.products.add(product)
        part.namesakes[name] = namesake

    # 2. Those that lack none.
    multiplied = set(chain.from_iterable(weights.values()))
    complete: list[_Part] = []
    for (_, sublayer), part in parts.items():
        needed = multiplied.intersection(coverage.sublayers[sublayer])
        if needed <= set(part.namesakes.values()):
            complete.append(part)

    return complete


def _outside(
    weights: Mapping[int, Sequence[str]], owners: Mapping[str, int]
) -> Iterator[tuple[int, str]]:
    """Yield the products with the weights that are in no sub-layer."""
    for product, names in weights.items():
        for name in names:
            if name not in owners:
                yield product, name


def _owners(coverage: Coverage) -> dict[str, int]:
    """Return the parameters of sub-layers, each with the index of the first that has it."""
    owners: dict[str, int] = {}
    for index, names in coverage.sublayers.items():
        for name in names:
            owners.setdefault(name, index)

    return owners


def _patterns(name: str) -> Iterator[tuple[str, str]]:
    """Yield a name with one of its numbers left out, and the name up to that number."""
    for number in _NUMBER.finditer(name):
        before, after = name[: number.start()], name[number.end() :]
        pattern = f"{before}*{after}"
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
    shape = outlines[name].shape
    for pattern, layer in _patterns(name):
        # That of another size is another thing.
        namesake = by_pattern.get(pattern)
        if namesake is not None and outlines[namesake].shape == shape:
            return layer, namesake

    return None


class _Around:
    """Walks around some products of a graph.

    Attributes:
        products: the calls.
        read: the values that they read.
        made: the values that depend on them.
    """

    def __init__(self, graph: Graph, finder: Finder, products: Set[int]) -> None:
        self.graph, self.finder, self.products = graph, finder, products
        self.read = list(chain.from_iterable(map(graph.float_indices, products)))
        results = chain.from_iterable(graph.nodes[node].outputs for node in products)
        self.made = self._reached(results, set())

    def reads_input(self) -> bool:
        """Return whether one of them reads the model's input as it is."""
        makers = {self.graph.values[value].node for value in self.read}
        return INPUT in makers

    def is_followed_by_product(self) -> bool:
        """Return whether what they make reaches another product; else they make the output."""
        after: set[int] = set()
        for value in self.made:
            after.update(self.graph.values[value].consumers)

        return self.finder.has_product(after - self.products)

    def is_passed_by(self) -> bool:
        """Return whether what they read reaches the model's output without them."""
        around = self._reached(self._origins(), self.products)
        return not around.isdisjoint(self.graph.outputs)

    def _origins(self) -> set[int]:
        """Return what they read with all that it is made of, back to the products before it."""
        origins: set[int] = set()
        stack = list(self.read)
        while stack:
            value = stack.pop()
            if value in self.made or value in origins:
                continue
            origins.add(value)

            # A norm is made of the stream, which may pass them by.
            node = self.graph.values[value].node
            is_call = node >= 0
            if is_call and not self.finder.is_product(node):
                stack.extend(self.graph.float_indices(node))

        return origins

    def _reached(self, values: Iterable[int], closed: Set[int]) -> set[int]:
        """Return values with all that they reach by differentiable paths.

        Args:
            values: where the paths begin.
            closed: calls that may not lie on them.
        """
        reached: set[int] = set()
        stack = list(values)
        while stack:
            # A value may be met by several paths.
            value = stack.pop()
            if value in reached:
                continue
            reached.add(value)

            # The calls that read it, if a gradient passes them.
            for node in set(self.graph.values[value].consumers) - closed:
                if value in self.graph.float_indices(node):
                    stack.extend(self.graph.nodes[node].outputs)

        return reached


def _common_module(parameters: Iterable[str]) -> str:
    """Return the name of the smallest module that holds some parameters."""
    # Without the last part, which is the parameter's own.
    paths = [name.rpartition(".")[0].replace(".", "/") for name in parameters]
    common = commonpath(paths)
    return common.replace("/", ".")
