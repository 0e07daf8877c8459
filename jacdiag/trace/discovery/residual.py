"""Find residual additions in a record: shortcut, branch, parallel branches.

An addition is residual if one of its terms (the shortcut, possibly scaled or cast on the way) is an
ancestor of another (the branch) and a matrix product with a parameter lies on every path between
them that carries more than one number per token (a norm of the stream may scale a branch). A
Fourier transform counts as a product. No name of any architecture is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from jacdiag.trace.discovery.carriers import Carriers
from jacdiag.trace.graph.additions import Term
from jacdiag.trace.graph.graph import Graph
from jacdiag.trace.graph.ops import RECURRENT_CELLS, SCATTERS, SHAPE_ONLY

_MOST_EXPANSIONS = 4  # sums inside sums that are taken apart


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
    def place(self) -> tuple[int, int]:
        """The addition and the position of the branch's term in it."""
        return self.addition, self.position

    @cached_property
    def cone_set(self) -> frozenset[int]:
        """The calls between shortcut and branch, to ask whether a call is one of them."""
        return frozenset(self.cone)

    @property
    def calls(self) -> tuple[int, ...]:
        """The calls that compute the branch, with the addition itself if it holds a product."""
        return self.with_own_product(self.cone)

    def with_own_product(self, calls: tuple[int, ...]) -> tuple[int, ...]:
        """Return calls of the branch, with the addition if it computes the branch (addmm)."""
        if self.term.product:
            return (*calls, self.addition)

        # The addition adds only.
        return calls


class Finder(Carriers):
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
        # 1. Every addition by itself.
        for node in self.graph.nodes:
            if node.name in RECURRENT_CELLS:
                self._note_cell(node.index)
            elif node.terms is None:
                continue
            elif node.function:
                self._note_hidden(node.index)
            else:
                self._consider(node.index)

        # 2. What all of them together show.
        self.sites = self._streams_that_go_on()
        return self._within_their_branch()

    def arrange(self, sites: list[Site]) -> list[Site]:
        """Return sites in the order of the stream, those inside others marked."""
        return self._mark_nested(sorted(sites, key=self._order))

    def _order(self, site: Site) -> tuple[int, int, int]:
        """Return the sort key of a site: the first matrix product of its branch."""
        first_product = next(iter(self.products_among(site.cone)), site.cone[0])
        return first_product, site.addition, site.position

    def _leaves(self, node: int) -> list[Leaf]:
        """Return the terms of an addition that have the sum's own shape."""
        leaves = [Leaf(node, k, term) for k, term in enumerate(self.graph.nodes[node].terms or ())]
        return [leaf for leaf in leaves if self.is_full(node, leaf.term)]

    def _note_hidden(self, node: int) -> None:
        """Note an addition that autograd does not see: it is no site, but reported by name."""
        # 1. The shortcut and the branches, as for any other addition.
        pair = self._pair(self._leaves(node))
        if pair is None:
            return

        # 2. Each branch. One that is made inside the call cannot be named.
        for branch in pair.branches:
            operand = branch.term.operand
            if operand is not None:
                self.hidden.append((node, pair.shortcut, operand))

    def _note_cell(self, node: int) -> None:
        """Note a recurrent cell that takes a branch as its input and the shortcut as its state.

        It is a gate in one call.
        """
        read = self.graph.float_indices(node)
        for branch, state in itertools.permutations(read, 2):
            # The state is a shortcut if the input is a branch of what it carries. The names of the
            # arguments do not say which is which.
            shortcut = self._carried_by(state, branch)
            if shortcut is not None:
                self.hidden.append((node, shortcut, branch))
                return

    def _carried_by(self, state: int, branch: int) -> int | None:
        """Return the first value that a value carries and that another is a branch of."""
        term = Term((branch,), branch)

        # The nearest one comes first.
        for shortcut in self.carriers(state):
            if self.is_branch(shortcut, term):
                return shortcut
        return None

    # -- one addition ------------------------------------------------------------------------------
    def _consider(self, node: int) -> None:
        """Add the sites of an addition, if it is residual."""
        pair = self._pair_of_addition(node)
        if pair is None:
            return

        # 1. The group: a sum that adds to an earlier sum of the same shortcut continues it.
        listed = {site.place for site in self.sites}
        group = self._group_of(pair)
        if self._carries_a_mixture(pair):
            self._mixed.add(group)

        # 2. All branches of the group share the last sum.
        output = self.graph.nodes[node].outputs[0]
        self._continue_group(group, output)

        # 3. The branches that are new.
        for branch in pair.branches:
            for leaf in self._split(pair.shortcut, branch):
                if leaf.place not in listed:
                    self.sites.append(self._new_site(pair, leaf, output, group))

    def _carries_a_mixture(self, pair: _Pair) -> bool:
        """Return whether the shortcut enters the sum by a mixture of streams."""
        operand = pair.carrier.term.operand
        if operand is None:
            return False
        return pair.shortcut not in self.carriers(operand)

    def _continue_group(self, group: int, output: int) -> None:
        """Give a later sum to all sites of a group."""
        for index, site in enumerate(self.sites):
            # Sites are frozen, so that a new one takes the place.
            if site.group == group:
                self.sites[index] = replace(site, output=output)

    def _new_site(self, pair: _Pair, leaf: Leaf, output: int, group: int) -> Site:
        """Return the site of one branch of a pair.

        Args:
            pair: its shortcut and the term by which that enters the sum.
            leaf: the branch.
            output: value index of the sum.
            group: index of the parallel branches.
        """
        cone = self.cone(pair.shortcut, leaf.term.values)
        return Site(
            addition=leaf.addition,
            position=leaf.position,
            term=leaf.term,
            shortcut=pair.shortcut,
            carrier=pair.carrier.place,
            scaled=pair.carrier.term.operand != pair.shortcut,
            cone=cone,
            output=output,
            group=group,
            mixed=self._is_mixed(pair.shortcut, cone),
        )

    def _pair_of_addition(self, node: int) -> _Pair | None:
        """Return the shortcut and the branches of an addition, or None if it is not residual.

        A term that is a sum itself is replaced by its own terms, up to four times.
        """
        leaves = self._leaves(node)
        if len(leaves) < 2:
            return None

        # Pair the terms as they are, then with one sum after another taken apart.
        pair = self._pair(leaves)
        expansions = 0
        while pair is None and expansions < _MOST_EXPANSIONS:
            expanded = self._expand_one(node, leaves)
            if expanded is None:
                return None

            leaves = expanded
            pair = self._pair(leaves)
            expansions += 1
        return pair

    def _group_of(self, pair: _Pair) -> int:
        """Return the group of a pair: that of a branch already listed, or a new one."""
        places = [branch.place for branch in pair.branches]
        for site in self.sites:
            # 1. The same term may be a branch of two shortcuts.
            if site.shortcut != pair.shortcut:
                continue

            # 2. A branch that both have.
            if site.place in places:
                return site.group
        return len(self.sites)

    def is_full(self, node: int, term: Term) -> bool:
        """Return whether a term is of the stream: differentiable, and of the sum's own shape.

        Args:
            node: the addition.
            term: one of its terms.
        """
        # 1. The sum is of floats.
        outputs = self.graph.nodes[node].outputs
        if not outputs:
            return False
        total = self.graph.values[outputs[0]]
        if not total.is_float:
            return False

        # 2. The term depends on the input.
        if not self._is_differentiable(term):
            return False

        # 3. The shape. That of a product inside the call is not known.
        if term.operand is None:
            return True
        shape = self.graph.values[term.operand].shape
        return shape == total.shape

    def _is_differentiable(self, term: Term) -> bool:
        """Return whether a term is made of floats that depend on the model's input."""
        return any(self.graph.values[index].is_differentiable for index in term.values)

    def _pair(self, leaves: list[Leaf]) -> _Pair | None:
        """Return the shortcut among terms; None if no term is an ancestor of all the others."""
        if len(leaves) < 2:
            return None

        # Carriers of one stream come first, mixtures of several streams second.
        pair = self._pair_by(leaves, self.carriers)
        if pair is None:
            pair = self._pair_by(leaves, self.mixed_streams)
        return pair

    def _pair_by(self, leaves: list[Leaf], origins: Callable[[int], Iterable[int]]) -> _Pair | None:
        """Return the shortcut among terms, where `origins` yields what a term may carry."""
        for k, carrier in enumerate(leaves):
            # Every term may be the shortcut's.
            others = leaves[:k] + leaves[k + 1 :]
            shortcut = self._shortcut_of(carrier.term, others, origins)

            # The others are branches of it.
            if shortcut is not None:
                return _Pair(shortcut, carrier, others)
        return None

    def _shortcut_of(
        self, carrier: Term, others: list[Leaf], origins: Callable[[int], Iterable[int]]
    ) -> int | None:
        """Return the first value that a term carries and that all other terms are branches of.

        A value that only some of them are branches of ends the search.
        """
        # 1. Where the search begins.
        start = _start_of_search(carrier)
        if start is None:
            return None

        # 2. The first candidate that any of the other terms is a branch of.
        for candidate in origins(start):
            branches = self._count_branches(candidate, others)
            if branches == len(others):
                return candidate
            if branches > 0:
                return None
        return None

    def _count_branches(self, shortcut: int, leaves: list[Leaf]) -> int:
        """Return how many terms are branches of a shortcut."""
        return sum(self.is_branch(shortcut, leaf.term) for leaf in leaves)

    def inner_calls(self, site: Site) -> tuple[int, ...]:
        """Return the calls of a branch.

        Between several streams, those are the calls from the first product on one mixture of the
        streams to the last.
        """
        if not site.mixed:
            return site.cone
        mixture = _shape_of_mixture(self.graph.values[site.shortcut].shape)
        products = self.products_among(site.cone)
        on_mixture = [node for node in products if self._has_shape_around(node, mixture)]
        if not on_mixture:
            return site.cone

        # From the first of them to the last.
        begin = site.cone.index(on_mixture[0])
        end = site.cone.index(on_mixture[-1]) + 1
        return site.cone[begin:end]

    def _has_shape_around(self, node: int, shape: tuple[int, ...]) -> bool:
        """Return whether a call reads or makes a value of a shape."""
        record = self.graph.nodes[node]
        return any(
            self.graph.values[index].shape == shape for index in (*record.inputs, *record.outputs)
        )

    def _is_mixed(self, shortcut: int, cone: tuple[int, ...]) -> bool:
        """Return whether the shortcut is (B, T, S, d) and the branch works on one (B, T, d)."""
        shape = self.graph.values[shortcut].shape
        if len(shape) < 4:
            return False

        # A product reads one mixture of the streams.
        mixture = _shape_of_mixture(shape)
        products = self.products_among(cone)
        return any(self._reads_shape(node, mixture) for node in products)

    def _reads_shape(self, node: int, shape: tuple[int, ...]) -> bool:
        """Return whether a call reads a differentiable value of a shape."""
        return any(value.shape == shape for value in self.graph.float_inputs(node))

    def is_branch(self, shortcut: int, term: Term) -> bool:
        """Return whether a term is a function of the shortcut with a product on its way.

        A product must lie on a path from the shortcut, and on every path that carries more than a
        statistic.

        Args:
            shortcut: index of the value.
            term: of an addition.
        """
        # 1. The term depends on the shortcut, and is not the shortcut itself.
        if shortcut in term.values:
            return False
        if not self.reaches(shortcut, term.values, through_products=True):
            return False

        # 2. The addition itself multiplies, so that every path passes a product.
        if term.product:
            return True

        # 3. A path around all products carries a statistic at most, and one path has a product.
        if self.reaches(shortcut, term.values, through_products=False, statistics=False):
            return False
        return self.has_product(self.cone(shortcut, term.values))

    def _expand_one(self, node: int, leaves: list[Leaf]) -> list[Leaf] | None:
        """Replace the first term that is itself a sum made in the same module call by its terms.

        None is returned if there is no such term.
        """
        owner = self.graph.nodes[node].invocation
        for k, leaf in enumerate(leaves):
            inner = self._inner_sum(leaf.term, owner)

            # Its terms take its place, in their order.
            if inner is not None:
                before, after = leaves[:k], leaves[k + 1 :]
                return before + inner + after
        return None

    def _inner_sum(self, term: Term, owner: int) -> list[Leaf] | None:
        """Return the terms of the sum that a term is, perhaps reshaped; None if it is none.

        Args:
            term: of an addition.
            owner: the module call in which the sum has to be made.
        """
        # 1. The call that made the term.
        maker = self._maker_before_reshaping(term.operand, owner)
        if maker is None:
            return None

        # 2. The experts of one MoE layer, added by a scatter, are one branch.
        if self.graph.nodes[maker].name in SCATTERS:
            return None

        # 3. Its terms, if it is a sum.
        leaves = self._leaves(maker)
        if len(leaves) < 2:
            return None
        return leaves

    def _maker_before_reshaping(self, value: int | None, owner: int) -> int | None:
        """Return the call that made a value, before it was reshaped; None outside the owner.

        Args:
            value: its index, None for a term that is no plain value.
            owner: the module call in which all of it has to happen.
        """
        while value is not None:
            node = self.graph.values[value].node
            if node < 0:
                return None
            record = self.graph.nodes[node]
            if record.invocation != owner:
                return None

            # Only a reshaping of one value leads further back.
            is_reshaping = record.terms is None and record.name in SHAPE_ONLY
            if not is_reshaping:
                return node
            value = self.only_float_input(node)
        return None

    def _split(self, shortcut: int, branch: Leaf) -> list[Leaf]:
        """Return the branches that a branch is the sum of, as in x + (a + m).

        Two that share a product are one branch.
        """
        # 1. The terms of the branch, if it is a sum.
        inner = self._inner_sum(branch.term, self.graph.nodes[branch.addition].invocation)
        if inner is None:
            return [branch]

        # 2. All of them have to be branches.
        if self._count_branches(shortcut, inner) < len(inner):
            return [branch]

        # 3. Each has to have products of its own.
        if self._share_a_product(shortcut, inner):
            return [branch]

        # 4. Each may be a sum itself.
        leaves: list[Leaf] = []
        for leaf in inner:
            leaves += self._split(shortcut, leaf)
        return leaves

    def _share_a_product(self, shortcut: int, leaves: Iterable[Leaf]) -> bool:
        """Return whether one product leads from a shortcut to two terms."""
        claimed: set[int] = set()
        for leaf in leaves:
            products = self.products_among(self.cone(shortcut, leaf.term.values))

            # A term before it has one of them.
            if not claimed.isdisjoint(products):
                return True
            claimed.update(products)
        return False

    # -- over all ----------------------------------------------------------------------------------
    def _streams_that_go_on(self) -> list[Site]:
        """Return the sites without lone sums of mixed streams.

        Positions mixed by attention look like mixed streams, but end there.
        """
        return [site for site in self.sites if not self._is_lone_mixture(site)]

    def _is_lone_mixture(self, site: Site) -> bool:
        """Return whether a sum mixes streams and no other sum continues it or is continued."""
        return site.group in self._mixed and not self._is_linked(site)

    def _is_linked(self, site: Site) -> bool:
        """Return whether the sum of another site is this one's shortcut, or the reverse."""
        others = [other for other in self.sites if other.group != site.group]
        return any(self._continue_each_other(site, other) for other in others)

    def _continue_each_other(self, site: Site, other: Site) -> bool:
        """Return whether the sum of one of two sites is the other's shortcut."""
        if other.output in self.carriers(site.shortcut):
            return True

        # The other way around.
        return site.output in self.carriers(other.shortcut)

    def _within_their_branch(self) -> list[Site]:
        """Return the sites without sums inside a branch whose shortcut comes from outside it.

        Such a sum adds a bias or a state that layers share.
        """
        accepted: list[Site] = []
        streams = self._separate_streams()

        # From the last sum to the first, so that a branch comes before what lies inside it.
        for site in sorted(self.sites, key=lambda s: s.addition, reverse=True):
            outer_sites = [outer for outer in accepted if self._enters_from_outside(site, outer)]
            is_second_stream = id(site) in streams
            if self._belongs(site, outer_sites, is_second_stream):
                accepted.append(site)
            else:
                reason = "it lies inside another sub-layer's branch, and its shortcut does not"
                self.dropped.append((site, reason))
        return accepted

    def _belongs(self, site: Site, outer_sites: list[Site], is_second_stream: bool) -> bool:
        """Return whether a sum is a sub-layer although it lies inside branches of others.

        Args:
            site: the sum.
            outer_sites: the others, whose branches its shortcut enters from outside.
            is_second_stream: its sum continues another, or is continued by one.
        """
        # 1. It lies inside no branch, as most do.
        if not outer_sites:
            return True

        # 2. It is a sum of a stream that it does not share with them.
        if not is_second_stream:
            return False

        # 3. The outer branches have to read their own shortcuts without it too.
        return all(self._reads_without(outer, site) for outer in outer_sites)

    def _enters_from_outside(self, site: Site, outer: Site) -> bool:
        """Return whether a sum lies inside a branch and its shortcut is made outside of it.

        Args:
            site: the sum.
            outer: the sub-layer of the branch.
        """
        # 1. Parallel branches, and sums on one shortcut, do not enter from outside.
        if site.group == outer.group or site.shortcut == outer.shortcut:
            return False

        # 2. The sum is made inside.
        if site.addition not in outer.cone_set:
            return False

        # 3. Its shortcut is not.
        maker = self.graph.values[site.shortcut].node
        return maker not in outer.cone_set

    def _separate_streams(self) -> set[int]:
        """Return the ids of sites whose sum continues another, or is continued by one."""
        linked: set[int] = set()
        for earlier, later in itertools.product(self.sites, repeat=2):
            # Both are on a stream of their own then.
            if self._continues(earlier, later):
                linked |= {id(earlier), id(later)}
        return linked

    def _continues(self, earlier: Site, later: Site) -> bool:
        """Return whether a later sum continues an earlier one with no product between."""
        # 1. Two sums, one after the other. Parallel branches have one sum.
        if earlier.group == later.group:
            return False
        if earlier.addition >= later.addition:
            return False

        # 2. Values of two shapes cannot be of one stream.
        shape = self.graph.values[earlier.output].shape
        if shape != self.graph.values[later.shortcut].shape:
            return False
        return self.reaches(earlier.output, (later.shortcut,), through_products=False)

    def _reads_without(self, outer: Site, inner: Site) -> bool:
        """Return whether a product of the outer branch reads its shortcut around the inner sum."""
        return self.has_product(self.cone_around(outer, (inner,)))

    def cone_around(self, outer: Site, inner: Iterable[Site]) -> tuple[int, ...]:
        """Return the calls that lead from a branch's shortcut to its end without inner sums.

        Args:
            outer: the branch.
            inner: the sums inside it that are left out.
        """
        # 1. Forward: the calls that the shortcut reaches.
        closed = {site.addition for site in inner}
        open_calls = sorted(outer.cone_set - closed)
        forward = self.calls_reached(outer.shortcut, open_calls)

        # 2. Backward: those of them that lead to the end.
        needed = set(outer.term.values)
        around: list[int] = []
        for node in reversed(forward):
            is_needed = not needed.isdisjoint(self.graph.nodes[node].outputs)
            if is_needed:
                around.append(node)
                needed.update(self.graph.float_indices(node))
        return tuple(reversed(around))

    def own_calls(self, site: Site, sites: Iterable[Site]) -> tuple[int, ...]:
        """Return the calls of a branch without those that only compute sums of other streams.

        Args:
            site: the branch.
            sites: all sub-layers.
        """
        # 1. Sums of other streams inside the branch.
        others = [other for other in sites if self._enters_from_outside(other, site)]
        if not others:
            return site.calls

        # 2. The calls around them, since such a sum is no part of the branch.
        around = self.cone_around(site, others)
        return site.with_own_product(around)

    def _mark_nested(self, sites: list[Site]) -> list[Site]:
        """Mark sites whose addition lies inside another's branch.

        They are left out of products over depth.
        """
        return [replace(site, nested=self._is_nested(site, sites)) for site in sites]

    def _is_nested(self, site: Site, sites: Iterable[Site]) -> bool:
        """Return whether a sum is part of another branch and not a stream of its own."""
        for other in sites:
            # 1. It lies inside the branch of the other.
            if not self._lies_in(site, other):
                continue

            # 2. Nothing on its stream goes on around that branch.
            if not self._escapes(site, other, sites):
                return True
        return False

    def _escapes(self, site: Site, other: Site, sites: Iterable[Site]) -> bool:
        """Return whether a sum's stream goes on around another sum: it is then a stream of its own.

        A message-passing layer's edge branch holds the entire node update, which the next layer's
        nodes continue.
        """
        # 1. Two sums of one shape are of one stream.
        values = self.graph.values
        shape = values[site.output].shape
        if shape == values[other.output].shape:
            return False

        # 2. Later sub-layers on a stream of this shape, one of which may go on with the sum.
        shortcuts: set[int] = set()
        for later in sites:
            is_of_this_shape = values[later.shortcut].shape == shape
            if is_of_this_shape and later.addition > other.addition:
                shortcuts.add(later.shortcut)
        return self.reaches(site.output, shortcuts, through_products=False, statistics=False)

    def _lies_in(self, site: Site, other: Site) -> bool:
        """Return whether a sum, its shortcut included, lies inside another branch.

        Args:
            site: the sum.
            other: the sub-layer of the branch.
        """
        # 1. Parallel branches do not lie inside each other.
        if site is other or site.group == other.group:
            return False

        # 2. The sum is made inside the branch.
        if site.addition not in other.cone_set:
            return False

        # 3. The shortcut is the branch's own, or is made inside it.
        if site.shortcut == other.shortcut:
            return True
        return self.graph.values[site.shortcut].node in other.cone_set


def _start_of_search(carrier: Term) -> int | None:
    """Return the value from which a term is followed back; None if the term has several."""
    # 1. The operand itself.
    if carrier.operand is not None:
        return carrier.operand

    # 2. An operand that the addition scales.
    if len(carrier.values) == 1:
        return carrier.values[0]

    # 3. A product of two, or a number.
    return None


def _shape_of_mixture(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (B, T, d) of one mixture of streams (B, T, S, d)."""
    return (*shape[:-2], shape[-1])
