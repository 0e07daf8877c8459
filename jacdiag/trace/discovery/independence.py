"""Which dimensions of a shortcut a branch keeps apart, read off the recorded operations.

Where the operations prove it, or show that a branch sums over a dimension, no product with its
Jacobian is needed to find out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.graph import Graph, Node
from jacdiag.trace.graph.index_layout import Layout, UnclearError, labelled, source_layout
from jacdiag.trace.graph.index_rules import IndexedCall, layout_after
from jacdiag.trace.graph.ops import CUTS


def independent_by_dataflow(
    graph: Graph, site: Site, feature_dim: int, branch_shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the dimensions over which the Jacobian of a branch is block diagonal.

    Args:
        graph: what one forward did.
        site: the residual sum.
        feature_dim: the dimension of the shortcut that is never independent.
        branch_shape: of the branch.

    Returns:
        The dimensions, ascending; those of size 1 count as independent. None if the operations
        leave one of them open: values have to show it then.
    """
    try:
        flow = _Flow(graph, site.shortcut, site.addition, site.cone_set)
        layout = flow.layout_of_branch(site, branch_shape)
    except UnclearError:
        return None
    return _decided(flow, layout, feature_dim, branch_shape)


def independent_between(
    finder: Finder, source: int, end: int, feature_dim: int
) -> tuple[int, ...] | None:
    """Return the dimensions over which the Jacobian between two values is block diagonal.

    Args:
        finder: of the graph of one forward.
        source: index of the value to differentiate by.
        end: index of the value that is differentiated.
        feature_dim: the dimension of the source that is never independent.

    Returns:
        As `independent_by_dataflow`.
    """
    graph = finder.graph
    shape = graph.values[end].shape
    last = graph.values[end].node
    path = frozenset(finder.cone(source, [end]))
    try:
        flow = _Flow(graph, source, last + 1, path)
        layout = flow.layout_of(end, shape)
    except UnclearError:
        return None
    return _decided(flow, layout, feature_dim, shape)


def _decided(
    flow: _Flow, layout: Layout, feature_dim: int, end_shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the independent dimensions; None if one is left open."""
    # 1. The end has to have the dimensions of the source.
    shape = flow.graph.values[flow.source].shape
    has_dimensions = len(shape) == len(end_shape)
    if not shape or not has_dimensions:
        return None

    # 2. Dimensions that may be independent.
    candidates = {dim for dim, size in enumerate(shape) if end_shape[dim] == size}
    candidates.discard(feature_dim % len(shape))

    # 3. A label that arrives is a proof. One that a sum took away is known not to arrive.
    independent = {dim for dim in candidates if layout[dim] == labelled(dim, shape[dim])}
    open_dims = candidates - independent - flow.mixed
    if open_dims:
        return None
    return tuple(sorted(independent))


@dataclass
class _Flow:
    """The layouts of all values that depend on a source.

    Attributes:
        graph: what one forward did.
        source: index of the value whose indices are followed.
        stop: the first call that is not looked at.
        path: the calls that lead to the end.
        layouts: of the values that depend on the source; None where nothing is known.
        mixed: dimensions of the source that a call of the path sums over.
    """

    graph: Graph
    source: int
    stop: int
    path: Collection[int]
    layouts: dict[int, Layout | None] = field(default_factory=dict)
    mixed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Follow the indices through every call."""
        source = self.graph.values[self.source]
        self.layouts[source.index] = source_layout(source.shape)
        for node in self.graph.nodes[max(source.node + 1, 0) : self.stop]:
            self._follow(node)

    def layout_of(self, value: int, shape: tuple[int, ...]) -> Layout:
        """Return the layout of a value.

        Raises:
            UnclearError: it is not known.
        """
        layout = self.layouts.get(value)
        has_shape = self.graph.values[value].shape == shape

        # A sum may broadcast its terms.
        if layout is None or not has_shape:
            raise UnclearError("the end")
        return layout

    def layout_of_branch(self, site: Site, shape: tuple[int, ...]) -> Layout:
        """Return the layout of a branch, as its sum reads it.

        Raises:
            UnclearError: it is not known.
        """
        # 1. A value of its own.
        value = site.result
        if value is None:
            value = site.term.operand
        if value is not None:
            return self.layout_of(value, shape)

        # 2. A part of the sum: a multiple of a value, or a product inside the call.
        node = self.graph.nodes[site.addition]
        return self._layout_after(node, set(site.term.values), shape, counts=True)

    def _follow(self, node: Node) -> None:
        """Set the layouts of what a call makes of values that depend on the source."""
        # 1. Nothing that it makes depends on the source by a derivative.
        depends = not self.layouts.keys().isdisjoint(node.inputs)
        depends_unseen = any(self._may_depend_unseen(value) for value in node.inputs)
        if node.name in CUTS or not (depends or depends_unseen):
            return

        # 2. Each of its results.
        leads_to_end = node.index in self.path
        for output in node.outputs:
            value = self.graph.values[output]
            has_derivative = value.is_float and 0 not in value.shape
            if not has_derivative:
                continue
            try:
                layout = self._layout_after(node, None, value.shape, counts=leads_to_end)
            except UnclearError:
                self.layouts[output] = None
            else:
                self.layouts[output] = layout

    def _layout_after(
        self, node: Node, only: Collection[int] | None, shape: tuple[int, ...], *, counts: bool
    ) -> Layout:
        """Return the layout of one result of a call.

        Args:
            node: the call.
            only: the operands that are looked at, by value; all if not given.
            shape: of the result.
            counts: whether the dimensions over which it sums are added to `mixed`.

        Raises:
            UnclearError: it is not known.
        """
        # 1. An operand that was written to through another view has two values. Inside a custom
        # autograd.Function, the backward is the model's own.
        arguments = node.arguments
        are_known = not node.function and set(node.inputs) == set(node.operands)
        if arguments is None or not are_known:
            raise UnclearError("a call whose operands or derivative are not known")

        # 2. The operands that depend on the source.
        layouts: dict[int, Layout] = {}
        for position, operand in enumerate(node.operands):
            if only is not None and operand not in only:
                continue
            if self._may_depend_unseen(operand):
                raise UnclearError("a value that no recorded call made")
            if operand in self.layouts:
                known = self.layouts[operand]
                if known is None:
                    raise UnclearError("an operand of which nothing is known")
                layouts[position] = known

        # 3. The rule of the operation.
        shapes = [self.graph.values[operand].shape for operand in node.operands]
        call = IndexedCall(arguments, shapes, layouts)
        layout = layout_after(node.name, call, shape)
        if len(layout) != len(shape):
            raise UnclearError("a result with another number of dimensions")
        if counts:
            self.mixed |= call.mixed
        return layout

    def _may_depend_unseen(self, value: int) -> bool:
        """Return whether a value may depend on the source in a way that was not recorded."""
        # 1. No recorded call made it, nor is it an attribute of a module.
        if value in self.graph.unexplained:
            return True

        # 2. It shares the memory of what a call made of the source.
        maker = self.graph.values[value].node
        if maker < 0 or value in self.layouts:
            return False
        results = self.graph.nodes[maker].outputs
        return value not in results and not self.layouts.keys().isdisjoint(results)
