"""Which part every parameter plays, from what the forward does with it; no name of any architecture
is used.

In an attention, W_Q and W_K are the products whose results meet before a softmax, W_V the one that
meets what comes out of it, W_O the product that no other follows. In an FFN, W_2 is the last,
W_gate the factor that passed a non-linearity, W_1 the other. A router is the product whose result
selects or weighs the results of others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from jacdiag.trace.discovery.coverage import parameters_of
from jacdiag.trace.discovery.matrix_order import ACTIVATIONS, roles_of
from jacdiag.trace.discovery.naming import home_of
from jacdiag.trace.discovery.norms import FUSED_NORMS
from jacdiag.trace.discovery.residual import Site
from jacdiag.trace.graph.graph import STATE, Graph
from jacdiag.trace.graph.reachability import REDUCTIONS
from jacdiag.trace.site_list import Sites
from jacdiag.trace.sublayer import Sublayer

_SOFTMAX = {"softmax", "log_softmax", "_softmax", "softmax_"}
_SDPA = {"scaled_dot_product_attention"}
_TORCH_ATTENTION = "multi_head_attention_forward"
_BILINEAR = {"matmul", "bmm", "einsum", "__matmul__", "baddbmm", "baddbmm_"}
_TIMES = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"}
_PARTS = {"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "__getitem__", "narrow"}
_CHOICE = {"topk", "softmax", "sigmoid", "argsort", "sort", "gather"}
# Calls after which a parameter's number is another one, so that a gain of 1 is no longer a
# parameter of 1.
_CHANGES = (
    _TIMES
    | ACTIVATIONS
    | set("div __truediv__ exp exp_ log sqrt pow __pow__ square neg abs clamp".split())
)
_CHANGES |= {"softmax", "normalize", "logsigmoid"}
_JOINS = {"cat", "concat", "concatenate"}
_NORMALISING = REDUCTIONS | FUSED_NORMS | {"rsqrt", "normalize"}
_LENGTHS = {"normalize", "norm", "vector_norm", "linalg_vector_norm"}
# Calls that keep the size of what a norm returns, but for the guard against a division by zero.
_KEEP_THE_SIZE = {
    "div",
    "__truediv__",
    "clamp",
    "clamp_min",
    "clamp_min_",
    "maximum",
    "expand_as",
    "to",
    "float",
}
_KEEP_THE_SIZE |= {"type_as", "contiguous", "expand", "unsqueeze"}
_NORMS_WITH_GAIN = FUSED_NORMS | {"batch_norm", "group_norm", "instance_norm"}
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Use:
    """What the forward does with one parameter.

    Attributes:
        role: embedding, positions, W_Q, W_K, W_V, W_QKV, W_KV, W_O, W_1, W_gate, W_gate_up, W_2,
            router, head, projection, cls, norm_gain, scale, bias, or "" where the dataflow does not
            tell. A scale is a LayerScale, a gate or a temperature; cls is any token that joins
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
    """Returns the use of every parameter of a recorded model, in the order of the parameters.

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
    found: dict[str, Use] = {}
    for site, raw in zip(sites, sites.raw, strict=True):
        roles = _Branch(sites, site, raw).roles()
        for name in site.parameters:
            if name not in found:
                use = roles.get(name) or _small_use(sites, name)
                found[name] = replace(use, layer=site.depth, sublayer=site.name)
    found |= {name: use for name, use in _outside(sites).items() if name not in found}
    outlines = sites.skeleton.outlines
    ranks = {name: outline.dim() for name, outline in outlines.items()}
    return {name: found.get(name) or _like(name, found, ranks) for name in outlines}


def pattern(name: str) -> str:
    """A parameter's name with its layer number, the first number in it, as "*".

    >>> pattern("model.layers.3.mlp.experts.0.w1.weight")
    'model.layers.*.mlp.experts.0.w1.weight'
    """
    return NUMBER.sub("*", name, count=1)


def tied_to_head(sites: Sites) -> set[str]:
    """The embeddings that a product behind the last sub-layer reads too."""
    last = max((sites.graph.values[s.output].node for s in sites.raw if not s.nested), default=-1)
    after = [
        n.index for n in sites.graph.nodes if n.index > last and sites.finder.is_product(n.index)
    ]
    return set(parameters_of(sites.graph, after, sites.skeleton)) & set(sites.coverage.embedding)


def _like(name: str, found: Mapping[str, Use], ranks: Mapping[str, int]) -> Use:
    """The use of a parameter of as many dimensions and of the same name but for its numbers."""
    same = NUMBER.sub("*", name)
    alike = (
        u
        for other, u in found.items()
        if ranks.get(other) == ranks[name] and NUMBER.sub("*", other) == same
    )
    twin = next(alike, None)
    if twin is None:
        return Use("")
    layer = re.search(NUMBER, name)
    return replace(
        twin, layer=int(layer[0]) if layer and twin.layer is not None else twin.layer, sublayer=""
    )


Label = tuple[int, frozenset[str]]  # a product, and what happened to its result since
# Labels of one value. A loop that cuts a value and joins the pieces doubles them each time it runs.
_MOST_LABELS = 512


def _without_parts_if_many(labels: set[Label]) -> set[Label]:
    """Return labels that no longer tell parts of a value apart, if there are too many of them."""
    if len(labels) <= _MOST_LABELS:
        return labels
    return {
        (product, frozenset(word for word in seen if not word.startswith("part ")))
        for product, seen in labels
    }


class _Branch:
    """Follows the results of a branch's products through its calls."""

    def __init__(self, sites: Sites, site: Sublayer, raw: Site) -> None:
        self.sites, self.graph, self.site, self.raw = sites, sites.graph, site, raw
        self.labels: dict[int, set[Label]] = {}
        self.followed: dict[int, set[int]] = {}  # product -> the products that read its result next
        self.tags: dict[int, set[str]] = {}

    def roles(self) -> dict[str, Use]:
        for node in self._calls():
            self._pass(node)
        found: dict[str, Use] = {}
        for node in self.tags:
            names = [
                n
                for n in parameters_of(self.graph, (node,), self.sites.skeleton)
                if self._rank(n) >= 2
            ]
            fan_in, fan_out = self._fans(node)
            if len(names) == 1:
                found.setdefault(
                    names[0], Use(self._role(node, fan_out), fan_in=fan_in, fan_out=fan_out)
                )
                continue
            if self.graph.nodes[node].name == _TORCH_ATTENTION:
                names = self._in_order(names)
            for role, name in roles_of(self.site.kind, names).items():  # several in one fused call
                rows, columns = self.sites.skeleton.outlines[name].shape[-2:]
                found.setdefault(name, Use(role, fan_in=columns, fan_out=rows))
        return found

    def _in_order(self, names: list[str]) -> list[str]:
        """Return the matrices of torch's fused attention in order of use; separate W_Q, W_K, W_V
        come after W_O.
        """
        # rows added to keys and values have rank 3
        matrices = [name for name in names if self._rank(name) == 2]
        return matrices if len(matrices) < 4 else [*matrices[1:], matrices[0]]

    def _calls(self) -> list[int]:
        """The branch's calls, and those of its module that read something else: keys and values of
        another sequence.
        """
        home = home_of(self.graph, self.sites.finder, self.raw)
        call, last = self.graph.invocations[home], max(self.raw.calls)
        own = range(call.start, min(call.end, last + 1)) if home else ()
        return sorted({*self.raw.calls, *own})

    def _rank(self, name: str) -> int:
        return self.sites.skeleton.outlines[name].dim()

    def _fans(self, node: int) -> tuple[int | None, int | None]:
        """Features that go in and come out: the last dimension, or that of the channels for a
        convolution.
        """
        record = self.graph.nodes[node]
        live = list(self.graph.float_inputs(node))
        made = [self.graph.values[v] for v in record.outputs]
        dim = 1 if record.name.startswith("conv") else -1
        if record.terms is not None:  # addmm: its product's own operand, not what is added
            inner = {v for t in record.terms if t.product for v in t.values}
            live = [v for v in live if v.index in inner] or live
        if not live or not made or not live[0].shape or not made[0].shape:
            return None, None
        return live[0].shape[dim], made[0].shape[dim]

    def _pass(self, node: int) -> None:
        record = self.graph.nodes[node]
        alive = {v.index for v in self.graph.float_inputs(node)}
        reads = [v for v in record.operands if v in alive] or sorted(alive)
        sides = [self.labels.get(v, set()) for v in reads]
        together = {label for side in sides for label in side}
        if self.sites.finder.is_product(node):
            for product, _ in together:
                self.followed[product].add(node)
            self.tags[node], self.followed[node] = set(), set()
            together = {(node, frozenset())}
        elif record.name in _SDPA:
            for side, tag in zip(sides, "QKV", strict=False):
                self._tag(side, tag)
        elif record.name in _BILINEAR and sum(map(bool, sides)) >= 2:
            together = self._meet([side for side in sides if side])
        elif record.name in _TIMES and sum(map(bool, sides)) == 2:
            self._multiplied(*[side for side in sides if side])
        mark = self._mark(record.name)
        for value in record.outputs:
            part = {f"part {value}"} if record.name in _PARTS else set()
            self.labels[value] = _without_parts_if_many(
                {(p, seen | mark | part) for p, seen in together}
            )
        if record.name in _SOFTMAX:
            self._tag({label for label in together if "left" in label[1]}, "Q")
            self._tag({label for label in together if "right" in label[1]}, "K")

    def _mark(self, name: str) -> frozenset[str]:
        marks = {"softmax"} if name in _SOFTMAX else set()
        marks |= {"act"} if name in ACTIVATIONS else set()
        return frozenset(marks | ({"choice"} if name in _CHOICE else set()))

    def _tag(self, labels: Iterable[Label], tag: str) -> None:
        for product, _ in labels:
            self.tags[product].add(tag)

    def _meet(self, sides: list[set[Label]]) -> set[Label]:
        """Two results meet in a product without weights: scores before a softmax, the mixing of
        values behind one.
        """
        if any("softmax" in seen for side in sides for _, seen in side):
            for side in sides:
                if not any("softmax" in seen for _, seen in side):
                    self._tag(side, "V")
            return {(p, seen - {"softmax", "left", "right"}) for side in sides for p, seen in side}
        names = ("left", "right")
        return {
            (p, seen | {names[min(k, 1)]}) for k, side in enumerate(sides[-2:]) for p, seen in side
        }

    def _multiplied(self, one: set[Label], other: set[Label]) -> None:
        a, b = {p for p, _ in one}, {p for p, _ in other}
        if a != b:
            for mine, theirs in ((one, b), (other, a)):
                mine = {label for label in mine if label[0] not in theirs}
                if any("choice" in seen for _, seen in mine):
                    self._tag(mine, "weighs")
                self._tag(mine, "gate" if any("act" in seen for _, seen in mine) else "up")
            return
        slices = [
            {s for _, seen in side for s in seen if s.startswith("part ")} for side in (one, other)
        ]
        if slices[0] - slices[1] and slices[1] - slices[0]:
            self._tag(one, "halves")

    def _role(self, node: int, fan_out: int | None) -> str:
        tags, last = self.tags[node], not self.followed[node]
        if self.site.kind == "attention":
            return self._attention_role(node)
        width = self.raw and self.graph.values[self.raw.shortcut].shape[-1]
        if "weighs" in tags and (self.site.kind == "moe" or fan_out != width) and last:
            return "router"
        if last and fan_out != width and self.site.kind == "moe":
            return "router"
        if last:
            return "W_2" if self.site.kind in ("mlp", "moe") else "W_O"
        if "halves" in tags:
            return "W_gate_up"
        return "W_gate" if "gate" in tags else "W_1"

    def _attention_role(self, node: int) -> str:
        behind = {letter for p in self.followed[node] for letter in "QKV" if letter in self.tags[p]}
        letters = "".join(letter for letter in "QKV" if letter in self.tags[node] | behind)
        if letters:  # "_a": the first of two factors, a low-rank projection
            return f"W_{letters}_a" if behind else f"W_{letters}"
        if "gate" in self.tags[node] and self.followed[node]:
            return "W_gate"
        return "W_O" if not self.followed[node] else "W_V"


def _outside(sites: Sites) -> dict[str, Use]:
    """Parameters outside all sub-layers: tables, head, what lies between."""
    graph, coverage, outlines = sites.graph, sites.coverage, sites.skeleton.outlines
    found: dict[str, Use] = {}
    ids: set[str] = set()
    for node in graph.nodes:
        if node.name == "embedding":
            names = [
                n for n in parameters_of(graph, (node.index,), sites.skeleton) if n in outlines
            ]
            if any(graph.values[v].live or graph.values[v].routed for v in node.inputs):
                ids.update(names)
            found |= {
                n: Use("positions", fan_in=outlines[n].shape[0], fan_out=outlines[n].shape[-1])
                for n in names
            }
    if ids:
        widest = max(sorted(ids), key=lambda n: outlines[n].shape[0])
        found[widest] = replace(found[widest], role="embedding")
    for name in (*coverage.embedding, *coverage.head, *coverage.norms, *coverage.uncovered):
        if name in found or name not in outlines:
            continue
        if _joins_the_input(sites, name):
            found[name] = Use("cls")
        elif outlines[name].dim() < 2:
            found[name] = _small_use(sites, name)
        elif name in coverage.uncovered:
            continue
        else:
            found[name] = _outer_matrix(sites, name)
    return found


def _outer_matrix(sites: Sites, name: str) -> Use:
    reads = [
        n.index
        for n in sites.graph.nodes
        if name in parameters_of(sites.graph, (n.index,), sites.skeleton)
    ]
    product = next((n for n in reads if sites.finder.is_product(n)), None)
    if product is None:
        return Use("positions" if name in sites.coverage.embedding else "")
    read = next(iter(sites.graph.float_inputs(product)))
    made = sites.graph.values[sites.graph.nodes[product].outputs[0]]
    last = max(n.index for n in sites.graph.nodes if sites.finder.is_product(n.index))
    role = "head" if product == last else "projection"
    return Use(
        role,
        fan_in=read.shape[-1] if read.shape else None,
        fan_out=made.shape[-1] if made.shape else None,
    )


def _joins_the_input(sites: Sites, name: str) -> bool:
    """Whether a parameter is a token of its own: it is put beside the tokens of the input."""
    use = _first_use(sites.graph, name)
    if use is None or sites.graph.nodes[use.node].name not in _JOINS:
        return False
    result = sites.graph.values[sites.graph.nodes[use.node].outputs[0]]
    shape = sites.skeleton.outlines[name].shape
    return len(result.shape) >= 3 and len(shape) >= 1 and shape[-1] == result.shape[-1]


def _small_use(sites: Sites, name: str) -> Use:
    """A vector is what the call that reads it makes of it: the gain or bias of a norm, a bias, a
    scale.
    """
    graph, shape = sites.graph, sites.skeleton.outlines[name].shape
    if any(name in _state_read(graph, n.index) for n in graph.nodes if n.name == "embedding"):
        return Use("positions")
    if math.prod(shape) > 1 and len(shape) >= 2 and min(shape) > 1:
        return Use("")
    use = _first_use(graph, name)
    if use is None:
        return Use("")
    record = graph.nodes[use.node]
    if record.name in _NORMS_WITH_GAIN:
        vectors = [
            v for v in record.operands if graph.values[v].from_state and not graph.values[v].live
        ]
        mine = [k for k, v in enumerate(vectors) if _made_of(graph, v, name)]
        is_gain = mine and mine[0] == max(0, len(vectors) - 2) * (len(vectors) > 2)
        return Use("norm_gain", offset=use.added) if is_gain else Use("bias")
    if record.name in _TIMES or record.name in ("div", "__truediv__"):
        role = "norm_gain" if _in_norm(sites, use.node) and not use.changed else "scale"
        return Use(role, offset=use.added + _times_one_more(graph, use.node))
    return Use("bias")


def _state_read(graph: Graph, node: int) -> set[str]:
    return {graph.values[v].name for v in graph.nodes[node].inputs if graph.values[v].node == STATE}


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


def _first_use(graph: Graph, name: str) -> _FirstUse | None:
    """Follow a parameter through the calls that read nothing live, `1 + weight` and casts, to the
    first that does.
    """
    waiting = [(v.index, 0.0, False) for v in graph.values if v.node == STATE and v.name == name]
    seen: set[int] = set()
    while waiting:
        value, added, changed = waiting.pop(0)
        for node in graph.values[value].consumers:
            record = graph.nodes[node]
            if any(graph.values[v].live for v in record.inputs):
                return _FirstUse(node, added, changed)
            now_changed = changed or record.name in _CHANGES
            waiting += [
                (v, added + record.added, now_changed) for v in record.outputs if v not in seen
            ]
            seen.update(record.outputs)
    return None


def _times_one_more(graph: Graph, node: int) -> float:
    """Return 1 where a product with a parameter is added to what it multiplied: `x + x * weight`;
    else 0.
    """
    record = graph.nodes[node]
    if record.name not in _TIMES:
        return 0.0
    multiplied = {v for v in record.operands if graph.values[v].live}
    for output in record.outputs:
        for consumer in graph.values[output].consumers:
            terms = graph.nodes[consumer].terms or ()
            if {output} | multiplied == {term.operand for term in terms}:
                return 1.0
    return 0.0


def _made_of(graph: Graph, value: int, name: str) -> bool:
    record = graph.values[value]
    if record.node == STATE:
        return record.name == name
    return record.node >= 0 and any(
        _made_of(graph, v, name) for v in graph.nodes[record.node].inputs
    )


def _in_norm(sites: Sites, node: int) -> bool:
    """Whether what a call multiplies was just normalised: by a mean or a norm, with no matrix or
    sum of two since.
    """
    graph = sites.graph
    waiting = [v for v in graph.nodes[node].inputs if graph.values[v].live]
    seen: set[int] = set()
    while waiting:
        made_by = graph.values[waiting.pop()].node
        if made_by < 0 or made_by in seen:
            continue
        seen.add(made_by)
        record = graph.nodes[made_by]
        if record.name in _NORMALISING:
            return True
        weighted = any(
            graph.values[v].from_state and not graph.values[v].live for v in record.inputs
        )
        adds_two = record.terms is not None and "sub" not in record.name
        if not (weighted or adds_two or sites.finder.is_product(made_by)):
            waiting += [v for v in record.inputs if graph.values[v].live]
    return False


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
    waiting = [v for v in graph.nodes[use.node].inputs if graph.values[v].live]
    seen: set[int] = set()
    length = None
    while waiting:
        made_by = graph.values[waiting.pop()].node
        if made_by < 0 or made_by in seen:
            continue
        seen.add(made_by)
        record = graph.nodes[made_by]
        live = [v for v in record.inputs if graph.values[v].live]
        if record.name in _LENGTHS and live:
            length = graph.values[live[0]].shape[-1]
            continue
        is_division = record.name in ("div", "__truediv__")
        if record.name not in _KEEP_THE_SIZE or (is_division and len(live) != 2):
            continue
        waiting += live
    return length
