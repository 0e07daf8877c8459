"""Which dimensions of a shortcut a branch keeps apart, read off the recorded operations.

Where the operations prove it, or show that a branch sums over a dimension, no product with its
Jacobian is needed to find out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from jacdiag.trace.discovery.residual import Site
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
    # 1. Dimensions that may be independent. What no recorded call made may hide any path.
    shape = graph.values[site.shortcut].shape
    if len(shape) != len(branch_shape) or not shape:
        return None
    candidates = {dim for dim, size in enumerate(shape) if branch_shape[dim] == size}
    candidates.discard(feature_dim % len(shape))

    # 2. Follow their indices to the branch's end.
    try:
        flow = _Flow(graph, site)
        layout = flow.layout_of_branch(branch_shape)
    except UnclearError:
        return None

    # 3. A label that arrives is a proof. One that a sum took away is known not to arrive.
    independent = {dim for dim in candidates if layout[dim] == labelled(dim, shape[dim])}
    open_dims = candidates - independent - flow.mixed
    if open_dims:
        return None
    return tuple(sorted(independent))


@dataclass
class _Flow:
    """The layouts of all values between a shortcut and the end of its branch.

    Attributes:
        graph: what one forward did.
        site: the residual sum.
        layouts: of the values that depend on the shortcut; None where nothing is known.
        mixed: dimensions of the shortcut that a call of the branch sums over.
    """

    graph: Graph
    site: Site
    layouts: dict[int, Layout | None] = field(default_factory=dict)
    mixed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Follow the indices through every call up to the sum."""
        source = self.graph.values[self.site.shortcut]
        self.layouts[source.index] = source_layout(source.shape)
        for node in self.graph.nodes[max(source.node + 1, 0) : self.site.addition]:
            self._follow(node)

    def layout_of_branch(self, shape: tuple[int, ...]) -> Layout:
        """Return the layout of the branch, as the sum reads it.

        Raises:
            UnclearError: it is not known.
        """
        # 1. A value of its own.
        site = self.site
        value = site.result
        if value is None:
            value = site.term.operand
        if value is not None:
            layout = self.layouts.get(value)
            if layout is None or self.graph.values[value].shape != shape:
                raise UnclearError("the end of the branch")
            return layout

        # 2. A part of the sum: a multiple of a value, or a product inside the call.
        node = self.graph.nodes[site.addition]
        return self._layout_after(node, set(site.term.values), shape, counts=True)

    def _follow(self, node: Node) -> None:
        """Set the layouts of what a call makes of values that depend on the shortcut."""
        # 1. Nothing that it makes depends on the shortcut by a derivative.
        if self.layouts.keys().isdisjoint(node.inputs) or node.name in CUTS:
            return

        # 2. Each of its results.
        is_in_branch = node.index in self.site.cone_set
        for output in node.outputs:
            value = self.graph.values[output]
            has_derivative = value.is_float and 0 not in value.shape
            if not has_derivative:
                continue
            try:
                layout = self._layout_after(node, None, value.shape, counts=is_in_branch)
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
        if node.function or set(node.inputs) != set(node.operands):
            raise UnclearError("a call whose operands are not known")

        # 2. The operands that depend on the shortcut.
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
        call = IndexedCall(node.arguments, shapes, layouts)
        layout = layout_after(node.name, call, shape)
        if len(layout) != len(shape):
            raise UnclearError("a result with another number of dimensions")
        if counts:
            self.mixed |= call.mixed
        return layout

    def _may_depend_unseen(self, value: int) -> bool:
        """Return whether a value may depend on the shortcut in a way that was not recorded."""
        # 1. No recorded call made it, nor is it an attribute of a module.
        if value in self.graph.unexplained:
            return True

        # 2. It shares the memory of what a call made of the shortcut.
        maker = self.graph.values[value].node
        if maker < 0 or value in self.layouts:
            return False
        results = self.graph.nodes[maker].outputs
        return value not in results and not self.layouts.keys().isdisjoint(results)
