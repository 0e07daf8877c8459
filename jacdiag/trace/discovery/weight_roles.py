"""The role of every parameter, from what the forward does with it.

No name of any architecture is used.

In an attention, W_Q and W_K are the products whose results meet before a softmax, W_V the one that
meets what comes out of it, W_O the product that no other follows. In an FFN, W_2 is the last,
W_gate the factor that passed a non-linearity, W_1 the other. A router is the product whose result
selects or weighs the results of others.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.matrix_order import roles_of
from jacdiag.trace.discovery.naming import home_of
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import STATE, Graph, Node, Value
from jacdiag.trace.graph.ops import (
    ACTIVATIONS,
    BILINEAR_OR_IN_PLACE,
    CHANGE_A_NUMBER,
    CHOICES,
    CUT_INTO_PIECES,
    DIVISIONS,
    FUSED_MULTI_HEAD,
    JOINS,
    KEEP_THE_SIZE,
    LENGTHS,
    LOOKUPS,
    NORMALISING,
    NORMS_WITH_GAIN,
    SCALED_DOT_PRODUCT,
    SOFTMAX,
    TIMES,
)
from jacdiag.trace.site_list import Sites
from jacdiag.trace.sublayer import Sublayer

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class ParameterUse:
    """What the forward does with one parameter.

    Attributes:
        role: embedding, positions, W_Q, W_K, W_V, W_QKV, W_KV, W_O, W_1, W_gate, W_gate_up, W_2,
            router, head, projection, cls, norm_gain, scale, bias, or "" if the dataflow does not
            show it. A scale is a LayerScale, a gate or a temperature; cls is any token that joins
            those of the input.
        layer: depth of the sub-layer that reads it, None outside all.
        sublayer: its name, "" outside all.
        fan_in, fan_out: sizes of the linear map that it makes, whichever way it is stored; None for
            a vector.
        offset: the number that is added to a gain or a scale before it multiplies: 1 in `x * (1 +
            weight)`.
    """

    role: str
    layer: int | None = None
    sublayer: str = ""
    fan_in: int | None = None
    fan_out: int | None = None
    offset: float = 0.0


def uses_of(sites: Sites) -> dict[str, ParameterUse]:
    """Return the use of every parameter of a recorded model, in the order of the parameters.

    A parameter that this forward did not read (an expert without tokens) takes the role of one
    whose name differs from its own in numbers only.

    Args:
        sites: the sub-layers of the model.

    Returns:
        The use by name of the parameter.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> uses = uses_of(jacdiag.sites(layer, torch.randn(2, 4, 8)))
        >>> names = ("self_attn.in_proj_weight", "linear1.weight", "norm1.weight")
        >>> [uses[name].role for name in names]
        ['W_QKV', 'W_1', 'norm_gain']
    """
    # 1. Parameters that sub-layers read, each by the first that reads it.
    uses: dict[str, ParameterUse] = {}
    for site, raw in zip(sites, sites.raw, strict=True):
        for name, use in _uses_in_sublayer(sites, site, raw).items():
            uses.setdefault(name, use)

    # 2. Parameters outside all sub-layers.
    for name, use in _outside(sites).items():
        uses.setdefault(name, use)

    # 3. Parameters that this forward did not read.
    outlines = sites.skeleton.outlines
    ranks = {name: outline.dim() for name, outline in outlines.items()}
    return {name: uses.get(name) or _like(name, uses, ranks) for name in outlines}


def _uses_in_sublayer(sites: Sites, site: Sublayer, raw: Site) -> dict[str, ParameterUse]:
    """Return the uses of the parameters that a sub-layer reads."""
    uses_of_matrices = _Branch(sites, site, raw).roles()
    uses: dict[str, ParameterUse] = {}
    for name in site.parameters:
        # A matrix has its role from the products, a vector from the first call that reads it.
        use = uses_of_matrices.get(name) or _small_use(sites, name)
        uses[name] = replace(use, layer=site.depth, sublayer=site.name)
    return uses


def pattern(name: str) -> str:
    """Return a parameter's name with its layer number, the first number in it, as "*".

    >>> pattern("model.layers.3.mlp.experts.0.w1.weight")
    'model.layers.*.mlp.experts.0.w1.weight'
    """
    return NUMBER.sub("*", name, count=1)


def tied_to_head(sites: Sites) -> set[str]:
    """Return the embeddings that a product after the last sub-layer reads too.

    Args:
        sites: the sub-layers of the model.

    Returns:
        Names of the parameters.
    """
    # 1. The call that makes the last sum on the stream.
    graph = sites.graph
    outer = [site for site in sites.raw if not site.nested]
    last_sum = max((graph.values[site.output].node for site in outer), default=-1)

    # 2. What a product after the last sub-layer reads is the head's.
    calls_after = range(last_sum + 1, len(graph.nodes))
    products = sites.finder.products_among(calls_after)
    read_by_head = set(parameters_of(graph, products, sites.skeleton))
    return read_by_head & set(sites.coverage.embedding)


def _like(name: str, uses: Mapping[str, ParameterUse], ranks: Mapping[str, int]) -> ParameterUse:
    """Return the use of a parameter of the same rank whose name differs in numbers only."""
    own_pattern = NUMBER.sub("*", name)
    for other, use in uses.items():
        # A parameter of another rank has another role.
        if ranks.get(other) != ranks[name]:
            continue

        # The other's layer is not its own.
        if NUMBER.sub("*", other) == own_pattern:
            layer = _layer_in_name(name, use.layer)
            return replace(use, layer=layer, sublayer="")
    return ParameterUse("")


def _layer_in_name(name: str, layer_of_other: int | None) -> int | None:
    """Return the layer that a parameter's name says, if a similar one belongs to a layer.

    Args:
        name: of the parameter.
        layer_of_other: the layer of a parameter whose name differs in numbers only.
    """
    # A parameter outside all layers may have a number in its name even so.
    if layer_of_other is None:
        return None

    # The first number is that of the layer.
    number = NUMBER.search(name)
    if number is None:
        return layer_of_other
    return int(number[0])


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


class _Branch:
    """Follows the results of a branch's products through its calls."""

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
            pieces = frozenset({value}) if cuts else frozenset()
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
        if not _with_mark(flows, _Mark.SOFTMAX):
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
        if letters:
            return f"W_{letters}"

        # 3. It makes none of them: the output, a gate of it, or values that nothing weighs.
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


# -- outside all sub-layers ------------------------------------------------------------------------
def _outside(sites: Sites) -> dict[str, ParameterUse]:
    """Return the uses of parameters outside all sub-layers: tables, head, what lies between."""
    coverage = sites.coverage
    outside = (*coverage.embedding, *coverage.head, *coverage.norms, *coverage.uncovered)

    # 1. Tables that a lookup reads.
    uses = _lookup_tables(sites)

    # 2. The other parameters.
    for name in outside:
        if name in uses or name not in sites.skeleton.outlines:
            continue
        use = _outer_use(sites, name)
        if use is not None:
            uses[name] = use
    return uses


def _outer_use(sites: Sites, name: str) -> ParameterUse | None:
    """Return the use of a parameter outside all sub-layers; None for one without a place."""
    # 1. A token of its own, such as a class token.
    if _joins_the_input(sites, name):
        return ParameterUse("cls")

    # 2. A vector, or a matrix that has a place.
    is_vector = sites.skeleton.outlines[name].dim() < 2
    if is_vector:
        return _small_use(sites, name)
    if name in sites.coverage.uncovered:
        return None
    return _outer_matrix(sites, name)


def _lookup_tables(sites: Sites) -> dict[str, ParameterUse]:
    """Return the uses of lookup tables: the embedding is the longest that the input indexes."""
    # 1. All tables, and those that the input indexes.
    outlines = sites.skeleton.outlines
    uses: dict[str, ParameterUse] = {}
    indexed_by_input: set[str] = set()
    for lookup in _lookups(sites.graph):
        tables = _tables_read(sites, lookup)
        for name in tables:
            shape = outlines[name].shape
            uses[name] = ParameterUse("positions", fan_in=shape[0], fan_out=shape[-1])
        if _depends_on_input(sites.graph, lookup):
            indexed_by_input.update(tables)

    # 2. The longest of them is the embedding.
    if indexed_by_input:
        longest = max(sorted(indexed_by_input), key=lambda name: outlines[name].shape[0])
        uses[longest] = replace(uses[longest], role="embedding")
    return uses


def _lookups(graph: Graph) -> list[int]:
    """Return the calls that look rows of a table up."""
    return [node.index for node in graph.nodes if node.name in LOOKUPS]


def _tables_read(sites: Sites, lookup: int) -> list[str]:
    """Return the parameters that a lookup reads."""
    names = parameters_of(sites.graph, (lookup,), sites.skeleton)
    return [name for name in names if name in sites.skeleton.outlines]


def _depends_on_input(graph: Graph, node: int) -> bool:
    """Return whether a call reads a value, or an index, that comes from the model's input."""
    return any(value.live or value.routed for value in graph.values_read(node))


def _outer_matrix(sites: Sites, name: str) -> ParameterUse:
    """Return the use of a matrix outside all sub-layers, by the first product that reads it."""
    # 1. The first product that reads the matrix.
    graph = sites.graph
    products = sites.finder.products_among(range(len(graph.nodes)))
    reader = _first_reader_of(sites, products, name)

    # 2. A matrix that no product reads. Before the first sub-layer, it is added.
    if reader is None and name in sites.coverage.embedding:
        return ParameterUse("positions")
    if reader is None:
        return ParameterUse("")

    # 3. The last product of all is the head.
    is_last_product = reader == products[-1]
    role = "head" if is_last_product else "projection"

    # 4. How many features go in and come out.
    value_in = graph.float_inputs(reader)[0]
    value_out = graph.values[graph.nodes[reader].outputs[0]]
    return ParameterUse(role, fan_in=value_in.features, fan_out=value_out.features)


def _first_reader_of(sites: Sites, calls: Iterable[int], name: str) -> int | None:
    """Return the first of some calls that reads a parameter; None if none does."""
    for node in calls:
        # Through values made of parameters alone, too.
        read = parameters_of(sites.graph, (node,), sites.skeleton)

        # The first one decides.
        if name in read:
            return node
    return None


def _joins_the_input(sites: Sites, name: str) -> bool:
    """Return whether a parameter is a token of its own, joined to those of the input."""
    # 1. The first call that reads it joins tensors.
    graph = sites.graph
    use = _first_use(graph, name)
    if use is None or graph.nodes[use.node].name not in JOINS:
        return False

    # 2. What it is joined to has tokens.
    joined = graph.values[graph.nodes[use.node].outputs[0]].shape
    if len(joined) < 3:
        return False

    # 3. A token has the features of those that it joins.
    shape = sites.skeleton.outlines[name].shape
    return tuple(shape[-1:]) == joined[-1:]


# -- vectors ---------------------------------------------------------------------------------------
def _small_use(sites: Sites, name: str) -> ParameterUse:
    """Return the use of a vector: the gain or bias of a norm, a bias, a scale, positions.

    It is what the first call that reads it makes of it.
    """
    # 1. A table, or a matrix.
    graph = sites.graph
    if _is_looked_up(graph, name):
        return ParameterUse("positions")
    if _is_matrix(sites.skeleton.outlines[name].shape):
        return ParameterUse("")

    # 2. A vector that no call reads together with something live.
    use = _first_use(graph, name)
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


def _use_in_fused_norm(graph: Graph, use: _FirstUse, name: str) -> ParameterUse:
    """Return the use of a vector that a fused norm reads: its gain or its bias."""
    if _is_gain(graph, use.node, name):
        return ParameterUse("norm_gain", offset=use.added)

    # The other vector, if it takes two.
    return ParameterUse("bias")


def _use_as_factor(sites: Sites, use: _FirstUse) -> ParameterUse:
    """Return the use of a vector that multiplies by element: a norm's gain or a scale."""
    offset = use.added + _times_one_more(sites.graph, use.node)

    # A gain of a norm multiplies what was just normalised, and is what it is.
    is_gain_of_norm = _in_norm(sites, use.node) and not use.changed
    if is_gain_of_norm:
        return ParameterUse("norm_gain", offset=offset)
    return ParameterUse("scale", offset=offset)


def _is_looked_up(graph: Graph, name: str) -> bool:
    """Return whether a parameter is a lookup table."""
    return any(name in _state_read(graph, lookup) for lookup in _lookups(graph))


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
class _FirstUse:
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


def _first_use(graph: Graph, name: str) -> _FirstUse | None:
    """Return the first call that reads a parameter together with something live.

    The parameter is followed through the calls that read nothing live, such as casts and
    `1 + weight`.
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
                return _FirstUse(node, derived.added, derived.changed)
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
    use = _first_use(graph, name)
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
