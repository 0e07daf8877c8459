"""Finds residual additions in a record: shortcut, branch, parallel branches.

An addition is residual if one of its terms (the shortcut, possibly scaled or cast on the way) is an
ancestor of another (the branch) and a matrix product with a parameter lies on every path between
them that carries more than one number per token (a norm of the stream may scale a branch). A
Fourier transform counts as a product. No name of any architecture is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jacdiag.trace.graph.additions import FORMS, SCATTERS, Term
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.reachability import Walks

_CELLS = {"gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_CARRY = {
    "to",
    "float",
    "double",
    "half",
    "bfloat16",
    "type",
    "contiguous",
    "clone",
    "dropout",
    "dropout_",
    "view",
    "reshape",
    "mul",
    "__mul__",
    "__rmul__",
    "__imul__",
    "mul_",
    "div",
    "__truediv__",
    "__itruediv__",
    "div_",
    "identity",
    "view_as",
    "reshape_as",
    "unflatten",
    "flatten",
    "transpose",
    "permute",
    "T",
    "mT",
    "squeeze",
    "unsqueeze",
    "alpha_dropout",
}
_SHAPE_ONLY = {
    "view",
    "reshape",
    "view_as",
    "reshape_as",
    "contiguous",
    "clone",
    "to",
    "float",
    "type",
    "transpose",
    "permute",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "dropout",
    "double",
}

Leaf = tuple[int, int, Term]  # an addition, the position of one of its terms, the term


@dataclass(frozen=True)
class Site:
    """One (shortcut, branch) pair in the record.

    Attributes:
        addition: the call that adds the branch (where `position` is the branch's term).
        shortcut: value index of x.
        carrier: (addition, position) of the shortcut's term in the sum.
        scaled: whether that term is anything but x itself (a gain, a cast, a mixing matrix).
        cone: the calls between shortcut and branch, ascending.
        output: value index of the sum of shortcut and all parallel branches.
        group: index of the set of parallel branches it belongs to.
        result: value index of the branch, where a user declared it; its sum may be hidden then
            (`summed`).
        mixed: the shortcut is several parallel streams (B, T, S, d), mixed on their way into the
            sum.
    """

    addition: int
    position: int
    term: Term
    shortcut: int
    carrier: tuple[int, int]
    scaled: bool
    cone: tuple[int, ...]
    output: int
    group: int
    mixed: bool = False
    nested: bool = False
    result: int | None = None
    summed: bool = True

    @property
    def calls(self) -> tuple[int, ...]:
        """The calls that compute the branch: its cone, and the addition itself where that holds a
        product (addmm).
        """
        return (*self.cone, self.addition) if self.term.product else self.cone


class Finder(Walks):
    """Finds the sites of one graph. Each addition costs a walk over its own cone only."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.sites: list[Site] = []
        # (addition in a custom Function, shortcut, branch)
        self.hidden: list[tuple[int, int, int]] = []
        self.dropped: list[tuple[Site, str]] = []  # pairs that are not sub-layers, with the reason
        # groups whose shortcut enters the sum through a mixing of streams
        self._mixed: set[int] = set()

    def find(self) -> list[Site]:
        for node in self.graph.nodes:
            if node.terms is not None and node.function:
                self._note_hidden(node.index)
            elif node.name in _CELLS:
                self._note_cell(node.index)
            elif node.terms is not None:
                self._consider(node.index)
        self.sites = self._streams_that_go_on()
        return self._within_their_branch()

    def arrange(self, sites: list[Site]) -> list[Site]:
        """In the order of the stream, those inside others marked."""
        return self._mark_nested(sorted(sites, key=self._order))

    def _order(self, site: Site) -> tuple[int, int, int]:
        """As the stream meets them: by the first matrix product of the branch."""
        return (
            next((n for n in site.cone if self.is_product(n)), site.cone[0]),
            site.addition,
            site.position,
        )

    def _note_hidden(self, node: int) -> None:
        """An addition that autograd does not see is no site; it is reported by name."""
        terms = [
            (node, k, t)
            for k, t in enumerate(self.graph.nodes[node].terms or ())
            if self.is_full(node, t)
        ]
        found = self._pair(terms) if len(terms) >= 2 else None
        if found is not None:
            shortcut, _, branches = found
            self.hidden += [
                (node, shortcut, term.operand)
                for _, _, term in branches
                if term.operand is not None
            ]

    def _note_cell(self, node: int) -> None:
        """A recurrent cell that takes a branch as its input and the shortcut as its state is a
        gate, in one call.
        """
        read = [v.index for v in self.graph.float_inputs(node)]
        for f, state in ((f, s) for f in read for s in read if f != s):
            shortcut = next(
                (x for x in self.carriers(state) if self.is_branch(x, Term((f,), f))), None
            )
            if shortcut is not None:
                self.hidden.append((node, shortcut, f))
                return

    # -- one addition ------------------------------------------------------------------------------
    def _consider(self, node: int) -> None:
        terms = [
            (node, k, t)
            for k, t in enumerate(self.graph.nodes[node].terms or ())
            if self.is_full(node, t)
        ]
        if len(terms) < 2:
            return
        found = self._pair(terms)
        for _ in range(4):
            if found is not None:
                break
            expanded = self._expand_one(node, terms)
            if expanded is None:
                return
            terms = expanded
            found = self._pair(terms)
        if found is None:
            return
        shortcut, (addition, position, term), branches = found
        carrier, scaled = (addition, position), term.operand != shortcut
        claimed = {(s.addition, s.position) for s in self.sites}
        group = next(
            (
                s.group
                for s in self.sites
                if s.shortcut == shortcut
                and (s.addition, s.position) in {(a, k) for a, k, _ in branches}
            ),
            len(self.sites),
        )
        if term.operand is not None and shortcut not in self.carriers(term.operand):
            self._mixed.add(group)
        output = self.graph.nodes[node].outputs[0]
        self.sites = [replace(s, output=output) if s.group == group else s for s in self.sites]
        for addition, position, term in (
            b for branch in branches for b in self._split(shortcut, branch)
        ):
            if (addition, position) not in claimed:
                cone = self.cone(shortcut, term.values)
                mixed = self._is_mixed(shortcut, cone)
                self.sites.append(
                    Site(
                        addition,
                        position,
                        term,
                        shortcut,
                        carrier,
                        scaled,
                        cone,
                        output,
                        group,
                        mixed,
                    )
                )

    def is_full(self, node: int, term: Term) -> bool:
        """A term of the stream: differentiable, and of the sum's own shape."""
        values = [self.graph.values[v] for v in term.values]
        made = (
            self.graph.values[self.graph.nodes[node].outputs[0]]
            if self.graph.nodes[node].outputs
            else None
        )
        if made is None or not made.is_float or not any(v.live and v.is_float for v in values):
            return False
        return term.operand is None or self.graph.values[term.operand].shape == made.shape

    def _pair(self, terms: list[Leaf]) -> tuple[int, Leaf, list[Leaf]] | None:
        """Returns (shortcut, its term, branches), or None if no term is an ancestor of all the
        others.
        """
        for carriers in (self.carriers, self._streams):
            for k, (_, _, carrier) in enumerate(terms):
                others = terms[:k] + terms[k + 1 :]
                if carrier.operand is None and len(carrier.values) != 1:
                    continue
                start = carrier.operand if carrier.operand is not None else carrier.values[0]
                for candidate in carriers(start):
                    branches = [t for t in others if self.is_branch(candidate, t[2])]
                    if branches and len(branches) == len(others):
                        return candidate, terms[k], branches
                    if branches:
                        break
        return None

    def carriers(self, value: int) -> Iterable[int]:
        """Yields a value and what it is a scaled, cast or reshaped copy of."""
        for _ in range(8):
            yield value
            node = self.graph.values[value].node
            if node < 0 or not self._carries(node):
                return
            live = [v.index for v in self.graph.float_inputs(node)]
            if len(live) != 1:
                return
            value = live[0]

    def _carries(self, node: int) -> bool:
        """Whether a call passes a value on: scaled, cast, reshaped, or with a constant added (sum()
        begins at 0).
        """
        record = self.graph.nodes[node]
        if record.name == "__getitem__":  # y[:, :] += f(x)
            return (
                self.graph.values[record.outputs[0]].shape
                == self.graph.values[record.inputs[0]].shape
            )
        if record.name in SCATTERS:
            return False
        if record.name in FORMS:
            terms = [
                t for t in record.terms or () if any(self.graph.values[v].live for v in t.values)
            ]
            return len(terms) <= 1 and not any(t.product or len(t.values) > 1 for t in terms)
        # with running statistics and in eval mode: a gain and a bias per channel
        if record.name == "batch_norm":
            return sum(self.graph.values[v].from_state for v in record.inputs) >= 4
        return record.name in _CARRY

    def _streams(self, value: int) -> Iterable[int]:
        """Yields the parallel streams (B, T, S, d) that a value mixes by small matrices
        (hyper-connections).
        """
        shape = self.graph.values[value].shape
        if len(shape) < 4:
            return
        stack, seen = [value], {value}
        while stack and len(seen) < 256:
            current = stack.pop(0)
            node = self.graph.values[current].node
            if current != value and self.graph.values[current].shape == shape:
                yield current
            if node < 0 or (self.is_product(node) and not self._mixes(node, shape)):
                continue
            fresh = [v.index for v in self.graph.float_inputs(node) if v.index not in seen]
            seen.update(fresh)
            stack.extend(fresh)

    def _mixes(self, node: int, shape: tuple[int, ...]) -> bool:
        """Whether a product mixes the streams: by a matrix no larger than their number squared,
        shape kept.
        """
        record = self.graph.nodes[node]
        if record.name.startswith("conv"):  # (B, C, H, W): rows of an image are no streams
            return False
        read = [self.graph.values[v] for v in record.inputs]
        small = all(
            math.prod(v.shape) <= shape[-2] ** 2 for v in read if v.from_state and not v.live
        )
        kept = any(self.graph.values[v].shape == shape for v in record.outputs)
        return small and kept and any(v.live and v.shape == shape for v in read)

    def inner_calls(self, site: Site) -> tuple[int, ...]:
        """The calls of a branch; between several streams, those from the first product on one
        mixture to the last.
        """
        if not site.mixed:
            return site.cone
        shape = self.graph.values[site.shortcut].shape
        one = (*shape[:-2], shape[-1])
        ends = [
            n
            for n in site.cone
            if self.is_product(n)
            and any(
                self.graph.values[v].shape == one
                for v in (*self.graph.nodes[n].inputs, *self.graph.nodes[n].outputs)
            )
        ]
        return tuple(n for n in site.cone if ends[0] <= n <= ends[-1]) if ends else site.cone

    def _is_mixed(self, shortcut: int, cone: tuple[int, ...]) -> bool:
        """Whether the shortcut is (B, T, S, d) and the branch works on one mixture (B, T, d) of its
        streams.
        """
        shape = self.graph.values[shortcut].shape
        if len(shape) < 4:
            return False
        one = (*shape[:-2], shape[-1])
        return any(
            v.shape == one for n in cone if self.is_product(n) for v in self.graph.float_inputs(n)
        )

    def is_branch(self, shortcut: int, term: Term) -> bool:
        """Whether a product lies on a path from the shortcut, and on every path that carries more
        than a statistic.
        """
        if shortcut in term.values or not self.reaches(
            shortcut, term.values, through_products=True
        ):
            return False
        if term.product:
            return True
        if self.reaches(shortcut, term.values, through_products=False, statistics=False):
            return False
        return any(self.is_product(node) for node in self.cone(shortcut, term.values))

    def _expand_one(self, node: int, terms: list[Leaf]) -> list[Leaf] | None:
        """Replaces the first term that is itself a sum made in the same module call by its own
        terms.
        """
        owner = self.graph.nodes[node].invocation
        for k, (_, _, term) in enumerate(terms):
            inner = self._inner_sum(term, owner)
            if inner is not None:
                return terms[:k] + inner + terms[k + 1 :]
        return None

    def _inner_sum(self, term: Term, owner: int) -> list[Leaf] | None:
        value = term.operand
        while value is not None and self.graph.values[value].node >= 0:
            node = self.graph.nodes[self.graph.values[value].node]
            if node.name in SCATTERS:  # the experts of one MoE layer are one branch
                return None
            if node.terms is not None and node.invocation == owner:
                parts = [
                    (node.index, j, t)
                    for j, t in enumerate(node.terms)
                    if self.is_full(node.index, t)
                ]
                return parts if len(parts) >= 2 else None
            if node.name not in _SHAPE_ONLY or node.invocation != owner:
                return None
            live = [v.index for v in self.graph.float_inputs(node.index)]
            value = live[0] if len(live) == 1 else None
        return None

    def _split(self, shortcut: int, branch: Leaf) -> list[Leaf]:
        """Takes a branch that is itself a sum of two branches apart (x + (a + m)); shared products
        keep it whole.
        """
        inner = self._inner_sum(branch[2], self.graph.nodes[branch[0]].invocation)
        if inner is None or not all(self.is_branch(shortcut, t) for _, _, t in inner):
            return [branch]
        products = [
            {n for n in self.cone(shortcut, t.values) if self.is_product(n)} for _, _, t in inner
        ]
        if any(a & b for i, a in enumerate(products) for b in products[:i]):
            return [branch]
        return [leaf for part in inner for leaf in self._split(shortcut, part)]

    # -- over all ----------------------------------------------------------------------------------
    def _streams_that_go_on(self) -> list[Site]:
        """Leaves out a lone sum of mixed streams: positions mixed by attention look the same, but
        end there.
        """

        def follows(later: Site, earlier: Site) -> bool:
            return earlier.group != later.group and earlier.output in self.carriers(later.shortcut)

        kept = []
        for site in self.sites:
            linked = any(follows(site, other) or follows(other, site) for other in self.sites)
            if site.group not in self._mixed or linked:
                kept.append(site)
        return kept

    def _within_their_branch(self) -> list[Site]:
        """Leaves out sums inside a branch whose shortcut comes from outside it: a bias or a state
        shared by layers.
        """
        kept: list[tuple[Site, frozenset[int]]] = []
        streams = self._separate_streams()
        for site in sorted(self.sites, key=lambda s: s.addition, reverse=True):
            origin = self.graph.values[site.shortcut].node
            around = [
                (s, cone) for s, cone in kept if site.addition in cone and s.group != site.group
            ]
            outside = [
                s for s, cone in around if origin not in cone and site.shortcut != s.shortcut
            ]
            # A sum of a second stream is a sub-layer if the outer branch reads its own shortcut
            # without it too.
            apart = id(site) in streams and all(self._reads_without(s, site) for s in outside)
            if not outside or apart:
                kept.append((site, frozenset(site.cone)))
            else:
                self.dropped.append(
                    (site, "it lies inside another sub-layer's branch, and its shortcut does not")
                )
        return [site for site, _ in kept]

    def _separate_streams(self) -> set[int]:
        """Return the ids of sites whose sum is continued by, or continues, another sum with no
        product between.
        """
        linked: set[int] = set()
        for later in self.sites:
            for earlier in self.sites:
                if earlier.group == later.group or earlier.addition >= later.addition:
                    continue
                if (
                    self.graph.values[earlier.output].shape
                    != self.graph.values[later.shortcut].shape
                ):
                    continue
                if self.reaches(earlier.output, (later.shortcut,), through_products=False):
                    linked |= {id(earlier), id(later)}
        return linked

    def _reads_without(self, outer: Site, inner: Site) -> bool:
        """Return whether a product of the outer branch depends on its shortcut by a path around the
        inner sum.
        """
        return any(self.is_product(node) for node in self.cone_around(outer, (inner,)))

    def cone_around(self, outer: Site, inner: Iterable[Site]) -> tuple[int, ...]:
        """Return the calls of a branch that the shortcut reaches and that lead to its end without
        the inner sums.
        """
        closed = {site.addition for site in inner}
        members = set(outer.cone) - closed
        live = {outer.shortcut}
        forward: list[int] = []
        for node in sorted(members):
            if any(value.index in live for value in self.graph.float_inputs(node)):
                forward.append(node)
                live.update(self.graph.nodes[node].outputs)
        needed = set(outer.term.values)
        around: list[int] = []
        for node in reversed(forward):
            if needed & set(self.graph.nodes[node].outputs):
                around.append(node)
                needed.update(value.index for value in self.graph.float_inputs(node))
        return tuple(reversed(around))

    def own_calls(self, site: Site, sites: Iterable[Site]) -> tuple[int, ...]:
        """Return the calls of a branch without those that only compute sums of other streams."""
        origin = self.graph.values
        cone = set(site.cone)
        others = [
            other
            for other in sites
            if other.addition in cone
            and other.group != site.group
            and other.shortcut != site.shortcut
            and origin[other.shortcut].node not in cone
        ]
        if not others:
            return site.calls
        around = self.cone_around(site, others)
        return (*around, site.addition) if site.term.product else around

    def _mark_nested(self, sites: list[Site]) -> list[Site]:
        """Marks sites whose addition lies inside another's branch; they are left out of products
        over depth.
        """
        inside = [(set(s.cone), s) for s in sites]
        marked = []
        for site in sites:
            nested = any(
                self._lies_in(site, other, cone) and not self._escapes(site, other, sites)
                for cone, other in inside
            )
            marked.append(replace(site, nested=nested))
        return marked

    def _escapes(self, site: Site, other: Site, sites: Iterable[Site]) -> bool:
        """Return whether a sum's stream goes on around another sum: it is then a stream of its own.

        A message-passing layer's edge branch holds the whole node update, which the next layer's
        nodes continue.
        """
        shape = self.graph.values[site.output].shape
        stream = self.graph.values[other.output].shape
        if shape == stream:
            return False
        ends = {
            later.shortcut
            for later in sites
            if later.addition > other.addition and self.graph.values[later.shortcut].shape == shape
        }
        return self.reaches(site.output, ends, through_products=False, statistics=False)

    def _lies_in(self, site: Site, other: Site, cone: set[int]) -> bool:
        """Return whether a whole sum, its shortcut included, lies inside another branch."""
        if site is other or site.group == other.group or site.addition not in cone:
            return False
        return site.shortcut == other.shortcut or self.graph.values[site.shortcut].node in cone
