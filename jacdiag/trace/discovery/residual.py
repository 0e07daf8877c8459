"""Find residual additions in a record: shortcut, branch, parallel branches.

An addition is residual if one of its terms (the shortcut, possibly scaled or cast on the way) is an
ancestor of another (the branch) and a matrix product with a parameter lies on every path between
them that carries more than one number per token (a norm of the stream may scale a branch). A
Fourier transform counts as a product. No name of any architecture is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jacdiag.trace.graph.additions import FORMS, Term
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import CARRIERS, RECURRENT_CELLS, SCATTERS, SHAPE_ONLY
from jacdiag.trace.graph.reachability import Walks

_MOST_EXPANSIONS = 4  # sums inside sums that are taken apart
_MOST_CARRIERS = 8  # calls that a value is followed back through
_MOST_VALUES = 256  # that a search for streams visits


@dataclass(frozen=True)
class Leaf:
    """One term of an addition in the record: the call, the term's position in it, the term."""

    addition: int
    position: int
    term: Term

    @property
    def place(self) -> tuple[int, int]:
        """The addition and the position, which name a term in the entire record."""
        return self.addition, self.position


@dataclass(frozen=True)
class _Pair:
    """A shortcut, the term by which it enters a sum, and the other terms: its branches."""

    shortcut: int
    carrier: Leaf
    branches: list[Leaf]


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
        result: value index of the branch if a user declared it. Its sum may be hidden then
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
        """The calls that compute the branch, with the addition itself if it holds a product."""
        if self.term.product:  # addmm
            return (*self.cone, self.addition)
        return self.cone


class Finder(Walks):
    """Finds the sites of one graph. Each addition costs a walk over its own cone only.

    Attributes:
        sites: the pairs that were found.
        hidden: (addition, shortcut, branch) of sums that autograd does not see.
        dropped: pairs that are not sub-layers, with the reason.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.sites: list[Site] = []
        self.hidden: list[tuple[int, int, int]] = []
        self.dropped: list[tuple[Site, str]] = []
        # groups whose shortcut enters the sum through a mixing of streams
        self._mixed: set[int] = set()

    def find(self) -> list[Site]:
        """Return the sites of the graph, in no particular order."""
        for node in self.graph.nodes:
            if node.terms is not None and node.function:
                self._note_hidden(node.index)
            elif node.name in RECURRENT_CELLS:
                self._note_cell(node.index)
            elif node.terms is not None:
                self._consider(node.index)
        self.sites = self._streams_that_go_on()
        return self._within_their_branch()

    def arrange(self, sites: list[Site]) -> list[Site]:
        """Return sites in the order of the stream, those inside others marked."""
        return self._mark_nested(sorted(sites, key=self._order))

    def _order(self, site: Site) -> tuple[int, int, int]:
        """Return the sort key of a site: the first matrix product of its branch."""
        first_product = next((n for n in site.cone if self.is_product(n)), site.cone[0])
        return first_product, site.addition, site.position

    def _leaves(self, node: int) -> list[Leaf]:
        """Return the terms of an addition that have the sum's own shape."""
        terms = enumerate(self.graph.nodes[node].terms or ())
        return [Leaf(node, k, term) for k, term in terms if self.is_full(node, term)]

    def _note_hidden(self, node: int) -> None:
        """Note an addition that autograd does not see: it is no site, but reported by name."""
        leaves = self._leaves(node)
        pair = self._pair(leaves) if len(leaves) >= 2 else None
        if pair is None:
            return
        for branch in pair.branches:
            if branch.term.operand is not None:
                self.hidden.append((node, pair.shortcut, branch.term.operand))

    def _note_cell(self, node: int) -> None:
        """Note a recurrent cell that takes a branch as its input and the shortcut as its state.

        It is a gate in one call.
        """
        read = [v.index for v in self.graph.float_inputs(node)]
        for branch, state in itertools.permutations(read, 2):
            for shortcut in self.carriers(state):
                if self.is_branch(shortcut, Term((branch,), branch)):
                    self.hidden.append((node, shortcut, branch))
                    return

    # -- one addition ------------------------------------------------------------------------------
    def _consider(self, node: int) -> None:
        """Add the sites of an addition, if it is residual."""
        pair = self._pair_of_addition(node)
        if pair is None:
            return
        shortcut, carrier = pair.shortcut, pair.carrier

        # 1. The group: a sum that adds to an earlier sum of the same shortcut continues it.
        listed = {(site.addition, site.position) for site in self.sites}
        group = self._group_of(pair)
        operand = carrier.term.operand
        if operand is not None and shortcut not in self.carriers(operand):
            self._mixed.add(group)

        # 2. All branches of the group share the last sum.
        output = self.graph.nodes[node].outputs[0]
        self.sites = [replace(s, output=output) if s.group == group else s for s in self.sites]

        # 3. The branches that are new.
        leaves = [leaf for branch in pair.branches for leaf in self._split(shortcut, branch)]
        for leaf in leaves:
            if leaf.place in listed:
                continue
            cone = self.cone(shortcut, leaf.term.values)
            self.sites.append(
                Site(
                    addition=leaf.addition,
                    position=leaf.position,
                    term=leaf.term,
                    shortcut=shortcut,
                    carrier=carrier.place,
                    scaled=operand != shortcut,
                    cone=cone,
                    output=output,
                    group=group,
                    mixed=self._is_mixed(shortcut, cone),
                )
            )

    def _pair_of_addition(self, node: int) -> _Pair | None:
        """Return the shortcut and the branches of an addition, or None if it is not residual.

        A term that is a sum itself is replaced by its own terms, up to four times.
        """
        leaves = self._leaves(node)
        if len(leaves) < 2:
            return None
        pair = self._pair(leaves)
        for _ in range(_MOST_EXPANSIONS):
            if pair is not None:
                break
            expanded = self._expand_one(node, leaves)
            if expanded is None:
                return None
            leaves = expanded
            pair = self._pair(leaves)
        return pair

    def _group_of(self, pair: _Pair) -> int:
        """Return the group of a pair: that of a branch already listed, or a new one."""
        places = {branch.place for branch in pair.branches}
        for site in self.sites:
            if site.shortcut == pair.shortcut and (site.addition, site.position) in places:
                return site.group
        return len(self.sites)

    def is_full(self, node: int, term: Term) -> bool:
        """Return whether a term is of the stream: differentiable, and of the sum's own shape."""
        outputs = self.graph.nodes[node].outputs
        if not outputs:
            return False
        total = self.graph.values[outputs[0]]
        values = [self.graph.values[v] for v in term.values]
        if not total.is_float or not any(v.live and v.is_float for v in values):
            return False
        return term.operand is None or self.graph.values[term.operand].shape == total.shape

    def _pair(self, leaves: list[Leaf]) -> _Pair | None:
        """Return the shortcut among terms; None if no term is an ancestor of all the others."""
        for origins in (self.carriers, self._streams):
            for k, carrier in enumerate(leaves):
                others = leaves[:k] + leaves[k + 1 :]
                shortcut = self._shortcut_of(carrier.term, others, origins)
                if shortcut is not None:
                    return _Pair(shortcut, carrier, others)
        return None

    def _shortcut_of(
        self, carrier: Term, others: list[Leaf], origins: Callable[[int], Iterable[int]]
    ) -> int | None:
        """Return the first value that a term carries and that all other terms are branches of.

        A value that only some of them are branches of ends the search.
        """
        start = carrier.operand
        if start is None:
            if len(carrier.values) != 1:
                return None
            start = carrier.values[0]
        for candidate in origins(start):
            count = sum(self.is_branch(candidate, other.term) for other in others)
            if not count:
                continue
            return candidate if count == len(others) else None
        return None

    def carriers(self, value: int) -> Iterable[int]:
        """Yield a value and what it is a scaled, cast or reshaped copy of."""
        for _ in range(_MOST_CARRIERS):
            yield value
            node = self.graph.values[value].node
            if node < 0 or not self._carries(node):
                return
            live = [v.index for v in self.graph.float_inputs(node)]
            if len(live) != 1:
                return
            value = live[0]

    def _carries(self, node: int) -> bool:
        """Return whether a call passes a value on: scaled, cast, reshaped, or plus a constant.

        `sum()` of Python begins by adding to 0.
        """
        record = self.graph.nodes[node]
        if record.name == "__getitem__":  # y[:, :] += f(x)
            shape_before = self.graph.values[record.inputs[0]].shape
            return self.graph.values[record.outputs[0]].shape == shape_before
        if record.name in SCATTERS:
            return False
        if record.name in FORMS:
            return self._adds_a_constant(record.terms or ())
        # with running statistics and in eval mode: a gain and a bias per channel
        if record.name == "batch_norm":
            return sum(self.graph.values[v].from_state for v in record.inputs) >= 4
        return record.name in CARRIERS

    def _adds_a_constant(self, terms: Iterable[Term]) -> bool:
        """Return whether an addition has one live term at most, and that one is a plain value."""
        live = [term for term in terms if any(self.graph.values[v].live for v in term.values)]
        if len(live) > 1:
            return False
        return not any(term.product or len(term.values) > 1 for term in live)

    def _streams(self, value: int) -> Iterable[int]:
        """Yield the parallel streams (B, T, S, d) that a value mixes by small matrices.

        Hyper-connections have such streams.
        """
        shape = self.graph.values[value].shape
        if len(shape) < 4:
            return
        stack, seen = [value], {value}
        while stack and len(seen) < _MOST_VALUES:
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
        """Return whether a product mixes the streams by a small matrix and keeps their shape.

        The matrix is no larger than the number of streams squared.
        """
        record = self.graph.nodes[node]
        if record.name.startswith("conv"):  # (B, C, H, W): rows of an image are no streams
            return False
        read = [self.graph.values[v] for v in record.inputs]
        weights = [v for v in read if v.from_state and not v.live]
        is_small = all(math.prod(v.shape) <= shape[-2] ** 2 for v in weights)
        keeps_shape = any(self.graph.values[v].shape == shape for v in record.outputs)
        return is_small and keeps_shape and any(v.live and v.shape == shape for v in read)

    def inner_calls(self, site: Site) -> tuple[int, ...]:
        """Return the calls of a branch.

        Between several streams, those are the calls from the first product on one mixture of the
        streams to the last.
        """
        if not site.mixed:
            return site.cone
        mixture = _shape_of_mixture(self.graph.values[site.shortcut].shape)
        products = [
            n for n in site.cone if self.is_product(n) and self._has_shape_around(n, mixture)
        ]
        if not products:
            return site.cone
        return tuple(n for n in site.cone if products[0] <= n <= products[-1])

    def _has_shape_around(self, node: int, shape: tuple[int, ...]) -> bool:
        """Return whether a call reads or makes a value of a shape."""
        record = self.graph.nodes[node]
        return any(self.graph.values[v].shape == shape for v in (*record.inputs, *record.outputs))

    def _is_mixed(self, shortcut: int, cone: tuple[int, ...]) -> bool:
        """Return whether the shortcut is (B, T, S, d) and the branch works on one (B, T, d)."""
        shape = self.graph.values[shortcut].shape
        if len(shape) < 4:
            return False
        mixture = _shape_of_mixture(shape)
        products = [n for n in cone if self.is_product(n)]
        return any(v.shape == mixture for n in products for v in self.graph.float_inputs(n))

    def is_branch(self, shortcut: int, term: Term) -> bool:
        """Return whether a term is a function of the shortcut with a product on its way.

        A product must lie on a path from the shortcut, and on every path that carries more than a
        statistic.
        """
        if shortcut in term.values:
            return False
        if not self.reaches(shortcut, term.values, through_products=True):
            return False
        if term.product:
            return True
        if self.reaches(shortcut, term.values, through_products=False, statistics=False):
            return False
        return any(self.is_product(node) for node in self.cone(shortcut, term.values))

    def _expand_one(self, node: int, leaves: list[Leaf]) -> list[Leaf] | None:
        """Replace the first term that is itself a sum made in the same module call by its terms."""
        owner = self.graph.nodes[node].invocation
        for k, leaf in enumerate(leaves):
            inner = self._inner_sum(leaf.term, owner)
            if inner is not None:
                return leaves[:k] + inner + leaves[k + 1 :]
        return None

    def _inner_sum(self, term: Term, owner: int) -> list[Leaf] | None:
        """Return the terms of the sum that a term is, perhaps reshaped; None if it is none.

        Args:
            term: of an addition.
            owner: the module call in which the sum has to be made.
        """
        value = term.operand
        while value is not None and self.graph.values[value].node >= 0:
            node = self.graph.nodes[self.graph.values[value].node]
            if node.name in SCATTERS:  # the experts of one MoE layer are one branch
                return None
            if node.terms is not None and node.invocation == owner:
                leaves = self._leaves(node.index)
                return leaves if len(leaves) >= 2 else None
            if node.name not in SHAPE_ONLY or node.invocation != owner:
                return None
            live = [v.index for v in self.graph.float_inputs(node.index)]
            value = live[0] if len(live) == 1 else None
        return None

    def _split(self, shortcut: int, branch: Leaf) -> list[Leaf]:
        """Return the branches that a branch is the sum of, as in x + (a + m).

        Two that share a product are one branch.
        """
        inner = self._inner_sum(branch.term, self.graph.nodes[branch.addition].invocation)
        if inner is None or not all(self.is_branch(shortcut, leaf.term) for leaf in inner):
            return [branch]
        claimed: set[int] = set()
        for leaf in inner:
            cone = self.cone(shortcut, leaf.term.values)
            products = {n for n in cone if self.is_product(n)}
            if products & claimed:
                return [branch]
            claimed |= products
        return [part for leaf in inner for part in self._split(shortcut, leaf)]

    # -- over all ----------------------------------------------------------------------------------
    def _streams_that_go_on(self) -> list[Site]:
        """Return the sites without lone sums of mixed streams.

        Positions mixed by attention look like mixed streams, but end there.
        """

        def follows(later: Site, earlier: Site) -> bool:
            return earlier.group != later.group and earlier.output in self.carriers(later.shortcut)

        sites = []
        for site in self.sites:
            linked = any(follows(site, other) or follows(other, site) for other in self.sites)
            if site.group not in self._mixed or linked:
                sites.append(site)
        return sites

    def _within_their_branch(self) -> list[Site]:
        """Return the sites without sums inside a branch whose shortcut comes from outside it.

        Such a sum adds a bias or a state that layers share.
        """
        accepted: list[tuple[Site, frozenset[int]]] = []
        streams = self._separate_streams()
        for site in sorted(self.sites, key=lambda s: s.addition, reverse=True):
            origin = self.graph.values[site.shortcut].node
            outer_sites = [
                outer
                for outer, cone in accepted
                if site.addition in cone
                and outer.group != site.group
                and origin not in cone
                and site.shortcut != outer.shortcut
            ]
            # A sum of a second stream is a sub-layer if the outer branch reads its own shortcut
            # without it too.
            is_second_stream = id(site) in streams and all(
                self._reads_without(outer, site) for outer in outer_sites
            )
            if not outer_sites or is_second_stream:
                accepted.append((site, frozenset(site.cone)))
            else:
                reason = "it lies inside another sub-layer's branch, and its shortcut does not"
                self.dropped.append((site, reason))
        return [site for site, _ in accepted]

    def _separate_streams(self) -> set[int]:
        """Return the ids of sites whose sum continues another, or is continued by one.

        No product lies between the two.
        """
        linked: set[int] = set()
        for later in self.sites:
            for earlier in self.sites:
                if earlier.group == later.group or earlier.addition >= later.addition:
                    continue
                shape = self.graph.values[earlier.output].shape
                if shape != self.graph.values[later.shortcut].shape:
                    continue
                if self.reaches(earlier.output, (later.shortcut,), through_products=False):
                    linked |= {id(earlier), id(later)}
        return linked

    def _reads_without(self, outer: Site, inner: Site) -> bool:
        """Return whether a product of the outer branch reads its shortcut around the inner sum."""
        return any(self.is_product(node) for node in self.cone_around(outer, (inner,)))

    def cone_around(self, outer: Site, inner: Iterable[Site]) -> tuple[int, ...]:
        """Return the calls that lead from a branch's shortcut to its end without inner sums."""
        # 1. Forward: the calls that the shortcut reaches.
        closed = {site.addition for site in inner}
        members = set(outer.cone) - closed
        live = {outer.shortcut}
        forward: list[int] = []
        for node in sorted(members):
            if any(value.index in live for value in self.graph.float_inputs(node)):
                forward.append(node)
                live.update(self.graph.nodes[node].outputs)

        # 2. Backward: those of them that lead to the end.
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
        if site.term.product:
            return (*around, site.addition)
        return around

    def _mark_nested(self, sites: list[Site]) -> list[Site]:
        """Mark sites whose addition lies inside another's branch.

        They are left out of products over depth.
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
        """Return whether a sum, its shortcut included, lies inside another branch."""
        if site is other or site.group == other.group or site.addition not in cone:
            return False
        return site.shortcut == other.shortcut or self.graph.values[site.shortcut].node in cone


def _shape_of_mixture(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (B, T, d) of one mixture of streams (B, T, S, d)."""
    return (*shape[:-2], shape[-1])
