"""Find residual additions in a record: shortcut, branch, parallel branches.

An addition is residual if one of its terms (the shortcut, possibly scaled or cast on the way) is an
ancestor of another (the branch) and a matrix product with a parameter lies on every path between
them that carries more than one number per token (a norm of the stream may scale a branch). A
Fourier transform counts as a product. No name of any architecture is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Set
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
        leaves = [Leaf(node, k, term) for k, term in enumerate(self.graph.nodes[node].terms or ())]
        return [leaf for leaf in leaves if self.is_full(node, leaf.term)]

    def _note_hidden(self, node: int) -> None:
        """Note an addition that autograd does not see: it is no site, but reported by name."""
        leaves = self._leaves(node)
        if len(leaves) < 2:
            return
        pair = self._pair(leaves)
        if pair is None:
            return

        # A branch that is made inside the call cannot be named.
        for branch in pair.branches:
            if branch.term.operand is not None:
                self.hidden.append((node, pair.shortcut, branch.term.operand))

    def _note_cell(self, node: int) -> None:
        """Note a recurrent cell that takes a branch as its input and the shortcut as its state.

        It is a gate in one call.
        """
        read = [value.index for value in self.graph.float_inputs(node)]
        for branch, state in itertools.permutations(read, 2):
            term = Term((branch,), branch)
            for shortcut in self.carriers(state):
                if self.is_branch(shortcut, term):
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
        for index, site in enumerate(self.sites):
            if site.group == group:
                self.sites[index] = replace(site, output=output)

        # 3. The branches that are new.
        leaves: list[Leaf] = []
        for branch in pair.branches:
            leaves += self._split(shortcut, branch)
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
        """Return whether a term is of the stream: differentiable, and of the sum's own shape.

        Args:
            node: the addition.
            term: one of its terms.
        """
        # 1. The sum and the term are floats, and the term depends on the input.
        outputs = self.graph.nodes[node].outputs
        if not outputs:
            return False
        total = self.graph.values[outputs[0]]
        values = [self.graph.values[index] for index in term.values]
        is_differentiable = any(value.is_differentiable for value in values)
        if not total.is_float or not is_differentiable:
            return False

        # 2. The shape. That of a product inside the call is not known.
        if term.operand is None:
            return True
        return self.graph.values[term.operand].shape == total.shape

    def _pair(self, leaves: list[Leaf]) -> _Pair | None:
        """Return the shortcut among terms; None if no term is an ancestor of all the others."""
        # Carriers of one stream come first, mixtures of several streams second.
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
        # 1. Where the search begins.
        start = carrier.operand
        if start is None:
            if len(carrier.values) != 1:
                return None
            start = carrier.values[0]

        # 2. The first candidate that any of the other terms is a branch of.
        for candidate in origins(start):
            branches = [leaf for leaf in others if self.is_branch(candidate, leaf.term)]
            if not branches:
                continue
            if len(branches) < len(others):
                return None
            return candidate
        return None

    def carriers(self, value: int) -> Iterable[int]:
        """Yield a value and what it is a scaled, cast or reshaped copy of."""
        for _ in range(_MOST_CARRIERS):
            yield value
            node = self.graph.values[value].node
            if node < 0 or not self._carries(node):
                return

            # A call that reads several live values does not pass on one of them.
            live = [read.index for read in self.graph.float_inputs(node)]
            if len(live) != 1:
                return
            value = live[0]

    def _carries(self, node: int) -> bool:
        """Return whether a call passes a value on: scaled, cast, reshaped, or plus a constant.

        `sum()` of Python begins by adding to 0.
        """
        # 1. Indexing that keeps everything, as in y[:, :] += f(x).
        record = self.graph.nodes[node]
        read = [self.graph.values[index] for index in record.inputs]
        if record.name == "__getitem__":
            return self.graph.values[record.outputs[0]].shape == read[0].shape

        # 2. Additions.
        if record.name in SCATTERS:
            return False
        if record.name in FORMS:
            return self._adds_a_constant(record.terms or ())

        # 3. With running statistics, and in eval mode, a batch norm is a gain and a bias per
        # channel.
        if record.name == "batch_norm":
            from_state = [value for value in read if value.from_state]
            return len(from_state) >= 4
        return record.name in CARRIERS

    def _adds_a_constant(self, terms: Iterable[Term]) -> bool:
        """Return whether an addition has one live term at most, and that one is a plain value."""
        live = [term for term in terms if self._is_live(term)]
        if not live:
            return True
        if len(live) > 1:
            return False
        (term,) = live
        return not term.product and len(term.values) == 1

    def _is_live(self, term: Term) -> bool:
        """Return whether a term depends on the model's input."""
        return any(self.graph.values[index].live for index in term.values)

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
            if current != value and self.graph.values[current].shape == shape:
                yield current

            # Go back, but not through a product that makes something other than a mixture.
            node = self.graph.values[current].node
            if node < 0:
                continue
            if self.is_product(node) and not self._mixes(node, shape):
                continue
            fresh = [read.index for read in self.graph.float_inputs(node) if read.index not in seen]
            seen.update(fresh)
            stack.extend(fresh)

    def _mixes(self, node: int, shape: tuple[int, ...]) -> bool:
        """Return whether a product mixes the streams by a small matrix and keeps their shape.

        The matrix is no larger than the number of streams squared.
        """
        # 1. Rows of an image (B, C, H, W) are no streams.
        record = self.graph.nodes[node]
        if record.name.startswith("conv"):
            return False

        # 2. The matrix is small.
        read = [self.graph.values[index] for index in record.inputs]
        sizes_of_weights = [math.prod(value.shape) for value in read if value.is_weight]
        is_small = max(sizes_of_weights, default=0) <= shape[-2] ** 2

        # 3. The streams come in and go out in the same shape.
        shapes_read = {value.shape for value in read if value.live}
        shapes_made = {self.graph.values[index].shape for index in record.outputs}
        keeps_shape = shape in shapes_read and shape in shapes_made
        return is_small and keeps_shape

    def inner_calls(self, site: Site) -> tuple[int, ...]:
        """Return the calls of a branch.

        Between several streams, those are the calls from the first product on one mixture of the
        streams to the last.
        """
        if not site.mixed:
            return site.cone
        mixture = _shape_of_mixture(self.graph.values[site.shortcut].shape)
        products = [node for node in site.cone if self.is_product(node)]
        on_mixture = [node for node in products if self._has_shape_around(node, mixture)]
        if not on_mixture:
            return site.cone
        first, last = on_mixture[0], on_mixture[-1]
        return tuple(node for node in site.cone if first <= node <= last)

    def _has_shape_around(self, node: int, shape: tuple[int, ...]) -> bool:
        """Return whether a call reads or makes a value of a shape."""
        record = self.graph.nodes[node]
        around = (*record.inputs, *record.outputs)
        return any(self.graph.values[index].shape == shape for index in around)

    def _is_mixed(self, shortcut: int, cone: tuple[int, ...]) -> bool:
        """Return whether the shortcut is (B, T, S, d) and the branch works on one (B, T, d)."""
        shape = self.graph.values[shortcut].shape
        if len(shape) < 4:
            return False
        mixture = _shape_of_mixture(shape)
        for node in cone:
            if not self.is_product(node):
                continue
            if any(value.shape == mixture for value in self.graph.float_inputs(node)):
                return True
        return False

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

        # 2. Every path passes a product.
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

            # 1. The sum. The experts of one MoE layer, added by a scatter, are one branch.
            if node.name in SCATTERS or node.invocation != owner:
                return None
            if node.terms is not None:
                leaves = self._leaves(node.index)
                return leaves if len(leaves) >= 2 else None

            # 2. A reshaping before it.
            if node.name not in SHAPE_ONLY:
                return None
            live = [read.index for read in self.graph.float_inputs(node.index)]
            value = live[0] if len(live) == 1 else None
        return None

    def _split(self, shortcut: int, branch: Leaf) -> list[Leaf]:
        """Return the branches that a branch is the sum of, as in x + (a + m).

        Two that share a product are one branch.
        """
        # 1. The terms of the branch, all of which have to be branches.
        inner = self._inner_sum(branch.term, self.graph.nodes[branch.addition].invocation)
        if inner is None:
            return [branch]
        if not all(self.is_branch(shortcut, leaf.term) for leaf in inner):
            return [branch]

        # 2. No product belongs to two of them.
        claimed: set[int] = set()
        for leaf in inner:
            cone = self.cone(shortcut, leaf.term.values)
            products = {node for node in cone if self.is_product(node)}
            if products & claimed:
                return [branch]
            claimed |= products

        # 3. Each may be a sum itself.
        leaves: list[Leaf] = []
        for leaf in inner:
            leaves += self._split(shortcut, leaf)
        return leaves

    # -- over all ----------------------------------------------------------------------------------
    def _streams_that_go_on(self) -> list[Site]:
        """Return the sites without lone sums of mixed streams.

        Positions mixed by attention look like mixed streams, but end there.
        """
        lone = [s for s in self.sites if s.group in self._mixed and not self._is_linked(s)]
        return [site for site in self.sites if site not in lone]

    def _is_linked(self, site: Site) -> bool:
        """Return whether the sum of another site is this one's shortcut, or the reverse."""
        others = [other for other in self.sites if other.group != site.group]
        for other in others:
            if other.output in self.carriers(site.shortcut):
                return True
            if site.output in self.carriers(other.shortcut):
                return True
        return False

    def _within_their_branch(self) -> list[Site]:
        """Return the sites without sums inside a branch whose shortcut comes from outside it.

        Such a sum adds a bias or a state that layers share.
        """
        accepted: list[tuple[Site, frozenset[int]]] = []
        streams = self._separate_streams()
        for site in sorted(self.sites, key=lambda s: s.addition, reverse=True):
            outer_sites = [
                outer for outer, cone in accepted if self._enters_from_outside(site, outer, cone)
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

    def _enters_from_outside(self, site: Site, outer: Site, cone: Set[int]) -> bool:
        """Return whether a sum lies inside a branch and its shortcut is made outside of it.

        Args:
            site: the sum.
            outer: the branch.
            cone: the calls of the branch.
        """
        if site.group == outer.group or site.shortcut == outer.shortcut:
            return False
        return site.addition in cone and self.graph.values[site.shortcut].node not in cone

    def _separate_streams(self) -> set[int]:
        """Return the ids of sites whose sum continues another, or is continued by one.

        No product lies between the two.
        """
        linked: set[int] = set()
        for earlier, later in itertools.product(self.sites, repeat=2):
            if earlier.group == later.group or earlier.addition >= later.addition:
                continue

            # Values of two shapes cannot be of one stream.
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
        """Return the calls that lead from a branch's shortcut to its end without inner sums.

        Args:
            outer: the branch.
            inner: the sums inside it that are left out.
        """
        # 1. Forward: the calls that the shortcut reaches.
        closed = {site.addition for site in inner}
        live = {outer.shortcut}
        forward: list[int] = []
        for node in sorted(set(outer.cone) - closed):
            reads_live = any(value.index in live for value in self.graph.float_inputs(node))
            if reads_live:
                forward.append(node)
                live.update(self.graph.nodes[node].outputs)

        # 2. Backward: those of them that lead to the end.
        needed = set(outer.term.values)
        around: list[int] = []
        for node in reversed(forward):
            is_needed = not needed.isdisjoint(self.graph.nodes[node].outputs)
            if is_needed:
                around.append(node)
                needed.update(value.index for value in self.graph.float_inputs(node))
        return tuple(reversed(around))

    def own_calls(self, site: Site, sites: Iterable[Site]) -> tuple[int, ...]:
        """Return the calls of a branch without those that only compute sums of other streams.

        Args:
            site: the branch.
            sites: all sub-layers.
        """
        cone = frozenset(site.cone)
        others = [other for other in sites if self._enters_from_outside(other, site, cone)]
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
        cones = [(other, set(other.cone)) for other in sites]
        marked: list[Site] = []
        for site in sites:
            is_nested = any(
                self._lies_in(site, other, cone) and not self._escapes(site, other, sites)
                for other, cone in cones
            )
            marked.append(replace(site, nested=is_nested))
        return marked

    def _escapes(self, site: Site, other: Site, sites: Iterable[Site]) -> bool:
        """Return whether a sum's stream goes on around another sum: it is then a stream of its own.

        A message-passing layer's edge branch holds the entire node update, which the next layer's
        nodes continue.
        """
        values = self.graph.values
        shape = values[site.output].shape
        if shape == values[other.output].shape:
            return False

        # Later sub-layers on a stream of this shape, one of which may go on with the sum.
        shortcuts = {later.shortcut for later in sites if later.addition > other.addition}
        ends = {shortcut for shortcut in shortcuts if values[shortcut].shape == shape}
        return self.reaches(site.output, ends, through_products=False, statistics=False)

    def _lies_in(self, site: Site, other: Site, cone: set[int]) -> bool:
        """Return whether a sum, its shortcut included, lies inside another branch.

        Args:
            site: the sum.
            other: the branch.
            cone: the calls of the branch.
        """
        if site is other or site.group == other.group:
            return False
        if site.addition not in cone:
            return False
        return site.shortcut == other.shortcut or self.graph.values[site.shortcut].node in cone


def _shape_of_mixture(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (B, T, d) of one mixture of streams (B, T, S, d)."""
    return (*shape[:-2], shape[-1])
