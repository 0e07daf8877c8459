"""The residual stream: which sub-layers follow which, and where one ends and the next begins."""

from __future__ import annotations

from dataclasses import dataclass

from jacdiag.trace.discovery.norms import waists
from jacdiag.trace.discovery.residual import Finder, Site
from jacdiag.trace.graph.graph import Graph, Invocation


@dataclass
class StreamSum:
    """One sum on the stream: a shortcut and its one or more parallel branches.

    Attributes:
        sites: indices of the branches.
        shortcut, output: value indices of x and of the sum y.
        after: what the stream is once y has passed what carries no matrix product (a post-norm).
            Mostly it is y itself.
    """

    sites: list[int]
    shortcut: int
    output: int
    after: int
    following: int | None = None
    preceding: int | None = None


class Streams:
    """Links the sums of a record into streams; an encoder-decoder model has two."""

    def __init__(self, graph: Graph, finder: Finder, sites: list[Site]) -> None:
        self.graph, self.finder = graph, finder

        # 1. The branches of each sum.
        by_group: dict[int, list[int]] = {}
        for index, site in enumerate(sites):
            is_on_stream = not site.nested and site.summed
            if is_on_stream:
                by_group.setdefault(site.group, []).append(index)

        # 2. The sums, in the order of the forward.
        self.groups: list[StreamSum] = []
        for members in by_group.values():
            first = sites[members[0]]
            group = StreamSum(members, first.shortcut, output=first.output, after=first.output)
            self.groups.append(group)
        self.groups.sort(key=lambda group: self.graph.values[group.output].node)

        # 3. The streams.
        self._link()
        self.main = self._longest()

    def _link(self) -> None:
        """Find for each sum the nearest earlier one that it continues with no product between."""
        # 1. Link each sum to the one that it continues.
        for k, group in enumerate(self.groups):
            j = self._nearest_before(k)
            if j is None:
                continue
            earlier = self.groups[j]
            earlier.following = k
            earlier.after = group.shortcut
            group.preceding = j

        # 2. The last sum of a stream.
        for group in self.groups:
            if group.following is None:
                group.after = self._end(group.output)

    def _nearest_before(self, k: int) -> int | None:
        """Return the nearest earlier sum that a sum continues and no other does; None if none."""
        shortcut = self.groups[k].shortcut
        for j in range(k - 1, -1, -1):
            # Another sum continues this one already.
            earlier = self.groups[j]
            if earlier.following is not None:
                continue

            # The shortcut is the sum itself, or what became of it without a product.
            if earlier.output == shortcut:
                return j
            if self.finder.reaches(earlier.output, (shortcut,), through_products=False):
                return j
        return None

    def _end(self, output: int) -> int:
        """Return the last value before the first matrix product after the stream's last sum.

        It lies after the final norm, if there is one.
        """
        # All paths pass a waist. A product on one of them ends the stream as well: that of an
        # encoder goes into products of the decoder, which come together again in its stream.
        cone = self.finder.cone(output, self.graph.outputs)
        products = filter(self.finder.is_product, cone)
        first_product = min(products, default=None)

        # The values at the waists, one after the other.
        end = output
        shape = self.graph.values[output].shape
        for node in waists(self.graph, cone, output):
            # 1. A product ends the stream.
            if first_product is not None and node >= first_product:
                break

            # 2. So does a value of other sizes. A norm of channels-first data works on a
            # transposed sum, which has the same ones.
            result = self.graph.values[self.graph.nodes[node].outputs[0]]
            if sorted(result.shape) != sorted(shape):
                break
            if result.shape == shape:
                end = result.index
        return end

    def _longest(self) -> list[int]:
        """Return the stream of most sums; of two as long, the one that ends later."""
        # 1. Every stream, from a sum that continues no other.
        chains: list[list[int]] = []
        for k, group in enumerate(self.groups):
            if group.preceding is None:
                chains.append(self._chain_from(k))

        # 2. The longest of them. Without a sum there is no stream.
        if not chains:
            return []
        return max(chains, key=lambda chain: (len(chain), chain[-1]))

    def _chain_from(self, first: int) -> list[int]:
        """Return a sum and all that follow it."""
        chain = [first]
        following = self.groups[first].following
        while following is not None:
            chain.append(following)
            following = self.groups[following].following
        return chain


def owner_of(graph: Graph, innermost: int, first: int, last: int, value: int) -> int:
    """Return the innermost module call that holds calls and makes, or is given, a value.

    Args:
        graph: what one forward did.
        innermost: where the search begins.
        first: the first call to be held.
        last: the last one.
        value: the value.
    """
    maker = graph.values[value].node
    for index in graph.ancestors(innermost):
        # 1. It holds the calls.
        call = graph.invocations[index]
        if not _holds_calls(call, first, last):
            continue

        # 2. It makes the value, or is given it.
        makes_value = maker >= call.start
        if makes_value or value in call.arguments:
            return index
    return 0


def _holds_calls(call: Invocation, first: int, last: int) -> bool:
    """Return whether a module call makes all calls from the first to the last."""
    # 1. It begins before the first.
    if call.start > first:
        return False

    # 2. It ends after the last. A call that has not ended yet holds all that follow.
    is_open = call.end < 0
    return is_open or last < call.end
