"""The roles of a sub-layer's matrices, from where the results of its products go.

In an attention, W_Q and W_K are the products whose results meet before a softmax, W_V the one that
meets what comes out of it, W_O the product that no other follows. In an FFN, W_2 is the last,
W_gate the factor that passed a non-linearity, W_1 the other. A router is the product whose result
selects or weighs the results of others.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.matrix_order import roles_of
from jacdiag.trace.discovery.naming import home_of
from jacdiag.trace.discovery.parameter_use import ParameterUse
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import Value
from jacdiag.trace.graph.ops import (
    ACTIVATIONS,
    BILINEAR_OR_IN_PLACE,
    CHOICES,
    CUT_INTO_PIECES,
    FUSED_MULTI_HEAD,
    SCALED_DOT_PRODUCT,
    SOFTMAX,
    TIMES,
)
from jacdiag.trace.site_list import Sites
from jacdiag.trace.sublayer import Sublayer


class _Mark(enum.Enum):
    """What happened to the result of a product on its way to a value."""

    SOFTMAX = enum.auto()
    ACTIVATION = enum.auto()
    CHOICE = enum.auto()  # it selects or weighs
    LEFT = enum.auto()  # it was the left factor of a product without weights
    RIGHT = enum.auto()


# Which calls leave a mark on what they read.
_CALLS_THAT_MARK = {
    _Mark.SOFTMAX: SOFTMAX,
    _Mark.ACTIVATION: ACTIVATIONS,
    _Mark.CHOICE: CHOICES,
}


class _Tag(enum.Enum):
    """What the dataflow shows of a product; several may be true."""

    QUERY = "Q"
    KEY = "K"
    VALUE = "V"
    WEIGHS = "its result selects or weighs the results of others"
    GATE = "its result passes an activation, then multiplies another"
    UP = "its result is multiplied by another"
    HALVES = "pieces of its result are multiplied by one another"


_ATTENTION_TAGS = (_Tag.QUERY, _Tag.KEY, _Tag.VALUE)


@dataclass(frozen=True)
class _ProductFlow:
    """The result of a product as it arrives at a value.

    Attributes:
        product: the call.
        marks: what happened to its result since.
        pieces: the values that were cut from it on the way.
    """

    product: int
    marks: frozenset[_Mark] = frozenset()
    pieces: frozenset[int] = frozenset()

    def passing(self, marks: frozenset[_Mark], pieces: frozenset[int]) -> _ProductFlow:
        """Return the flow after a call that leaves marks on it, or cuts pieces from it."""
        return _ProductFlow(self.product, self.marks | marks, self.pieces | pieces)


# Flows into one value. A loop that cuts a value and joins the pieces doubles them in each pass.
_MOST_FLOWS = 512


def _without_pieces_if_many(flows: set[_ProductFlow]) -> set[_ProductFlow]:
    """Return flows that no longer tell pieces of a value apart, if there are too many of them."""
    if len(flows) <= _MOST_FLOWS:
        return flows

    # Flows that differ in their pieces alone become one.
    return {_ProductFlow(flow.product, flow.marks) for flow in flows}


def _with_mark(flows: Iterable[_ProductFlow], mark: _Mark) -> set[_ProductFlow]:
    return {flow for flow in flows if mark in flow.marks}


def _union(sides: Iterable[set[_ProductFlow]]) -> set[_ProductFlow]:
    flows: set[_ProductFlow] = set()
    return flows.union(*sides)


def _pieces_of(flows: Iterable[_ProductFlow]) -> set[int]:
    pieces: set[int] = set()
    return pieces.union(*(flow.pieces for flow in flows))


def _products_of(flows: Iterable[_ProductFlow]) -> set[int]:
    return {flow.product for flow in flows}


class BranchMatrices:
    """The matrices of one branch; follows the results of its products through its calls.

    Args:
        sites: the sub-layers of the model.
        site: the sub-layer.
        raw: the same as a residual sum.
    """

    def __init__(self, sites: Sites, site: Sublayer, raw: Site) -> None:
        self.sites = sites
        self.graph = sites.graph
        self.site = site
        self.raw = raw
        self.flows: dict[int, set[_ProductFlow]] = {}  # by value
        self.followed: dict[int, set[int]] = {}  # product -> the products that read its result next
        self.tags: dict[int, set[_Tag]] = {}  # by product

    def roles(self) -> dict[str, ParameterUse]:
        """Return the uses of the branch's matrices by name of the parameter."""
        # 1. Follow the results of products from call to call.
        for node in self._calls():
            self._pass(node)

        # 2. The matrices of each product. The first one that reads a matrix decides.
        uses: dict[str, ParameterUse] = {}
        for node in self.tags:
            for name, use in self._uses_in(node).items():
                uses.setdefault(name, use)
        return uses

    def _uses_in(self, node: int) -> dict[str, ParameterUse]:
        """Return the uses of the matrices that one product reads."""
        # 1. The only matrix of an ordinary product.
        matrices = self._matrices_read(node)
        if len(matrices) == 1:
            return {matrices[0]: self._use_of_product(node)}

        # 2. Several in one fused call: their order gives their roles.
        if self.graph.nodes[node].name == FUSED_MULTI_HEAD:
            matrices = self._in_order(matrices)

        # 3. The use of each.
        uses: dict[str, ParameterUse] = {}
        for role, name in roles_of(self.site.kind, matrices).items():
            uses[name] = self._use_of_stored(role, name)
        return uses

    def _matrices_read(self, node: int) -> list[str]:
        """Return the parameters of rank 2 or more that a call reads."""
        read = parameters_of(self.graph, (node,), self.sites.skeleton)
        return [name for name in read if self._rank(name) >= 2]

    def _use_of_product(self, node: int) -> ParameterUse:
        """Return the use of the only matrix that a product reads."""
        fan_in, fan_out = self._fans(node)
        role = self._role(node, fan_out)
        return ParameterUse(role, fan_in=fan_in, fan_out=fan_out)

    def _use_of_stored(self, role: str, name: str) -> ParameterUse:
        """Return the use of a matrix whose rows are its outputs, as torch stores them."""
        rows, columns = self.sites.skeleton.outlines[name].shape[-2:]
        return ParameterUse(role, fan_in=columns, fan_out=rows)

    def _in_order(self, names: list[str]) -> list[str]:
        """Return the matrices of torch's fused attention in order of use."""
        # Rows that are added to keys and values have rank 3, and are no matrices.
        matrices = [name for name in names if self._rank(name) == 2]

        # Separate W_Q, W_K and W_V are read after W_O.
        is_separate = len(matrices) >= 4
        if is_separate:
            output, *projections = matrices
            return [*projections, output]
        return matrices

    def _calls(self) -> list[int]:
        """Return the branch's calls, and those of its module that read something else.

        Cross-attention makes keys and values of another sequence, for example.
        """
        # 1. The branch itself.
        calls = set(self.raw.calls)

        # 2. What its module does up to the last of them.
        home = home_of(self.graph, self.sites.finder, self.raw)
        if home:
            module_call = self.graph.invocations[home]
            end = min(module_call.end, max(calls) + 1)
            calls.update(range(module_call.start, end))
        return sorted(calls)

    def _rank(self, name: str) -> int:
        return self.sites.skeleton.outlines[name].dim()

    def _fans(self, node: int) -> tuple[int | None, int | None]:
        """Return how many features go in and come out.

        They are in the last dimension, or in that of the channels for a convolution.
        """
        # 1. The sizes before and after.
        record = self.graph.nodes[node]
        factor = self._factor_of(node)
        if factor is None or not record.outputs:
            return None, None
        shape_in = factor.shape
        shape_out = self.graph.values[record.outputs[0]].shape

        # 2. A scalar has no features.
        if not shape_in or not shape_out:
            return None, None

        # 3. The dimension of the features.
        is_convolution = record.name.startswith("conv")
        dim = 1 if is_convolution else -1
        return shape_in[dim], shape_out[dim]

    def _factor_of(self, node: int) -> Value | None:
        """Return the first differentiable value that a product multiplies by its matrix.

        Of an addmm, that is not what is added.
        """
        read = self.graph.float_inputs(node)
        in_product = _values_in_products(self.graph.nodes[node].terms or ())

        # 1. The first that a term of the call multiplies.
        for value in read:
            if value.index in in_product:
                return value

        # 2. A call without such terms multiplies the first that it reads.
        return next(iter(read), None)

    # -- following results -------------------------------------------------------------------------
    def _pass(self, node: int) -> None:
        """Take the flows of a call's operands on to its results."""
        # 1. What the call does with the results of products.
        record = self.graph.nodes[node]
        flows = self._flows_through(node)

        # 2. The flows of its own results. Pieces that are cut off are kept separate.
        marks = _marks_of(record.name)
        cuts = record.name in CUT_INTO_PIECES
        for value in record.outputs:
            pieces: frozenset[int] = frozenset()
            if cuts:
                pieces = frozenset({value})
            passed_on = {flow.passing(marks, pieces) for flow in flows}
            self.flows[value] = _without_pieces_if_many(passed_on)

        # 3. The factors of what a softmax reads are queries and keys.
        if record.name in SOFTMAX:
            self._tag(_with_mark(flows, _Mark.LEFT), _Tag.QUERY)
            self._tag(_with_mark(flows, _Mark.RIGHT), _Tag.KEY)

    def _flows_through(self, node: int) -> set[_ProductFlow]:
        """Return the flows that a call passes on, and tag the products that they come from."""
        # 1. A product with weights ends the flows into it.
        name = self.graph.nodes[node].name
        sides = self._sides(node)
        flows = _union(sides)
        if self.sites.finder.is_product(node):
            return self._begin_flow(node, flows)

        # 2. Fused attention reads queries, keys and values in this order.
        if name in SCALED_DOT_PRODUCT:
            for side, tag in zip(sides, _ATTENTION_TAGS, strict=False):
                self._tag(side, tag)
            return flows

        # 3. Any other call may multiply the results of two products.
        factors = [side for side in sides if side]
        if len(factors) < 2:
            return flows

        # 4. A product of two results, as matrices or by element.
        if name in BILINEAR_OR_IN_PLACE:
            return self._meet(factors)
        if name in TIMES and len(factors) == 2:
            self._multiplied(*factors)
        return flows

    def _sides(self, node: int) -> list[set[_ProductFlow]]:
        """Return the flows into each differentiable operand of a call."""
        live = self.graph.float_indices(node)

        # 1. The operands in their order, each as often as the call names it.
        operands: list[int] = []
        for value in self.graph.nodes[node].operands:
            if value in live:
                operands.append(value)

        # 2. Without operands of its own, everything that the call reads.
        if not operands:
            operands = sorted(live)

        # 3. The flows that arrived at each of them.
        return [self.flows.get(value, set()) for value in operands]

    def _begin_flow(self, node: int, flows: set[_ProductFlow]) -> set[_ProductFlow]:
        """Note a product with weights: the flows into it end, and one begins."""
        for flow in flows:
            self.followed[flow.product].add(node)
        self.tags[node] = set()
        self.followed[node] = set()
        return {_ProductFlow(node)}

    def _tag(self, flows: Iterable[_ProductFlow], tag: _Tag) -> None:
        for flow in flows:
            self.tags[flow.product].add(tag)

    def _meet(self, sides: list[set[_ProductFlow]]) -> set[_ProductFlow]:
        """Return the flows of a product without weights.

        Before a softmax it makes scores, of which the factors are marked. After one it mixes
        values, which are what did not pass the softmax.
        """
        # 1. Before a softmax: scores.
        flows = _union(sides)
        is_before_softmax = not _with_mark(flows, _Mark.SOFTMAX)
        if is_before_softmax:
            left, right = sides[-2:]
            return _marked(left, _Mark.LEFT) | _marked(right, _Mark.RIGHT)

        # 2. After a softmax: a mixture of values. Its marks are of no more use.
        for side in sides:
            is_weights_of_mixture = bool(_with_mark(side, _Mark.SOFTMAX))
            if not is_weights_of_mixture:
                self._tag(side, _Tag.VALUE)
        return _unmarked(flows, {_Mark.SOFTMAX, _Mark.LEFT, _Mark.RIGHT})

    def _multiplied(self, left: set[_ProductFlow], right: set[_ProductFlow]) -> None:
        """Tag the products whose results are multiplied by element: gates, and what they gate."""
        # 1. Two matrices: each makes one factor.
        left_products = _products_of(left)
        right_products = _products_of(right)
        if left_products != right_products:
            self._tag_factor(_without_products(left, right_products))
            self._tag_factor(_without_products(right, left_products))
            return

        # 2. One matrix makes both factors if each is a piece that the other is not.
        left_pieces = _pieces_of(left)
        right_pieces = _pieces_of(right)
        if left_pieces <= right_pieces or right_pieces <= left_pieces:
            return
        self._tag(left, _Tag.HALVES)

    def _tag_factor(self, flows: set[_ProductFlow]) -> None:
        """Tag the products whose results are one factor of a product by element."""
        # 1. A router selects or weighs what it multiplies.
        if _with_mark(flows, _Mark.CHOICE):
            self._tag(flows, _Tag.WEIGHS)

        # 2. A gate passes a non-linearity before.
        if _with_mark(flows, _Mark.ACTIVATION):
            self._tag(flows, _Tag.GATE)
        else:
            self._tag(flows, _Tag.UP)

    # -- roles -------------------------------------------------------------------------------------
    def _role(self, node: int, fan_out: int | None) -> str:
        """Return the role of the matrix of a product."""
        # 1. An attention has roles of its own.
        if self.site.kind == "attention":
            return self._attention_role(node)

        # 2. The last product of the branch.
        tags = self.tags[node]
        is_last = not self.followed[node]
        if is_last:
            return self._last_role(tags, fan_out)

        # 3. The others differ by what their result is multiplied by.
        if _Tag.HALVES in tags:
            return "W_gate_up"
        if _Tag.GATE in tags:
            return "W_gate"

        return "W_1"

    def _last_role(self, tags: set[_Tag], fan_out: int | None) -> str:
        """Return the role of a product that no other follows: the output's, or a router's."""
        if self._is_router(tags, fan_out):
            return "router"

        # The field calls the last matrix of an FFN W_2, and that of any other branch W_O.
        is_ffn = self.site.kind in ("mlp", "moe")
        if is_ffn:
            return "W_2"
        return "W_O"

    def _is_router(self, tags: set[_Tag], fan_out: int | None) -> bool:
        """Return whether a product that no other follows selects or weighs the others' results."""
        # 1. What the product shows.
        weighs = _Tag.WEIGHS in tags
        features = self.graph.values[self.raw.shortcut].features
        makes_stream = fan_out == features

        # 2. In a mixture of experts one of the two is enough. A router has an output for each
        # expert there.
        if self.site.kind == "moe":
            return weighs or not makes_stream
        return weighs and not makes_stream

    def _attention_role(self, node: int) -> str:
        """Return the role of a matrix in an attention, such as W_Q or W_QKV."""
        # 1. What the product makes: queries, keys, values, itself or through products that follow.
        own = self.tags[node]
        passed_on = _union_of_tags(self.tags[product] for product in self.followed[node])
        letters = _letters_of(own | passed_on)

        # 2. The first of two factors is a low-rank projection.
        if _letters_of(passed_on):
            return f"W_{letters}_a"

        # 3. Else the product makes them itself.
        if letters:
            return f"W_{letters}"

        # 4. It makes none of them: the output, a gate of it, or values that nothing weighs.
        is_last = not self.followed[node]
        if is_last:
            return "W_O"

        if _Tag.GATE in own:
            return "W_gate"
        return "W_V"


def _marked(flows: Iterable[_ProductFlow], mark: _Mark) -> set[_ProductFlow]:
    """Return flows with one more mark."""
    return {flow.passing(frozenset({mark}), frozenset()) for flow in flows}


def _unmarked(flows: Iterable[_ProductFlow], marks: set[_Mark]) -> set[_ProductFlow]:
    """Return flows without some marks."""
    return {replace(flow, marks=flow.marks - marks) for flow in flows}


def _without_products(flows: Iterable[_ProductFlow], products: set[int]) -> set[_ProductFlow]:
    """Return the flows that come from other products."""
    return {flow for flow in flows if flow.product not in products}


def _union_of_tags(tags: Iterable[set[_Tag]]) -> set[_Tag]:
    union: set[_Tag] = set()
    return union.union(*tags)


def _letters_of(tags: set[_Tag]) -> str:
    """Return which of queries, keys and values a product makes, as in "QKV" for a fused one."""
    return "".join(tag.value for tag in _ATTENTION_TAGS if tag in tags)


def _values_in_products(terms: Iterable[Term]) -> set[int]:
    """Return the values that terms multiply by a matrix."""
    values: set[int] = set()
    for term in terms:
        # As in addmm, of which the other term is what is added.
        if term.product:
            values.update(term.values)
    return values


def _marks_of(name: str) -> frozenset[_Mark]:
    """Return what a call of that name does to what it reads."""
    return frozenset(mark for mark, names in _CALLS_THAT_MARK.items() if name in names)
