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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.matrix_order import roles_of
from jacdiag.trace.discovery.naming import home_of
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import STATE, Graph, Node
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
class Use:
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


def uses_of(sites: Sites) -> dict[str, Use]:
    """Return the use of every parameter of a recorded model, in the order of the parameters.

    A parameter that this forward did not read (an expert without tokens) takes the role of one
    whose name differs from its own in numbers only.

    Example:
        >>> import torch, jacdiag
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True)
        >>> uses = uses_of(jacdiag.sites(layer, torch.randn(2, 4, 8)))
        >>> names = ("self_attn.in_proj_weight", "linear1.weight", "norm1.weight")
        >>> [uses[name].role for name in names]
        ['W_QKV', 'W_1', 'norm_gain']
    """
    uses: dict[str, Use] = {}

    # 1. Parameters that sub-layers read.
    for site, raw in zip(sites, sites.raw, strict=True):
        roles = _Branch(sites, site, raw).roles()
        for name in site.parameters:
            if name in uses:
                continue
            use = roles.get(name) or _small_use(sites, name)
            uses[name] = replace(use, layer=site.depth, sublayer=site.name)

    # 2. Parameters outside all sub-layers.
    for name, use in _outside(sites).items():
        uses.setdefault(name, use)

    # 3. Parameters that this forward did not read.
    outlines = sites.skeleton.outlines
    ranks = {name: outline.dim() for name, outline in outlines.items()}
    return {name: uses.get(name) or _like(name, uses, ranks) for name in outlines}


def pattern(name: str) -> str:
    """Return a parameter's name with its layer number, the first number in it, as "*".

    >>> pattern("model.layers.3.mlp.experts.0.w1.weight")
    'model.layers.*.mlp.experts.0.w1.weight'
    """
    return NUMBER.sub("*", name, count=1)


def tied_to_head(sites: Sites) -> set[str]:
    """Return the embeddings that a product after the last sub-layer reads too."""
    graph = sites.graph
    last_sum = -1
    for site in sites.raw:
        if not site.nested:
            last_sum = max(last_sum, graph.values[site.output].node)

    # What a product after the last sub-layer reads is the head's.
    is_product = sites.finder.is_product
    after = [node for node in range(last_sum + 1, len(graph.nodes)) if is_product(node)]
    read_by_head = set(parameters_of(graph, after, sites.skeleton))
    return read_by_head & set(sites.coverage.embedding)


def _like(name: str, uses: Mapping[str, Use], ranks: Mapping[str, int]) -> Use:
    """Return the use of a parameter of the same rank whose name differs in numbers only."""
    own_pattern = NUMBER.sub("*", name)
    for other, use in uses.items():
        if ranks.get(other) != ranks[name] or NUMBER.sub("*", other) != own_pattern:
            continue

        # The other's layer is not its own: that stands in its name.
        number = NUMBER.search(name)
        layer = use.layer
        if number is not None and layer is not None:
            layer = int(number[0])
        return replace(use, layer=layer, sublayer="")
    return Use("")


class _Mark(enum.Enum):
    """What happened to the result of a product on its way to a value."""

    SOFTMAX = enum.auto()
    ACTIVATION = enum.auto()
    CHOICE = enum.auto()  # it selects or weighs
    LEFT = enum.auto()  # it was the left factor of a product without weights
    RIGHT = enum.auto()


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
class _Flow:
    """The result of a product as it arrives at a value.

    Attributes:
        product: the call.
        marks: what happened to its result since.
        pieces: the values that were cut from it on the way.
    """

    product: int
    marks: frozenset[_Mark] = frozenset()
    pieces: frozenset[int] = frozenset()


# Flows into one value. A loop that cuts a value and joins the pieces doubles them in each pass.
_MOST_FLOWS = 512


def _without_pieces_if_many(flows: set[_Flow]) -> set[_Flow]:
    """Return flows that no longer tell pieces of a value apart, if there are too many of them."""
    if len(flows) <= _MOST_FLOWS:
        return flows
    return {_Flow(flow.product, flow.marks) for flow in flows}


def _with_mark(flows: Iterable[_Flow], mark: _Mark) -> set[_Flow]:
    return {flow for flow in flows if mark in flow.marks}


def _union(sides: Iterable[set[_Flow]]) -> set[_Flow]:
    flows: set[_Flow] = set()
    return flows.union(*sides)


def _pieces_of(flows: Iterable[_Flow]) -> set[int]:
    pieces: set[int] = set()
    return pieces.union(*(flow.pieces for flow in flows))


def _products_of(flows: Iterable[_Flow]) -> set[int]:
    return {flow.product for flow in flows}


class _Branch:
    """Follows the results of a branch's products through its calls."""

    def __init__(self, sites: Sites, site: Sublayer, raw: Site) -> None:
        self.sites = sites
        self.graph = sites.graph
        self.site = site
        self.raw = raw
        self.flows: dict[int, set[_Flow]] = {}  # by value
        self.followed: dict[int, set[int]] = {}  # product -> the products that read its result next
        self.tags: dict[int, set[_Tag]] = {}  # by product

    def roles(self) -> dict[str, Use]:
        """Return the uses of the branch's matrices by name of the parameter."""
        for node in self._calls():
            self._pass(node)
        uses: dict[str, Use] = {}
        for node in self.tags:
            for name, use in self._uses_in(node).items():
                uses.setdefault(name, use)
        return uses

    def _uses_in(self, node: int) -> dict[str, Use]:
        """Return the uses of the matrices that one product reads."""
        read = parameters_of(self.graph, (node,), self.sites.skeleton)
        matrices = [name for name in read if self._rank(name) >= 2]
        if len(matrices) == 1:
            fan_in, fan_out = self._fans(node)
            role = self._role(node, fan_out)
            return {matrices[0]: Use(role, fan_in=fan_in, fan_out=fan_out)}

        # Several in one fused call: their order gives their roles.
        if self.graph.nodes[node].name == FUSED_MULTI_HEAD:
            matrices = self._in_order(matrices)
        uses: dict[str, Use] = {}
        for role, name in roles_of(self.site.kind, matrices).items():
            rows, columns = self.sites.skeleton.outlines[name].shape[-2:]
            uses[name] = Use(role, fan_in=columns, fan_out=rows)
        return uses

    def _in_order(self, names: list[str]) -> list[str]:
        """Return the matrices of torch's fused attention in order of use.

        Separate W_Q, W_K and W_V are read after W_O.
        """
        # Rows that are added to keys and values have rank 3, and are no matrices.
        matrices = [name for name in names if self._rank(name) == 2]
        if len(matrices) < 4:
            return matrices
        return [*matrices[1:], matrices[0]]

    def _calls(self) -> list[int]:
        """Return the branch's calls, and those of its module that read something else.

        Cross-attention makes keys and values of another sequence, for example.
        """
        calls = set(self.raw.calls)
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
        # 1. What the product reads. Of addmm, that is not what is added.
        record = self.graph.nodes[node]
        read = list(self.graph.float_inputs(node))
        if record.terms is not None:
            in_product = _values_in_products(record.terms)
            factors = [value for value in read if value.index in in_product]
            read = factors or read
        if not read or not record.outputs:
            return None, None

        # 2. The sizes before and after.
        shape_in = read[0].shape
        shape_out = self.graph.values[record.outputs[0]].shape
        if not shape_in or not shape_out:
            return None, None
        dim = 1 if record.name.startswith("conv") else -1
        return shape_in[dim], shape_out[dim]

    # -- following results -------------------------------------------------------------------------
    def _pass(self, node: int) -> None:
        """Take the flows of a call's operands on to its results."""
        # 1. What the call does with the results of products.
        name = self.graph.nodes[node].name
        flows = self._flows_through(node)

        # 2. The flows of its own results. Pieces that are cut off are kept separate.
        marks = _marks_of(name)
        cuts = name in CUT_INTO_PIECES
        for value in self.graph.nodes[node].outputs:
            pieces = frozenset({value}) if cuts else frozenset()
            passed_on = {
                _Flow(flow.product, flow.marks | marks, flow.pieces | pieces) for flow in flows
            }
            self.flows[value] = _without_pieces_if_many(passed_on)

        # 3. The factors of what a softmax reads are queries and keys.
        if name in SOFTMAX:
            self._tag(_with_mark(flows, _Mark.LEFT), _Tag.QUERY)
            self._tag(_with_mark(flows, _Mark.RIGHT), _Tag.KEY)

    def _flows_through(self, node: int) -> set[_Flow]:
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

        # 3. A product of two results, as matrices or by element.
        factors = [side for side in sides if side]
        if name in BILINEAR_OR_IN_PLACE and len(factors) >= 2:
            return self._meet(factors)
        if name in TIMES and len(factors) == 2:
            self._multiplied(*factors)
        return flows

    def _sides(self, node: int) -> list[set[_Flow]]:
        """Return the flows into each differentiable operand of a call."""
        live = {value.index for value in self.graph.float_inputs(node)}
        operands = [value for value in self.graph.nodes[node].operands if value in live]
        if not operands:
            operands = sorted(live)
        return [self.flows.get(value, set()) for value in operands]

    def _begin_flow(self, node: int, flows: set[_Flow]) -> set[_Flow]:
        """Note a product with weights: the flows into it end, and one begins."""
        for flow in flows:
            self.followed[flow.product].add(node)
        self.tags[node] = set()
        self.followed[node] = set()
        return {_Flow(node)}

    def _tag(self, flows: Iterable[_Flow], tag: _Tag) -> None:
        for flow in flows:
            self.tags[flow.product].add(tag)

    def _meet(self, sides: list[set[_Flow]]) -> set[_Flow]:
        """Return the flows of a product without weights.

        Before a softmax it makes scores, of which the factors are marked. After one it mixes
        values, which are what did not pass the softmax.
        """
        # 1. Before a softmax: scores.
        if not _with_mark(_union(sides), _Mark.SOFTMAX):
            left, right = sides[-2:]
            marked = {replace(flow, marks=flow.marks | {_Mark.LEFT}) for flow in left}
            return marked | {replace(flow, marks=flow.marks | {_Mark.RIGHT}) for flow in right}

        # 2. After a softmax: a mixture of values. Its marks are of no more use.
        for side in sides:
            if not _with_mark(side, _Mark.SOFTMAX):
                self._tag(side, _Tag.VALUE)
        ended = {_Mark.SOFTMAX, _Mark.LEFT, _Mark.RIGHT}
        return {replace(flow, marks=flow.marks - ended) for flow in _union(sides)}

    def _multiplied(self, left: set[_Flow], right: set[_Flow]) -> None:
        """Tag the products whose results are multiplied by element: gates, and what they gate."""
        left_products = _products_of(left)
        right_products = _products_of(right)
        if left_products != right_products:
            self._tag_factor({flow for flow in left if flow.product not in right_products})
            self._tag_factor({flow for flow in right if flow.product not in left_products})
            return

        # One matrix makes both factors if each is a piece that the other is not.
        left_pieces = _pieces_of(left)
        right_pieces = _pieces_of(right)
        if left_pieces - right_pieces and right_pieces - left_pieces:
            self._tag(left, _Tag.HALVES)

    def _tag_factor(self, flows: set[_Flow]) -> None:
        """Tag the products whose results are one factor of a product by element."""
        if _with_mark(flows, _Mark.CHOICE):
            self._tag(flows, _Tag.WEIGHS)
        if _with_mark(flows, _Mark.ACTIVATION):
            self._tag(flows, _Tag.GATE)
        else:
            self._tag(flows, _Tag.UP)

    # -- roles -------------------------------------------------------------------------------------
    def _role(self, node: int, fan_out: int | None) -> str:
        """Return the role of the matrix of a product."""
        if self.site.kind == "attention":
            return self._attention_role(node)
        tags = self.tags[node]
        is_last = not self.followed[node]
        if is_last:
            return self._last_role(tags, fan_out)

        # The others differ by what their result is multiplied by.
        if _Tag.HALVES in tags:
            return "W_gate_up"
        if _Tag.GATE in tags:
            return "W_gate"
        return "W_1"

    def _last_role(self, tags: set[_Tag], fan_out: int | None) -> str:
        """Return the role of a product that no other follows: the output's, or a router's."""
        if self._is_router(tags, fan_out):
            return "router"
        if self.site.kind in ("mlp", "moe"):
            return "W_2"
        return "W_O"

    def _is_router(self, tags: set[_Tag], fan_out: int | None) -> bool:
        """Return whether a product that no other follows selects or weighs the others' results."""
        makes_stream = fan_out == self.graph.values[self.raw.shortcut].shape[-1]
        if self.site.kind == "moe":
            return _Tag.WEIGHS in tags or not makes_stream
        return _Tag.WEIGHS in tags and not makes_stream

    def _attention_role(self, node: int) -> str:
        """Return the role of a matrix in an attention, such as W_Q or W_QKV."""
        # 1. What the product makes: queries, keys, values, itself or through products that follow.
        passed_on: set[_Tag] = set()
        for product in self.followed[node]:
            passed_on.update(self.tags[product])
        passed_on &= set(_ATTENTION_TAGS)
        tags = self.tags[node] | passed_on
        letters = "".join(tag.value for tag in _ATTENTION_TAGS if tag in tags)

        # 2. The first of two factors is a low-rank projection.
        if letters and passed_on:
            return f"W_{letters}_a"
        if letters:
            return f"W_{letters}"

        # 3. It makes none of them.
        is_last = not self.followed[node]
        if is_last:
            return "W_O"
        if _Tag.GATE in self.tags[node]:
            return "W_gate"
        return "W_V"


def _values_in_products(terms: Iterable[Term]) -> set[int]:
    """Return the values that terms multiply by a matrix."""
    values: set[int] = set()
    for term in terms:
        if term.product:
            values.update(term.values)
    return values


def _marks_of(name: str) -> frozenset[_Mark]:
    """Return what a call of that name does to what it reads."""
    marks: set[_Mark] = set()
    if name in SOFTMAX:
        marks.add(_Mark.SOFTMAX)
    if name in ACTIVATIONS:
        marks.add(_Mark.ACTIVATION)
    if name in CHOICES:
        marks.add(_Mark.CHOICE)
    return frozenset(marks)


# -- outside all sub-layers ------------------------------------------------------------------------
def _outside(sites: Sites) -> dict[str, Use]:
    """Return the uses of parameters outside all sub-layers: tables, head, what lies between."""
    coverage = sites.coverage
    outlines = sites.skeleton.outlines
    uses = _lookup_tables(sites)
    for name in (*coverage.embedding, *coverage.head, *coverage.norms, *coverage.uncovered):
        if name in uses or name not in outlines:
            continue
        if _joins_the_input(sites, name):
            uses[name] = Use("cls")
        elif outlines[name].dim() < 2:
            uses[name] = _small_use(sites, name)
        elif name not in coverage.uncovered:
            uses[name] = _outer_matrix(sites, name)
    return uses


def _lookup_tables(sites: Sites) -> dict[str, Use]:
    """Return the uses of lookup tables: the embedding is the longest that the input indexes."""
    # 1. All tables, and those that the input indexes.
    graph = sites.graph
    outlines = sites.skeleton.outlines
    uses: dict[str, Use] = {}
    indexed_by_input: set[str] = set()
    for node in graph.nodes:
        if node.name not in LOOKUPS:
            continue
        read = [graph.values[index] for index in node.inputs]
        reads_input = any(value.live or value.routed for value in read)
        for name in parameters_of(graph, (node.index,), sites.skeleton):
            if name not in outlines:
                continue
            shape = outlines[name].shape
            uses[name] = Use("positions", fan_in=shape[0], fan_out=shape[-1])
            if reads_input:
                indexed_by_input.add(name)

    # 2. The longest of them is the embedding.
    if indexed_by_input:
        longest = max(sorted(indexed_by_input), key=lambda name: outlines[name].shape[0])
        uses[longest] = replace(uses[longest], role="embedding")
    return uses


def _outer_matrix(sites: Sites, name: str) -> Use:
    """Return the use of a matrix outside all sub-layers, by the first product that reads it."""
    # 1. The first product that reads the matrix, and the last product of all.
    graph = sites.graph
    products = [node.index for node in graph.nodes if sites.finder.is_product(node.index)]
    readers = [n for n in products if name in parameters_of(graph, (n,), sites.skeleton)]
    if not readers and name in sites.coverage.embedding:
        return Use("positions")
    if not readers:
        return Use("")
    first_reader = readers[0]
    is_last_product = first_reader == products[-1]
    role = "head" if is_last_product else "projection"

    # 2. How many features go in and come out.
    shape_in = next(iter(graph.float_inputs(first_reader))).shape
    shape_out = graph.values[graph.nodes[first_reader].outputs[0]].shape
    fan_in = shape_in[-1] if shape_in else None
    fan_out = shape_out[-1] if shape_out else None
    return Use(role, fan_in=fan_in, fan_out=fan_out)


def _joins_the_input(sites: Sites, name: str) -> bool:
    """Return whether a parameter is a token of its own, joined to those of the input."""
    graph = sites.graph
    use = _first_use(graph, name)
    if use is None or graph.nodes[use.node].name not in JOINS:
        return False

    # A token has the features of those that it joins.
    joined = graph.values[graph.nodes[use.node].outputs[0]].shape
    shape = sites.skeleton.outlines[name].shape
    if len(joined) < 3 or not shape:
        return False
    return shape[-1] == joined[-1]


# -- vectors ---------------------------------------------------------------------------------------
def _small_use(sites: Sites, name: str) -> Use:
    """Return the use of a vector: the gain or bias of a norm, a bias, a scale, positions.

    It is what the first call that reads it makes of it.
    """
    # 1. Tables and matrices.
    graph = sites.graph
    shape = sites.skeleton.outlines[name].shape
    if _is_looked_up(graph, name):
        return Use("positions")
    is_matrix = len(shape) >= 2 and min(shape) > 1
    use = None if is_matrix else _first_use(graph, name)
    if use is None:
        return Use("")

    # 2. The gain of a fused norm.
    operation = graph.nodes[use.node].name
    if operation in NORMS_WITH_GAIN and _is_gain(graph, use.node, name):
        return Use("norm_gain", offset=use.added)

    # 3. A product by element is a norm's gain or a scale. Anything else adds a bias.
    if operation in NORMS_WITH_GAIN or operation not in TIMES | DIVISIONS:
        return Use("bias")
    is_gain_of_norm = _in_norm(sites, use.node) and not use.changed
    role = "norm_gain" if is_gain_of_norm else "scale"
    return Use(role, offset=use.added + _times_one_more(graph, use.node))


def _is_looked_up(graph: Graph, name: str) -> bool:
    """Return whether a parameter is a lookup table."""
    lookups = [node.index for node in graph.nodes if node.name in LOOKUPS]
    return any(name in _state_read(graph, node) for node in lookups)


def _is_gain(graph: Graph, node: int, name: str) -> bool:
    """Return whether a parameter is the gain of a fused norm, which comes before the bias.

    Running statistics, which a batch norm reads too, come before both.
    """
    vectors = [v for v in graph.nodes[node].operands if graph.values[v].is_weight]
    position_of_gain = max(0, len(vectors) - 2)
    for position, vector in enumerate(vectors):
        if _made_of(graph, vector, name):
            return position == position_of_gain
    return False


def _state_read(graph: Graph, node: int) -> set[str]:
    """Return the names of the parameters and buffers that a call reads itself."""
    read = [graph.values[index] for index in graph.nodes[node].inputs]
    return {value.name for value in read if value.node == STATE}


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

    def after(self, call: Node, output: int) -> _Derived:
        """Return what a call makes of it."""
        added = self.added + call.added
        changed = self.changed or call.name in CHANGE_A_NUMBER
        return _Derived(output, added, changed)


def _first_use(graph: Graph, name: str) -> _FirstUse | None:
    """Return the first call that reads a parameter together with something live.

    The parameter is followed through the calls that read nothing live, such as casts and
    `1 + weight`.
    """
    # 1. The parameter itself.
    states = [value for value in graph.values if value.node == STATE]
    waiting = [_Derived(value.index) for value in states if value.name == name]

    # 2. What calls make of it, until one reads something live as well.
    seen: set[int] = set()
    while waiting:
        derived = waiting.pop(0)
        for node in graph.values[derived.value].consumers:
            if graph.live_inputs(node):
                return _FirstUse(node, derived.added, derived.changed)
            record = graph.nodes[node]
            for output in record.outputs:
                if output not in seen:
                    waiting.append(derived.after(record, output))
            seen.update(record.outputs)
    return None


def _times_one_more(graph: Graph, node: int) -> float:
    """Return 1 if a product is added to what it multiplied, as in `x + x * weight`, else 0."""
    record = graph.nodes[node]
    if record.name not in TIMES:
        return 0.0

    # The sum has two terms: the product, and what it multiplied.
    multiplied = {value for value in record.operands if graph.values[value].live}
    for output in record.outputs:
        for consumer in graph.values[output].consumers:
            terms = graph.nodes[consumer].terms or ()
            added = {term.operand for term in terms}
            if added == {output} | multiplied:
                return 1.0
    return 0.0


def _made_of(graph: Graph, value: int, name: str) -> bool:
    """Return whether a value is a parameter, or was computed from it."""
    record = graph.values[value]
    if record.node == STATE:
        return record.name == name
    if record.node < 0:
        return False
    inputs = graph.nodes[record.node].inputs
    return any(_made_of(graph, index, name) for index in inputs)


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
        if graph.nodes[maker].name in NORMALISING:
            return True
        if not _ends_norm(sites, maker):
            waiting += graph.live_inputs(maker)
    return False


def _ends_norm(sites: Sites, node: int) -> bool:
    """Return whether nothing before a call is of one norm with what follows it."""
    graph = sites.graph
    record = graph.nodes[node]
    reads_weight = any(graph.values[index].is_weight for index in record.inputs)
    adds_two = record.terms is not None and "sub" not in record.name
    return reads_weight or adds_two or sites.finder.is_product(node)


def length_divided_by(graph: Graph, name: str) -> int | None:
    """Return how many numbers the norm of a gain divides by their length; None for any other norm.

    A norm by the mean square, or one that multiplies by a constant too, is another norm.

    Args:
        graph: of the forward.
        name: of the gain.
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
        operation = graph.nodes[maker].name
        live = graph.live_inputs(maker)
        if operation in LENGTHS and live:
            numbers = graph.values[live[0]].shape[-1]
            continue

        # A call that may change the size of the result ends the way, since the norm is another.
        divides_by_a_weight = operation in DIVISIONS and len(live) != 2
        if operation in KEEP_THE_SIZE and not divides_by_a_weight:
            waiting += live
    return numbers
